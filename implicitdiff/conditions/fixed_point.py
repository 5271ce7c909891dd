"""A fixed point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..operators import Structure
from .base import Tree, checked_callable


class FixedPoint:
    """``update(x, *args) = x``: the residual is x − update(x).

    >>> FixedPoint(torch.cos).residual(torch.tensor(0.0))
    tensor(-1.)
    """

    structure: Structure = "general"

    def __init__(self, update: Callable[..., Tree]) -> None:
        self._update = checked_callable(update, "update")

    def update(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """One step of the iteration, a tree like x."""
        return self._update(x, *args, **kwargs)

    def residual(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """x − update(x, *args)."""
        return pytree.tree_map(torch.sub, x, self.update(x, *args, **kwargs))
