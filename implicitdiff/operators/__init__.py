"""Linear operators: matrices known by their products with plain tensors of shape (*batch, n)."""

from .base import DenseOperator, FunctionOperator, LinearOperator, Structure, Transpose
from .block_diagonal import BlockDiagonalOperator
from .diagonal import DiagonalOperator
from .low_rank import LowRankUpdate
from .sparse import SparseOperator

__all__ = [
    "BlockDiagonalOperator",
    "DenseOperator",
    "DiagonalOperator",
    "FunctionOperator",
    "LinearOperator",
    "LowRankUpdate",
    "SparseOperator",
    "Structure",
    "Transpose",
]
