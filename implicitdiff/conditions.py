"""Conditions: the equations F(x, *args) = 0 that characterise a solution.

A condition of your own is a small class with two members, ``residual(x, *args, **kwargs)``, a tree like x, and
``structure``, what is promised of ∂F/∂x: "general", "symmetric" or "positive_definite".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .operators import Structure

Tree = Any
"""A tensor, or a dict, list, tuple or namedtuple of trees."""


@runtime_checkable
class Condition(Protocol):
    """What the library asks of a condition."""

    structure: Structure

    def residual(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """F(x, *args, **kwargs), a tree like x."""


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


class FixedPoint:
    """``update(x, *args) = x``: the residual is x − update(x).

    >>> FixedPoint(torch.cos).residual(torch.tensor(0.0))
    tensor(-1.)
    """

    structure: Structure = "general"

    def __init__(self, update: Callable[..., Tree]) -> None:
        self.update = checked_callable(update, "update")

    def residual(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """x − update(x, *args)."""
        return pytree.tree_map(torch.sub, x, self.update(x, *args, **kwargs))


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


def checked_callable(function: Any, name: str) -> Any:
    """The function, or a TypeError that says what was given instead.

    A module with buffers is called on copies of them: a solver evaluates it many times, which must not move the
    running statistics of a batch norm.
    """
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{name} is {function!r}, but it must be a callable: {name}(x, *args).")
    if isinstance(function, torch.nn.Module) and any(True for _ in function.buffers()):
        return lambda *args, **kwargs: torch.func.functional_call(
            function, {k: v.clone() for k, v in function.named_buffers()}, args, kwargs
        )
    return function
