"""The optimizers of torch.optim."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._vectors import vector_norm
from ..info import RUNNING, FailurePolicy, Status
from ._unfollowed import refuse_to_be_unrolled
from .base import InnerProblem, InnerSolver

PATIENCE = 10
"""Steps that leave x where it is, before a system has stagnated."""


class TorchOptimizerState(NamedTuple):
    x: Tensor
    value: Tensor
    gradient: Tensor
    residual_norm: Tensor
    status: Tensor
    rests: Tensor  # (*batch,), steps since x has moved
    run: _Run


class TorchOptimizer(InnerSolver):
    """Any optimizer of ``torch.optim``, or of its interface, by its class and its settings.

    Each system of a batch is one parameter of the optimizer, and stays where it converged. One that evaluates a closure
    several times (``torch.optim.LBFGS``) sees the systems that have not converged as one problem, the sum of their
    objectives; tolerances of its own must be below ``tol``
    (``tolerance_grad=0.0, tolerance_change=0.0`` for LBFGS), or the systems end as ``STAGNATED`` when it stops to move.

    * ``optimizer_class``, ``settings``: as in ``torch.optim.Adam(parameters, lr=0.1)``.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. It needs an
    objective, so an :class:`~implicitdiff.ArgminLayer`, and cannot be unrolled
    (:class:`~implicitdiff.ImplicitDiffError`). Raises TypeError for what is not such a class; a setting that the class
    does not know is its own TypeError, here.

    >>> import implicitdiff as idf
    >>> adam = TorchOptimizer(torch.optim.Adam, lr=0.1, tol=1e-3)
    >>> layer = idf.ArgminLayer(lambda x, t: ((x - t) ** 2).sum(), inner_solver=adam)
    >>> layer(torch.zeros(2), torch.tensor([1.0, 2.0])).round(decimals=2)
    tensor([1., 2.])
    """

    def __init__(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        *,
        tol: float | None = None,
        max_iterations: int = 1000,
        on_failure: FailurePolicy = "warn",
        **settings: Any,
    ) -> None:
        super().__init__(tol=tol, max_iterations=max_iterations, on_failure=on_failure)
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise TypeError(
                f"optimizer_class is {optimizer_class!r}, but it must be a class such as torch.optim.Adam; its "
                f"settings come after it: TorchOptimizer(torch.optim.Adam, lr=0.1)."
            )
        optimizer_class([torch.zeros(1, requires_grad=True)], **settings)  # so that mistakes are found here
        self.optimizer_class, self.settings = optimizer_class, settings

    def start(self, problem: InnerProblem, x0: Tensor) -> TorchOptimizerState:
        value, gradient = problem.value_and_gradient(x0)
        refuse_to_be_unrolled(self, gradient)
        norm = vector_norm(gradient)
        zero = torch.zeros_like(norm, dtype=torch.int64)
        run = _Run(x0, self._threshold(norm), self.optimizer_class, self.settings)
        return TorchOptimizerState(x0, value, gradient, norm, zero + RUNNING, zero, run)

    def step(self, problem: InnerProblem, state: TorchOptimizerState) -> TorchOptimizerState:
        x = state.run.step(problem, state)
        value, gradient = problem.value_and_gradient(x)
        norm = vector_norm(gradient)
        rests = torch.where((x == state.x).all(-1), state.rests + 1, 0)
        status = torch.where(rests >= PATIENCE, int(Status.STAGNATED), state.status)
        return TorchOptimizerState(x, value, gradient, norm, status, rests, state.run)

    def __repr__(self) -> str:
        given = {"tol": self.tol, "max_iterations": self.max_iterations, "on_failure": self.on_failure} | self.settings
        name = f"{self.optimizer_class.__module__}.{self.optimizer_class.__qualname__}"
        return f"TorchOptimizer({', '.join([name, *(f'{k}={v!r}' for k, v in given.items())])})"


class _Run:
    """One optimizer at work: its parameters are the rows of one tensor."""

    def __init__(
        self, x0: Tensor, threshold: Tensor, optimizer_class: type[torch.optim.Optimizer], settings: dict[str, Any]
    ) -> None:
        self.threshold = threshold
        self.x = x0.detach().clone(memory_format=torch.contiguous_format)
        self.gradient = torch.zeros_like(self.x)
        rows, gradients = (t.view(x0.shape[:-1].numel(), x0.shape[-1]) for t in (self.x, self.gradient))
        parameters = [row.detach().requires_grad_() for row in rows]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer = optimizer_class(parameters, **settings)

    def step(self, problem: InnerProblem, state: TorchOptimizerState) -> Tensor:
        """Where the optimizer goes from a state."""
        active = (state.residual_norm > self.threshold) & (state.status == RUNNING)
        here: tuple[Tensor, Tensor] | None = (state.value, state.gradient)

        def closure() -> Tensor:
            nonlocal here
            value, gradient = here or problem.value_and_gradient(self.x)
            here = None
            self.gradient.copy_(torch.where(active.unsqueeze(-1), gradient, 0))
            return torch.where(active, value, 0).sum()

        self.optimizer.step(closure)  # type: ignore[arg-type]  # a float, it says, but its own docs return a tensor
        return self.x.clone()
