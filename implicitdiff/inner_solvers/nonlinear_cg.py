"""Conjugate gradients for minima of functions that are not quadratic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._vectors import inner
from ._line_search import Iterate, first_iterate, unit_length
from ._strong_wolfe import advance_wolfe
from .base import DECIDES, InnerProblem, InnerSolver

CURVATURE = 0.2
"""Line searches are nearly exact, as conjugacy needs."""
LEAST = 0.4
"""β is bounded from below by this multiple of dᵀ∇f / ‖d‖²."""


class NonlinearCGState(NamedTuple):
    x: Tensor
    residual_norm: Tensor
    status: Tensor
    here: Iterate
    direction: Tensor
    length: Tensor  # (*batch,), the first trial along it


class NonlinearCG(InnerSolver):
    """The conjugate gradient method of Hager and Zhang (2005), with strong Wolfe line searches.

    It holds four vectors only. Its directions, by their Eq. 1.3, descend whatever the line search (with the lower bound
    on β of Hager and Zhang 2013); it starts again along −∇f where rounding spoils that.

    Shapes, settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. It needs an objective.

    >>> import implicitdiff as idf
    >>> layer = idf.ArgminLayer(lambda x, t: (torch.cosh(x - t) + x**2).sum(), inner_solver=NonlinearCG(tol=1e-6))
    >>> bool(layer.solve(torch.zeros(3, dtype=torch.float64), 1.0).forward.converged)
    True
    """

    uncompilable = DECIDES

    def start(self, problem: InnerProblem, x0: Tensor) -> NonlinearCGState:
        here = first_iterate(problem, x0)
        return self._state(here, -here.gradient, unit_length(here.gradient).squeeze(-1))

    def step(self, problem: InnerProblem, state: NonlinearCGState) -> NonlinearCGState:
        here, d = state.here, state.direction
        there = advance_wolfe(problem, here, d, state.length, CURVATURE)
        g, y = there.gradient, there.gradient - here.gradient
        slope, curvature, square = inner(d, here.gradient), inner(d, y), inner(d, d)
        curved = curvature > 0
        curvature = torch.where(curved, curvature, 1)
        beta = (inner(y, g) - 2 * inner(y, y) * inner(d, g) / curvature) / curvature
        beta = torch.maximum(beta, LEAST * slope / torch.where(square > 0, square, 1))
        direction = torch.where(curved, beta, 0).detach() * d - g  # as the step length, β is not differentiated
        slope_there = inner(direction, g)
        downhill = curved & (slope_there < 0)
        direction = torch.where(downhill, direction, -g)
        # At first the next step changes f by as much, to first order (Nocedal and Wright 2006, section 3.5).
        length = there.step.unsqueeze(-1) * slope / torch.where(downhill, slope_there, 1)
        length = torch.where(downhill, length, unit_length(g)).squeeze(-1).detach()
        # Where no step was found along a conjugate direction, the steepest descent is tried before giving up.
        conjugate = (d != -here.gradient).any(-1)
        status = torch.where((there.step == 0) & conjugate, here.progress.status, there.progress.status)
        there = there._replace(progress=there.progress._replace(status=status))
        return self._state(there, direction, length)

    @staticmethod
    def _state(here: Iterate, direction: Tensor, length: Tensor) -> NonlinearCGState:
        return NonlinearCGState(here.x, here.residual_norm, here.progress.status, here, direction, length)
