"""What a condition is: the equations F(x, *args) = 0 that characterise a solution."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from ..operators import Structure

Tree = Any
"""A tensor, or a dict, list, tuple or namedtuple of trees."""


@runtime_checkable
class Condition(Protocol):
    """What the library asks of a condition.

    A condition of your own is a small class with these two members. One whose F has kinks may add ``smooth = False``:
    points where its derivative does not exist are then looked for, and reported as
    :attr:`~implicitdiff.Status.NOT_SMOOTH`.
    """

    structure: Structure
    """What is promised of ∂F/∂x: "general", "symmetric" or "positive_definite"."""

    def residual(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """F(x, *args, **kwargs), a tree like x."""


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


def checked_stepsize(stepsize: float) -> float:
    """The step length, or a ValueError that says what was given instead."""
    if not stepsize > 0:
        raise ValueError(f"stepsize is {stepsize!r}, but it must be a positive number.")
    return stepsize
