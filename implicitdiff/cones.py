"""Convex cones K and the nearest points of them, for :class:`implicitdiff.conditions.ConicProgram`.

Sizes, order of entries and scaling are those of Clarabel. A cone of your own is a small class with a ``size`` and
``project``, in operations of torch.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._cone_projections import positive_semidefinite_cone, second_order_cone
from ._exponential_cone import exponential_cone

__all__ = ["Cone", "Exponential", "NonNegative", "PositiveSemidefinite", "SecondOrder", "Zero"]
__dir__ = __all__.copy  # for tab completion


class Cone(ABC):
    """A closed convex cone K of vectors.

    Projections have derivatives of every order, except at kinks, where they are those of one side. They take and
    return vectors of shape (*batch, size). A cone of one's own writes :attr:`size` and :meth:`project`; equal ones (by
    ``==``) that follow each other in a programme are projected onto as one batch. What it raises is up to it.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class NonPositive(Cone):
    ...     n: int
    ...     @property
    ...     def size(self) -> int:
    ...         return self.n
    ...     def project(self, v: torch.Tensor) -> torch.Tensor:
    ...         return v.clamp(max=0)
    >>> v = torch.tensor([-1.0, 2.0])
    >>> NonPositive(2).project(v), NonPositive(2).project_dual(v)
    (tensor([-1.,  0.]), tensor([-1.,  0.]))
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of entries of its vectors."""

    @abstractmethod
    def project(self, v: Tensor) -> Tensor:
        """The nearest point of K to v, of shape (*batch, size)."""

    def project_dual(self, v: Tensor) -> Tensor:
        """The nearest point of the dual cone {y : ⟨y, s⟩ ≥ 0 for every s of K}, by Moreau's v = Π_K*(v) − Π_K(−v).

        >>> NonNegative(2).project_dual(torch.tensor([1.0, -1.0])), Zero(2).project_dual(torch.tensor([1.0, -1.0]))
        (tensor([1., 0.]), tensor([ 1., -1.]))
        """
        return v + self.project(-v)


@dataclass(frozen=True)
class _Sized(Cone):
    """A cone of a family with one size."""

    n: int
    least: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < self.least:
            raise ValueError(
                f"n is {self.n!r}, but {type(self).__name__}(n) takes an integer of at least {self.least}."
            )

    @property
    def size(self) -> int:
        return self.n


class Zero(_Sized):
    """{0} in n dimensions: rows that are equalities. Its dual is the whole space.

    Vectors are (*batch, n). Raises ValueError for an n below 0.

    >>> cone = Zero(2)
    >>> cone.size, cone.project(torch.tensor([1.0, 2.0]))
    (2, tensor([0., 0.]))
    """

    def project(self, v: Tensor) -> Tensor:
        return 0 * v


class NonNegative(_Sized):
    """{s : s ≥ 0} in n dimensions, its own dual: rows that are inequalities A x ≤ b.

    Vectors are (*batch, n). Raises ValueError for an n below 0.

    >>> NonNegative(2).project(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    def project(self, v: Tensor) -> Tensor:
        return torch.relu(v)


class SecondOrder(_Sized):
    """{(t, x) : ‖x‖₂ ≤ t} in n dimensions, t first; its own dual.

    Vectors are (*batch, n). Raises ValueError for an n below 1. The projection is that of
    :func:`~implicitdiff.projections.second_order_cone`.

    >>> SecondOrder(3).project(torch.tensor([0.0, 3.0, 4.0]))
    tensor([2.5000, 1.5000, 2.0000])
    """

    least = 1

    def project(self, v: Tensor) -> Tensor:
        return second_order_cone(v)


class PositiveSemidefinite(_Sized):
    """Symmetric n × n matrices without a negative eigenvalue, as vectors of n(n + 1)/2 entries; its own dual.

    The vector is the upper triangle, column by column, with √2 on the entries off the diagonal, so that inner products
    of vectors are those of matrices: (X₁₁, √2 X₁₂, X₂₂, √2 X₁₃, √2 X₂₃, X₃₃, …). That is Clarabel's
    ``PSDTriangleConeT``; SCS has the lower triangle column by column, another order from n = 3 on.

    Vectors are (*batch, n(n + 1)/2), matrices (*batch, n, n). Raises ValueError for an n below 0. The projection is
    that of :func:`~implicitdiff.projections.positive_semidefinite_cone`.

    >>> cone = PositiveSemidefinite(2)
    >>> cone.matrix(cone.project(cone.vector(torch.tensor([[0.0, 2.0], [2.0, 0.0]])))).round(decimals=3)
    tensor([[1., 1.],
            [1., 1.]])
    """

    @property
    def size(self) -> int:
        return self.n * (self.n + 1) // 2

    def project(self, v: Tensor) -> Tensor:
        return self.vector(positive_semidefinite_cone(self.matrix(v)))

    def vector(self, X: Tensor) -> Tensor:
        """The vector, of shape (*batch, size), of symmetric matrices (*batch, n, n)."""
        column, row = torch.tril_indices(self.n, self.n, device=X.device)
        return torch.where(row == column, 1, X.new_full((), math.sqrt(2))) * X[..., row, column]

    def matrix(self, v: Tensor) -> Tensor:
        """The symmetric matrices, of shape (*batch, n, n), of vectors (*batch, size)."""
        i = torch.arange(self.n, device=v.device)
        low, high = torch.minimum(i, i.unsqueeze(-1)), torch.maximum(i, i.unsqueeze(-1))
        return torch.where(low == high, 1, v.new_full((), math.sqrt(0.5))) * v[..., high * (high + 1) // 2 + low]


@dataclass(frozen=True)
class Exponential(Cone):
    """The closure of {(x, y, z) : y exp(x/y) ≤ z, y > 0}, the order of Clarabel and SCS.

    Its dual is the closure of {(u, v, w) : −u exp(v/u) ≤ e w, u < 0}.

    Vectors are (*batch, 3), others raise ValueError. The projection is that of
    :func:`~implicitdiff.projections.exponential_cone`.

    >>> Exponential().project(torch.tensor([1.0, 1.0, 0.0])).round(decimals=3)
    tensor([0.1470, 0.4350, 0.6090])
    """

    @property
    def size(self) -> int:
        return 3

    def project(self, v: Tensor) -> Tensor:
        return exponential_cone(v)


def size_of(cones: Sequence[Cone]) -> int:
    """The number of entries of the product of cones."""
    return sum(cone.size for cone in cones)


def project_onto_product(cones: Sequence[Cone], v: Tensor) -> Tensor:
    """The nearest point of K₁ × K₂ × …; equal cones next to each other are one batch."""
    parts, start = [v[..., :0]], 0
    for cone, group in itertools.groupby(cones):
        count = len(list(group))
        part = v[..., start : start + count * cone.size]
        parts.append(cone.project(part.unflatten(-1, (count, cone.size))).flatten(-2))
        start += count * cone.size
    return torch.cat(parts, -1)
