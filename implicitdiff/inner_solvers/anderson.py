"""Anderson acceleration of a fixed-point iteration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._vectors import appended, vector_norm
from ..info import FailurePolicy
from ..linear_solvers.base import check_count
from .base import InnerProblem, InnerSolver


class AndersonState(NamedTuple):
    x: Tensor
    residual: Tensor
    steps: Tensor  # (*batch, history, n), differences of successive x; zero where there is none yet
    changes: Tensor  # (*batch, history, n), differences of successive residuals
    residual_norm: Tensor


class Anderson(InnerSolver):
    """Anderson acceleration, type II (Walker and Ni 2011), of x ← x − F(x).

    The next iterate is that of the plain iteration from the affine combination of the last ``history`` + 1 iterates
    whose linearised residual is smallest. A step after which the residual has grown tenfold forgets the history.
    It costs one evaluation of F and holds twice ``history`` vectors.

    * ``history``: at least 1.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`.

    >>> import implicitdiff as idf
    >>> layer = idf.FixedPointLayer(lambda x, t: torch.cos(x) + t, inner_solver=Anderson())
    >>> layer.solve(torch.zeros((), dtype=torch.float64), 0.0).forward.iterations.item()
    7
    """

    def __init__(
        self,
        history: int = 5,
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

    def start(self, problem: InnerProblem, x0: Tensor) -> AndersonState:
        residual = problem.residual(x0)
        empty = residual.new_zeros(*residual.shape[:-1], self.history, residual.shape[-1])
        return AndersonState(x0, residual, empty, empty, vector_norm(residual))

    def step(self, problem: InnerProblem, state: AndersonState) -> AndersonState:
        weights = self._weights(state.changes, state.residual)
        x = state.x - state.residual - (weights @ (state.steps - state.changes)).squeeze(-2)
        residual = problem.residual(x)
        norm = vector_norm(residual)
        forget = (norm > 10 * state.residual_norm).reshape(*norm.shape, 1, 1)
        steps = appended(state.steps, x - state.x)
        changes = appended(state.changes, residual - state.residual)
        return AndersonState(x, residual, torch.where(forget, 0, steps), torch.where(forget, 0, changes), norm)

    def _weights(self, changes: Tensor, residual: Tensor) -> Tensor:
        """argmin over w of ‖residual − w · changes‖₂, of shape (*batch, 1, history), by the normal equations.

        The rows are scaled to unit length first; a little ridge makes rows that are still empty, or parallel, harmless.
        """
        length = vector_norm(changes).unsqueeze(-1)
        rows = changes / torch.where(length > 0, length, 1)
        gram = rows @ rows.mT
        ridge = 10 * torch.finfo(gram.dtype).eps * torch.eye(self.history, dtype=gram.dtype, device=gram.device)
        gram = gram + torch.where(length > 0, ridge, torch.eye(self.history, dtype=gram.dtype, device=gram.device))
        weights, _ = torch.linalg.solve_ex(gram, rows @ residual.unsqueeze(-1))
        return (weights / torch.where(length > 0, length, 1)).mT
