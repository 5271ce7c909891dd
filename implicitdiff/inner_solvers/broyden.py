"""Broyden's method with limited memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._iteration import any_of
from .._vectors import appended, inner, quotient, vector_norm
from ..info import RUNNING, FailurePolicy, Status
from ..linear_solvers.base import check_count
from .base import DECIDES, InnerProblem, InnerSolver

REMEMBERED = 10
"""Residual norms that a step may climb back to."""
MAX_TRIALS = 10
SHORTENING = 0.25
SUFFICIENT_DECREASE = 1e-4
LEAST_PIVOT = 0.1
PATIENCE = 40
"""Steps without a new smallest residual norm, before a system has stagnated."""


class BroydenMemory(NamedTuple):
    """H = scale · I + Σ left · rightᵀ, the estimate of the inverse Jacobian; zero rows where there is no term yet."""

    left: Tensor  # (*batch, history, n)
    right: Tensor
    terms: Tensor  # (*batch,), how many there are
    scale: Tensor  # (*batch, 1)

    def apply(self, v: Tensor) -> Tensor:
        """H v."""
        return self.scale * v + _combined(self.left, self.right, v)

    def apply_transposed(self, v: Tensor) -> Tensor:
        """Hᵀ v."""
        return self.scale * v + _combined(self.right, self.left, v)

    def without_terms(self, where: Tensor, scale: Tensor) -> BroydenMemory:
        """The memory begun anew, with another scale, for the systems of the mask (*batch,)."""
        rows, column = where.reshape(*where.shape, 1, 1), where.unsqueeze(-1)
        return BroydenMemory(
            torch.where(rows, 0, self.left),
            torch.where(rows, 0, self.right),
            torch.where(where, 0, self.terms),
            torch.where(column, scale, self.scale),
        )


class BroydenState(NamedTuple):
    x: Tensor
    residual: Tensor
    residual_norm: Tensor
    status: Tensor
    memory: BroydenMemory
    recent: Tensor  # (*batch, REMEMBERED), the last residual norms
    steps: Tensor  # (*batch,)
    best: Tensor  # the smallest residual norm so far
    stalls: Tensor  # steps since then


class Broyden(InnerSolver):
    """Broyden's good method (Kelley 1995, chapter 7) for roots and fixed points: x ← x − step · H F(x), no derivatives.

    H starts as a multiple of the identity and takes up one rank-one term a step, by the Sherman–Morrison formula, its
    pivot kept away from zero (Moré and Trangenstein 1976). After ``history`` terms it starts anew. The step is
    shortened until ‖F‖ has decreased, not from the last but from the largest of the last ten, and with some allowance
    in the first steps (the condition of La Cruz, Martínez and Raydan 2006): the method is fast and seldom monotone.
    Systems where no step is found, or ‖F‖ has long not improved, end as ``STAGNATED``.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. Raises ValueError
    for a ``history`` that is not a whole number of at least 1.

    >>> import implicitdiff as idf
    >>> layer = idf.RootLayer(lambda x, y: x**2 - y, inner_solver=Broyden())
    >>> layer(torch.ones(2), torch.tensor([4.0, 9.0])).round(decimals=3)
    tensor([2., 3.])
    """

    uncompilable = DECIDES

    def __init__(
        self,
        history: int = 20,
        *,
        tol: float | None = None,
        max_iterations: int = 500,
        on_failure: FailurePolicy = "warn",
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        super().__init__(
            tol=tol, max_iterations=max_iterations, on_failure=on_failure, compile=compile, check_every=check_every
        )
        self.history = check_count(history, "history")

    def start(self, problem: InnerProblem, x0: Tensor) -> BroydenState:
        residual = problem.residual(x0)
        norm = vector_norm(residual)
        size, start = norm.detach(), vector_norm(x0.detach())
        # The first step is no longer than x0, as the scale of F is not known yet.
        scale = (start.clamp(min=1) / torch.where(size > 0, size, 1)).clamp(max=1).unsqueeze(-1)
        empty = residual.detach().new_zeros(*residual.shape[:-1], self.history, residual.shape[-1])
        zero = torch.zeros_like(size, dtype=torch.int64)
        memory = BroydenMemory(empty, empty, zero, scale)
        recent = size.unsqueeze(-1).expand(*size.shape, REMEMBERED)
        return BroydenState(x0, residual, norm, zero + RUNNING, memory, recent, zero, size, zero)

    def step(self, problem: InnerProblem, state: BroydenState) -> BroydenState:
        direction = -state.memory.apply(state.residual)
        step, residual, found = self._search(problem, state, direction)
        s, y = step * direction, residual - state.residual
        norm = vector_norm(residual)
        size = norm.detach()
        better = size < state.best
        stalls = torch.where(better, 0, state.stalls + 1)
        # Where no step is found from a fresh memory, none will be.
        stuck = (~found & (state.memory.terms == 0)) | (stalls >= PATIENCE)
        return BroydenState(
            state.x + s,
            residual,
            norm,
            torch.where(stuck & size.isfinite(), int(Status.STAGNATED), state.status),
            self._updated(state.memory, s, y, found),
            torch.cat([state.recent[..., 1:], size.unsqueeze(-1)], dim=-1),
            state.steps + 1,
            torch.where(better, size, state.best),
            stalls,
        )

    def _search(self, problem: InnerProblem, state: BroydenState, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step lengths (*batch, 1), the residuals they lead to, and whether they suffice; 0 where none was found."""
        before = state.residual_norm.detach()
        limit = state.recent.amax(-1) * (1 + 1 / (state.steps + 1) ** 2)
        hopeless = ~direction.detach().isfinite().all(-1)
        step = torch.ones_like(before)
        for _ in range(MAX_TRIALS):
            residual = problem.residual(state.x + step.unsqueeze(-1) * direction)
            found = vector_norm(residual.detach()) <= limit - SUFFICIENT_DECREASE * step**2 * before
            if not any_of(~(found | hopeless)):
                break
            step = torch.where(found, step, SHORTENING * step)
        # With NaN in the direction of a system, its residual stays NaN: the loop ends it.
        kept = found | hopeless
        return (
            torch.where(kept, step, 0).unsqueeze(-1),
            torch.where(kept.unsqueeze(-1), residual, state.residual),
            found,
        )

    def _updated(self, memory: BroydenMemory, s: Tensor, y: Tensor, found: Tensor) -> BroydenMemory:
        """H with the secant equation H y = s (nearly so where that would make it singular)."""
        length, change = vector_norm(s).unsqueeze(-1), vector_norm(y).unsqueeze(-1)
        known = (length > 0) & (change > 0)
        scale = torch.where(inner(s, y) < 0, -1.0, 1.0) * quotient(length, change)
        fresh = (memory.terms == 0) | (memory.terms == self.history) | ~found
        memory = memory.without_terms(fresh, torch.where(known, scale, memory.scale))
        s, y = quotient(s, length), quotient(y, length)
        Hy = memory.apply(y)
        pivot = inner(s, Hy)
        sign = torch.where(pivot < 0, -1.0, 1.0)
        small = pivot.abs() < LEAST_PIVOT
        damping = torch.where(small, (1 - LEAST_PIVOT * sign) / (1 - torch.where(small, pivot, 0)), 1)
        pivot = damping * pivot + (1 - damping)
        left = quotient(damping * (s - Hy), torch.where(known, pivot, 0))
        return BroydenMemory(
            appended(memory.left, left),
            appended(memory.right, memory.apply_transposed(s)),
            memory.terms + known.squeeze(-1),
            memory.scale,
        )


def _combined(rows: Tensor, weights: Tensor, v: Tensor) -> Tensor:
    """Σ rows · ⟨weights, v⟩ over the terms."""
    return ((weights @ v.unsqueeze(-1)).mT @ rows).squeeze(-2)
