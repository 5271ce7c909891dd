"""The matrix itself, factorised."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..info import LinearSolution, Status
from ..operators import LinearOperator
from .base import LinearSolver
from .system import System


class Dense(LinearSolver):
    """Forms the matrix by n products and factorises it: for small systems, also many of them at once.

    Cholesky where the structure is symmetric and the matrix turns out positive definite; otherwise the eigenvalue
    decomposition for symmetric and LU for general structure. A singular matrix gives the least-squares solution of
    minimum norm; where that does not solve the system, the report says BREAKDOWN.

    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    >>> Dense()(A, torch.tensor([2.0, 3.0])).value
    tensor([3., 1.])
    """

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        system = System(A, b)
        matrix = system.to_dense()
        x = _by_structure(matrix, b.unsqueeze(-1), A.is_symmetric).squeeze(-1)
        zero = torch.zeros(b.shape[:-1], dtype=torch.int64, device=b.device)
        info = self._info(system, b, x, zero, zero + int(Status.BREAKDOWN))
        # A small residual is what rounding leaves; a singular matrix leaves a large one.
        rounded = (info.status == Status.BREAKDOWN) & (info.residual_norm < torch.finfo(b.dtype).eps ** 0.5)
        status = torch.where(rounded, int(Status.STAGNATED), info.status)
        return LinearSolution(x, replace(info, status=status))


def _by_structure(matrix: Tensor, b: Tensor, symmetric: bool) -> Tensor:
    if matrix.shape[-1] == 0:
        return torch.zeros_like(b)
    if not bool(matrix.isfinite().all()) or not bool(b.isfinite().all()):
        return _system_by_system(matrix, b, symmetric)
    if symmetric:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not (bool(failed.any()) or _is_singular(factor, power=2)):
            return torch.cholesky_solve(b, factor)
        return _by_eigenvalues(matrix, b)
    factor, pivots, failed = torch.linalg.lu_factor_ex(matrix)
    if bool(failed.any()) or _is_singular(factor):
        return torch.linalg.pinv(matrix) @ b
    return torch.linalg.lu_solve(factor, pivots, b)


def _is_singular(factor: Tensor, power: int = 1) -> bool:
    """Whether a pivot of a factorisation is lost in rounding; those of Cholesky are the squares of its diagonal."""
    pivots = factor.diagonal(dim1=-2, dim2=-1).abs() ** power
    smallest = torch.finfo(pivots.dtype).eps * pivots.shape[-1] * pivots.amax(-1)
    return bool((pivots.amin(-1) <= smallest).any())


def _by_eigenvalues(matrix: Tensor, b: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    cutoff = torch.finfo(values.dtype).eps * values.shape[-1] * values.abs().amax(-1, keepdim=True)
    kept = values.abs() > cutoff
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1), 0).unsqueeze(-1)
    return vectors @ (inverse * (vectors.mH @ b))


def _system_by_system(matrix: Tensor, b: Tensor, symmetric: bool) -> Tensor:
    """LAPACK raises on a NaN anywhere in a batch: the finite systems are solved, the others are NaN."""
    shape = torch.broadcast_shapes(matrix.shape[:-2], b.shape[:-2])
    matrices = matrix.expand(*shape, *matrix.shape[-2:]).reshape(-1, *matrix.shape[-2:])
    vectors = b.expand(*shape, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
    finite = matrices.isfinite().flatten(1).all(-1) & vectors.isfinite().flatten(1).all(-1)
    x = torch.full_like(vectors, torch.nan)
    if bool(finite.any()):
        x[finite] = _by_structure(matrices[finite], vectors[finite], symmetric)
    return x.reshape(*shape, *b.shape[-2:])
