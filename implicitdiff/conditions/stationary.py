"""A stationary point of an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..operators import Structure
from .base import Tree, checked_callable


class Stationary:
    """The gradient in x of ``objective(x, *args)`` is zero; the Jacobian is the Hessian of the objective.

    Its structure is "symmetric": a stationary point need not be a minimum.

    >>> condition = Stationary(lambda x, y: (x**2).sum() - (x * y).sum())
    >>> condition.residual(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]))
    tensor([0., 2.])
    """

    structure: Structure = "symmetric"

    def __init__(self, objective: Callable[..., Tensor]) -> None:
        self.objective = checked_callable(objective, "objective")

    def residual(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """∇ₓ objective(x, *args)."""
        return torch.func.grad(self.objective)(x, *args, **kwargs)
