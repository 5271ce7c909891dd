"""Limited-memory BFGS."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._vectors import inner, vector_norm
from ..info import FailurePolicy
from ..linear_solvers.base import check_max_iterations
from ._line_search import Iterate, advance, first_iterate
from .base import InnerProblem, InnerSolver


class Pair(NamedTuple):
    """A step, the change of the gradient along it, and their product sᵀy; all zero where the pair is skipped."""

    step: Tensor
    change: Tensor
    curvature: Tensor  # (*batch, 1)


class LBFGSState(NamedTuple):
    x: Tensor
    residual_norm: Tensor
    status: Tensor
    here: Iterate
    pairs: tuple[Pair | None, ...]  # the last one last; None where there is none yet
    scale: Tensor  # (*batch, 1), the inverse Hessian's scale before the pairs correct it


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
        return LBFGSState(x0, here.residual_norm, here.progress.status, here, (None,) * self.history, scale)

    def step(self, problem: InnerProblem, state: LBFGSState) -> LBFGSState:
        here = state.here
        there = advance(problem, here, -self._inverse_hessian(state), torch.ones_like(here.step))
        s, y = there.x - here.x, there.gradient - here.gradient
        curvature = inner(s, y)
        kept = curvature > 1e-10 * (vector_norm(s) * vector_norm(y)).unsqueeze(-1)
        curvature = torch.where(kept, curvature, 0)
        scale = torch.where(kept, curvature / torch.where(kept, inner(y, y), 1), state.scale)
        pairs = (*state.pairs[1:], Pair(s, y, curvature))
        return LBFGSState(there.x, there.residual_norm, there.progress.status, there, pairs, scale)

    def _inverse_hessian(self, state: LBFGSState) -> Tensor:
        """The two-loop recursion applied to the gradient; a pair of curvature 0 changes nothing."""
        q, weights = state.here.gradient, []
        pairs = [pair for pair in state.pairs if pair is not None]
        for pair in reversed(pairs):
            weight = _over(inner(pair.step, q), pair.curvature)
            weights.append(weight)
            q = q - weight * pair.change
        q = state.scale * q
        for pair, weight in zip(pairs, reversed(weights), strict=True):
            q = q + (weight - _over(inner(pair.change, q), pair.curvature)) * pair.step
        return q


def _over(product: Tensor, curvature: Tensor) -> Tensor:
    used = curvature > 0
    return torch.where(used, product / torch.where(used, curvature, 1), 0)
