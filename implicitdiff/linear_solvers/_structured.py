"""Direct solves that never form a dense matrix, for operators that allow it."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from ..operators import BlockDiagonalOperator, DiagonalOperator, LinearOperator, LowRankUpdate, SparseOperator


def has_direct_solve(A: LinearOperator) -> bool:
    """Whether A is of a kind that :func:`solve_structured` may solve."""
    if isinstance(A, BlockDiagonalOperator):
        return all(map(has_direct_solve, A.blocks))
    if isinstance(A, LowRankUpdate):
        return has_direct_solve(A.A)
    return isinstance(A, (DiagonalOperator, SparseOperator))


def solve_structured(A: LinearOperator, b: Tensor) -> Tensor | None:
    """A⁻¹ b for b of shape (*batch, n); None where A has no structure to use, or is singular."""
    if isinstance(A, DiagonalOperator):
        return b / A.diagonal() if bool((A.diagonal() != 0).all()) else None
    if isinstance(A, SparseOperator):
        return _by_superlu(A, b)
    if isinstance(A, BlockDiagonalOperator):
        sizes = [block.shape[0] for block in A.blocks]
        parts = [solve_structured(block, part) for block, part in zip(A.blocks, b.split(sizes, -1), strict=True)]
        return None if any(part is None for part in parts) else torch.cat(parts, dim=-1)  # type: ignore[arg-type]
    if isinstance(A, LowRankUpdate):
        return _by_woodbury(A, b)
    return None


def _by_superlu(A: SparseOperator, b: Tensor) -> Tensor | None:
    if b.device.type != "cpu" or not A.is_square or 0 in A.shape:
        return None
    csr = A.compressed
    entries = (csr.values().numpy(), csr.col_indices().numpy(), csr.crow_indices().numpy())
    try:
        factor = scipy.sparse.linalg.splu(scipy.sparse.csr_matrix(entries, shape=A.shape).tocsc())
    except RuntimeError:  # "Factor is exactly singular"
        return None
    flat = b.resolve_conj().reshape(-1, A.shape[0]).numpy()
    if np.iscomplexobj(flat) and not np.iscomplexobj(entries[0]):
        solved = factor.solve(flat.real.T.copy()) + 1j * factor.solve(flat.imag.T.copy())
    else:
        solved = factor.solve(flat.T.copy())
    return torch.from_numpy(np.ascontiguousarray(solved.T)).to(b.dtype).reshape(b.shape)


def _by_woodbury(A: LowRankUpdate, b: Tensor) -> Tensor | None:
    """(D + U Vᴴ)⁻¹ b = y − Z (I + Vᴴ Z)⁻¹ Vᴴ y with y = D⁻¹ b and Z = D⁻¹ U (Golub and Van Loan 2013, Eq. 2.1.4)."""
    y, columns = solve_structured(A.A, b), solve_structured(A.A, A.U.mT)
    if y is None or columns is None:
        return None
    Z = columns.mT
    capacitance = torch.eye(Z.shape[-1], dtype=Z.dtype, device=Z.device) + A.V.mH @ Z
    inner, failed = torch.linalg.solve_ex(capacitance, A.V.mH @ y.unsqueeze(-1))
    return None if bool(failed.any()) else y - (Z @ inner).squeeze(-1)
