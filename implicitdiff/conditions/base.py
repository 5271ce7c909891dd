"""What a condition is: the equations F(x, *args) = 0 that characterise a solution."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from .._names import name_of
from ..operators import Structure

Tree = Any
"""A tensor, or a dict, list, tuple or namedtuple of trees."""


@runtime_checkable
class Condition(Protocol):
    """What the library asks of a condition.

    A condition of your own is a small class with these two members. One whose F has kinks may add ``smooth = False``:
    points where its derivative does not exist are then looked for, and reported as
    :attr:`~implicitdiff.Status.NOT_SMOOTH`. x is a tree of tensors of any shapes, and so is what ``residual`` returns.
    Where it is used, what has no ``residual`` raises TypeError, and another ``structure`` ValueError.

    x e^x = y has the solution x = W(y), Lambert's function, by SciPy:

    >>> import implicitdiff as idf, scipy.special
    >>> from implicitdiff.operators import Structure
    >>> class Lambert:
    ...     structure: Structure = "symmetric"  # ∂F/∂x is diagonal
    ...     def residual(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    ...         return x * x.exp() - y
    >>> @idf.implicit(Lambert())
    ... def lambert(init: None, y: torch.Tensor) -> torch.Tensor:
    ...     return torch.from_numpy(scipy.special.lambertw(y.numpy()).real)
    >>> y = torch.tensor([0.0, torch.e], requires_grad=True)
    >>> torch.autograd.grad(lambert(None, y).sum(), y)[0]  # 1 / (e^x (1 + x))
    tensor([1.0000, 0.1839])

    Without its annotation, ``structure`` is any string to a type checker, which then refuses the class.
    """

    @property
    def structure(self) -> Structure:
        """What is promised of ∂F/∂x: "general", "symmetric" or "positive_definite"; an attribute will do."""

    def residual(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """F(x, *args, **kwargs), a tree like x."""


def checked_callable(function: Any, name: str, call: str | None = None) -> Any:
    """The function, or a TypeError that says what was given instead.

    A module with buffers is called on copies of them: a solver evaluates it many times, which must not move the
    running statistics of a batch norm.
    """
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{name} is {function!r}, but it must be a callable: {call or f'{name}(x, *args)'}.")
    if isinstance(function, torch.nn.Module) and any(True for _ in function.buffers()):

        def on_copies(*args: Any, **kwargs: Any) -> Any:
            buffers = {k: v.clone() for k, v in function.named_buffers()}
            return torch.func.functional_call(function, buffers, args, kwargs)

        on_copies.__name__ = name_of(function)
        return on_copies
    return function


def checked_stepsize(stepsize: float) -> float:
    """The step length, or a ValueError that says what was given instead."""
    if not stepsize > 0:
        raise ValueError(f"stepsize is {stepsize!r}, but it must be a positive number.")
    return stepsize
