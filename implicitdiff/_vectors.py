"""Norms and inner products over the last dimension, system by system."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_norm(v: Tensor) -> Tensor:
    """The norm where squares may under- or overflow: 1e-30 in float32."""
    norm = vector_norm(v)
    if v.shape[-1] == 0 or (norm.ndim == 0 and norm.device.type == "cpu" and _is_safe(float(norm), norm.dtype)):
        return norm
    size = largest(v)
    scale = torch.where((size > 0) & size.isfinite(), size, 1)
    return scale * vector_norm(v / scale.unsqueeze(-1))


def _is_safe(norm: float, dtype: torch.dtype) -> bool:
    """Whether the squares of a vector of this norm stay in range, but for parts that do not count."""
    info = torch.finfo(dtype)
    return info.tiny**0.5 / info.eps < norm < info.max**0.5


def largest(v: Tensor) -> Tensor:
    """The largest modulus of an entry, in one pass; 0 for an empty vector."""
    return torch.linalg.vector_norm(v, ord=torch.inf if v.shape[-1] else 2, dim=-1)


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
