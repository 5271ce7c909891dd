"""Meta-learning algorithms: what the parameters of a task are, and what that says of the meta-parameters.

Each learner adapts the model's parameters θ to the support set of a task, φ(θ), and is trained by the loss of φ(θ) on
the query sets, whose gradient in θ is what the algorithms differ in. A batch of tasks is one vmapped computation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_leaves, tree_map

import implicitdiff as idf
from implicitdiff.inner_solvers import GradientDescent

from .tasks import Task

Loss = Callable[[Tensor, Tensor], Tensor]
"""From the outputs of the model and the targets of one task to a scalar."""

Parameters = dict[str, Tensor]


class MetaLoss(NamedTuple):
    """The result of one pass over a batch of tasks."""

    loss: Tensor
    """The mean query loss, a scalar; its ``backward()`` leaves the meta-gradient in ``.grad``."""
    outputs: Tensor
    """The model's outputs on the query sets after adaptation, (tasks, queries, ...), without a graph."""


class Learner(nn.Module):
    """What the algorithms share; a subclass writes :meth:`adapted`.

    ``task_chunk`` bounds the memory of the inner problems: so many tasks are solved together (None: all of them).
    """

    def __init__(self, model: nn.Module, loss: Loss, *, task_chunk: int | None = None) -> None:
        super().__init__()
        if any(True for _ in model.buffers()):
            raise ValueError(
                "the model has buffers, which would be shared by all tasks: build its batch norms with "
                "track_running_stats=False, or use layer or group norm."
            )
        if task_chunk is not None and task_chunk < 1:
            raise ValueError(f"task_chunk is {task_chunk}, but it must be at least 1, or None.")
        self.model, self.loss, self.task_chunk = model, loss, task_chunk

    @abstractmethod
    def adapted(self, support: tuple[Tensor, Tensor]) -> Parameters:
        """φ(θ) for the support set (inputs, targets) of one task, differentiable in the meta-parameters."""

    def meta_parameters(self) -> Parameters:
        """θ by name."""
        return dict(self.model.named_parameters())

    def adapt(self, support: tuple[Tensor, Tensor]) -> Parameters:
        """The parameters adapted to one task's support set, (inputs, targets), without a graph."""
        with torch.no_grad():
            return {name: value.detach() for name, value in self.adapted(support).items()}

    def predict(self, parameters: Parameters, inputs: Tensor) -> Tensor:
        """The model's outputs with adapted parameters."""
        return functional_call(self.model, parameters, (inputs,))

    def meta_loss(self, tasks: Task | list[Task]) -> Tensor:
        """The mean query loss over tasks, a scalar whose ``backward()`` gives the meta-gradient."""
        return self.meta_step(tasks).loss

    def meta_step(self, tasks: Task | list[Task]) -> MetaLoss:
        """The mean query loss with the query outputs it was computed from.

        ``tasks`` is one Task whose tensors have a leading task dimension, or a list of Tasks of equal shapes.
        """
        parts = [self._chunk_step(chunk) for chunk in self._chunks(tasks)]
        losses, outputs = zip(*parts, strict=True)
        return MetaLoss(torch.cat(losses).mean(), torch.cat(outputs))

    def _chunks(self, tasks: Task | list[Task]) -> Iterator[Task]:
        batch = Task.stack(tasks) if isinstance(tasks, list) else tasks
        count = len(batch.query[0])
        size = self.task_chunk or count
        for first in range(0, count, size):
            yield Task(*(tuple(t[first : first + size] for t in part) for part in batch))

    def _chunk_step(self, chunk: Task) -> tuple[Tensor, Tensor]:
        """Query losses (tasks,) and outputs of one chunk."""
        return self._query(_each(self.adapted)(chunk.support), chunk)

    def _query(self, parameters: Parameters, chunk: Task) -> tuple[Tensor, Tensor]:
        inputs, targets = chunk.query
        outputs = _each(self.predict)(parameters, inputs)
        return _each(self.loss)(outputs, targets), outputs.detach()

    def _support_loss(self, parameters: Parameters, support: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = support
        return self.loss(self.predict(parameters, inputs), targets)


class IMAML(Learner):
    """Implicit MAML (Rajeswaran et al. 2019, Algorithms 1 and 2).

    φ(θ) minimises G(φ) = loss(model(x; φ), y) + ½ Σ λ (φ − θ)² (Eq. 4); its derivative is (I + ∇²L/λ)⁻¹ (Lemma 1), so
    the meta-gradient takes one linear solve per task and no memory for the inner steps.

    * ``inner_solver``, ``linear_solver``: as in :class:`implicitdiff.ArgminLayer`;
    * ``regularization``: λ > 0, a number, a tensor or ``nn.Parameter`` (then it gets a gradient, is learned), or a dict
      of them like the model's parameters.

    >>> from imaml.models import MLP
    >>> from imaml.tasks import Sinusoids
    >>> learner = IMAML(MLP([1, 8, 1]), nn.functional.mse_loss, regularization=1.0)
    >>> learner.meta_loss(Sinusoids(shots=5).sample(2, "train", 0, 0)).backward()
    >>> all(p.grad is not None for p in learner.parameters())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        inner_solver: Any = None,
        linear_solver: Any = None,
        regularization: float | Tensor | dict[str, Any] = 1.0,
        task_chunk: int | None = None,
    ) -> None:
        super().__init__(model, loss, task_chunk=task_chunk)
        names = dict(model.named_parameters()).keys()
        per_parameter = isinstance(regularization, dict)
        if per_parameter and regularization.keys() != names:
            raise ValueError(
                f"regularization has the names {sorted(regularization)}, but the parameters are {sorted(names)}."
            )
        given = regularization if per_parameter else {"": regularization}
        for name, value in given.items():
            if not bool((torch.as_tensor(value) > 0).all()):
                raise ValueError(f"regularization must be positive, but {name or 'it'} is {value!r}.")
        # A learned λ is a parameter of the learner; ParameterDict takes no dots in names, so the order identifies them.
        self.learned_regularization = nn.ParameterList(v for v in given.values() if isinstance(v, nn.Parameter))
        self._regularization = given
        self.layer = idf.ArgminLayer(self._regularized_loss, inner_solver=inner_solver, linear_solver=linear_solver)

    def adapted(self, support: tuple[Tensor, Tensor]) -> Parameters:
        theta = self.meta_parameters()
        return self.layer(theta, theta, self._strengths(theta), support)

    def _strengths(self, theta: Parameters) -> Parameters:
        learned = iter(self.learned_regularization)
        values = {k: next(learned) if isinstance(v, nn.Parameter) else v for k, v in self._regularization.items()}
        return {
            name: torch.as_tensor(values.get(name, values.get("")), dtype=p.dtype, device=p.device)
            for name, p in theta.items()
        }

    def _regularized_loss(
        self, phi: Parameters, theta: Parameters, strengths: Parameters, support: tuple[Tensor, Tensor]
    ) -> Tensor:
        pull = sum((strengths[name] * (phi[name] - theta[name]) ** 2).sum() for name in phi)
        return self._support_loss(phi, support) + 0.5 * pull


class MAML(Learner):
    """MAML (Finn et al. 2017): φ(θ) is the result of ``steps`` gradient steps from θ, differentiated through.

    ``truncate=K`` differentiates through the last K steps only; ``first_order=True`` through none (FOMAML);
    ``nesterov=True`` takes the steps with Nesterov momentum 0.9.

    >>> from imaml.models import MLP
    >>> from imaml.tasks import Sinusoids
    >>> learner = MAML(MLP([1, 8, 1]), nn.functional.mse_loss, steps=2, stepsize=0.01)
    >>> learner.meta_loss(Sinusoids(shots=5).sample(2, "train", 0, 0)).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        steps: int,
        stepsize: float,
        nesterov: bool = False,
        truncate: int | None = None,
        first_order: bool = False,
        task_chunk: int | None = None,
    ) -> None:
        super().__init__(model, loss, task_chunk=task_chunk)
        if first_order and truncate is not None:
            raise ValueError("first_order=True is truncate=0: give one of the two.")
        descent = GradientDescent(
            stepsize=stepsize,
            momentum=0.9 if nesterov else 0.0,
            nesterov=nesterov,
            max_iterations=steps,
            tol=0.0,
            on_failure="ignore",
        )
        self.layer = idf.UnrolledLayer(self._loss_at, descent, truncate=0 if first_order else truncate)

    def adapted(self, support: tuple[Tensor, Tensor]) -> Parameters:
        # The unknown is the way from θ, as the start of an unrolled layer gets no gradient and θ must.
        theta = self.meta_parameters()
        way = self.layer({name: torch.zeros_like(p) for name, p in theta.items()}, theta, support)
        return {name: p + way[name] for name, p in theta.items()}

    def _loss_at(self, way: Parameters, theta: Parameters, support: tuple[Tensor, Tensor]) -> Tensor:
        return self._support_loss({name: p + way[name] for name, p in theta.items()}, support)


