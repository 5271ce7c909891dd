"""Curve fitting as a layer."""

from __future__ import annotations

from collections.abc import Callable

from ..conditions import Tree
from ..inner_solvers.base import InnerSolverLike
from ..least_squares import LeastSquares
from ..linear_solvers.base import LinearSolverLike
from .implicit_layers import ArgminLayer


class LeastSquaresLayer(ArgminLayer):
    """``layer(init, *args)`` is the x near init that minimises ½‖residual(x, *args)‖², as in fitting a curve to data.

    ``residual`` is a callable or an ``nn.Module`` and returns a tensor or a tree of any shape; ``inner_solver`` is
    :class:`~implicitdiff.inner_solvers.LevenbergMarquardt` by default; everything else, errors included, is as in
    :class:`~implicitdiff.ArgminLayer`. The derivatives are those of the solution, with the exact Hessian: they hold
    where the fit is poor, too.

    A rate fitted to data, and how it depends on each of them:

    >>> t = torch.linspace(0, 2, 5, dtype=torch.float64)
    >>> layer = LeastSquaresLayer(lambda x, y: x["amplitude"] * torch.exp(-x["rate"] * t) - y)
    >>> init = {"amplitude": torch.ones((), dtype=torch.float64), "rate": torch.ones((), dtype=torch.float64)}
    >>> y = 2 * torch.exp(-0.5 * t)
    >>> layer(init, y)
    {'amplitude': tensor(2.0000, dtype=torch.float64), 'rate': tensor(0.5000, dtype=torch.float64)}
    >>> sensitivity = torch.func.jacrev(lambda y: layer(init, y)["rate"])(y)
    >>> sensitivity
    tensor([ 0.3165,  0.0213, -0.1589, -0.2603, -0.3091], dtype=torch.float64)

    So data with independent errors of standard deviation 0.1 give the rate one of

    >>> 0.1 * sensitivity.norm()
    tensor(0.0538, dtype=torch.float64)

    Many fits at once, each with its own stopping:

    >>> rates = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    >>> torch.func.vmap(layer, in_dims=(None, 0))(init, torch.exp(-rates.unsqueeze(-1) * t))["rate"]
    tensor([0.1000, 1.0000, 3.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        residual: Callable[..., Tree],
        *,
        inner_solver: InnerSolverLike | None = None,
        linear_solver: LinearSolverLike | None = None,
        polish: bool = False,
    ) -> None:
        super().__init__(LeastSquares(residual), inner_solver=inner_solver, linear_solver=linear_solver, polish=polish)
