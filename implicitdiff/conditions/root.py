"""A root."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._names import call_of
from ..operators import Structure
from .base import Tree, checked_callable


class Root:
    """``residual(x, *args) = 0``, a tree like x, with a Jacobian of general structure.

    x is a tensor or a tree of them, of any shapes. Raises TypeError for a ``residual`` that is not callable, and in use
    :class:`~implicitdiff.ImplicitDiffError` where it does not return a tree like x.

    >>> Root(lambda x, y: x * x - y).residual(torch.tensor(3.0), 4.0)
    tensor(5.)
    """

    structure: Structure = "general"

    def __init__(self, residual: Callable[..., Tree]) -> None:
        self._residual = checked_callable(residual, "residual")

    def residual(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """F(x, *args), the user's function itself."""
        return self._residual(x, *args, **kwargs)

    def __repr__(self) -> str:
        return call_of(type(self).__name__, {"residual": self._residual})
