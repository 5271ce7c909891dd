"""Linear systems with the derivative of a forward–backward step, on the support of its backward step.

    F(x) = x − P(x − S ∇f(x)),   A = ∂F/∂x = I − D (I − S H),   D = ∂P,  H = ∇²f,  S = diag(stepsizes)

Where D is diagonal (a 0/1 mask for the lasso, a projection onto a box, …), nothing couples the entries with d = 0 back,
and with K = (D⁻¹ − I) S⁻¹ + H on the others, which is symmetric,

    A u = b:   u = b off the support,   K u = (D S)⁻¹ b − H b̃  on it (b̃: b off the support, 0 on it);
    Aᵀ u = g:  K w = g on the support,  u = (D S)⁻¹ w  on it,  u = g − H w  off it.

For the lasso K is the Hessian on the support (Bertrand et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._vectors import GOLDEN, SILVER, probe
from .operators import LinearOperator
from .operators.base import Origin


class Support:
    """The support of d (*batch, n) and the systems on it; ``hessian`` is symmetric of shape (n, n), s like d."""

    def __init__(self, d: Tensor, s: Tensor, hessian: LinearOperator) -> None:
        self.hessian, self.n = hessian, d.shape[-1]
        mask = d != 0
        self.mask, self.weight = mask, 1 / torch.where(mask, d * s, 1)
        self.size = int(mask.sum(-1).max()) if d.numel() else 0
        # The entries of each support first, in their order; smaller supports of a batch are padded.
        self._places = torch.argsort(~mask, dim=-1, stable=True)[..., : self.size]
        self._used = mask.gather(-1, self._places)
        diagonal = torch.where(mask, (1 - d) / torch.where(mask, d * s, 1), 0)
        self.operator: LinearOperator = _OnSupport(self, diagonal.gather(-1, self._places))

    def restrict(self, v: Tensor) -> Tensor:
        """(*batch, n) → (*batch, size), 0 in the padding."""
        return torch.where(self._used, v.gather(-1, self._places), 0)

    def extend(self, w: Tensor) -> Tensor:
        """(*batch, size) → (*batch, n), 0 off the support."""
        return torch.zeros_like(self.weight).scatter(-1, self._places, torch.where(self._used, w, 0))

    def reduced(self, b: Tensor, transposed: bool) -> Tensor:
        """The right-hand side of the system with K."""
        if transposed:
            return self.restrict(b)
        return self.restrict(self.weight * b - self.hessian.matvec(torch.where(self.mask, 0, b)))

    def full(self, w: Tensor, b: Tensor, transposed: bool) -> Tensor:
        """The solution of the full system from that with K."""
        wide = self.extend(w)
        if not transposed:
            return torch.where(self.mask, wide, b)
        return torch.where(self.mask, self.weight * wide, b - self.hessian.matvec(wide))


class _OnSupport(LinearOperator):
    """K, and the identity in the padding."""

    def __init__(self, support: Support, diagonal: Tensor) -> None:
        batch_shape = tuple(diagonal.shape[:-1])
        super().__init__(
            support.size, structure="symmetric", batch_shape=batch_shape, dtype=diagonal.dtype, device=diagonal.device
        )
        self.support, self.added, self.origin = support, diagonal, Origin(whole=support.n)

    def matvec(self, v: Tensor) -> Tensor:
        support = self.support
        product = support.restrict(support.hessian.matvec(support.extend(v))) + self.added * v
        return torch.where(support._used, product, v)

    rmatvec = matvec

    def to_dense(self) -> Tensor:
        if 0 in self.shape:
            return self.added.new_zeros(*self.batch_shape, *self.shape)
        return torch.func.vmap(self.matvec)(self._basis()).movedim(0, -1)


def diagonal_of(pullback: Callable[[Tensor], Tensor], like: Tensor) -> Tensor | None:
    """The diagonal d (*batch, n) of a linear map v ↦ Dᵀ v that is diagonal; None where it is not.

    Two vectors tell: a map that is not diagonal does not multiply the entries of both by the same numbers.
    """
    first, second = probe(like, GOLDEN), probe(like, SILVER)
    d = pullback(first) / first
    error = (pullback(second) - d * second).abs()
    return d if bool((error <= 100 * torch.finfo(like.dtype).eps * d.abs()).all()) else None
