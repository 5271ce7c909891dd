"""Block-diagonal operators."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import STRUCTURES, LinearOperator


class BlockDiagonalOperator(LinearOperator):
    """diag(A₁, …, Aₖ) of square operators of any sizes, acting on the parts of one vector.

    Of shape (n, n), n the sum of theirs; batch dimensions broadcast, and the structure is the weakest of theirs. Raises
    ValueError for no block, or one that is not square.

    Blocks of equal sizes whose systems are to be solved each with its own stopping belong into one batch instead:
    ``DenseOperator(torch.stack(matrices))``.

    >>> from implicitdiff.operators import DenseOperator, DiagonalOperator
    >>> A = BlockDiagonalOperator(DenseOperator(torch.ones(2, 2)), DiagonalOperator(torch.tensor([5.0])))
    >>> A @ torch.tensor([1.0, 2.0, 3.0])
    tensor([ 3.,  3., 15.])
    """

    def __init__(self, *blocks: LinearOperator) -> None:
        if not blocks or not all(block.is_square for block in blocks):
            raise ValueError(f"blocks are {blocks}, but there must be at least one, and all square.")
        super().__init__(
            sum(block.shape[0] for block in blocks),
            structure=min((block.structure for block in blocks), key=STRUCTURES.index),
            batch_shape=tuple(torch.broadcast_shapes(*(block.batch_shape for block in blocks))),
            dtype=next((block.dtype for block in blocks if block.dtype), None),
            device=next((block.device for block in blocks if block.device), None),
        )
        self.blocks = blocks
        self.diagonal_is_cheap = all(block.diagonal_is_cheap for block in blocks)

    def _parts(self, v: Tensor) -> tuple[Tensor, ...]:
        return v.split([block.shape[0] for block in self.blocks], dim=-1)

    def matvec(self, v: Tensor) -> Tensor:
        return torch.cat([block.matvec(part) for block, part in zip(self.blocks, self._parts(v), strict=True)], dim=-1)

    def rmatvec(self, v: Tensor) -> Tensor:
        return torch.cat([block.rmatvec(part) for block, part in zip(self.blocks, self._parts(v), strict=True)], dim=-1)

    def to_dense(self) -> Tensor:
        dense = [block.to_dense() for block in self.blocks]
        matrix = dense[0].new_zeros(*self.batch_shape, *self.shape)
        start = 0
        for block in dense:
            stop = start + block.shape[-1]
            matrix[..., start:stop, start:stop] = block
            start = stop
        return matrix

    def diagonal(self) -> Tensor:
        parts = [block.diagonal() for block in self.blocks]
        return torch.cat([part.expand(*self.batch_shape, part.shape[-1]) for part in parts], dim=-1)
