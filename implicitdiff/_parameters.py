"""Parameters of projections and proxes: how they meet v, and what is checked of them."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

Parameter: TypeAlias = float | Tensor
"""A number, or a tensor whose derivative is followed."""


def per_system(value: Parameter, dims: int = 1) -> Parameter:
    """A parameter of shape (*batch), one value per system, as a factor of systems that have ``dims`` dimensions."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.reshape(*value.shape, *(1,) * dims)


def check_non_negative(**values: Parameter) -> None:
    """Raise ValueError for a negative number; what is in a tensor is not looked at, as it may live in a transform."""
    for name, value in values.items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name} is {value!r}, but it must be at least 0.")


def check_vector(v: Tensor) -> None:
    """Raise ValueError for a tensor without a last dimension."""
    if v.ndim == 0:
        raise ValueError("v is 0-d, but it must be of shape (*batch, n): use v.reshape(1) for a single number.")


def check_matrix(V: Tensor) -> None:
    """Raise ValueError for a tensor without two last dimensions."""
    if V.ndim < 2:
        raise ValueError(f"V has shape {tuple(V.shape)}, but it must be of shape (*batch, m, n).")


def check_same_size(name: str, value: Tensor, v: Tensor) -> None:
    """Raise ValueError where the last dimension of a parameter is not that of v."""
    check_vector(v)
    if value.ndim == 0 or value.shape[-1] != v.shape[-1]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but its last dimension must be {v.shape[-1]}, as v has shape "
            f"{tuple(v.shape)}."
        )
