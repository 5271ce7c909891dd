"""What a linear operator is, the two plain kinds of it, and their algebra."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Number
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .._captures import is_transformed

Structure = Literal["general", "symmetric", "positive_definite"]
"""What is promised of an operator. "positive_definite" includes symmetric (Hermitian, for complex operators)."""

STRUCTURES: tuple[Structure, ...] = ("general", "symmetric", "positive_definite")


def check_structure(structure: Structure) -> Structure:
    if structure not in STRUCTURES:
        raise ValueError(f"structure is {structure!r}, but it must be one of {', '.join(map(repr, STRUCTURES))}.")
    return structure


@dataclass
class Origin:
    """What is known, beyond its products, of an operator that is the derivative ∂F/∂x of a condition, or of its
    transpose."""

    of_fixed_point: bool = False
    """Whether A = I − ∂T/∂x for an update T, whose own iteration then solves with A."""
    estimated_inverse: Callable[[Tensor], Tensor] | None = None
    """v ↦ M v with a symmetric M ≈ A⁻¹, where the inner solver has left one."""
    kinks: Callable[[], Tensor] | None = None
    """Which systems, (*batch,), lie at a kink of F, so that A is one of several; None where F is smooth."""
    support: Callable[[], Any] | None = None
    """The :class:`~implicitdiff._support.Support` on which systems with A are solved; None where there is none."""
    unjudged: Callable[[], Tensor] | None = None
    """F(x) / max(1, ‖x‖₂), (*batch, n), where nobody has said that x is a solution."""
    whole: int | None = None
    """The n of the operator that this one is a part of, where its products cost what that one's do."""


class LinearOperator(ABC):
    """A matrix A of shape (n, n), or a batch of them, known by its products.

    A subclass writes ``matvec`` and ``rmatvec`` and calls this constructor.

    * ``n``: the size, or a pair (m, n) for a rectangular matrix, for which :class:`~implicitdiff.LSMR` and
      :class:`~implicitdiff.Dense` find the least-squares solution;
    * ``structure``: what is promised: "general", "symmetric" or "positive_definite";
    * ``batch_shape``: of a batch of matrices; () for one;
    * ``dtype``, ``device``: None means as the vector it meets.

    ``A(v)`` or ``A @ v`` is the product, of shape (*batch, m), with v of shape (*batch, n). ``A + B``, ``s * A``,
    ``A @ B``, ``A.T`` and ``A.shift(s)`` are operators again, with the structure that can be proved of them.

    Raises ValueError for another structure, for a structure of a rectangular matrix, and where shapes do not fit:
    those of a vector, or of two operators.

    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[2.0, 1.0], [0.0, 3.0]]))
    >>> A @ torch.tensor([1.0, 1.0])
    tensor([3., 3.])
    >>> A.T(torch.tensor([1.0, 1.0]))
    tensor([2., 4.])
    >>> A.shift(1.0).to_dense()
    tensor([[3., 1.],
            [0., 4.]])
    """

    def __init__(
        self,
        n: int | tuple[int, int],
        *,
        structure: Structure = "general",
        batch_shape: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.shape: tuple[int, int] = (n, n) if isinstance(n, int) else n
        self.structure: Structure = check_structure(structure)
        if self.shape[0] != self.shape[1] and structure != "general":
            raise ValueError(f"an operator of shape {self.shape} is not square, so it cannot be {structure}.")
        self.batch_shape = tuple(batch_shape)
        self.dtype = dtype
        self.device = device
        self.origin = Origin()

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """A v, of shape (*batch, m), for v of shape (*batch, n)."""

    @abstractmethod
    def rmatvec(self, v: Tensor) -> Tensor:
        """Aᵀ v (Aᴴ v for complex operators), of shape (*batch, n), for v of shape (*batch, m)."""

    def __call__(self, v: Tensor) -> Tensor:
        if v.shape[-1:] != (self.shape[1],):
            raise ValueError(
                f"an operator of shape {self.shape} met a vector of shape {tuple(v.shape)}: "
                f"its last dimension must be {self.shape[1]}."
            )
        return self.matvec(v)

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: LinearOperator) -> LinearOperator: ...
    def __matmul__(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        return _Product(self, other) if isinstance(other, LinearOperator) else self(other)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return _Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: float | Tensor) -> LinearOperator:
        return _Affine(self, factor, 0.0) if isinstance(factor, (Number, Tensor)) else NotImplemented

    __rmul__ = __mul__

    def shift(self, s: float | Tensor) -> LinearOperator:
        """A + s·I; s a number or a tensor of shape (*batch,)."""
        return _Affine(self, 1.0, s)

    @property
    def T(self) -> LinearOperator:
        """The transpose (the adjoint, for complex operators)."""
        return self if self.is_symmetric else Transpose(self)

    @property
    def is_square(self) -> bool:
        """Whether the matrix has as many rows as columns."""
        return self.shape[0] == self.shape[1]

    @property
    def is_symmetric(self) -> bool:
        """Whether the structure promises symmetry."""
        return self.structure != "general"

    def to_dense(self) -> Tensor:
        """The matrix, of shape (*batch_shape, m, n), by n products unless the operator knows better."""
        basis = self._basis()
        if 0 in self.shape:
            return basis.new_zeros(*self.batch_shape, *self.shape)
        return torch.stack([self.matvec(e) for e in basis], dim=-1)

    diagonal_is_cheap = False
    """Whether ``diagonal()`` costs no more than a product."""

    def diagonal(self) -> Tensor:
        """The diagonal, of shape (*batch_shape, n), by n products unless the operator knows better."""
        if self.shape[0] == 0:
            return self._basis().sum(0)
        entries = [self.matvec(e)[..., i] for i, e in enumerate(self._basis())]
        return torch.stack(entries, dim=-1)

    def traceable(self) -> LinearOperator:
        """The same operator with products that torch.compile can follow."""
        return self

    def opened(self) -> LinearOperator:
        """The same operator for several products, with what they share computed once."""
        return self

    def _basis(self) -> Tensor:
        n = self.shape[1]
        eye = torch.eye(n, dtype=self.dtype, device=self.device)
        return eye.reshape(n, *(1 for _ in self.batch_shape), n).expand(n, *self.batch_shape, n)

    def in_precision(self, dtype: torch.dtype) -> LinearOperator:
        """The operator with its products computed in a lower precision, on vectors of the dtype that it takes itself.

        By ``torch.autocast``, unless the operator knows better: matrix products are computed in ``dtype``, and what
        autocast leaves alone is left alone, such as sums and all of float64.
        """
        return _Autocast(self, dtype)

    def __repr__(self) -> str:
        batch = f", batch_shape={self.batch_shape}" if self.batch_shape else ""
        return f"{type(self).__name__}(n={self.shape[0]}, structure={self.structure!r}{batch})"


