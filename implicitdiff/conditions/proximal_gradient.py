"""Fixed points of forward–backward steps: a gradient step on the smooth part, then the prox of the other part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._names import call_of
from .base import Tree, checked_callable, checked_stepsize
from .fixed_point import FixedPoint


class ForwardBackward(FixedPoint):
    """x = backward_step(forward_step(x)). The derivative of the backward step is often diagonal, a 0/1 mask for the
    lasso: linear systems are then solved on the support alone, where they are smaller and symmetric."""

    smooth = False
    objective: Callable[..., Tensor]

    def stepsizes(self, x: Tree) -> Tree:
        """The step length of each entry, a tree like x."""
        raise NotImplementedError

    def forward_step(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """v = x − stepsize · ∇f(x, *args)."""
        raise NotImplementedError

    def backward_step(self, v: Tree, *args: Any, **kwargs: Any) -> Tree:
        """The prox at v."""
        raise NotImplementedError

    def update(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """The next iterate from x."""
        return self.backward_step(self.forward_step(x, *args, **kwargs), *args, **kwargs)


class ProximalGradient(ForwardBackward):
    """x = prox(x − stepsize · ∇f(x, *args), stepsize, *args): x minimises f + g (Blondel et al. 2022, Table 1).

    * ``objective(x, *args)``: f, the smooth part, a scalar;
    * ``prox(v, stepsize, *args)``: argmin over x of ½‖x − v‖² + stepsize · g(x, *args), a tree like v; see
      :mod:`implicitdiff.prox`. It gets the same args as the objective;
    * ``stepsize``: any positive number has the same solutions.

    Where the derivative of the prox is diagonal, a 0/1 mask for the lasso, the linear systems of derivatives are solved
    on the support alone (Bertrand et al. 2022), which is exact, smaller and symmetric.

    x is a tensor or a tree of them, of any shapes. Raises TypeError for what is not callable, and ValueError for a
    ``stepsize`` that is not positive.

    >>> from implicitdiff import prox
    >>> lasso = ProximalGradient(lambda x, y: 0.5 * ((x - y) ** 2).sum(), lambda v, s, y: prox.lasso(v, s, 1.0))
    >>> lasso.residual(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 0.5]))
    tensor([0., 0.])
    """

    def __init__(self, objective: Callable[..., Tensor], prox: Callable[..., Tree], stepsize: float = 1.0) -> None:
        self.objective = checked_callable(objective, "objective")
        self.prox = checked_callable(prox, "prox")
        self.stepsize = checked_stepsize(stepsize)

    def stepsizes(self, x: Tree) -> Tree:
        return pytree.tree_map(lambda leaf: torch.full_like(leaf, self.stepsize), x)

    def forward_step(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        gradient = torch.func.grad(self.objective)(x, *args, **kwargs)
        return pytree.tree_map(lambda x, g: x - self.stepsize * g, x, gradient)

    def backward_step(self, v: Tree, *args: Any, **kwargs: Any) -> Tree:
        return self.prox(v, self.stepsize, *args, **kwargs)

    def __repr__(self) -> str:
        return call_of(type(self).__name__, {"objective": self.objective, "prox": self.prox, "stepsize": self.stepsize})


class ProjectedGradient(ProximalGradient):
    """x = projection(x − stepsize · ∇f(x, *args), *args): x minimises f over a convex set (Blondel et al. 2022,
    Table 1).

    ``projection(v, *args)`` is the Euclidean one, a tree like v; see :mod:`implicitdiff.projections`. Everything else,
    shapes and errors included, is as in :class:`ProximalGradient`.

    >>> condition = ProjectedGradient(lambda x, y: ((x - y) ** 2).sum(), lambda v, y: v.clamp(min=0))
    >>> condition.residual(torch.tensor([2.0, 0.0]), torch.tensor([2.0, -3.0]))
    tensor([0., 0.])
    """

    def __init__(
        self, objective: Callable[..., Tensor], projection: Callable[..., Tree], stepsize: float = 1.0
    ) -> None:
        self.projection = checked_callable(projection, "projection")
        super().__init__(objective, self._prox, stepsize)

    def _prox(self, v: Tree, stepsize: float, *args: Any, **kwargs: Any) -> Tree:
        return self.projection(v, *args, **kwargs)

    def __repr__(self) -> str:
        settings = {"objective": self.objective, "projection": self.projection, "stepsize": self.stepsize}
        return call_of(type(self).__name__, settings)


class BlockProximalGradient(ForwardBackward):
    """xᵢ = proxᵢ(xᵢ − stepsizeᵢ · ∇ᵢf(x, *args), stepsizeᵢ, *args) for each block i of x (Blondel et al. 2022,
    Table 1).

    x is a container of blocks, each a tensor or a tree of any shapes; ``proxes`` and ``stepsizes`` are containers of
    the same kind and length, a prox(v, stepsize, *args) and a step length per block.

    Raises ValueError where they do not fit each other, or x, or a step is not positive, and TypeError for a prox or an
    ``objective`` that is not callable.

    >>> from implicitdiff import prox
    >>> condition = BlockProximalGradient(
    ...     lambda x: ((x[0] - 1) ** 2).sum() + ((x[1] + 3) ** 2).sum(), [prox.none, prox.lasso], [0.5, 0.25])
    >>> condition.residual([torch.tensor([1.0]), torch.tensor([-2.5])])
    [tensor([0.]), tensor([0.])]
    """

    def __init__(self, objective: Callable[..., Tensor], proxes: Tree, stepsizes: Tree) -> None:
        self.objective = checked_callable(objective, "objective")
        self.proxes, self._spec = pytree.tree_flatten(proxes)
        for prox in self.proxes:
            checked_callable(prox, "each of the proxes", "prox(v, stepsize, *args)")
        steps, spec = pytree.tree_flatten(stepsizes)
        if spec != self._spec:
            raise ValueError(f"proxes are {self._spec} and stepsizes {spec}, but there must be one of each per block.")
        self._stepsizes = [checked_stepsize(step) for step in steps]

    def blocks(self, x: Tree) -> list[Tree]:
        """The blocks of x, in the order of the proxes."""
        try:
            return self._spec.flatten_up_to(x)
        except (ValueError, TypeError) as error:
            raise ValueError(f"x must be a container of blocks like the proxes, {self._spec}: {error}") from error

    def stepsizes(self, x: Tree) -> Tree:
        filled = [
            pytree.tree_map(lambda leaf, step=step: torch.full_like(leaf, step), block)
            for block, step in zip(self.blocks(x), self._stepsizes, strict=True)
        ]
        return pytree.tree_unflatten(filled, self._spec)

    def forward_step(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        blocks = self.blocks(x)
        gradients = self.blocks(torch.func.grad(self.objective)(x, *args, **kwargs))
        moved = [
            pytree.tree_map(lambda x, g, step=step: x - step * g, block, gradient)
            for block, gradient, step in zip(blocks, gradients, self._stepsizes, strict=True)
        ]
        return pytree.tree_unflatten(moved, self._spec)

    def backward_step(self, v: Tree, *args: Any, **kwargs: Any) -> Tree:
        parts = zip(self.blocks(v), self.proxes, self._stepsizes, strict=True)
        return pytree.tree_unflatten([prox(block, step, *args, **kwargs) for block, prox, step in parts], self._spec)

    def __repr__(self) -> str:
        proxes, steps = (pytree.tree_unflatten(each, self._spec) for each in (self.proxes, self._stepsizes))
        return call_of(type(self).__name__, {"objective": self.objective, "proxes": proxes, "stepsizes": steps})
