"""Fixed points of mirror descent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._names import call_of
from .base import Tree, checked_callable, checked_stepsize
from .fixed_point import FixedPoint


class MirrorDescent(FixedPoint):
    """x = projection(mirror_map(x) − stepsize · ∇f(x, *args), *args): x minimises f over a convex set
    (Blondel et al. 2022, Table 1).

    * ``mirror_map(x)``: the gradient ∇φ of a strictly convex φ, into the dual space: ``torch.log`` (up to a constant)
      for the negative entropy;
    * ``projection(y, *args)``: the Bregman projection from the dual space, argmin over the set of φ(x) − ⟨x, y⟩:
      softmax for the entropy on the simplex (:func:`implicitdiff.projections.kl_simplex`).

    x is a tensor or a tree of them, of any shapes, and the mirror map and the projection return trees like it. Raises
    TypeError for what is not callable, and ValueError for a ``stepsize`` that is not positive.

    >>> condition = MirrorDescent(lambda x, c: (c * x).sum() + (x * x.log()).sum(),
    ...                           lambda y, c: torch.softmax(y, -1), torch.log)
    >>> c = torch.tensor([0.0, 1.0])
    >>> condition.residual(torch.softmax(-c, -1), c).abs().max().item() < 1e-6
    True
    """

    smooth = False

    def __init__(
        self,
        objective: Callable[..., Tensor],
        projection: Callable[..., Tree],
        mirror_map: Callable[[Tree], Tree],
        stepsize: float = 1.0,
    ) -> None:
        self.objective = checked_callable(objective, "objective")
        self.projection = checked_callable(projection, "projection")
        self.mirror_map = checked_callable(mirror_map, "mirror_map")
        self.stepsize = checked_stepsize(stepsize)

    def update(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """The next iterate from x."""
        gradient = torch.func.grad(self.objective)(x, *args, **kwargs)
        y = pytree.tree_map(lambda m, g: m - self.stepsize * g, self.mirror_map(x), gradient)
        return self.projection(y, *args, **kwargs)

    def __repr__(self) -> str:
        return call_of(type(self).__name__, vars(self))