class DenseOperator(LinearOperator):
    """An operator whose matrix is at hand, of shape (*batch, n, n), or (*batch, m, n) where the structure is general.

    Raises ValueError for a tensor that is not a matrix, and what :class:`~implicitdiff.LinearOperator` raises.

    >>> DenseOperator(2.0 * torch.eye(2), structure="positive_definite").diagonal()
    tensor([2., 2.])
    """

    def __init__(self, matrix: Tensor, structure: Structure = "general") -> None:
        if matrix.ndim < 2:
            raise ValueError(f"matrix has the shape {tuple(matrix.shape)}, but it must be a matrix: (*batch, m, n).")
        super().__init__(
            (matrix.shape[-2], matrix.shape[-1]),
            structure=structure,
            batch_shape=tuple(matrix.shape[:-2]),
            dtype=matrix.dtype,
            device=matrix.device,
        )
        self.matrix = matrix

    diagonal_is_cheap = True

    def matvec(self, v: Tensor) -> Tensor:
        return (self.matrix @ v.unsqueeze(-1)).squeeze(-1)

    def rmatvec(self, v: Tensor) -> Tensor:
        return (self.matrix.mH @ v.unsqueeze(-1)).squeeze(-1)

    def to_dense(self) -> Tensor:
        return self.matrix

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal(dim1=-2, dim2=-1)

    def in_precision(self, dtype: torch.dtype) -> LinearOperator:
        return _Rounded(self, dtype)


class _Rounded(LinearOperator):
    """A matrix converted to another dtype once, where autocast would convert it in each product."""

    def __init__(self, A: DenseOperator, dtype: torch.dtype) -> None:
        super().__init__(A.shape, structure=A.structure, batch_shape=A.batch_shape, dtype=A.dtype, device=A.device)
        self.low, self.origin = DenseOperator(A.matrix.to(dtype), A.structure), A.origin

    diagonal_is_cheap = True

    def matvec(self, v: Tensor) -> Tensor:
        return self.low.matvec(v.to(self.low.dtype)).to(v.dtype)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.low.rmatvec(v.to(self.low.dtype)).to(v.dtype)

    def to_dense(self) -> Tensor:
        return self.low.matrix.to(self.dtype)

    def diagonal(self) -> Tensor:
        return self.low.diagonal().to(self.dtype)