class Reptile(MAML):
    """Reptile (Nichol et al. 2018): the meta-gradient is θ − φ(θ), averaged over tasks.

    >>> from imaml.models import MLP
    >>> from imaml.tasks import Sinusoids
    >>> learner = Reptile(MLP([1, 8, 1]), nn.functional.mse_loss, steps=2, stepsize=0.01)
    >>> learner.meta_loss(Sinusoids(shots=5).sample(2, "train", 0, 0)).backward()
    """

    def __init__(
        self, model: nn.Module, loss: Loss, *, steps: int, stepsize: float, task_chunk: int | None = None
    ) -> None:
        super().__init__(model, loss, steps=steps, stepsize=stepsize, first_order=True, task_chunk=task_chunk)

    def _chunk_step(self, chunk: Task) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            phi = _each(self.adapted)(chunk.support)
            losses, outputs = self._query(phi, chunk)
        # A term of value 0 whose gradient in θ is θ − φ, task by task.
        pull = sum((p * (p.detach() - phi[name])).flatten(1).sum(1) for name, p in self.meta_parameters().items())
        return losses + (pull - pull.detach()), outputs


def _each(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for every task of a batch: vmap, but for a single task, which costs less time and memory without."""

    def call(*batched: Any) -> Any:
        if len(tree_leaves(batched)[0]) != 1:
            return vmap(function)(*batched)
        return tree_map(lambda t: t.unsqueeze(0), function(*tree_map(lambda t: t[0], batched)))

    return call
