"""A matrix of low rank added to an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import STRUCTURES, LinearOperator, Structure


class LowRankUpdate(LinearOperator):
    """A + U Vᵀ with U and V of shape (*batch, n, k); V is U where it is not given.

    With V = U, the structure is that of A, as U Uᵀ is symmetric and has no negative eigenvalue; otherwise general.
    :class:`~implicitdiff.Dense` solves it through A where A is diagonal or sparse, by the identity of Sherman, Morrison
    and Woodbury (Golub and Van Loan 2013, Eq. 2.1.4).

    Raises ValueError where A is not square, or U or V does not fit it.

    >>> from implicitdiff.operators import DiagonalOperator
    >>> A = LowRankUpdate(DiagonalOperator(torch.tensor([1.0, 2.0])), torch.tensor([[1.0], [1.0]]))
    >>> A.to_dense()
    tensor([[2., 1.],
            [1., 3.]])
    """

    def __init__(self, A: LinearOperator, U: Tensor, V: Tensor | None = None) -> None:
        other = U if V is None else V
        if U.ndim < 2 or U.shape[-2:] != other.shape[-2:] or U.shape[-2] != A.shape[0] or not A.is_square:
            raise ValueError(
                f"A has the shape {A.shape}, U {tuple(U.shape)} and V {tuple(other.shape)}, but for A of (n, n), U and "
                f"V must be (*batch, n, k)."
            )
        structure: Structure = min(A.structure, "positive_definite" if V is None else "general", key=STRUCTURES.index)
        batch_shape = tuple(torch.broadcast_shapes(A.batch_shape, U.shape[:-2], other.shape[:-2]))
        super().__init__(A.shape, structure=structure, batch_shape=batch_shape, dtype=U.dtype, device=U.device)
        self.A, self.U, self.V = A, U, other
        self.diagonal_is_cheap = A.diagonal_is_cheap

    def matvec(self, v: Tensor) -> Tensor:
        return self.A.matvec(v) + _times(self.U, _times(self.V.mH, v))

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.A.rmatvec(v) + _times(self.V, _times(self.U.mH, v))

    @property
    def T(self) -> LinearOperator:
        return self if self.is_symmetric else LowRankUpdate(self.A.T, self.V, self.U)

    def to_dense(self) -> Tensor:
        return self.A.to_dense() + self.U @ self.V.mH

    def diagonal(self) -> Tensor:
        return self.A.diagonal() + (self.U * self.V.conj()).sum(-1)


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)
