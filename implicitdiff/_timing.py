"""Where the parts of a solve say that they begin and end, for whoever measures them (:mod:`implicitdiff.profile`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

from torch.compiler import is_dynamo_compiling

P = ParamSpec("P")
R = TypeVar("R")

Part = Literal[
    # whole: what the user calls, or autograd
    "layer",
    "derivative",
    "linear solve",
    # made of parts
    "inner solver",
    "linear solver",
    # the smallest
    "captured tensors",
    "evaluations",
    "building A",
    "products",
    "matrix of A",
    "preconditioner",
    "args product",
]


class Watcher(Protocol):
    def begin(self, part: Part) -> Any:
        """Note that a part begins on this thread; what comes back is given to :meth:`end`."""

    def end(self, begun: Any) -> None:
        """Note that it ends, by an error or without."""


watchers: list[Watcher] = []
"""Who measures; nobody, usually."""


def timed(part: Part) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: a call of the function is that part of a solve. It costs next to nothing if nobody measures."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def part_of_a_solve(*args: P.args, **kwargs: P.kwargs) -> R:
            # What is compiled is a part of its caller; asked first, so that it is not compiled anew for a watcher.
            if is_dynamo_compiling() or not watchers:
                return function(*args, **kwargs)
            begun = [(watcher, watcher.begin(part)) for watcher in watchers]
            try:
                return function(*args, **kwargs)
            finally:
                for watcher, at in begun:
                    watcher.end(at)

        return part_of_a_solve

    return decorate
