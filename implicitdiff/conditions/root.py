"""A root."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..operators import Structure
from .base import Tree, checked_callable


class Root:
    """``residual(x, *args) = 0``, a tree like x, with a Jacobian of general structure.

    >>> Root(lambda x, y: x * x - y).residual(torch.tensor(3.0), 4.0)
    tensor(5.)
    """

    structure: Structure = "general"

    def __init__(self, residual: Callable[..., Tree]) -> None:
        self._residual = checked_callable(residual, "residual")

    def residual(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """F(x, *args), the user's function itself."""
        return self._residual(x, *args, **kwargs)
