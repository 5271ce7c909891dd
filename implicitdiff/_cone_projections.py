"""Projections onto the second-order cone and the cone of positive semidefinite matrices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ._norms import polar
from ._parameters import check_vector


def second_order_cone(v: Tensor) -> Tensor:
    """{(t, x) : ‖x‖₂ ≤ t}, with t first; v of shape (*batch, 1 + n).

    v = (t, x) itself in the cone, 0 in its polar (‖x‖₂ ≤ −t), otherwise ½ (1 + t/‖x‖₂) (‖x‖₂, x) (Parikh and Boyd 2014,
    Section 6.3).

    Raises:
        ValueError: v of no dimension.

    >>> second_order_cone(torch.tensor([0.0, 3.0, 4.0]))
    tensor([2.5000, 1.5000, 2.0000])
    """
    check_vector(v)
    t, x = v[..., :1], v[..., 1:]
    length, unit = polar(x)
    inside, below = length < t, length <= -t
    height = t / 2 + length / 2
    return torch.where(inside, v, torch.where(below, 0, torch.cat([height, height * unit], -1)))


def positive_semidefinite_cone(V: Tensor) -> Tensor:
    """{X : X = Xᵀ, no eigenvalue of X is negative}, in the Frobenius norm.

    V = QΛQᵀ goes to QΛ₊Qᵀ, of which every derivative exists where no eigenvalue is 0, repeated or not (Malick and
    Sendov 2006, Theorem 2.7). At an eigenvalue of 0 to working precision, the derivative is that of its negative side.

    Args:
        V: shape (*batch, n, n); its symmetric part is projected.

    Raises:
        ValueError: V is not square.

    >>> positive_semidefinite_cone(torch.tensor([[0.0, 2.0], [2.0, 0.0]])).round(decimals=3)
    tensor([[1., 1.],
            [1., 1.]])
    """
    if V.ndim < 2 or V.shape[-1] != V.shape[-2]:
        raise ValueError(f"V has shape {tuple(V.shape)}, but it must be of shape (*batch, n, n).")
    A = V / 2 + V.mT / 2
    plain = A.detach()
    finite = plain.isfinite().all(-1).all(-1)[..., None]
    values, vectors = torch.linalg.eigh(torch.where(finite.unsqueeze(-1), plain, 0))
    largest = values.abs().amax(-1, keepdim=True) if V.shape[-1] else values
    rounding = V.shape[-1] * torch.finfo(V.dtype).eps * largest
    values = torch.where(values.abs() <= rounding, 0, values)
    return _PositivePart.apply(torch.where(finite, values, torch.nan), vectors, A)


class _PositivePart(torch.autograd.Function):
    """The k-th derivative of A ↦ A₊ in k symmetric directions H₁, …, H_k; for k = 0, A₊ itself.

    In the eigenbasis of A it is, summed over the orders of the directions (Higham 2008, Section 3.2; Daleckiĭ and
    Kreĭn 1965),

        Σ_bc…  λ₊[a, b, c, …, z]  (H₁)_ab (H₂)_bc ⋯        with the divided differences of λ ↦ λ₊.

    It is linear in each direction and, as A ↦ A₊ is a gradient, self-adjoint in each: so its derivatives, of both
    modes, are again of this form, and every order follows from this one rule. ``values`` and ``vectors`` of A are
    given beside it, so that they are computed once.
    """

    @staticmethod
    def forward(values: Tensor, vectors: Tensor, A: Tensor, *directions: Tensor) -> Tensor:
        positive = torch.relu(values)
        if not directions:
            return (vectors * positive.unsqueeze(-2)) @ vectors.mT
        apart = (values > 0).unsqueeze(-1) != (values > 0).unsqueeze(-2)
        gaps = apart / torch.where(apart, values.unsqueeze(-1) - values.unsqueeze(-2), 1)
        slopes = (0 * values + (values > 0)).unsqueeze(-1)  # NaN stays NaN
        first = torch.where(apart, gaps * (positive.unsqueeze(-1) - positive.unsqueeze(-2)), slopes)
        rotated = [vectors.mT @ H @ vectors for H in directions]
        terms = [_chain(first, gaps, ~apart, order) for order in itertools.permutations(rotated)]
        return vectors @ sum(terms[1:], start=terms[0]) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        values, vectors, A, *directions = ctx.saved_tensors
        g = g / 2 + g.mT / 2
        others = ([*directions[:i], *directions[i + 1 :]] for i in range(len(directions)))
        orders = [[*directions, g], *([*rest, g] for rest in others)]
        return None, None, *(
            _PositivePart.apply(values, vectors, A, *order) if needed else None
            for order, needed in zip(orders, ctx.needs_input_grad[2:], strict=True)
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        # Forward AD is off inside this rule, and dual levels do not nest: without both lines jacfwd∘jacfwd is wrong.
        with forward_ad._set_fwd_grad_enabled(True):
            values, vectors, A, *directions = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
            others = ([*directions[:i], *directions[i + 1 :]] for i in range(len(directions)))
            orders = [directions, *others]
            terms = [
                _PositivePart.apply(values, vectors, A, *order, tangent)
                for order, tangent in zip(orders, tangents[2:], strict=True)
                if tangent is not None
            ]
            return sum(terms[1:], start=terms[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> tuple[Tensor, int]:
        moved = (t.unsqueeze(0) if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims, strict=True))
        return _PositivePart.apply(*moved), 0


def _chain(first: Tensor, gaps: Tensor, alike: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Σ_bc…  λ₊[a, b, c, …, z]  (H₁)_ab (H₂)_bc ⋯, by products of matrices.

    Among eigenvalues of one side λ₊ is linear, and all differences but the first are 0. In every other chain a first
    step from one side to the other is found, and the difference is formed over its two ends, so that no denominator
    is small beside its eigenvalues:  λ₊[…, p, q, …] = (λ₊[…, p, …] − λ₊[…, q, …]) / (p − q).
    """
    if len(matrices) == 1:
        return first * matrices[0]
    terms = []
    for i, H in enumerate(matrices):
        before, step, after = [alike * B for B in matrices[:i]], gaps * H, list(matrices[i + 1 :])

        def chain(*shorter: Tensor) -> Tensor:
            return _chain(first, gaps, alike, shorter)

        with_start = chain(*before, step @ after[0], *after[1:]) if after else chain(*before) @ step
        with_end = chain(*before[:-1], before[-1] @ step, *after) if before else step @ chain(*after)
        terms.append(with_start - with_end)
    return sum(terms[1:], start=terms[0])
