"""The matrix itself, factorised."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .._vectors import scaled_norm, vector_norm
from ..info import FailurePolicy, LinearSolution, SolveInfo, Status
from ..operators import LinearOperator, Transpose
from ._structured import solve_structured
from .base import LinearSolver
from .system import System

REFINEMENTS = 6
"""Products that a kept factorisation may cost before a new one is made."""


class Inverse(NamedTuple):
    """b of shape (*batch, n) ↦ A⁻¹ b, or A⁻ᴴ b where the flag is set."""

    apply: Callable[[Tensor, bool], Tensor]
    is_pseudo: bool = False
    """Whether it is the pseudo-inverse of a matrix that is singular up to rounding."""


class Dense(LinearSolver):
    """Forms the matrix by n products and factorises it: for small systems, also many of them at once.

    By structure: Cholesky where a symmetric matrix turns out positive definite, the eigenvalue decomposition where it
    does not; LU where it is general. A singular or rectangular matrix gives the least-squares solution of minimum norm;
    the report's method then says so, and where that does not solve a square system its status is BREAKDOWN. Diagonal,
    sparse (by SuperLU) and block-diagonal operators and their :class:`~implicitdiff.operators.LowRankUpdate` (by
    Woodbury's identity) are solved as they are. See Golub and Van Loan 2013, Chapters 3 and 4. It holds n² numbers a
    system and takes n³ operations.

    ``warm_start=True`` keeps the last factorisation and refines with it while that converges fast: where the same
    solver serves Newton's forward pass and the backward pass, or step after step of a training, most solves then take
    a few products in the place of n.

    Shapes, further settings and errors are those of :class:`~implicitdiff.LinearSolver`; A may be rectangular.

    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    >>> Dense()(A, torch.tensor([2.0, 3.0])).value
    tensor([3., 1.])
    """

    takes_rectangular = True

    def __init__(
        self, *, rtol: float = 1e-6, atol: float = 0.0, warm_start: bool = False, on_failure: FailurePolicy = "warn"
    ) -> None:
        super().__init__(rtol=rtol, atol=atol, on_failure=on_failure)
        self.warm_start = warm_start
        self._kept: tuple[tuple[object, ...], bool, Inverse] | None = None
        self._has_one_operator = False

    def of_one_operator(self) -> Dense:
        if self.warm_start:
            return self  # it keeps more than that
        solver = copy(self)
        solver._has_one_operator = True
        return solver

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        system, singular, product = System(A, b), False, None
        x, steps = self._refined(system, b), torch.zeros(b.shape[:-1], dtype=torch.int64, device=b.device)
        if x is None:
            x = solve_structured(A, b)
        if x is None:
            x, singular, product = self._factorised(system, b)
        info = self._info(system, b, x, steps, steps + int(Status.BREAKDOWN), product)
        if singular:
            info = replace(info, method=f"{self.name} (minimum norm, as A is singular)")
        if not A.is_square:
            return LinearSolution(x, self._least_squares_info(system, b, x, info))
        # A small residual is what rounding leaves; a singular matrix leaves a large one.
        rounded = (info.status == Status.BREAKDOWN) & (info.residual_norm < torch.finfo(b.dtype).eps ** 0.5)
        status = torch.where(rounded, int(Status.STAGNATED), info.status)
        return LinearSolution(x, replace(info, status=status))

    def _factorised(self, system: System, b: Tensor) -> tuple[Tensor, bool, Tensor | None]:
        """The solution x, whether the matrix (one of a batch) is singular, and A x where the matrix is at hand."""
        if 0 in (*system.shape, *b.shape):
            return b.new_zeros(*b.shape[:-1], system.shape[1]), False, None
        if self._has_one_operator and self._kept is not None and self._kept[0] == _key(system):
            kept = self._kept[2]
            return kept.apply(b, self._is_adjoint_of_kept(system)), kept.is_pseudo, None
        matrix = system.to_dense()
        inverse = _inverse(matrix, system.is_symmetric) if system.is_square else None
        if inverse is None and not (system.is_square and bool(matrix.isfinite().all())):
            return _system_by_system(matrix, b.unsqueeze(-1), system.is_symmetric).squeeze(-1), False, None
        if inverse is None:
            inverse = _pseudo_inverse(matrix, system.is_symmetric)
        if self.warm_start or self._has_one_operator:
            self._kept = (_key(system), isinstance(system.A, Transpose), inverse)
        x = inverse.apply(b, False)
        return x, inverse.is_pseudo, (matrix @ x.unsqueeze(-1)).squeeze(-1)

    def _is_adjoint_of_kept(self, system: System) -> bool:
        assert self._kept is not None
        return not system.is_symmetric and self._kept[1] != isinstance(system.A, Transpose)

    def _refined(self, system: System, b: Tensor) -> Tensor | None:
        """The solution by the kept factorisation; None where there is none, or it does not bring b's system to rtol."""
        if not self.warm_start or self._kept is None or self._kept[0] != _key(system):
            return None
        inverse, adjoint = self._kept[2], self._is_adjoint_of_kept(system)
        limit = torch.clamp(self.rtol * scaled_norm(b), min=self.atol)
        x, r, before = torch.zeros_like(b), b, torch.full_like(limit, torch.inf)
        for _ in range(REFINEMENTS):
            x = x + inverse.apply(r, adjoint)
            r = b - system(x)
            norm = scaled_norm(r)
            if bool((norm <= limit).all()):
                return x
            if not bool(((norm <= limit) | (norm <= 0.5 * before)).all()):
                return None
            before = norm
        return None

    def _least_squares_info(self, system: System, b: Tensor, x: Tensor, info: SolveInfo) -> SolveInfo:
        """Of a rectangular system, a solution is also the x that no other one comes nearer with (as in LSMR)."""
        r = b - system(x)
        size = vector_norm(system.rmatvec(b)) / vector_norm(b).clamp(min=torch.finfo(b.dtype).tiny)
        best = vector_norm(system.rmatvec(r)) <= self.rtol * size * vector_norm(r)
        status = torch.where(best & (info.status == Status.BREAKDOWN), int(Status.CONVERGED), info.status)
        return replace(info, status=status, converged=status == Status.CONVERGED, matvecs=system.matvecs)


def _key(system: System) -> tuple[object, ...]:
    return system.shape, system.batch_shape, system.dtype, system.device, system.is_symmetric


def _inverse(matrix: Tensor, symmetric: bool) -> Inverse | None:
    """The inverse of square matrices (*batch, n, n); None where one is singular up to rounding or is not finite."""
    if symmetric:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not (bool(failed.any()) or _is_singular(factor, power=2)):
            return Inverse(lambda b, adjoint: torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1))
        return None
    factor, pivots, failed = torch.linalg.lu_factor_ex(matrix)
    if bool(failed.any()) or _is_singular(factor):
        return None
    return Inverse(
        lambda b, adjoint: torch.linalg.lu_solve(factor, pivots, b.unsqueeze(-1), adjoint=adjoint).squeeze(-1)
    )


