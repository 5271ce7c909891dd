"""A stationary point of an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._names import call_of
from ..operators import Structure
from .base import Tree, checked_callable


class Stationary:
    """The gradient in x of ``objective(x, *args)`` is zero; the Jacobian is the Hessian of the objective.

    Its structure is "symmetric": a stationary point need not be a minimum.

    ``chunks=(argument, dim, k)`` sums the products of the backward pass over k slices of the data, which takes a
    fraction of the memory and about the same time: the argument, by its place in args or its keyword, is a tensor or a
    tree of tensors that are sliced together along ``dim``. The objective must be a mean or a sum over that data, with
    or without terms that the data do not enter; :class:`~implicitdiff.ImplicitDiffError` is raised where it is not.

    x is a tensor or a tree of them, of any shapes; the objective returns a scalar. Raises TypeError for an
    ``objective`` that is not callable, and ValueError for ``chunks`` that are not such a triple.

    >>> condition = Stationary(lambda x, y: (x**2).sum() - (x * y).sum())
    >>> condition.residual(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]))
    tensor([0., 2.])
    >>> sliced = Stationary(lambda w, data: ((data[0] @ w - data[1]) ** 2).mean(), chunks=(0, 0, 4))
    """

    structure: Structure = "symmetric"

    def __init__(self, objective: Callable[..., Tensor], chunks: tuple[int | str, int, int] | None = None) -> None:
        self.objective = checked_callable(objective, "objective")
        if chunks is not None and not (
            isinstance(chunks, Sequence)
            and len(chunks) == 3
            and isinstance(chunks[0], (int, str))
            and isinstance(chunks[1], int)
            and chunks[2] >= 1
        ):
            raise ValueError(
                f"chunks is {chunks!r}, but it must be (argument, dim, k): which of the args is sliced (its place or "
                f"its keyword), along which dimension, and in how many slices, at least 1."
            )
        self.chunks = chunks

    def residual(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """∇ₓ objective(x, *args)."""
        return torch.func.grad(self.objective)(x, *args, **kwargs)

    def __repr__(self) -> str:
        return call_of(type(self).__name__, vars(self))
