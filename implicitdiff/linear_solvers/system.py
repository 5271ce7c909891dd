"""The linear system as the solvers work with it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .._lanczos import Notes
from .._timing import timed
from ..operators import LinearOperator


class System(LinearOperator):
    """The operator that a solver works with: it counts the products and carries the preconditioner.

    What ``start`` and ``step`` of an :class:`~implicitdiff.IterativeLinearSolver` get as ``A``. ``A(v)`` is the product
    with v of shape (*batch, n), ``A.rmatvec(v)`` that with Aᵀ, ``A.precondition(v)`` is M⁻¹ v, of the same shape;
    dtype and device are those of b where the operator has none. Its errors are those of
    :class:`~implicitdiff.LinearOperator`.

    >>> from implicitdiff.operators import DiagonalOperator
    >>> A = System(DiagonalOperator(torch.tensor([2.0, 4.0])), b=torch.ones(2), precondition=lambda v: v / 2)
    >>> A(torch.ones(2)), A.precondition(torch.ones(2)), A.matvecs
    (tensor([2., 4.]), tensor([0.5000, 0.5000]), 1)
    """

    def __init__(self, A: LinearOperator, b: Tensor, precondition: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(
            A.shape, structure=A.structure, batch_shape=A.batch_shape, dtype=A.dtype or b.dtype, device=b.device
        )
        self._b = b
        self.A, self.matvecs, self.diagonal_is_cheap = A, 0, A.diagonal_is_cheap
        self.origin = A.origin
        self.notes: Notes = []
        """What a method leaves at each step, for what it tells of the spectrum."""
        self.first_product: Tensor | None = None
        """A b, where the method starts at zero and keeps it."""
        self.in_place = b.ndim == 1
        """Whether the method may write over its state: nobody asks for the old one where a single system is followed
        step by step."""
        self.precondition = precondition or _identity
        """v ↦ M⁻¹ v; the identity without a preconditioner."""

    def traceable(self) -> System:
        """The same with products that torch.compile can follow."""
        part = System(self.A.traceable(), self._b, self.precondition)
        part.in_place = False
        return part

    def opened(self) -> System:
        """The same for a few steps, with what their products share computed once, and tallies of its own."""
        part = System(self.A.opened(), self._b, self.precondition)
        part.in_place = False
        return part

    @property
    def tallies(self) -> tuple[int, Notes]:
        """The products and the notes, which :meth:`add` takes over from a part."""
        return self.matvecs, self.notes

    def add(self, tallies: tuple[int, Notes], steps: int, of: int) -> None:
        """Take over the tallies of a part: of its products, those of so many of its steps."""
        self.matvecs += tallies[0] * steps // of
        self.notes += tallies[1]

    @property
    def is_preconditioned(self) -> bool:
        """Whether ``precondition`` is not the identity."""
        return self.precondition is not _identity

    @timed("products")
    def matvec(self, v: Tensor) -> Tensor:
        self.matvecs += 1
        return self.A.matvec(v)

    @timed("products")
    def rmatvec(self, v: Tensor) -> Tensor:
        self.matvecs += 1
        return self.A.rmatvec(v)

    @timed("matrix of A")
    def to_dense(self) -> Tensor:
        self.matvecs += self.shape[1]
        return self.A.to_dense() if self.A.dtype is not None else super().to_dense()

    def diagonal(self) -> Tensor:
        # The operator's own way, unless that is by products too: they count.
        return self.A.diagonal() if self.diagonal_is_cheap else self.to_dense().diagonal(dim1=-2, dim2=-1)


def _identity(v: Tensor) -> Tensor:
    return v


def initial(A: System, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first iterate and its residual; the start at zero needs no product."""
    return (b.new_zeros(*b.shape[:-1], A.shape[1]), b) if x0 is None else (x0, b - A(x0))
