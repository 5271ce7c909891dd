"""What meta-learning algorithms share: a model, a body in front of it, a loss, one pass over a batch of tasks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_leaves, tree_map

from ..tasks import Task

Loss = Callable[[Tensor, Tensor], Tensor]
"""From the outputs of the model and the targets of one task to a scalar."""

Parameters = dict[str, Tensor]

Examples = tuple[Any, Tensor]
"""(inputs, targets) of one task, the inputs being those of the model."""


class MetaLoss(NamedTuple):
    """The result of one pass over a batch of tasks: their mean query loss, and the outputs it comes from.

    >>> from torch import nn
    >>> from imaml import MAML
    >>> from imaml.models import MLP
    >>> from imaml.tasks import Sinusoids
    >>> learner = MAML(MLP([1, 8, 1]), nn.functional.mse_loss, steps=1, stepsize=0.01)
    >>> loss, outputs = learner.meta_step(Sinusoids(queries=30).sample(4, "train", seed=0, index=0))
    >>> loss.shape, outputs.shape
    (torch.Size([]), torch.Size([4, 30, 1]))
    """

    loss: Tensor
    """The mean query loss, a scalar; its ``backward()`` leaves the meta-gradient in ``.grad``."""
    outputs: Tensor
    """The model's outputs on the query sets after adaptation, (tasks, queries, ...), without a graph."""


class Learner(nn.Module):
    """The base of the meta-learning algorithms: a subclass writes :meth:`~imaml.Learner.adapted`.

    * ``model``: its parameters are adapted to each task, from θ, their own values. Those that do not require gradients
      are adapted all the same, but not learned: each task starts from what they are;
    * ``loss``: from the model's outputs and the targets of one task to a scalar;
    * ``body``: learned, but shared by all tasks: it runs once on the support set and once on the query set of each, and
      the model sees what it returns. ANIL (Raghu et al. 2020) is ``MAML(net.head, loss, body=net.features, ...)``;
    * ``task_chunk``: so many tasks are solved together, which bounds the memory; None: all of them.

    Tensors of a batch of tasks are (tasks, examples, …), those of one task (examples, …).

    Raises TypeError where the model or the body is not an ``nn.Module``, and ValueError where it has no parameters or
    has buffers, the two share parameters, or ``task_chunk`` is below 1.

    A learner that adapts by one gradient step:

    >>> from torch import nn
    >>> from imaml.models import MLP
    >>> from imaml.tasks import Sinusoids
    >>> class OneStep(Learner):
    ...     def adapted(self, support):
    ...         inputs, targets = support
    ...         def loss(phi):
    ...             return self.loss(torch.func.functional_call(self.model, phi, (inputs,)), targets)
    ...         theta = self.meta_parameters()
    ...         gradient = torch.func.grad(loss)(theta)
    ...         return {name: p - 0.01 * gradient[name] for name, p in theta.items()}
    >>> learner = OneStep(MLP([1, 8, 1]), nn.functional.mse_loss)
    >>> tasks = Sinusoids(shots=5).sample(2, "train", seed=0, index=0)
    >>> learner.meta_loss(tasks).backward()
    >>> one = (tasks.support[0][0], tasks.support[1][0])
    >>> learner.predict(learner.adapt(one), torch.zeros(7, 1)).shape
    torch.Size([7, 1])
    """

    def __init__(
        self, model: nn.Module, loss: Loss, *, body: nn.Module | None = None, task_chunk: int | None = None
    ) -> None:
        super().__init__()
        _check_module("model", model)
        if body is not None:
            _check_module("body", body)
            _check_apart(body, model)
        if task_chunk is not None and task_chunk < 1:
            raise ValueError(f"task_chunk is {task_chunk}, but it must be at least 1, or None.")
        self.model, self.loss, self.body, self.task_chunk = model, loss, body, task_chunk

    @abstractmethod
    def adapted(self, support: Examples) -> Parameters:
        """φ(θ) for the support set of one task, (what the model takes, targets), differentiable in what is learned."""

    def meta_parameters(self) -> Parameters:
        """θ by name: the parameters of the model, not of the body."""
        return dict(self.model.named_parameters())

    def adapt(self, support: tuple[Tensor, Tensor]) -> Parameters:
        """The model's parameters adapted to one task's support set, (inputs, targets), without a graph."""
        inputs, targets = support
        with torch.no_grad():
            return {name: value.detach() for name, value in self.adapted((self._seen(inputs), targets)).items()}

    def predict(self, parameters: Parameters, inputs: Tensor) -> Tensor:
        """The outputs, by way of the body where there is one, with adapted parameters of the model."""
        return self._outputs(parameters, self._seen(inputs))

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

    def report(self) -> dict[str, float]:
        """What the last :meth:`~imaml.Learner.meta_step` and its ``backward()`` tell of their accuracy.

        Means over its tasks.
        """
        return {}

    def _chunks(self, tasks: Task | list[Task]) -> Iterator[Task]:
        batch = Task.stack(tasks) if isinstance(tasks, list) else tasks
        count = len(batch.query[0])
        size = self.task_chunk or count
        for first in range(0, count, size):
            yield Task(*(tuple(t[first : first + size] for t in part) for part in batch))

    def _chunk_step(self, chunk: Task) -> tuple[Tensor, Tensor]:
        """Query losses (tasks,) and outputs of one chunk."""
        inputs, targets = chunk.support
        # The body runs before the steps: support and query apart, so that each set has batch statistics of its own.
        phi = each(self.adapted)((each(self._seen)(inputs), targets))
        return self._query(phi, chunk)

    def _query(self, parameters: Parameters, chunk: Task) -> tuple[Tensor, Tensor]:
        inputs, targets = chunk.query
        outputs = each(self.predict)(parameters, inputs)
        return each(self.loss)(outputs, targets), outputs.detach()

    def _support_loss(self, parameters: Parameters, support: Examples) -> Tensor:
        seen, targets = support
        return self.loss(self._outputs(parameters, seen), targets)

    def _seen(self, inputs: Tensor) -> Any:
        """What the model takes."""
        return inputs if self.body is None else self.body(inputs)

    def _outputs(self, parameters: Parameters, seen: Any) -> Tensor:
        return functional_call(self.model, parameters, (seen,))


