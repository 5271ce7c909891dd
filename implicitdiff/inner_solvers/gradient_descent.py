"""Gradient descent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..info import RUNNING, FailurePolicy, Status
from ..linear_solvers.base import check_not_negative, vector_norm
from ._line_search import backtrack
from .base import InnerProblem, InnerSolver


class GradientDescentState(NamedTuple):
    x: Tensor
    value: Tensor
    gradient: Tensor
    velocity: Tensor
    step: Tensor  # (*batch,)
    residual_norm: Tensor
    status: Tensor


class GradientDescent(InnerSolver):
    """Gradient descent, by a fixed step or by a line search (``stepsize=None``: backtracking from twice the last step).

    With ``momentum`` μ (needs a fixed step): v ← μ v + ∇f, x ← x − step · v, or with ``nesterov=True``
    x ← x − step · (∇f + μ v) (Sutskever et al. 2013, in torch.optim.SGD's form).

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
    ) -> None:
        super().__init__(tol=tol, max_iterations=max_iterations, on_failure=on_failure)
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

    def start(self, problem: InnerProblem, x0: Tensor) -> GradientDescentState:
        value, g = problem.value_and_gradient(x0)
        norm = vector_norm(g)
        # A first trial step of unit length, as the scale of the objective is not known yet.
        step = 1 / torch.where(norm > 0, norm, 1).detach()
        status = torch.full_like(norm, RUNNING, dtype=torch.int64)
        return GradientDescentState(x0, value, g, torch.zeros_like(g), step, norm, status)

    def step(self, problem: InnerProblem, state: GradientDescentState) -> GradientDescentState:
        if self.stepsize is None:
            return self._search(problem, state)
        velocity = self.momentum * state.velocity + state.gradient if self.momentum else state.gradient
        direction = state.gradient + self.momentum * velocity if self.nesterov else velocity
        x = state.x - self.stepsize * direction
        value, g = problem.value_and_gradient(x)
        return state._replace(x=x, value=value, gradient=g, velocity=velocity, residual_norm=vector_norm(g))

    def _search(self, problem: InnerProblem, state: GradientDescentState) -> GradientDescentState:
        slope = -(state.residual_norm**2)
        trial = backtrack(problem, state.x, state.value, slope, -state.gradient, 2 * state.step)
        value, g = problem.value_and_gradient(trial.x)
        norm = vector_norm(g)
        stuck = (trial.step == 0) | (trial.by_rounding & (norm >= state.residual_norm))
        status = torch.where(stuck, int(Status.STAGNATED), state.status)
        step = torch.where(trial.step > 0, trial.step, state.step)
        return GradientDescentState(trial.x, value, g, state.velocity, step, norm, status)
