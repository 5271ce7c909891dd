"""The projection onto a slice of a box by one hyperplane."""

from __future__ import annotations

import torch
from torch import Tensor


def box_section(
    v: Tensor, lower: Tensor | float, upper: Tensor | float, weights: Tensor | float, total: Tensor | float
) -> Tensor:
    """The x nearest to v with lower ≤ x ≤ upper and Σ weights · x = total.

    * ``v``: (*batch, n);
    * ``lower``, ``upper``: what broadcasts to it, infinite ones too;
    * ``weights``: what broadcasts to it, of any sign;
    * ``total``: what broadcasts to (*batch,).

    The solution is x = clip(v + τ · weights, lower, upper), and Σ weights · x is piecewise linear and increasing in the
    multiplier τ: the piece is found by bisection over its sorted breakpoints (Brucker 1984; Calamai and Moré 1987 for
    general bounds), and τ is the closed form on that piece, differentiable in all five arguments.

    A system that no x satisfies (the total out of reach, a lower bound above its upper bound) is NaN, and its
    derivatives are. Shapes that do not broadcast raise torch's RuntimeError.

    >>> box_section(torch.tensor([0.5, 1.0, 3.0]), 0.0, 1.0, 1.0, 2.0)
    tensor([0.2500, 0.7500, 1.0000])
    """
    given = (torch.as_tensor(t, dtype=v.dtype, device=v.device) for t in (lower, upper, weights))
    total = torch.as_tensor(total, dtype=v.dtype, device=v.device)
    full = torch.broadcast_tensors(v, *given, total.unsqueeze(-1))
    return _box_section(full[0], full[1], full[2], full[3], total)


def _box_section(v: Tensor, lower: Tensor, upper: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    at_lower, at_upper, possible = _active(*(t.detach() for t in (v, lower, upper, weights, total)))
    free = ~(at_lower | at_upper) & (weights != 0)
    bound = torch.where(at_lower, lower, upper)
    # Without a weight the hyperplane does not see the coordinate.
    bound = torch.where(weights != 0, bound, torch.minimum(torch.maximum(v, lower), upper))
    slope = torch.where(free, weights**2, 0).sum(-1)
    missing = total - (weights * torch.where(free, v, bound)).sum(-1)
    multiplier = torch.where(slope > 0, missing / torch.where(slope > 0, slope, 1), 0).unsqueeze(-1)
    x = torch.where(free, v + multiplier * weights, bound)
    # Rounding may lead over a bound, though the piece does not.
    x = x + (torch.minimum(torch.maximum(x, lower), upper) - x).detach()
    return x * torch.where(possible, 1, torch.nan).to(x).unsqueeze(-1)


@torch.no_grad()
def _active(v: Tensor, lower: Tensor, upper: Tensor, weights: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which coordinates are at which bound, (*batch, n), and whether there is a solution at all, (*batch,)."""
    # As τ grows, a coordinate leaves its first bound at ``leaves`` and arrives at its last one at ``arrives``.
    moves = (weights != 0) & (lower < upper)
    rising = weights > 0
    first, last = torch.where(rising, lower, upper), torch.where(rising, upper, lower)
    divisor = torch.where(moves, weights, 1)
    leaves = torch.where(moves, (first - v) / divisor, -torch.inf)
    arrives = torch.where(moves, (last - v) / divisor, -torch.inf)

    def reached(multiplier: Tensor) -> Tensor:
        """Σ weights · x at a multiplier (*batch, 1)."""
        inside = v + torch.where(moves, multiplier, 0) * weights
        x = torch.where(multiplier >= arrives, last, torch.where(multiplier <= leaves, first, inside))
        return torch.where(weights != 0, weights * x, 0).sum(-1, keepdim=True)

    total = total.expand(v.shape[:-1]).unsqueeze(-1)
    infinity = torch.full_like(total, torch.inf)
    least, most = reached(-infinity), reached(infinity)
    breakpoints = torch.cat([-infinity, leaves, arrives, infinity], -1).sort(-1).values
    # The first breakpoint that reaches the total, and that the sum rises up to.
    low = torch.zeros_like(total, dtype=torch.int64)
    high = low + breakpoints.shape[-1] - 1
    for _ in range(breakpoints.shape[-1].bit_length()):
        middle = (low + high) // 2
        value = reached(breakpoints.gather(-1, middle))
        enough = (value >= torch.minimum(total, most)) & (value > least)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    before, after = breakpoints.gather(-1, low), breakpoints.gather(-1, high)
    at_first, at_last = (leaves >= after) | ~moves, (arrives <= before) & moves
    at_lower, at_upper = torch.where(rising, at_first, at_last), torch.where(rising, at_last, at_first)
    terms = weights.abs() * (lower.abs() + upper.abs())
    slack = 4 * torch.finfo(v.dtype).eps * torch.where(terms.isfinite(), terms, 0).sum(-1, keepdim=True)
    in_reach = (least - slack <= total) & (total <= most + slack)
    return at_lower, at_upper, in_reach.squeeze(-1) & (lower <= upper).all(-1)