def _pseudo_inverse(matrix: Tensor, symmetric: bool) -> Inverse:
    """Of finite matrices."""
    if symmetric:
        return _pseudo_inverse_of_symmetric(matrix)
    inverse = torch.linalg.pinv(matrix)
    return Inverse(lambda b, adjoint: ((inverse.mH if adjoint else inverse) @ b.unsqueeze(-1)).squeeze(-1), True)


def _is_singular(factor: Tensor, power: int = 1) -> bool:
    """Whether a pivot of a factorisation is lost in rounding; those of Cholesky are the squares of its diagonal."""
    pivots = factor.diagonal(dim1=-2, dim2=-1).abs() ** power
    smallest = torch.finfo(pivots.dtype).eps * pivots.shape[-1] * pivots.amax(-1)
    return not bool((pivots.amin(-1) > smallest).all())  # a NaN counts


def _pseudo_inverse_of_symmetric(matrix: Tensor) -> Inverse:
    values, vectors = torch.linalg.eigh(matrix)
    cutoff = torch.finfo(values.dtype).eps * values.shape[-1] * values.abs().amax(-1, keepdim=True)
    kept = values.abs() > cutoff
    reciprocal = torch.where(kept, 1 / torch.where(kept, values, 1), 0).unsqueeze(-1)
    return Inverse(
        lambda b, adjoint: (vectors @ (reciprocal * (vectors.mH @ b.unsqueeze(-1)))).squeeze(-1),
        is_pseudo=not bool(kept.all()),
    )


def _system_by_system(matrix: Tensor, b: Tensor, symmetric: bool) -> Tensor:
    """For rectangular matrices, and for those with a NaN, at which LAPACK raises wherever it stands in a batch.

    b has the shape (*batch, m, 1). The finite systems are solved, the others are NaN.
    """
    shape = torch.broadcast_shapes(matrix.shape[:-2], b.shape[:-2])
    matrices = matrix.expand(*shape, *matrix.shape[-2:]).reshape(-1, *matrix.shape[-2:])
    vectors = b.expand(*shape, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
    finite = matrices.isfinite().flatten(1).all(-1) & vectors.isfinite().flatten(1).all(-1)
    x = vectors.new_full((len(vectors), matrix.shape[-1], 1), torch.nan)
    if bool(finite.any()) and matrix.shape[-1] == matrix.shape[-2]:
        found = _inverse(matrices[finite], symmetric) or _pseudo_inverse(matrices[finite], symmetric)
        x[finite] = found.apply(vectors[finite].squeeze(-1), False).unsqueeze(-1)
    elif bool(finite.any()):
        x[finite] = torch.linalg.pinv(matrices[finite]) @ vectors[finite]
    return x.reshape(*shape, *x.shape[-2:])
