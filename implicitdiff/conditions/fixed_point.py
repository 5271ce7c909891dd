"""A fixed point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .._names import call_of
from .._tree import Vectorizer
from ..operators import Structure
from .base import Tree, checked_callable


class FixedPoint:
    """``update(x, *args) = x``: the residual is x − update(x).

    x is a tensor or a tree of them, of any shapes. Raises TypeError for an ``update`` that is not callable, and in use
    :class:`~implicitdiff.ImplicitDiffError` where it does not return a tree like x.

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
        step = self.update(x, *args, **kwargs)
        if _shapes(step) != _shapes(x):  # torch would broadcast
            Vectorizer.of(x, "x").ravel(step, "what update returned")
        return pytree.tree_map(torch.sub, x, step)

    def __repr__(self) -> str:
        return call_of(type(self).__name__, {"update": self._update})


def _shapes(tree: Tree) -> Tree:
    return pytree.tree_map(lambda leaf: getattr(leaf, "shape", None), tree)
