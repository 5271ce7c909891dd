"""Norms and inner products over the last dimension, system by system."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_norm(v: Tensor) -> Tensor:
    """The norm where squares may under- or overflow: 1e-30 in float32."""
    if v.shape[-1] == 0:
        return vector_norm(v)
    largest = v.abs().amax(-1)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    return scale * vector_norm(v / scale.unsqueeze(-1))


def vector_norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1)


def dot(u: Tensor, v: Tensor) -> Tensor:
    """⟨u, v⟩ over the last dimension, conjugating u."""
    return torch.linalg.vecdot(u, v)


def inner(u: Tensor, v: Tensor) -> Tensor:
    """⟨u, v⟩ over the last dimension, conjugating u, with that dimension kept."""
    return torch.linalg.vecdot(u, v).unsqueeze(-1)


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where the denominator is."""
    ok = denominator != 0
    return torch.where(ok, numerator / torch.where(ok, denominator, 1), 0)


def appended(rows: Tensor, new: Tensor) -> Tensor:
    """A history of vectors (*batch, history, n) without the first one, and with a new last one."""
    return torch.cat([rows[..., 1:, :], new.unsqueeze(-2)], dim=-2)


GOLDEN, SILVER = 0.6180339887498949, 0.4142135623730951


def probe(like: Tensor, irrational: float) -> Tensor:
    """Entries from 1 to 2 without a simple relation, the same each time: a Weyl sequence, as vmap has no randomness."""
    places = torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device)
    return (1 + (places * irrational) % 1).to(like.dtype).reshape(like.shape)
