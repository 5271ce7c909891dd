"""Newton's method for minima, its systems solved by truncated conjugate gradients (Hessian-free)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._iteration import iterate
from ..info import RUNNING, FailurePolicy, Status
from ..linear_solvers.base import System, check_max_iterations, inner, vector_norm
from ..linear_solvers.cg import CG
from ._line_search import backtrack
from .base import InnerProblem, InnerSolver


class NewtonCGState(NamedTuple):
    x: Tensor
    value: Tensor
    gradient: Tensor
    residual_norm: Tensor
    status: Tensor


class NewtonCG(InnerSolver):
    """Line-search Newton-CG (Nocedal and Wright 2006, Algorithm 7.1), the Hessian known by its products only.

    Each Newton system is solved until its residual is below min(½, √‖∇f‖)·‖∇f‖, by at most ``cg_iterations`` steps,
    and truncated where CG meets negative curvature (Steihaug 1983); the steepest descent direction where it does so at
    once.

    >>> import implicitdiff as idf
    >>> layer = idf.ArgminLayer(lambda x, t: (torch.exp(x) - t * x).sum(), inner_solver=NewtonCG())
    >>> layer(torch.zeros(1), torch.tensor([1.0])).item()
    0.0
    """

    def __init__(
        self,
        cg_iterations: int | None = None,
        *,
        tol: float | None = None,
        max_iterations: int = 100,
        on_failure: FailurePolicy = "warn",
    ) -> None:
        super().__init__(tol=tol, max_iterations=max_iterations, on_failure=on_failure)
        self.cg_iterations = check_max_iterations(cg_iterations)

    def start(self, problem: InnerProblem, x0: Tensor) -> NewtonCGState:
        value, g = problem.value_and_gradient(x0)
        norm = vector_norm(g)
        return NewtonCGState(x0, value, g, norm, torch.full_like(norm, RUNNING, dtype=torch.int64))

    def step(self, problem: InnerProblem, state: NewtonCGState) -> NewtonCGState:
        direction = self._direction(problem, state)
        slope = inner(direction, state.gradient).squeeze(-1)
        downhill = slope < 0
        direction = torch.where(downhill.unsqueeze(-1), direction, -state.gradient)
        slope = torch.where(downhill, slope, -(state.residual_norm**2))
        trial = backtrack(problem, state.x, state.value, slope, direction, torch.ones_like(slope))
        value, g = problem.value_and_gradient(trial.x)
        norm = vector_norm(g)
        stuck = (trial.step == 0) | (trial.by_rounding & (norm >= state.residual_norm))
        status = torch.where(stuck, int(Status.STAGNATED), state.status)
        return NewtonCGState(trial.x, value, g, norm, status)

    def _direction(self, problem: InnerProblem, state: NewtonCGState) -> Tensor:
        norm = state.residual_norm.detach()
        scale = torch.where((norm > 0) & norm.isfinite(), norm, 1).unsqueeze(-1)
        cg = CG()
        b = -state.gradient / scale
        hessian = System(problem.hessian(state.x), b)
        budget = self.cg_iterations or max(100, 10 * b.shape[-1])
        ended = iterate(lambda s: cg.step(hessian, s), cg.start(hessian, b, None), norm.sqrt().clamp(max=0.5), budget)
        return ended.state.x * scale
