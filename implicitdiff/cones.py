"""Convex cones K and the nearest points of them, for :class:`implicitdiff.conditions.ConicProgram`.

Sizes, order of entries and scaling are those of Clarabel. A cone of your own is a small class with a ``dimension`` and
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


class Cone(ABC):
    """A closed convex cone K of vectors.

    Projections have derivatives of every order, except at kinks, where they are those of one side.
    """

    @property
    @abstractmethod
    def dimension(self) -> int:
        """The number of entries of its vectors."""

    @abstractmethod
    def project(self, v: Tensor) -> Tensor:
        """The nearest point of K to v, of shape (*batch, dimension)."""

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
            raise ValueError(f"{type(self).__name__}({self.n!r}): n must be an integer of at least {self.least}.")

    @property
    def dimension(self) -> int:
        return self.n


class Zero(_Sized):
    """{0} in n dimensions: rows that are equalities. Its dual is the whole space."""

    def project(self, v: Tensor) -> Tensor:
        return torch.zeros_like(v)


class NonNegative(_Sized):
    """{s : s ≥ 0} in n dimensions, its own dual: rows that are inequalities A x ≤ b."""

    def project(self, v: Tensor) -> Tensor:
        return torch.relu(v)


class SecondOrder(_Sized):
    """{(t, x) : ‖x‖₂ ≤ t} in n dimensions, t first; its own dual.

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

    >>> cone = PositiveSemidefinite(2)
    >>> cone.to_matrix(cone.project(cone.to_vector(torch.tensor([[0.0, 2.0], [2.0, 0.0]])))).round(decimals=3)
    tensor([[1., 1.],
            [1., 1.]])
    """

    @property
    def dimension(self) -> int:
        return self.n * (self.n + 1) // 2

    def project(self, v: Tensor) -> Tensor:
        return self.to_vector(positive_semidefinite_cone(self.to_matrix(v)))

    def to_vector(self, X: Tensor) -> Tensor:
        """The vector, of shape (*batch, dimension), of symmetric matrices (*batch, n, n)."""
        column, row = torch.tril_indices(self.n, self.n, device=X.device)
        return torch.where(row == column, 1, math.sqrt(2)).to(X.dtype) * X[..., row, column]

    def to_matrix(self, v: Tensor) -> Tensor:
        """The symmetric matrices, of shape (*batch, n, n), of vectors (*batch, dimension)."""
        i = torch.arange(self.n, device=v.device)
        low, high = torch.minimum(i, i.unsqueeze(-1)), torch.maximum(i, i.unsqueeze(-1))
        return torch.where(low == high, 1, math.sqrt(0.5)).to(v.dtype) * v[..., high * (high + 1) // 2 + low]


@dataclass(frozen=True)
class Exponential(Cone):
    """The closure of {(x, y, z) : y exp(x/y) ≤ z, y > 0}, the order of Clarabel and SCS.

    Its dual is the closure of {(u, v, w) : −u exp(v/u) ≤ e w, u < 0}.

    >>> Exponential().project(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    tensor([0.5789, 0.8818, 1.7002], dtype=torch.float64)
    """

    @property
    def dimension(self) -> int:
        return 3

    def project(self, v: Tensor) -> Tensor:
        return exponential_cone(v)


def dimension_of(cones: Sequence[Cone]) -> int:
    """The dimension of the product of cones."""
    return sum(cone.dimension for cone in cones)


def project_onto_product(cones: Sequence[Cone], v: Tensor) -> Tensor:
    """The nearest point of K₁ × K₂ × …; equal cones next to each other are one batch."""
    parts, start = [v[..., :0]], 0
    for cone, group in itertools.groupby(cones):
        count = len(list(group))
        part = v[..., start : start + count * cone.dimension]
        parts.append(cone.project(part.unflatten(-1, (count, cone.dimension))).flatten(-2))
        start += count * cone.dimension
    return torch.cat(parts, -1)
