"""The plain fixed-point iteration."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._vectors import vector_norm
from .base import InnerProblem, InnerSolver


class FixedPointIterationState(NamedTuple):
    x: Tensor
    residual: Tensor
    residual_norm: Tensor


class FixedPointIteration(InnerSolver):
    """x ← x − F(x), which for a fixed point is x ← update(x): it converges where the update is a contraction.

    Its rate is the Lipschitz constant of the update (Banach 1922): each step gains so much, and costs one evaluation.
    Shapes, settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`.

    >>> import implicitdiff as idf
    >>> layer = idf.FixedPointLayer(lambda x, t: torch.cos(x) + t, inner_solver=FixedPointIteration())
    >>> layer(torch.zeros((), dtype=torch.float64), 0.0).item()
    0.739085...
    """

    def start(self, problem: InnerProblem, x0: Tensor) -> FixedPointIterationState:
        residual = problem.residual(x0)
        return FixedPointIterationState(x0, residual, vector_norm(residual))

    def step(self, problem: InnerProblem, state: FixedPointIterationState) -> FixedPointIterationState:
        return self.start(problem, state.x - state.residual)
