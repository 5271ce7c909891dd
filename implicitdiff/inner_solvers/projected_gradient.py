"""Projected gradient with spectral steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import conditions
from .._vectors import dot, vector_norm
from ..conditions import Condition, Tree
from ..conditions.base import checked_callable
from ..info import RUNNING, FailurePolicy
from ._step_search import Progress, first_progress, progress_after, unit_step, with_decrease
from .base import DECIDES, InnerProblem, InnerSolver

MEMORY = 10


class ProjectedGradientState(NamedTuple):
    x: Tensor
    value: Tensor
    gradient: Tensor
    residual_norm: Tensor
    status: Tensor
    recent: Tensor  # (*batch, MEMORY), how far the last values lie above this one
    step: Tensor  # (*batch,), the spectral step length
    progress: Progress


class ProjectedGradient(InnerSolver):
    """Spectral projected gradient (Birgin, Martínez and Raydan 2000, Algorithm SPG2) over a convex set.

    It goes from x towards projection(x − α · ∇f), α the step length of Barzilai and Borwein, by the first fraction of
    the way that lowers the largest of the last ten values. That is one evaluation of the objective and its gradient
    and two projections a step, mostly; the objective is evaluated inside the set only.

    ``projection(v, *args)`` is the Euclidean one, a tree like v, see :mod:`implicitdiff.projections`; it gets the same
    args as the objective. Where x starts outside the set, it starts from its projection.

    Its condition is :class:`implicitdiff.conditions.ProjectedGradient`: converged means
    ‖x − projection(x − ∇f(x))‖₂ ≤ tol.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. It needs an
    objective. Raises TypeError for a ``projection`` that is not callable.

    >>> import implicitdiff as idf
    >>> layer = idf.ArgminLayer(lambda x, y: ((x - y) ** 2).sum(),
    ...                         inner_solver=ProjectedGradient(lambda v, y: v.clamp(min=0)))
    >>> layer(torch.ones(2), torch.tensor([3.0, -1.0]))
    tensor([3., 0.])
    """

    uncompilable = DECIDES

    def __init__(
        self,
        projection: Callable[..., Tree],
        *,
        tol: float | None = None,
        max_iterations: int = 2000,
        on_failure: FailurePolicy = "warn",
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        super().__init__(
            tol=tol, max_iterations=max_iterations, on_failure=on_failure, compile=compile, check_every=check_every
        )
        self.projection = checked_callable(projection, "projection")

    def condition(self, objective: Callable[..., Tensor]) -> Condition:
        return conditions.ProjectedGradient(objective, self.projection)

    def start(self, problem: InnerProblem, x0: Tensor) -> ProjectedGradientState:
        with torch.no_grad():  # the start is a constant, in the set as well
            x0 = self._project(problem, x0)
        value, gradient = problem.value_and_gradient(x0)
        residual = x0 - self._project(problem, x0 - gradient)
        norm = vector_norm(residual)
        progress = first_progress(norm)
        recent = torch.zeros_like(progress.norm).unsqueeze(-1).expand(*norm.shape, MEMORY)
        return ProjectedGradientState(x0, value, gradient, norm, progress.status, recent, unit_step(residual), progress)

    def step(self, problem: InnerProblem, state: ProjectedGradientState) -> ProjectedGradientState:
        here, recent = state.x, state.recent
        ahead = self._project(problem, here - state.step.unsqueeze(-1) * state.gradient)
        start, end = here.detach(), ahead.detach()
        decrease = dot(end - start, end - start) / state.step  # at least, by the projection's inequality
        found = with_decrease(
            problem,
            start,
            state.value,
            state.gradient,
            torch.ones_like(state.step),
            lambda fraction: _between(start, end, fraction),
            lambda point, fraction: fraction * decrease,
            state.status != RUNNING,
            recent.amax(-1),
        )
        x, value, gradient = found.point, found.value, found.gradient
        if value is None or gradient is None or torch.is_grad_enabled():  # what the search has found has no graph
            x = _between(here, ahead, found.step)
            value, gradient = problem.value_and_gradient(x)
        norm = vector_norm(x - self._project(problem, x - gradient))
        progress = progress_after(state.progress, norm, found.hidden, found.ok)
        assert found.change is not None
        change = found.change.unsqueeze(-1)
        recent = torch.cat([recent[..., 1:] - change, torch.zeros_like(change)], -1)
        step = _spectral_step(state.step, (x - here).detach(), (gradient - state.gradient).detach())
        return ProjectedGradientState(x, value, gradient, norm, progress.status, recent, step, progress)

    def _project(self, problem: InnerProblem, v: Tensor) -> Tensor:
        return problem.apply(self.projection, v)


def _between(x: Tensor, y: Tensor, fraction: Tensor) -> Tensor:
    """From x towards y; y itself for 1, in the set to the last bit."""
    fraction = fraction.unsqueeze(-1)
    return torch.where(fraction == 1, y, x + fraction * (y - x))


def _spectral_step(before: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """⟨s, s⟩/⟨s, Δ∇f⟩, of Barzilai and Borwein; ten times the last one along negative curvature."""
    square, curvature = dot(step, step), dot(step, change)
    length = torch.where(curvature > 0, square / torch.where(curvature > 0, curvature, 1), 10 * before)
    return torch.where((square > 0) & (length > 0) & length.isfinite(), length, before)
