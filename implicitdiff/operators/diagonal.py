"""Diagonal operators."""

from __future__ import annotations

from torch import Tensor

from .base import LinearOperator, Structure


class DiagonalOperator(LinearOperator):
    """diag(d), for d of shape (*batch, n).

    ``structure`` None means symmetric, or general for a complex d. Raises ValueError for a scalar, and what
    :class:`~implicitdiff.LinearOperator` raises.

    >>> import torch
    >>> DiagonalOperator(torch.tensor([2.0, 3.0]), structure="positive_definite") @ torch.tensor([1.0, 1.0])
    tensor([2., 3.])
    """

    diagonal_is_cheap = True

    def __init__(self, diagonal: Tensor, structure: Structure | None = None) -> None:
        if diagonal.ndim < 1:
            raise ValueError("diagonal is a scalar, but it must be a vector: (*batch, n).")
        # A complex diagonal matrix is not Hermitian in general.
        structure = structure or ("general" if diagonal.is_complex() else "symmetric")
        super().__init__(
            diagonal.shape[-1],
            structure=structure,
            batch_shape=tuple(diagonal.shape[:-1]),
            dtype=diagonal.dtype,
            device=diagonal.device,
        )
        self._diagonal = diagonal

    def matvec(self, v: Tensor) -> Tensor:
        return self._diagonal * v

    def rmatvec(self, v: Tensor) -> Tensor:
        return self._diagonal.conj() * v

    def to_dense(self) -> Tensor:
        return self._diagonal.diag_embed()

    def diagonal(self) -> Tensor:
        return self._diagonal
