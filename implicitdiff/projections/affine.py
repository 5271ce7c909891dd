"""Projections onto a hyperplane, a half-space and the solutions of linear equations."""

from __future__ import annotations

import torch
from torch import Tensor

from .._norms import polar
from .._parameters import Parameter, check_same_size, per_system


def hyperplane(v: Tensor, a: Tensor, b: Parameter) -> Tensor:
    """{x : ⟨a, x⟩ = b}: x = v − a (⟨a, v⟩ − b) / ‖a‖².

    Args:
        v: shape (*batch, n).
        a: the normal, of any length but 0, shape (n,) or (*batch, n).
        b: a number or a tensor of shape (*batch).

    Raises:
        ValueError: the last dimension of ``a`` is not that of v.

    >>> hyperplane(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]), 1.0)
    tensor([0.5000, 0.5000])
    """
    unit, height = _height(v, a, b)
    return v - height * unit


def half_space(v: Tensor, a: Tensor, b: Parameter) -> Tensor:
    """{x : ⟨a, x⟩ ≤ b}: x = v − a (⟨a, v⟩ − b)₊ / ‖a‖².

    Args:
        v: shape (*batch, n).
        a: the outward normal, of any length but 0, shape (n,) or (*batch, n).
        b: a number or a tensor of shape (*batch).

    Raises:
        ValueError: the last dimension of ``a`` is not that of v.

    >>> half_space(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([1.0, 1.0]), 1.0)
    tensor([[0.5000, 0.5000],
            [0.0000, 0.0000]])
    """
    unit, height = _height(v, a, b)
    return v - torch.where(height < 0, 0, height) * unit


def affine_set(v: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """{x : A x = b}: the nearest solution; of equations that contradict each other, the nearest least-squares one.

    x = v − A⁺(A v − b), A of any shape and rank. Derivatives in A are those among matrices of its rank (Golub and
    Pereyra 1973), so for a matrix of full rank simply the derivatives.

    Args:
        v: shape (*batch, n).
        A: shape (m, n) or (*batch, m, n).
        b: shape (m,) or (*batch, m).

    Raises:
        ValueError: A has not as many columns as v has entries, or not as many rows as b.

    >>> affine_set(torch.zeros(3), torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([2.0])).round(decimals=3)
    tensor([1., 1., 0.])
    """
    if A.ndim < 2:
        raise ValueError(f"A has shape {tuple(A.shape)}, but it must be of shape (*batch, m, n).")
    check_same_size("A", A, v)
    if b.ndim == 0 or b.shape[-1] != A.shape[-2]:
        raise ValueError(
            f"b has shape {tuple(b.shape)}, but its last dimension must be {A.shape[-2]}, as A has shape "
            f"{tuple(A.shape)}."
        )
    surplus = (A @ v.unsqueeze(-1)).squeeze(-1) - b
    return v - (torch.linalg.pinv(A) @ surplus.unsqueeze(-1)).squeeze(-1)


def _height(v: Tensor, a: Tensor, b: Parameter) -> tuple[Tensor, Tensor]:
    """The unit normal, and how far v lies beyond the hyperplane along it; no normal, no distance."""
    check_same_size("a", a, v)
    length, unit = polar(a)
    offset = per_system(b) / torch.where(length > 0, length, 1)
    return unit, (unit * v).sum(-1, keepdim=True) - offset
