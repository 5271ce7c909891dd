"""Sparse operators."""

from __future__ import annotations

import warnings
from functools import cached_property

import torch
from torch import Tensor

from .._captures import transform_level
from .base import LinearOperator, Structure


class SparseOperator(LinearOperator):
    """A sparse tensor of torch, COO or CSR, of shape (m, n), as an operator.

    Its products are differentiable in the entries and work under every transform. :class:`~implicitdiff.Dense`
    factorises it as it is, by SuperLU. Raises ValueError for a tensor of another layout, and what
    :class:`~implicitdiff.LinearOperator` raises.

    >>> A = SparseOperator(torch.tensor([[2.0, 0.0], [1.0, 3.0]]).to_sparse())
    >>> A @ torch.tensor([1.0, 1.0]), A.T @ torch.tensor([1.0, 1.0])
    (tensor([2., 4.]), tensor([3., 3.]))
    """

    diagonal_is_cheap = True

    def __init__(self, matrix: Tensor, structure: Structure = "general") -> None:
        if matrix.layout not in (torch.sparse_coo, torch.sparse_csr) or matrix.ndim != 2:
            raise ValueError(
                f"matrix has the layout {matrix.layout} and the shape {tuple(matrix.shape)}, but it must be a sparse "
                f"COO or CSR matrix: use matrix.to_sparse(), or DenseOperator for a dense one."
            )
        if matrix.layout is torch.sparse_csr:
            counts = matrix.crow_indices().diff()
            rows = torch.arange(len(counts), device=matrix.device).repeat_interleave(counts)
            entries = (rows, matrix.col_indices(), matrix.values())
        else:
            matrix = matrix.coalesce()
            entries = (*matrix.indices(), matrix.values())
        self._set(*entries, (matrix.shape[0], matrix.shape[1]), structure)

    @classmethod
    def from_entries(
        cls,
        rows: Tensor,
        columns: Tensor,
        values: Tensor,
        shape: tuple[int, int],
        structure: Structure = "general",
    ) -> SparseOperator:
        """The operator of the entries A[rows[k], columns[k]] = values[k], those of one place added up.

        For values that torch.func follows, where torch does not make sparse tensors. The three have one shape (k,).

        >>> entries = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([2.0, 3.0])
        >>> SparseOperator.from_entries(*entries, shape=(2, 2)).to_dense()
        tensor([[0., 2.],
                [3., 0.]])
        """
        new = cls.__new__(cls)
        new._set(rows, columns, values, shape, structure)
        return new

    def _set(self, rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int], structure: Structure) -> None:
        super().__init__(shape, structure=structure, dtype=values.dtype, device=values.device)
        self.rows, self.columns, self.values = rows, columns, values
        """The entries, each of shape (number of entries,)."""

    def matvec(self, v: Tensor) -> Tensor:
        if self._is_followed(v):
            return _gathered(self.rows, self.columns, self.values, self.shape[0], v)
        return _multiplied(self.compressed, v)

    def rmatvec(self, v: Tensor) -> Tensor:
        if self._is_followed(v):
            return _gathered(self.columns, self.rows, self.values.conj_physical(), self.shape[1], v)
        return _multiplied(self.compressed if self.is_symmetric else self._adjoint, v)

    @property
    def T(self) -> SparseOperator:
        """The transpose (the adjoint, for complex operators)."""
        if self.is_symmetric:
            return self
        shape = (self.shape[1], self.shape[0])
        return SparseOperator.from_entries(self.columns, self.rows, self.values.conj_physical(), shape, self.structure)

    def _is_followed(self, v: Tensor) -> bool:
        """Whether derivatives, a transform or a mode look on, which torch's sparse products do not serve."""
        if transform_level() or torch._C._is_torch_function_mode_enabled():
            return True
        return torch.is_grad_enabled() and (self.values.requires_grad or v.requires_grad)

    @cached_property
    def compressed(self) -> Tensor:
        """The matrix in torch's CSR layout, without a graph."""
        return _csr(self.rows, self.columns, self.values, self.shape)

    @cached_property
    def _adjoint(self) -> Tensor:
        return _csr(self.columns, self.rows, self.values.conj_physical(), self.shape[::-1])

    def to_dense(self) -> Tensor:
        return self.values.new_zeros(self.shape).index_put((self.rows, self.columns), self.values, accumulate=True)

    def diagonal(self) -> Tensor:
        kept = torch.where(self.rows == self.columns, self.values, 0)
        return kept.new_zeros(min(self.shape)).index_add(0, self.rows.clamp(max=min(self.shape) - 1), kept)


def _gathered(rows: Tensor, columns: Tensor, values: Tensor, m: int, v: Tensor) -> Tensor:
    """The product in operations that derivatives and transforms follow."""
    products = values * v[..., columns]
    return products.new_zeros(*products.shape[:-1], m).index_add(-1, rows, products)


def _multiplied(matrix: Tensor, v: Tensor) -> Tensor:
    """The fast product; it knows no lower precision, and inside autocast it would fail."""
    with torch.autocast(v.device.type, enabled=False):
        if v.ndim == 1:
            return matrix @ v
        return (matrix @ v.reshape(-1, matrix.shape[1]).mT).mT.reshape(*v.shape[:-1], matrix.shape[0])


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    entries = torch.stack([rows, columns])
    matrix = torch.sparse_coo_tensor(entries, values.detach(), shape, check_invariants=False)
    with warnings.catch_warnings():  # that the layout, ten times as fast, is "in beta state"
        warnings.simplefilter("ignore", UserWarning)
        return matrix.to_sparse_csr()