class FunctionOperator(LinearOperator):
    """An operator given by a function v ↦ A v on tensors of shape (*batch, n); ``n`` may be a pair (m, n).

    ``rmatvec`` is v ↦ Aᵀ v; without it, a general operator is transposed by differentiating ``matvec``. A ``dtype``
    of None means: as the vector it meets. Errors are those of :class:`~implicitdiff.LinearOperator`.

    >>> second_difference = FunctionOperator(
    ...     lambda v: 2 * v - torch.roll(v, 1, -1) - torch.roll(v, -1, -1), n=4, structure="symmetric")
    >>> second_difference(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([ 2., -1.,  0., -1.])
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        n: int | tuple[int, int],
        *,
        rmatvec: Callable[[Tensor], Tensor] | None = None,
        structure: Structure = "general",
        batch_shape: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(n, structure=structure, batch_shape=batch_shape, dtype=dtype, device=device)
        self._matvec, self._rmatvec = matvec, rmatvec

    def matvec(self, v: Tensor) -> Tensor:
        return self._matvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        if self._rmatvec is not None:
            return self._rmatvec(v)
        if self.is_symmetric:
            return self._matvec(v)
        return torch.func.vjp(self._matvec, v.new_zeros(*v.shape[:-1], self.shape[1]))[1](v)[0]


class Transpose(LinearOperator):
    """Aᵀ (Aᴴ, for complex operators); ``A.T`` makes it.

    Of shape (n, m) for A of shape (m, n). Errors are those of :class:`~implicitdiff.LinearOperator`.

    >>> A = DenseOperator(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> A.T, A.T(torch.tensor([2.0])), A.T.T is A
    (Transpose(n=3, structure='general'), tensor([2., 4., 6.]), True)
    """

    def __init__(self, A: LinearOperator) -> None:
        super().__init__(
            A.shape[::-1], structure=A.structure, batch_shape=A.batch_shape, dtype=A.dtype, device=A.device
        )
        self.A, self.origin, self.diagonal_is_cheap = A, A.origin, A.diagonal_is_cheap

    def matvec(self, v: Tensor) -> Tensor:
        return self.A.rmatvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.A.matvec(v)

    @property
    def T(self) -> LinearOperator:
        return self.A

    def traceable(self) -> LinearOperator:
        return Transpose(self.A.traceable())

    def opened(self) -> LinearOperator:
        return Transpose(self.A.opened())

    def to_dense(self) -> Tensor:
        return self.A.to_dense().mH

    def diagonal(self) -> Tensor:
        return self.A.diagonal().conj()

    def in_precision(self, dtype: torch.dtype) -> LinearOperator:
        return self.A.in_precision(dtype).T


class _Autocast(LinearOperator):
    """An operator whose products run under ``torch.autocast``."""

    def __init__(self, A: LinearOperator, dtype: torch.dtype) -> None:
        super().__init__(A.shape, structure=A.structure, batch_shape=A.batch_shape, dtype=A.dtype, device=A.device)
        self.A, self.origin, self.low = A, A.origin, dtype

    def matvec(self, v: Tensor) -> Tensor:
        with torch.autocast(v.device.type, self.low):
            return self.A.matvec(v).to(v.dtype)

    def rmatvec(self, v: Tensor) -> Tensor:
        with torch.autocast(v.device.type, self.low):
            return self.A.rmatvec(v).to(v.dtype)


class _Sum(LinearOperator):
    def __init__(self, A: LinearOperator, B: LinearOperator) -> None:
        structure = min(A.structure, B.structure, key=STRUCTURES.index)
        if A.shape != B.shape:
            raise ValueError(f"operators of shapes {A.shape} and {B.shape} cannot be added: the shapes must be equal.")
        super().__init__(A.shape, structure=structure, **_common(A, B))
        self.A, self.B, self.diagonal_is_cheap = A, B, A.diagonal_is_cheap and B.diagonal_is_cheap

    def matvec(self, v: Tensor) -> Tensor:
        return self.A.matvec(v) + self.B.matvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.A.rmatvec(v) + self.B.rmatvec(v)

    def to_dense(self) -> Tensor:
        return self.A.to_dense() + self.B.to_dense()

    def diagonal(self) -> Tensor:
        return self.A.diagonal() + self.B.diagonal()

    def in_precision(self, dtype: torch.dtype) -> LinearOperator:
        return _Sum(self.A.in_precision(dtype), self.B.in_precision(dtype))


class _Product(LinearOperator):
    def __init__(self, A: LinearOperator, B: LinearOperator) -> None:
        if A.shape[1] != B.shape[0]:
            raise ValueError(
                f"operators of shapes {A.shape} and {B.shape} cannot be multiplied: the inner numbers must be equal."
            )
        super().__init__((A.shape[0], B.shape[1]), structure="general", **_common(A, B))
        self.A, self.B = A, B

    def matvec(self, v: Tensor) -> Tensor:
        return self.A.matvec(self.B.matvec(v))

    def rmatvec(self, v: Tensor) -> Tensor:
        return self.B.rmatvec(self.A.rmatvec(v))

    def in_precision(self, dtype: torch.dtype) -> LinearOperator:
        return _Product(self.A.in_precision(dtype), self.B.in_precision(dtype))


class _Affine(LinearOperator):
    """factor · A + shift · I"""

    def __init__(self, A: LinearOperator, factor: float | Tensor, shift: float | Tensor) -> None:
        structure = A.structure
        if structure == "positive_definite" and not (_provably(factor, above_zero=True) and _provably(shift)):
            structure = "symmetric"
        if structure == "symmetric" and (_is_complex(factor) or _is_complex(shift)):
            structure = "general"
        shapes = (s.shape for s in (factor, shift) if isinstance(s, Tensor))
        batch_shape = tuple(torch.broadcast_shapes(A.batch_shape, *shapes))
        if not A.is_square and not (isinstance(shift, Number) and shift == 0):
            raise ValueError(f"an operator of shape {A.shape} cannot be shifted: it is not square.")
        super().__init__(A.shape, structure=structure, batch_shape=batch_shape, dtype=A.dtype, device=A.device)
        self.A, self.factor, self.shift_by, self.diagonal_is_cheap = A, factor, shift, A.diagonal_is_cheap

    def matvec(self, v: Tensor) -> Tensor:
        product = _column(self.factor) * self.A.matvec(v)
        return product + _column(self.shift_by) * v if self.is_square else product

    def rmatvec(self, v: Tensor) -> Tensor:
        product = _column(_conj(self.factor)) * self.A.rmatvec(v)
        return product + _column(_conj(self.shift_by)) * v if self.is_square else product

    def to_dense(self) -> Tensor:
        matrix = self.A.to_dense()
        eye = torch.eye(*self.shape, dtype=matrix.dtype, device=matrix.device)
        return _column(_column(self.factor)) * matrix + _column(_column(self.shift_by)) * eye

    def diagonal(self) -> Tensor:
        return _column(self.factor) * self.A.diagonal() + _column(self.shift_by)

    def in_precision(self, dtype: torch.dtype) -> LinearOperator:
        return _Affine(self.A.in_precision(dtype), self.factor, self.shift_by)


def _common(A: LinearOperator, B: LinearOperator) -> dict[str, Any]:
    batch_shape = tuple(torch.broadcast_shapes(A.batch_shape, B.batch_shape))
    return {"batch_shape": batch_shape, "dtype": A.dtype or B.dtype, "device": A.device or B.device}


def _column(s: float | Tensor) -> float | Tensor:
    return s.unsqueeze(-1) if isinstance(s, Tensor) else s


def _conj(s: float | Tensor) -> float | Tensor:
    return s.conj() if isinstance(s, Tensor) else s.conjugate()


def _is_complex(s: float | Tensor) -> bool:
    return s.is_complex() if isinstance(s, Tensor) else isinstance(s, complex)


def _provably(s: float | Tensor, above_zero: bool = False) -> bool:
    """Whether s is known to be non-negative (positive); a value inside a transform cannot be looked at."""
    if _is_complex(s) or (isinstance(s, Tensor) and is_transformed(s)):
        return False
    if isinstance(s, Tensor):
        return bool((s > 0).all() if above_zero else (s >= 0).all())
    return s > 0 if above_zero else s >= 0
