"""What the steps of a bilevel loop share: the last solution, the last adjoint, and a tolerance that decreases."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._captures import plain_value
from .conditions import Tree
from .info import Solution
from .inner_solvers._wrapper import Wrapper
from .layers import ImplicitLayer

__all__ = ["WarmStart", "decreasing"]
__dir__ = __all__.copy  # for tab completion


class WarmStart(nn.Module):
    """An implicit layer whose calls start where the last one ended, as the outer variables move little in between.

    ``WarmStart(layer)(init, *args)`` is ``layer(init, *args)``, but only the first call starts at ``init``: later ones
    start at the last solution, and the linear solver at the last adjoint where it has a setting ``warm_start`` (Arbel
    and Mairal 2022). Inside of ``vmap``, where there is a solution per sample, each call starts at ``init``.
    :attr:`tolerance` sets the accuracy of both solves; see :func:`decreasing`. The layer itself is left as it is.

    Shapes of init, args and x are those of the layer, and so are errors. Raises TypeError for anything but an implicit
    layer, and ValueError for a tolerance that is not positive.

    >>> import itertools, implicitdiff as idf
    >>> ridge = idf.ArgminLayer(lambda w, a: ((w - 1) ** 2).sum() + a.exp() * (w**2).sum())
    >>> inner, log_penalty = WarmStart(ridge), torch.zeros((), requires_grad=True)
    >>> optimizer = torch.optim.SGD([log_penalty], lr=1.0)
    >>> for inner.tolerance in itertools.islice(decreasing(0.1), 20):
    ...     optimizer.zero_grad()
    ...     ((inner(torch.zeros(2), log_penalty) - 0.8) ** 2).sum().backward()
    ...     optimizer.step()
    >>> log_penalty.exp().item()  # w = 1 / (1 + penalty) is 0.8 at a penalty of 1/4
    0.2...
    """

    def __init__(self, layer: ImplicitLayer) -> None:
        super().__init__()
        if not isinstance(layer, ImplicitLayer):
            raise TypeError(f"layer is {layer!r}, but it must be an ArgminLayer, RootLayer or FixedPointLayer.")
        self.layer = copy.copy(layer)
        self.layer.inner_solver = inner = copy.copy(layer.inner_solver)
        if isinstance(inner, Wrapper):
            inner.inner_solver = copy.copy(inner.inner_solver)
        self.layer.linear_solver = copy.copy(layer.linear_solver)
        if hasattr(self.layer.linear_solver, "warm_start"):
            self.layer.linear_solver.warm_start = True
        self._last: Tree | None = None

    @property
    def tolerance(self) -> float | None:
        """The inner solver's ``tol``, ‖F(x)‖₂, and the linear solver's ``rtol``; set it before a call."""
        return getattr(self.layer.inner_solver, "tol", None)

    @tolerance.setter
    def tolerance(self, tolerance: float) -> None:
        if not tolerance > 0:
            raise ValueError(f"tolerance is {tolerance!r}, but it must be a positive number.")
        self.layer.inner_solver.tol = self.layer.linear_solver.rtol = tolerance

    def forward(self, init: Tree, *args: Any, **kwargs: Any) -> Tree:
        """The solution, a tree like ``init``."""
        return self.solve(init, *args, **kwargs).value

    def solve(self, init: Tree, *args: Any, **kwargs: Any) -> Solution:
        """The solution with its reports."""
        solution = self.layer.solve(init if self._last is None else self._last, *args, **kwargs)
        last = pytree.tree_map_only(Tensor, plain_value, solution.value)
        is_one = pytree.tree_map_only(Tensor, Tensor.size, last) == pytree.tree_map_only(Tensor, Tensor.size, init)
        self._last = last if is_one else None  # under vmap there is one per sample
        return solution


def decreasing(first: float = 0.1, power: float = 2.0) -> Iterator[float]:
    """The tolerances first / kᵖ for k = 1, 2, …, without end, one per outer step.

    HOAG (Pedregosa 2016) solves the inner problem and the linear system of step k to such a tolerance; its outer steps
    converge where the tolerances have a finite sum, so for a power above 1. Early steps, whose gradients
    need not be good, are cheap.

    Raises ValueError where ``first`` is not positive or ``power`` not above 1.

    >>> import itertools
    >>> list(itertools.islice(decreasing(0.1), 3))
    [0.1, 0.025, 0.0111...]
    """
    if not (first > 0 and power > 1):
        raise ValueError(f"first is {first!r} and power {power!r}, but they must be above 0 and above 1.")
    return (first / k**power for k in itertools.count(1))
