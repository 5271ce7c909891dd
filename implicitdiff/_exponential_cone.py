"""The projection onto the exponential cone."""

from __future__ import annotations

import torch
from torch import Tensor

from ._parameters import check_vector

LARGEST_RATIO = 200.0
"""Beyond it, the exponential of the ratio is nothing beside the other numbers, or they beside it."""
BISECTIONS = 80
NEWTON_STEPS = 3
"""From a root that is held fixed, k Newton steps give 2ᵏ − 1 derivatives of it."""


def exponential_cone(v: Tensor) -> Tensor:
    """The closure of {(x, y, z) : y > 0, y · exp(x / y) ≤ z}; v of shape (*batch, 3).

    On the curved part of the boundary, v is the sum of a point α (ρ, 1, e^ρ) of the cone and of one of its polar,
    β (1, 1 − ρ, −e^−ρ), with α, β ≥ 0: two of the equations give α and β, the third is solved for ρ (Friberg 2021,
    Theorem 3.3). Derivatives are right up to the seventh order.

    Raises:
        ValueError: the last dimension of v is not 3.

    >>> exponential_cone(torch.tensor([1.0, 1.0, 0.0])).round(decimals=3)
    tensor([0.1470, 0.4350, 0.6090])
    """
    check_vector(v)
    if v.shape[-1] != 3:
        raise ValueError(f"v has shape {tuple(v.shape)}, but a point of the exponential cone has 3 entries.")
    scale = v.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    x, y, z = (v / scale).unbind(-1)
    plain = tuple(t.detach() for t in (x, y, z))
    inside, polar, flat = _inside(*plain), _inside_polar(*plain), _near_flat(*plain)
    curved = ~(inside | polar | flat)
    # Elsewhere a point takes the place of v for which all of this is regular.
    on_boundary = _curved(*(torch.where(curved, t, 1) for t in (x, y, z)))
    on_face = torch.stack([x.clamp(max=0), torch.relu(y), torch.relu(z)], -1)
    near = torch.where(flat.unsqueeze(-1), on_face, on_boundary) * scale
    near = torch.where(polar.unsqueeze(-1), 0, near)
    return torch.where(inside.unsqueeze(-1) | v.isnan().any(-1, keepdim=True), v, near)


def _inside(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    ratio = torch.where(y > 0, x / torch.where(y > 0, y, 1), 0)
    return ((y > 0) & (y * torch.exp(ratio) <= z)) | ((y == 0) & (x <= 0) & (z >= 0))


def _inside_polar(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The polar cone is the closure of {x > 0, x · exp(y / x − 1) ≤ −z}."""
    ratio = torch.where(x > 0, y / torch.where(x > 0, x, 1), 0)
    return ((x > 0) & (x * torch.exp(ratio - 1) <= -z)) | ((x == 0) & (y <= 0) & (z <= 0))


def _near_flat(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Where the boundary is the face {x ≤ 0, y = 0, z ≥ 0}, or so near to {z = 0} or to the z-axis as to be flat."""
    along_axis = (x > 0) & (y < 0) & (-y >= LARGEST_RATIO * x)
    along_floor = (x < 0) & (y > 0) & (-x >= LARGEST_RATIO * y)
    return ((x <= 0) & (y <= 0)) | along_axis | along_floor


def _curved(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    rho = _ratio(x.detach(), y.detach(), z.detach())
    for _ in range(NEWTON_STEPS):
        alpha, _, h, slope = _split(rho, x, y, z)
        rho = rho - h / slope
    alpha = _split(rho, x, y, z)[0]
    return alpha.unsqueeze(-1) * torch.stack([rho, torch.ones_like(rho), rho.exp()], -1)


def _split(rho: Tensor, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """α and β at a ratio, what is missing in the third equation, and its derivative in the ratio."""
    size, turn = rho * rho - rho + 1, 2 * rho - 1
    alpha, beta = ((rho - 1) * x + y) / size, (x - rho * y) / size
    up, down = rho.exp(), (-rho).exp()
    slope = ((x - alpha * turn) / size + alpha) * up - ((-y - beta * turn) / size - beta) * down
    return alpha, beta, alpha * up - beta * down - z, slope


def _ratio(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The root by bisection, between the ratios for which α and β are not negative; h increases there."""
    low = torch.where(x > 0, 1 - y / torch.where(x > 0, x, 1), -LARGEST_RATIO).clamp(-LARGEST_RATIO, LARGEST_RATIO)
    high = torch.where(y > 0, x / torch.where(y > 0, y, 1), LARGEST_RATIO).clamp(-LARGEST_RATIO, LARGEST_RATIO)
    for _ in range(BISECTIONS):
        middle = low / 2 + high / 2
        below = _split(middle, x, y, z)[2] < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low / 2 + high / 2
