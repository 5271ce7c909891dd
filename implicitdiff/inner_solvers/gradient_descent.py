"""Gradient descent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..info import FailurePolicy
from ..linear_solvers.base import check_not_negative
from ._line_search import Iterate, advance, first_iterate
from .base import DECIDES, InnerProblem, InnerSolver


class GradientDescentState(NamedTuple):
    x: Tensor
    residual_norm: Tensor
    status: Tensor
    here: Iterate
    velocity: Tensor


class GradientDescent(InnerSolver):
    """Gradient descent, by a fixed step or by a line search.

    * ``stepsize``: a positive number, which converges below 2/L for a gradient with Lipschitz constant L. None: by
      backtracking from twice the last step, until f has decreased enough (Nocedal and Wright 2006, Algorithm 3.1);
    * ``momentum``: μ of at least 0 and below 1, with a fixed step: v ← μ v + ∇f, x ← x − step · v;
    * ``nesterov``: x ← x − step · (∇f + μ v) instead (Sutskever et al. 2013, in torch.optim.SGD's form).

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. It needs an
    objective. Raises ValueError for these three out of range, and for a momentum without a fixed step.

    >>> import implicitdiff as idf
    >>> layer = idf.ArgminLayer(lambda x, t: ((x - t) ** 2).sum(), inner_solver=GradientDescent(stepsize=0.4))
    >>> layer(torch.zeros(2), torch.tensor([1.0, 2.0])).round(decimals=2)
    tensor([1., 2.])
    """

    def __init__(
        self,
        stepsize: float | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        *,
        tol: float | None = None,
        max_iterations: int = 1000,
        on_failure: FailurePolicy = "warn",
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        super().__init__(
            tol=tol, max_iterations=max_iterations, on_failure=on_failure, compile=compile, check_every=check_every
        )
        if stepsize is not None and not stepsize > 0:
            raise ValueError(f"stepsize is {stepsize!r}, but it must be a positive number, or None for a line search.")
        check_not_negative(momentum=momentum)
        if momentum >= 1:
            raise ValueError(f"momentum is {momentum!r}, but it must be below 1.")
        if momentum and stepsize is None:
            raise ValueError("momentum needs a fixed stepsize: a line search has no descent direction to search along.")
        if nesterov and not momentum:
            raise ValueError("nesterov=True needs a momentum above 0, for example 0.9.")
        self.stepsize, self.momentum, self.nesterov = stepsize, momentum, nesterov

    @property
    def uncompilable(self) -> str | None:  # type: ignore[override]
        return DECIDES if self.stepsize is None else None

    def start(self, problem: InnerProblem, x0: Tensor) -> GradientDescentState:
        return self._state(first_iterate(problem, x0), torch.zeros_like(x0))

    def step(self, problem: InnerProblem, state: GradientDescentState) -> GradientDescentState:
        here = state.here
        if self.stepsize is None:
            # At first a step of unit length, as the scale of the objective is not known yet.
            norm = here.residual_norm.detach()
            first = (state.velocity == 0).all(-1)
            length = torch.where(first, 1 / torch.where(norm > 0, norm, 1), 2 * here.step)
            return self._state(advance(problem, here, -here.gradient, length), here.gradient)
        velocity = self.momentum * state.velocity + here.gradient if self.momentum else here.gradient
        direction = here.gradient + self.momentum * velocity if self.nesterov else velocity
        return self._state(first_iterate(problem, here.x - self.stepsize * direction), velocity)

    @staticmethod
    def _state(here: Iterate, velocity: Tensor) -> GradientDescentState:
        return GradientDescentState(here.x, here.residual_norm, here.progress.status, here, velocity)
