"""The objective of least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._names import call_of
from .conditions.base import Tree, checked_callable


class LeastSquares:
    """The objective ½‖residual(x, *args)‖², the residual a tensor or tree of any shape.

    As an objective it is what any other is; :class:`~implicitdiff.inner_solvers.GaussNewton` and
    :class:`~implicitdiff.inner_solvers.LevenbergMarquardt` look inside it. Derivatives of the solution use the exact
    Hessian, JᵀJ + Σ rᵢ ∇²rᵢ, whatever found it. Raises TypeError for a ``residual`` that is not callable.

    >>> LeastSquares(lambda x, y: x - y)(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    tensor(2.5000)
    """

    def __init__(self, residual: Callable[..., Tree]) -> None:
        self.function = residual
        self.residual = checked_callable(residual, "residual")

    def __call__(self, x: Tree, *args: Any, **kwargs: Any) -> Tensor:
        leaves = pytree.tree_leaves(self.residual(x, *args, **kwargs))
        return 0.5 * torch.stack([leaf.square().sum() for leaf in leaves]).sum()

    def __repr__(self) -> str:
        return call_of(type(self).__name__, {"residual": self.function})
