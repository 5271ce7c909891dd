"""Whether a piecewise smooth function has a kink near a point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._vectors import GOLDEN, SILVER, probe
from .operators import LinearOperator

JUMP = 0.1
"""A change of the derivative, relative to its size, that a step as small as the error of x cannot explain otherwise."""


def has_kink(derivative: Callable[[Tensor], LinearOperator], x: Tensor, error: Tensor) -> Tensor:
    """Which systems x (*batch, n) have a kink within about ``error`` (*batch,) or the rounding of x.

    Every entry is moved a little, and then back to the other side: across a kink the derivative differs.
    """
    if not x.numel():
        return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    v, side = probe(x, GOLDEN), probe(x, SILVER)
    side = torch.where(v > 1.5, side, -side)
    size = torch.finfo(x.dtype).eps ** 0.5 * x.abs().amax(-1).clamp(min=1) + 10 * error
    ahead, behind = (derivative(x + sign * size.unsqueeze(-1) * side).rmatvec(v) for sign in (1, -1))
    largest = torch.maximum(ahead.abs().amax(-1), behind.abs().amax(-1))
    return (ahead - behind).abs().amax(-1) > JUMP * largest
