"""Projections onto bounds: each coordinate by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .._parameters import Parameter, check_non_negative, per_system


def box(v: Tensor, lower: Parameter, upper: Parameter) -> Tensor:
    """{x : lower ≤ x ≤ upper}, coordinate by coordinate.

    Args:
        v: any shape.
        lower: a number or a tensor that broadcasts against v; −inf for no bound.
        upper: the same; inf for no bound.

    Raises:
        ValueError: two numbers with ``lower`` > ``upper``.

    >>> box(torch.tensor([-1.0, 0.5, 7.0]), 0.0, torch.tensor([1.0, 1.0, 2.0]))
    tensor([0.0000, 0.5000, 2.0000])
    """
    if not isinstance(lower, Tensor) and not isinstance(upper, Tensor) and not lower <= upper:
        raise ValueError(f"lower is {lower!r} and upper is {upper!r}, but lower must be at most upper.")
    return torch.where(v <= lower, lower, torch.where(v >= upper, upper, v))


def non_negative(v: Tensor) -> Tensor:
    """{x : x ≥ 0}, coordinate by coordinate; v of any shape. It raises nothing.

    >>> non_negative(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    return torch.relu(v)


def hypercube(v: Tensor) -> Tensor:
    """{x : 0 ≤ x ≤ 1}, coordinate by coordinate; v of any shape. It raises nothing.

    >>> hypercube(torch.tensor([-1.0, 0.25, 7.0]))
    tensor([0.0000, 0.2500, 1.0000])
    """
    return box(v, 0.0, 1.0)


def linf_ball(v: Tensor, radius: Parameter = 1.0) -> Tensor:
    """{x : max |xᵢ| ≤ radius}: v, each coordinate cut at ±radius.

    Args:
        v: shape (*batch, n).
        radius: a number or a tensor of shape (*batch), at least 0.

    Raises:
        ValueError: a negative number as radius.

    >>> linf_ball(torch.tensor([-3.0, 0.5]), 2.0)
    tensor([-2.0000,  0.5000])
    """
    check_non_negative(radius=radius)
    bound = per_system(radius)
    return box(v, -bound, bound)
