"""Projections onto the simplex, by sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from .._parameters import Parameter, check_non_negative, check_vector, per_system


def simplex(v: Tensor, total: Parameter = 1.0) -> Tensor:
    """{x : x ≥ 0, Σ x = total}.

    By sorting (Held, Wolfe and Crowder 1974; Duchi et al. 2008, Figure 1): x = (v − τ)₊. With s the 0/1 vector of the
    support, the Jacobian is diag(s) − ssᵀ/Σs, and ∂x/∂total = s/Σs.

    Args:
        v: shape (*batch, n).
        total: a number or a tensor of shape (*batch), at least 0.

    Raises:
        ValueError: a negative number as total, or v of no dimension.

    >>> simplex(torch.tensor([0.5, 1.25, -1.0]))
    tensor([0.1250, 0.8750, 0.0000])
    """
    check_non_negative(total=total)
    check_vector(v)
    if v.shape[-1] == 0:
        return v.clone()
    total = per_system(total)
    # A shift of v changes nothing: beside a largest entry of 0, sums over the support are exact at any scale of v.
    v = v - v.detach().amax(-1, keepdim=True)
    ordered = v.detach().sort(dim=-1, descending=True).values
    ranks = torch.arange(1, v.shape[-1] + 1, device=v.device)
    excess = ordered.cumsum(-1) - total
    size = (ordered * ranks > excess).sum(-1, keepdim=True).clamp(min=1)
    support = ~(v < ordered.gather(-1, size - 1))  # NaN is not left out
    threshold = (torch.where(support, v, 0).sum(-1, keepdim=True) - total) / support.sum(-1, keepdim=True)
    return torch.where(support, torch.relu(v - threshold), 0)


def sparse_simplex(v: Tensor, k: int, total: Parameter = 1.0) -> Tensor:
    """{x : x ≥ 0, Σ x = total, at most k entries are not 0}.

    The k largest entries are projected onto their simplex (Kyrillidis et al. 2013, Algorithm 1 and Theorem 1). The
    set is not convex; the derivative is that on the support. Of equal entries any may be chosen.

    Args:
        v: shape (*batch, n).
        k: a whole number of at least 1; from n on, nothing is sparse.
        total: a number or a tensor of shape (*batch), at least 0.

    Raises:
        ValueError: k below 1, a negative number as total, or v of no dimension.

    >>> sparse_simplex(torch.tensor([0.5, 0.75, 0.625]), 2)
    tensor([0.0000, 0.5625, 0.4375])
    """
    if int(k) != k or k < 1:
        raise ValueError(f"k is {k!r}, but it must be a whole number of at least 1.")
    check_vector(v)
    largest = v.detach().topk(min(int(k), v.shape[-1]), dim=-1).indices
    kept = simplex(v.gather(-1, largest), total)
    return torch.zeros_like(v).scatter(-1, largest, kept)
