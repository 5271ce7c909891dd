"""Proximal gradient, plain and accelerated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import conditions
from .._iteration import Ended, any_of, select
from .._vectors import dot, vector_norm
from ..conditions import Condition, Tree
from ..conditions.base import checked_callable, checked_stepsize
from ..info import RUNNING, FailurePolicy, Status
from ._step_search import (
    Found,
    Progress,
    first_progress,
    is_hidden,
    progress_after,
    rounding_scale,
    unit_step,
    within_curvature,
)
from .base import DECIDES, InnerProblem, InnerSolver


class ProximalGradientState(NamedTuple):
    x: Tensor  # where the next step begins: extrapolated from the last two points of the prox
    value: Tensor
    gradient: Tensor
    residual_norm: Tensor
    status: Tensor
    point: Tensor  # the last point of the prox
    momentum: Tensor  # (*batch,), tₖ of Beck and Teboulle
    step: Tensor  # (*batch,), the longest that the next step may be
    grows: Tensor  # (*batch,), whether the step length grows until it is found too long
    threshold: Tensor
    progress: Progress


class ProximalGradient(InnerSolver):
    """Proximal gradient for objective(x) + g(x): FISTA (Beck and Teboulle 2009, §4), or ISTA with ``accelerate=False``.

    * ``prox(v, stepsize, *args)``: argmin over x of ½‖x − v‖² + stepsize · g(x, *args), a tree like v, see
      :mod:`implicitdiff.prox`; it gets the same args as the objective, and ``stepsize`` is a scalar tensor;
    * ``accelerate``: with momentum, which starts anew where it points uphill (O'Donoghue and Candès 2015, Eq. 13);
    * ``stepsize``: a fixed step, at most 1/L for an objective with Lipschitz constant L of its gradient. None: by
      backtracking, each system its own, and from a restart on the steps may grow again (by the momentum of Scheinberg,
      Goldfarb and Bai 2014, which allows for it).

    Its condition is :class:`implicitdiff.conditions.ProximalGradient` with that step (1 for None): converged means
    ‖x − prox(x − stepsize · ∇f(x), stepsize)‖₂ ≤ tol. The objective must be smooth on all of the space, as momentum
    leaves the domain of g; what is returned is always a point of the prox.

    A step costs one gradient and two evaluations of the prox and, without a fixed step, one of the objective.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. It needs an
    objective. Raises TypeError for a ``prox`` that is not callable, and ValueError for a step that is not positive.

    >>> import implicitdiff as idf
    >>> def soft_threshold(v, stepsize, y):
    ...     return v.sign() * (v.abs() - stepsize).relu()
    >>> layer = idf.ArgminLayer(lambda x, y: 0.5 * ((x - y) ** 2).sum(), inner_solver=ProximalGradient(soft_threshold))
    >>> layer(torch.zeros(2), torch.tensor([3.0, 0.5]))
    tensor([2., 0.])
    """

    uncompilable = DECIDES

    def __init__(
        self,
        prox: Callable[..., Tree],
        accelerate: bool = True,
        *,
        stepsize: float | None = None,
        tol: float | None = None,
        max_iterations: int = 5000,
        on_failure: FailurePolicy = "warn",
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        super().__init__(
            tol=tol, max_iterations=max_iterations, on_failure=on_failure, compile=compile, check_every=check_every
        )
        self.prox, self.accelerate = checked_callable(prox, "prox"), accelerate
        self.stepsize = None if stepsize is None else checked_stepsize(stepsize)

    def condition(self, objective: Callable[..., Tensor]) -> Condition:
        return conditions.ProximalGradient(objective, self.prox, self._stepsize_of_condition)

    @property
    def _stepsize_of_condition(self) -> float:
        return 1.0 if self.stepsize is None else self.stepsize

    def start(self, problem: InnerProblem, x0: Tensor) -> ProximalGradientState:
        value, gradient, norm = self._at(problem, x0)
        progress = first_progress(norm)
        one = torch.ones_like(progress.norm)
        step = unit_step(gradient) if self.stepsize is None else self.stepsize * one
        threshold = self._threshold(progress.norm)
        return ProximalGradientState(
            x0, value, gradient, norm, progress.status, x0, one, step, one > 0, threshold, progress
        )

    def step(self, problem: InnerProblem, state: ProximalGradientState) -> ProximalGradientState:
        there = self._advance(problem, state, self.accelerate)
        beside = (there.residual_norm.detach() <= state.threshold) & (there.x != there.point).any(-1)
        if any_of(beside):  # the end is a point of the prox: one more step, without momentum
            there = select(beside, self._advance(problem, there, False), there)
        return there

    def run(self, problem: InnerProblem, x0: Tensor, step: Callable[[Any], Any]) -> Any:
        ended = super().run(problem, x0, step)
        state = ended.state
        beside = (state.x != state.point).any(-1)
        if not any_of(beside):
            return ended
        value, gradient, norm = self._at(problem, state.point)
        at_point = state._replace(x=state.point, value=value, gradient=gradient, residual_norm=norm)
        converged = beside & (norm.detach() <= state.threshold)
        status = torch.where(converged, int(Status.CONVERGED), ended.status)
        return Ended(select(beside, at_point, state), ended.iterations, status)

    def _advance(self, problem: InnerProblem, here: ProximalGradientState, accelerate: bool) -> ProximalGradientState:
        found = self._search(problem, here)
        # What the search has found has no graph.
        point = self._move(problem, here.x, here.gradient, found.step) if torch.is_grad_enabled() else found.point
        uphill = dot((here.x - point).detach(), (point - here.point).detach()) > 0
        anew = uphill | (not accelerate)
        grows = (here.grows & (found.step >= here.step)) | anew
        step = found.step
        if self.stepsize is None:
            step = torch.where(grows & ~found.hidden, 2 * step, step)
        # The inequality tₖ₊₁(tₖ₊₁ − 1) · next step ≤ tₖ² · step, which acceleration needs, holds for all shorter ones.
        momentum = (1 + (1 + 4 * here.momentum**2 * found.step / step).sqrt()) / 2
        inertia = torch.where(anew, 0, (here.momentum - 1) / momentum)
        x = point
        if accelerate:
            x = torch.where(anew.unsqueeze(-1), point, point + inertia.unsqueeze(-1) * (point - here.point))
        value, gradient, norm = self._at(problem, x)
        progress = progress_after(here.progress, norm, found.hidden, found.ok)
        momentum = torch.where(anew, 1, momentum)
        return ProximalGradientState(
            x, value, gradient, norm, progress.status, point, momentum, step, grows, here.threshold, progress
        )

    def _search(self, problem: InnerProblem, here: ProximalGradientState) -> Found:
        x, g = here.x.detach(), here.gradient.detach()
        if self.stepsize is None:
            settled = here.status != RUNNING
            return within_curvature(
                problem, x, here.value, g, here.step, lambda step: self._move(problem, x, g, step), settled
            )
        with torch.no_grad():
            point = self._move(problem, x, g, here.step)
        d = point - x
        hidden = is_hidden(dot(d, d) / here.step, rounding_scale(x, here.value.detach(), g))
        return Found(here.step, point, None, None, None, hidden, torch.ones_like(hidden))

    def _move(self, problem: InnerProblem, x: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
        return problem.apply(self.prox, x - step.unsqueeze(-1) * gradient, step)

    def _at(self, problem: InnerProblem, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value, gradient, and ‖F(x)‖₂ by that gradient."""
        value, gradient = problem.value_and_gradient(x)
        s = self._stepsize_of_condition
        return value, gradient, vector_norm(x - problem.apply(self.prox, x - s * gradient, s))
