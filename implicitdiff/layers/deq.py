"""Deep equilibrium models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..conditions import Tree
from ..errors import ImplicitDiffError
from ..info import Solution
from ..inner_solvers.base import InnerSolverLike
from ..linear_solvers.base import LinearSolverLike
from .implicit_layers import FixedPointLayer


class DEQ(nn.Module):
    """A deep equilibrium model (Bai, Kolter and Koltun 2019): ``layer(init, *args)`` is the z with
    ``update(z, *args) = z``, for each sample of a batch by itself.

    ``init`` and all tensors of the args have a leading dimension, that of the samples; ``update`` sees one sample, and
    is usually a module, whose parameters the samples share. Each sample has its own stopping and its own report
    (``layer.solve(init, *args).forward``). ``inner_solver`` is :class:`~implicitdiff.inner_solvers.Anderson` by
    default (:class:`~implicitdiff.inner_solvers.Broyden` is the other usual choice), ``linear_solver``
    :class:`~implicitdiff.Auto`; a cheap, inexact gradient is that of :class:`~implicitdiff.JacobianFree`.

    Raises :class:`~implicitdiff.ImplicitDiffError` where leading dimensions differ, and what
    :class:`~implicitdiff.FixedPointLayer` raises.

    >>> cell = torch.nn.Linear(3, 3)
    >>> layer = DEQ(lambda z, u: torch.tanh(0.5 * cell(z) + u))
    >>> z = layer(torch.zeros(8, 3), torch.randn(8, 3))
    >>> loss = z.square().sum() + 0.1 * layer.jacobian_penalty(z, torch.randn(8, 3))
    >>> loss.backward()
    >>> cell.weight.grad.shape
    torch.Size([3, 3])
    """

    def __init__(
        self,
        update: Callable[..., Tree],
        *,
        inner_solver: InnerSolverLike | None = None,
        linear_solver: LinearSolverLike | None = None,
    ) -> None:
        super().__init__()
        self.layer = FixedPointLayer(update, inner_solver=inner_solver, linear_solver=linear_solver)

    def forward(self, init: Tree, *args: Any, **kwargs: Any) -> Tree:
        """The equilibria, a tree like ``init``."""
        return self.solve(init, *args, **kwargs).value

    def solve(self, init: Tree, *args: Any, **kwargs: Any) -> Solution:
        """The equilibria with their reports, of shape (samples,)."""
        solutions: list[Solution] = []

        def one(init: Tree, args: Any, kwargs: Any) -> Tree:
            solutions.append(self.layer.solve(init, *args, **kwargs))
            return solutions[0].value

        value = _over_samples(one)(init, args, kwargs)
        solutions[0].value = value
        return solutions[0]

    def jacobian_penalty(self, z: Tree, *args: Any, **kwargs: Any) -> Tensor:
        """An unbiased estimate of ‖∂update/∂z‖²_F / n, averaged over the samples, to add to a loss.

        A small one keeps the iteration a contraction, so that it converges in few steps (Bai, Koltun and Kolter
        2021). It costs one vector–Jacobian product with a random vector, and is differentiable in args and parameters,
        with z held fixed.
        """
        z = pytree.tree_map(Tensor.detach, z)
        update = _over_samples(lambda z, args, kwargs: self.layer.condition.update(z, *args, **kwargs))  # type: ignore[attr-defined]
        pullback = torch.func.vjp(lambda z: update(z, args, kwargs), z)[1]
        (pulled,) = pullback(pytree.tree_map(torch.randn_like, z))
        leaves = pytree.tree_leaves(pulled)
        return torch.stack([leaf.square().sum() for leaf in leaves]).sum() / sum(leaf.numel() for leaf in leaves)


def _over_samples(function: Callable[[Tree, Any, Any], Tree]) -> Callable[[Tree, Any, Any], Tree]:
    """The function over the leading dimension of every tensor."""

    def mapped(*trees: Any) -> Tree:
        shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Tensor)]
        if len({shape[:1] for shape in shapes}) > 1 or () in shapes:
            raise ImplicitDiffError(
                f"init and the tensors of the args have the shapes {shapes}, but all must have the same leading "
                f"dimension, that of the samples. What they share belongs into the update: a parameter, a closure."
            )
        dims = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, trees)
        return torch.func.vmap(function, in_dims=dims)(*trees)

    return mapped
