"""Generalised minimal residuals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._vectors import vector_norm
from ..info import RUNNING, FailurePolicy, Status
from ..preconditioners import Preconditioner
from .base import check_count
from .iterative import IterativeLinearSolver
from .system import System, initial


class GMRESState(NamedTuple):
    x: Tensor  # the iterate at the start of the cycle
    residual_norm: Tensor
    status: Tensor
    basis: Tensor  # (*batch, restart + 1, n), orthonormal rows; those that are not filled may hold anything
    triangle: Tensor  # (*batch, restart, restart), R of the Hessenberg matrix, the identity where not filled yet
    rotations: Tensor  # (*batch, restart + 1, restart + 1), the product of the Givens rotations
    start_norm: Tensor  # (*batch,), the residual at the start of the cycle
    filled: Tensor  # (*batch,), columns in use
    column: int  # the next column; all systems that still run share it


class GMRES(IterativeLinearSolver):
    """GMRES with restarts (Saad and Schultz 1986), for any square operator.

    Orthogonalised twice by classical Gram-Schmidt; preconditioned from the right, so that its residual is the true
    one. An iteration takes one product.

    * ``restart``: the steps of a cycle, at least 1. So many vectors of n are held, and orthogonalised against. A cycle
      that does not lower the residual ends with ``Status.STAGNATED``, one in which A turns out singular up to rounding
      with ``Status.BREAKDOWN``.

    Shapes and errors are those of :class:`~implicitdiff.LinearSolver`, settings those of
    :class:`~implicitdiff.IterativeLinearSolver`; ``restart`` below 1 raises ValueError.

    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    >>> GMRES()(A, torch.tensor([2.0, 2.0])).value
    tensor([1.0000, 1.0000])
    """

    uncompilable = "each step of a cycle has shapes of its own and would be a compilation of its own"

    def __init__(
        self,
        restart: int = 30,
        *,
        rtol: float = 1e-6,
        atol: float = 0.0,
        max_iterations: int | None = None,
        preconditioner: Preconditioner | None = None,
        warm_start: bool = False,
        on_failure: FailurePolicy = "warn",
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        super().__init__(
            rtol=rtol,
            atol=atol,
            max_iterations=max_iterations,
            preconditioner=preconditioner,
            warm_start=warm_start,
            on_failure=on_failure,
            compile=compile,
            check_every=check_every,
        )
        self.restart = check_count(restart, "restart")

    def start(self, A: System, b: Tensor, x0: Tensor | None) -> GMRESState:
        return self._cycle(*initial(A, b, x0))

    def _cycle(self, x: Tensor, r: Tensor) -> GMRESState:
        batch, n = r.shape[:-1], r.shape[-1]
        m = min(self.restart, n)
        norm = vector_norm(r)
        basis = r.new_empty(*batch, m + 1, n)
        basis[..., 0, :] = r / torch.where(norm > 0, norm, 1).unsqueeze(-1)
        eye = torch.eye(m + 1, dtype=r.dtype, device=r.device).expand(*batch, m + 1, m + 1)
        status = torch.full_like(norm, RUNNING, dtype=torch.int64)
        return GMRESState(x, norm, status, basis, eye[..., :m, :m], eye, norm, torch.zeros_like(status), 0)

    def step(self, A: System, state: GMRESState) -> GMRESState:
        m, k = state.triangle.shape[-1], state.column
        known = state.basis[..., : k + 1, :]
        w = A(A.precondition(known[..., k, :]))
        h = torch.zeros_like(state.basis[..., 0])
        for _ in range(2):  # twice is enough
            projection = torch.linalg.vecdot(known, w.unsqueeze(-2)) if w.ndim > 1 else known.conj() @ w
            w = w - _combined(projection, known)
            h[..., : k + 1] += projection
        below = vector_norm(w)

        # The new column of the Hessenberg matrix, rotated by what was there and then by one more rotation.
        column = (state.rotations @ h.unsqueeze(-1)).squeeze(-1)
        here = column[..., k]
        length = torch.hypot(here.abs(), below)
        # A column that depends on the others up to rounding: A is singular there. It is left out: c = 0, s = 1.
        singular = length <= 4 * torch.finfo(length.dtype).eps * torch.hypot(vector_norm(column), below)
        safe = torch.where(singular, 1, length)
        c, s = torch.where(singular, 0, here / safe), torch.where(singular, 1, below / safe)
        upper, lower = state.rotations[..., k, :], state.rotations[..., k + 1, :]
        rotations = state.rotations.clone()
        rotations[..., k, :] = c.conj().unsqueeze(-1) * upper + s.unsqueeze(-1) * lower
        rotations[..., k + 1, :] = -s.unsqueeze(-1) * upper + c.unsqueeze(-1) * lower
        triangle = state.triangle.clone()
        triangle[..., :k, k] = column[..., :k]
        triangle[..., k, k] = safe

        basis = state.basis  # written over in rows that nobody has read, of systems that have ended too
        basis[..., k + 1, :] = w / torch.where(below > 0, below, 1).unsqueeze(-1)
        norm = state.start_norm * rotations[..., k + 1, 0].abs()
        status = torch.where(singular, int(Status.BREAKDOWN), state.status)
        norm = torch.where(below.isfinite(), norm, torch.nan)
        state = GMRESState(
            state.x, norm, status, basis, triangle, rotations, state.start_norm, torch.full_like(status, k + 1), k + 1
        )
        if k + 1 < m:
            return state
        return self._restarted(A, state)

    def _restarted(self, A: System, state: GMRESState) -> GMRESState:
        # The residual of the cycle's end lies in the basis: no product is needed for it.
        coefficients = (
            state.start_norm.unsqueeze(-1) * state.rotations[..., -1, 0:1] * state.rotations[..., -1, :].conj()
        )
        r = _combined(coefficients, state.basis)
        new = self._cycle(self.finish(A, state), r)
        stalled = state.residual_norm >= (1 - 1e-6) * state.start_norm
        status = torch.where((state.status == RUNNING) & stalled, int(Status.STAGNATED), state.status)
        return new._replace(residual_norm=state.residual_norm, status=status)

    def finish(self, A: System, state: GMRESState) -> Tensor:
        k = int(state.filled.max()) if state.filled.numel() else 0  # one that has ended may have had a longer cycle
        in_use = torch.arange(k, device=state.filled.device) < state.filled.unsqueeze(-1)
        g = torch.where(in_use, state.start_norm.unsqueeze(-1) * state.rotations[..., :k, 0], 0)
        y = torch.linalg.solve_triangular(state.triangle[..., :k, :k], g.unsqueeze(-1), upper=True).squeeze(-1)
        basis = state.basis[..., :k, :]
        if basis.ndim > 2:  # of systems that have filled less
            basis = torch.where(in_use.unsqueeze(-1), basis, 0)
        return state.x + A.precondition(_combined(y, basis))


def _combined(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Σ coefficientᵢ · rowᵢ."""
    return (coefficients.unsqueeze(-2) @ rows).squeeze(-2)
