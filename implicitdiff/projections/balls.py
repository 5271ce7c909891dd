"""Projections onto balls and spheres of the ℓ₁ and ℓ₂ norms."""

from __future__ import annotations

import torch
from torch import Tensor

from .._norms import polar
from .._parameters import Parameter, check_non_negative, check_vector, per_system
from .simplices import simplex


def l2_ball(v: Tensor, radius: Parameter = 1.0) -> Tensor:
    """{x : ‖x‖₂ ≤ radius}: outside of it, v · radius / ‖v‖₂.

    Args:
        v: shape (*batch, n).
        radius: a number or a tensor of shape (*batch), at least 0.

    Raises:
        ValueError: a negative number as radius, or v of no dimension.

    >>> l2_ball(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    check_non_negative(radius=radius)
    check_vector(v)
    radius = per_system(radius)
    length, unit = polar(v)
    return torch.where(length >= radius, radius * unit, v)


def l2_sphere(v: Tensor, radius: Parameter = 1.0) -> Tensor:
    """{x : ‖x‖₂ = radius}; for v = 0, of which all points are nearest, the one on the first axis.

    Args:
        v: shape (*batch, n).
        radius: a number or a tensor of shape (*batch), at least 0.

    Raises:
        ValueError: a negative number as radius, or v of no dimension.

    >>> l2_sphere(torch.tensor([0.3, 0.4]))
    tensor([0.6000, 0.8000])
    """
    check_non_negative(radius=radius)
    check_vector(v)
    _, unit = polar(v)
    nowhere = (unit == 0).all(-1, keepdim=True)
    first = (torch.arange(v.shape[-1], device=v.device) == 0).to(v.dtype)
    return per_system(radius) * torch.where(nowhere, first, unit)


def l1_ball(v: Tensor, radius: Parameter = 1.0) -> Tensor:
    """{x : ‖x‖₁ ≤ radius} (Duchi et al. 2008, Section 4: outside of it, the signs and the simplex).

    Args:
        v: shape (*batch, n).
        radius: a number or a tensor of shape (*batch), at least 0.

    Raises:
        ValueError: a negative number as radius, or v of no dimension.

    >>> l1_ball(torch.tensor([0.5, -1.25, 0.0]))
    tensor([ 0.1250, -0.8750,  0.0000])
    """
    check_non_negative(radius=radius)
    check_vector(v)
    inside = v.abs().sum(-1, keepdim=True) < per_system(radius)
    return torch.where(inside, v, l1_sphere(v, radius))


def l1_sphere(v: Tensor, radius: Parameter = 1.0) -> Tensor:
    """{x : ‖x‖₁ = radius}: the signs of v, and the projection of |v| onto the simplex.

    Where a coordinate of v is 0 both signs are as near, and the positive one is taken.

    Args:
        v: shape (*batch, n).
        radius: a number or a tensor of shape (*batch), at least 0.

    Raises:
        ValueError: a negative number as radius, or v of no dimension.

    >>> l1_sphere(torch.tensor([0.25, -0.25]))
    tensor([ 0.5000, -0.5000])
    """
    check_non_negative(radius=radius)
    negative = v < 0
    x = simplex(torch.where(negative, -v, v), radius)
    return torch.where(negative, -x, x)
