"""Limited-memory BFGS."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._limited_memory import LimitedMemory, Pair
from .._vectors import inner, vector_norm
from ..info import FailurePolicy
from ..linear_solvers.base import check_max_iterations
from ._line_search import Iterate, advance, first_iterate
from .base import InnerProblem, InnerSolver


class LBFGSState(NamedTuple):
    x: Tensor
    residual_norm: Tensor
    status: Tensor
    here: Iterate
    memory: LimitedMemory


class LBFGS(InnerSolver):
    """L-BFGS (Nocedal and Wright 2006, Algorithm 7.4) with backtracking; pairs without positive curvature are skipped.

    >>> import implicitdiff as idf
    >>> layer = idf.ArgminLayer(lambda x, t: (torch.cosh(x - t) + x**2).sum(), inner_solver=LBFGS(tol=1e-6))
    >>> bool(layer.solve(torch.zeros(3, dtype=torch.float64), 1.0).forward.converged)
    True
    """

    def __init__(
        self,
        history: int = 10,
        *,
        tol: float | None = None,
        max_iterations: int = 500,
        on_failure: FailurePolicy = "warn",
    ) -> None:
        super().__init__(tol=tol, max_iterations=max_iterations, on_failure=on_failure)
        check_max_iterations(history)
        self.history = history

    def start(self, problem: InnerProblem, x0: Tensor) -> LBFGSState:
        here = first_iterate(problem, x0)
        norm = here.residual_norm.detach()
        # The first step has unit length at most, as the scale of the objective is not known yet.
        scale = (1 / torch.where(norm > 0, norm, 1)).clamp(max=1).unsqueeze(-1)
        memory = LimitedMemory((None,) * self.history, scale)
        return LBFGSState(x0, here.residual_norm, here.progress.status, here, memory)

    def step(self, problem: InnerProblem, state: LBFGSState) -> LBFGSState:
        here = state.here
        there = advance(problem, here, -state.memory.apply(here.gradient), torch.ones_like(here.step))
        s, y = there.x - here.x, there.gradient - here.gradient
        curvature = inner(s, y)
        kept = curvature > 1e-10 * (vector_norm(s) * vector_norm(y)).unsqueeze(-1)
        curvature = torch.where(kept, curvature, 0)
        scale = torch.where(kept, curvature / torch.where(kept, inner(y, y), 1), state.memory.scale)
        memory = LimitedMemory((*state.memory.pairs[1:], Pair(s, y, curvature)), scale)
        return LBFGSState(there.x, there.residual_norm, there.progress.status, there, memory)

    def leave(self, problem: InnerProblem, state: LBFGSState) -> None:
        problem.leave_inverse(state.memory)
