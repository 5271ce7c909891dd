"""The projection onto the exponential cone."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ._parameters import check_vector


def exponential_cone(v: Tensor) -> Tensor:
    """The closure of {(x, y, z) : y exp(x/y) ≤ z, y > 0}, the order of Clarabel and SCS; v of shape (*batch, 3).

    The nearest point on the curved part of the boundary is y (ρ, 1, exp(ρ)), with ρ the root of a monotone function
    (Friberg 2021, Theorem 3.3); its derivatives, of every order, are those of the implicit function ρ(v).

    Raises:
        ValueError: the last dimension of v is not 3.

    >>> exponential_cone(torch.tensor([1.0, 1.0, 0.0])).round(decimals=3)
    tensor([0.1470, 0.4350, 0.6090])
    """
    check_vector(v)
    if v.shape[-1] != 3:
        raise ValueError(f"v has shape {tuple(v.shape)}, but a point of the exponential cone has 3 entries.")
    # A cone looks the same at every scale, so this one may be held fixed in derivatives.
    scale = v.detach().abs().amax(-1, keepdim=True)
    scale = torch.where((scale >= torch.finfo(v.dtype).tiny) & scale.isfinite(), scale, 1)
    v = v / scale
    x, y, z = v.unbind(-1)
    logarithm = torch.where(z == 0, 1, z).abs().log()
    inside = (y > 0) & (z > 0) & (x <= y * (logarithm - torch.where(y > 0, y, 1).log()))
    inside |= ~v.isfinite().all(-1)  # stays as it is
    below = (x > 0) & (z < 0) & (y <= x * (1 + logarithm - torch.where(x > 0, x, 1).log()))
    flat = _is_flat(v.detach())
    on_faces = torch.stack([x.clamp(max=0), torch.relu(y), torch.relu(z)], -1)
    # The branches that are not taken must have finite derivatives too: they see a vector of ones.
    curved = _on_curve(torch.where((inside | below | flat).unsqueeze(-1), 1, v))
    nearest = torch.where(flat.unsqueeze(-1), on_faces, curved)
    nearest = torch.where(below.unsqueeze(-1), 0, torch.where(inside.unsqueeze(-1), v, nearest))
    return scale * nearest


def _on_curve(v: Tensor) -> Tensor:
    """The nearest point where it is y (ρ, 1, exp(ρ)), and v less that point is a (1, 1 − ρ, −exp(−ρ)), both in front
    positive. Of equal expressions for the same entry, those without cancellation are taken."""
    z, ratio = v[..., 2], _Ratio.apply(v)
    height, a = _heights(ratio, v)
    right = ratio > 0
    small = torch.where(right, -ratio, ratio).exp()
    top = torch.where(right, z + a * small, height * small)
    height = torch.where(right, top * small, height)
    return torch.stack([ratio * height, height, top], -1)


def _heights(ratio: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The y and a of a ratio ρ for which the first two entries of v are right."""
    x, y, _ = v.unbind(-1)
    q = ratio * (ratio - 1) + 1
    return ((ratio - 1) * x + y) / q, (x - ratio * y) / q


def _excess(ratio: Tensor, v: Tensor) -> Tensor:
    """What the third entry then is above that of v, exp(ρ) y − exp(−ρ) a − z, times exp(−|ρ|)."""
    height, a = _heights(ratio, v)
    small = (-ratio.abs()).exp()
    right = ratio > 0
    return torch.where(right, height - small**2 * a, small**2 * height - a) - small * v[..., 2]


def _slopes(ratio: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of exp(ρ) y − exp(−ρ) a − z in ρ and, negative, in v, times q exp(−|ρ|).

    That in ρ is a sum of positive terms.
    """
    height, a = _heights(ratio, v)
    right = ratio > 0
    small = torch.where(right, -ratio, ratio).exp()
    up, down = torch.where(right, 1, small**2), torch.where(right, small**2, 1)
    in_ratio = up * (height * ((ratio - 1) ** 2 + 1) + a) + down * (a * (ratio**2 + 1) + height)
    in_v = torch.stack([up * (1 - ratio) + down, -up - down * ratio, small * (ratio * (ratio - 1) + 1)], -1)
    return in_ratio, in_v


def _farthest(v: Tensor) -> float:
    """Where |ρ| is larger, exp(−|ρ|) is lost beside anything else, but exp(2|ρ|) does not overflow."""
    return -0.5 * math.log(torch.finfo(v.dtype).tiny)


def _bracket(v: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of the ratios for which y and a are positive."""
    x, y, _ = v.unbind(-1)
    low = torch.where(x > 0, 1 - y / torch.where(x > 0, x, 1), -torch.inf)
    high = torch.where(y > 0, x / torch.where(y > 0, y, 1), torch.inf)
    return low, high


def _is_flat(v: Tensor) -> Tensor:
    """Whether, to working precision, the nearest point is on a flat part of the boundary, and each entry by itself."""
    (low, high), end = _bracket(v), _farthest(v)
    far_right = (high > end) & ((low >= end) | (_excess(torch.full_like(low, end), v) <= 0))
    far_left = (low < -end) & ((high <= -end) | (_excess(torch.full_like(low, -end), v) >= 0))
    return ((v[..., 0] <= 0) & (v[..., 1] <= 0)) | far_right | far_left


class _Ratio(torch.autograd.Function):
    """ρ = x / y of the nearest point, for v whose nearest point is on the curved part of the boundary.

    The derivative is in operations on v and on ρ itself, so that every order follows.
    """

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        end = _farthest(v)
        low, high = (bound.clamp(-end, end) for bound in _bracket(v))
        for _ in range(math.ceil(math.log2(2 * end / NEAR))):
            middle = low / 2 + high / 2
            is_above = _excess(middle, v) > 0
            low, high = torch.where(is_above, low, middle), torch.where(is_above, middle, high)
        ratio = low / 2 + high / 2
        for _ in range(NEWTON_STEPS):
            q = ratio * (ratio - 1) + 1
            ratio = torch.clamp(ratio - q * _excess(ratio, v) / _slopes(ratio, v)[0], low, high)
        return ratio

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs)
        ctx.save_for_forward(output, *inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        in_ratio, in_v = _slopes(*ctx.saved_tensors)
        return (g / in_ratio).unsqueeze(-1) * in_v

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        # Forward AD is off inside this rule, and dual levels do not nest: without both lines jacfwd∘jacfwd is wrong.
        with forward_ad._set_fwd_grad_enabled(True):
            _, v = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
            in_ratio, in_v = _slopes(_Ratio.apply(v), v)
            return (in_v * tangent).sum(-1) / in_ratio

    @staticmethod
    def vmap(info: Any, in_dims: Any, v: Tensor) -> tuple[Tensor, int]:
        return _Ratio.apply(v.movedim(in_dims[0], 0)), 0


NEAR, NEWTON_STEPS = 0.05, 5
"""The function's second derivative is a few times its first at most: from as near as that, each step of Newton's method
squares the error."""
