"""Fixed points of Newton's method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._names import call_of
from .._tree import Vectorizer
from .base import Tree, checked_callable
from .fixed_point import FixedPoint


class Newton(FixedPoint):
    """x = x − J(x)⁻¹ r(x, *args) with J = ∂r/∂x: the roots of :class:`~implicitdiff.Root`, by a step of Newton's method
    (Blondel et al. 2022, Table 1).

    At a root ∂F/∂x is the identity, so that every linear solver is done at once; but each evaluation forms and inverts
    the n × n matrix J, so that this pays for small n only.

    x is a tensor or a tree of them, of n numbers in all. Raises TypeError for a ``residual`` that is not callable, and
    in use :class:`~implicitdiff.ImplicitDiffError` where it does not return a tree like x.

    >>> Newton(lambda x, y: x**2 - y).update(torch.tensor([2.0]), 5.0)
    tensor([2.2500])
    """

    def __init__(self, residual: Callable[..., Tree]) -> None:
        self._residual = checked_callable(residual, "residual")

    def update(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """The Newton step from x."""
        vectorizer = Vectorizer.of(x, "x")

        def residual(vector: torch.Tensor) -> torch.Tensor:
            return vectorizer.ravel(self._residual(vectorizer.unravel(vector), *args, **kwargs), "the residual")

        vector = vectorizer.ravel(x, "x")
        # Not linalg.solve: torch's own derivative of it is wrong under vmap(jacfwd).
        inverse = torch.linalg.inv(torch.func.jacrev(residual)(vector))
        return vectorizer.unravel(vector - inverse @ residual(vector))

    def __repr__(self) -> str:
        return call_of(type(self).__name__, {"residual": self._residual})
