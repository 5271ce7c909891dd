"""Limited-memory BFGS."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..info import RUNNING, FailurePolicy, Status
from ..linear_solvers.base import check_max_iterations, inner, vector_norm
from ._line_search import backtrack
from .base import InnerProblem, InnerSolver


class LBFGSState(NamedTuple):
    x: Tensor
    value: Tensor
    gradient: Tensor
    steps: Tensor  # (*batch, history, n), the last one last; zero where there is none yet
    changes: Tensor  # (*batch, history, n), of the gradient along the steps
    curvatures: Tensor  # (*batch, history, 1), their products sᵀy; zero where there is none yet
    residual_norm: Tensor
    status: Tensor


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
        value, g = problem.value_and_gradient(x0)
        norm = vector_norm(g)
        empty = g.new_zeros(*g.shape[:-1], self.history, g.shape[-1])
        status = torch.full_like(norm, RUNNING, dtype=torch.int64)
        return LBFGSState(x0, value, g, empty, empty, empty[..., :1], norm, status)

    def step(self, problem: InnerProblem, state: LBFGSState) -> LBFGSState:
        direction = -self._inverse_hessian(state)
        slope = inner(direction, state.gradient).squeeze(-1)
        downhill = slope < 0
        direction = torch.where(downhill.unsqueeze(-1), direction, -state.gradient)
        slope = torch.where(downhill, slope, -(state.residual_norm**2))
        first = state.curvatures[..., -1, 0] == 0
        norm = torch.where(state.residual_norm > 0, state.residual_norm, 1)
        length = torch.where(first, 1 / norm.clamp(min=1), torch.ones_like(norm))
        trial = backtrack(problem, state.x, state.value, slope, direction, length)
        value, g = problem.value_and_gradient(trial.x)
        norm = vector_norm(g)
        stuck = (trial.step == 0) | (trial.by_rounding & (norm >= state.residual_norm))
        status = torch.where(stuck, int(Status.STAGNATED), state.status)

        s, y = trial.x - state.x, g - state.gradient
        curvature = inner(s, y)
        keep = curvature > 1e-10 * (vector_norm(s) * vector_norm(y)).unsqueeze(-1)
        pair = keep.unsqueeze(-1)
        return LBFGSState(
            trial.x,
            value,
            g,
            torch.where(pair, _appended(state.steps, s), state.steps),
            torch.where(pair, _appended(state.changes, y), state.changes),
            torch.where(pair, _appended(state.curvatures, curvature), state.curvatures),
            norm,
            status,
        )

    def _inverse_hessian(self, state: LBFGSState) -> Tensor:
        """The two-loop recursion applied to the gradient; empty places of the history change nothing."""
        q, weights = state.gradient, []
        used = state.curvatures > 0
        rho = torch.where(used, 1 / torch.where(used, state.curvatures, 1), 0)
        for i in reversed(range(self.history)):
            weight = rho[..., i, :] * inner(state.steps[..., i, :], q)
            weights.append(weight)
            q = q - weight * state.changes[..., i, :]
        y = state.changes[..., -1, :]
        square = inner(y, y)
        q = q * torch.where(square > 0, state.curvatures[..., -1, :] / torch.where(square > 0, square, 1), 1)
        for i, weight in enumerate(reversed(weights)):
            q = q + (weight - rho[..., i, :] * inner(state.changes[..., i, :], q)) * state.steps[..., i, :]
        return q


def _appended(history: Tensor, new: Tensor) -> Tensor:
    return torch.cat([history[..., 1:, :], new.unsqueeze(-2)], dim=-2)