def as_vector(parameters: Parameters) -> Tensor:
    """All parameters in one vector (n,)."""
    return torch.cat([p.reshape(-1) for p in parameters.values()])


def as_parameters(vector: Tensor, like: Parameters) -> Parameters:
    """The parts of a vector (n,), by the names of the parameters and in their shapes and dtypes."""
    parts = vector.split([p.numel() for p in like.values()])
    return {name: part.reshape(p.shape).to(p.dtype) for part, (name, p) in zip(parts, like.items(), strict=True)}


def each(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for every task of a batch: vmap, but for a single task, which costs less time and memory without."""

    def call(*batched: Any) -> Any:
        if len(tree_leaves(batched)[0]) != 1:
            return vmap(function)(*batched)
        return tree_map(lambda t: t.unsqueeze(0), function(*tree_map(lambda t: t[0], batched)))

    return call


def _check_module(name: str, module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} is {module!r}, but it must be an nn.Module, whose parameters are what is learned.")
    if not any(True for _ in module.parameters()):
        what = "nothing to adapt" if name == "model" else "nothing to learn: put it into the model, or into the tasks"
        raise ValueError(f"the {name} has no parameters, so there is {what}.")
    if any(True for _ in module.buffers()):
        raise ValueError(
            f"the {name} has buffers, which would be shared by all tasks: build its batch norms with "
            f"track_running_stats=False, or use layer or group norm."
        )


def _check_apart(body: nn.Module, model: nn.Module) -> None:
    adapted = {id(p) for p in model.parameters()}
    shared = [name for name, p in body.named_parameters() if id(p) in adapted]
    if shared:
        raise ValueError(
            f"body and model share parameters, {shared}: the model must start where the body ends, as in "
            f"MAML(net.head, loss, body=net.features, ...)."
        )
