"""Mirror descent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import conditions
from .._vectors import dot, vector_norm
from ..conditions import Condition, Tree
from ..conditions.base import checked_callable, checked_stepsize
from ..info import RUNNING, FailurePolicy
from ._step_search import (
    Found,
    Progress,
    first_progress,
    is_hidden,
    progress_after,
    rounding_scale,
    unit_step,
    with_decrease,
)
from .base import DECIDES, InnerProblem, InnerSolver


class MirrorDescentState(NamedTuple):
    x: Tensor
    value: Tensor
    gradient: Tensor
    residual_norm: Tensor
    status: Tensor
    step: Tensor  # (*batch,), the first that is tried
    progress: Progress


class MirrorDescent(InnerSolver):
    """Mirror descent, x ← projection(mirror_map(x) − step · ∇f(x)).

    It is that of Beck and Teboulle (2003, Eq. 3.7). A step costs one gradient and, without a fixed step, the objective.

    * ``projection(y, *args)`` and ``mirror_map(x)``: the Bregman projection from the dual space, and ∇φ into it, as in
      :class:`implicitdiff.conditions.MirrorDescent`;
    * ``stepsize``: a fixed step, at most 1/L where L φ − f is convex. None: by backtracking from twice the last step,
      each system its own, until f ≤ f(x) + 10⁻⁴ ⟨∇f(x), step made⟩ (Armijo along the arc, Li and Cevher 2019). It
      looks at f alone, as the Bregman distance, which a test of relative smoothness would need, cannot be had from ∇φ.

    Its condition is that of :class:`implicitdiff.conditions.MirrorDescent` with that step (1 for None): converged means
    ‖x − projection(mirror_map(x) − stepsize · ∇f(x))‖₂ ≤ tol. It must start where the mirror map is finite: inside of
    the simplex for the entropy.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. It needs an
    objective. Raises TypeError for what is not callable, and ValueError for a step that is not positive.

    >>> import implicitdiff as idf
    >>> solver = MirrorDescent(lambda y, c: torch.softmax(y, -1), torch.log)
    >>> layer = idf.ArgminLayer(lambda x, c: (c * x).sum() + (x * x.log()).sum(), inner_solver=solver)
    >>> c = torch.tensor([0.0, 1.0, 2.0])
    >>> torch.allclose(layer(torch.full((3,), 1 / 3), c), torch.softmax(-c, -1), atol=1e-3)
    True
    """

    uncompilable = DECIDES

    def __init__(
        self,
        projection: Callable[..., Tree],
        mirror_map: Callable[[Tree], Tree],
        stepsize: float | None = None,
        *,
        tol: float | None = None,
        max_iterations: int = 5000,
        on_failure: FailurePolicy = "warn",
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        super().__init__(
            tol=tol, max_iterations=max_iterations, on_failure=on_failure, compile=compile, check_every=check_every
        )
        self.projection = checked_callable(projection, "projection")
        self.mirror_map = checked_callable(mirror_map, "mirror_map")
        self.stepsize = None if stepsize is None else checked_stepsize(stepsize)

    def condition(self, objective: Callable[..., Tensor]) -> Condition:
        return conditions.MirrorDescent(objective, self.projection, self.mirror_map, self._stepsize_of_condition)

    @property
    def _stepsize_of_condition(self) -> float:
        return 1.0 if self.stepsize is None else self.stepsize

    def start(self, problem: InnerProblem, x0: Tensor) -> MirrorDescentState:
        value, gradient = problem.value_and_gradient(x0)
        norm = self._residual_norm(problem, x0, gradient)
        progress = first_progress(norm)
        step = unit_step(gradient) if self.stepsize is None else torch.full_like(progress.norm, self.stepsize)
        return MirrorDescentState(x0, value, gradient, norm, progress.status, step, progress)

    def step(self, problem: InnerProblem, state: MirrorDescentState) -> MirrorDescentState:
        found = self._search(problem, state)
        x, value, gradient = found.point, found.value, found.gradient
        if value is None or gradient is None or torch.is_grad_enabled():  # what the search has found has no graph
            x = self._move(problem, self._dual(problem, state.x), state.gradient, found.step)
            value, gradient = problem.value_and_gradient(x)
        norm = self._residual_norm(problem, x, gradient)
        progress = progress_after(state.progress, norm, found.hidden, found.ok)
        step = found.step
        if self.stepsize is None:
            step = torch.where(found.hidden, step, 2 * step)
        return MirrorDescentState(x, value, gradient, norm, progress.status, step, progress)

    def _search(self, problem: InnerProblem, here: MirrorDescentState) -> Found:
        x, g = here.x.detach(), here.gradient.detach()
        with torch.no_grad():
            y = self._dual(problem, x)
        if self.stepsize is None:

            def path(step: Tensor) -> Tensor:
                return self._move(problem, y, g, step)

            def descent(point: Tensor, step: Tensor) -> Tensor:  # ⟨∇φ(p) − ∇φ(x), p − x⟩/step
                d = point - x
                rise = torch.where(d == 0, 0, self._dual(problem, point) - y)  # ∇φ may be infinite on the boundary
                return dot(rise, d) / step

            return with_decrease(problem, x, here.value, g, here.step, path, descent, here.status != RUNNING)
        with torch.no_grad():
            point = self._move(problem, y, g, here.step)
        hidden = is_hidden(dot(g, point - x), rounding_scale(x, here.value.detach(), g))
        return Found(here.step, point, None, None, None, hidden, torch.ones_like(hidden))

    def _dual(self, problem: InnerProblem, x: Tensor) -> Tensor:
        return problem.apply(self._mirror_map, x)

    def _mirror_map(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        return self.mirror_map(x)

    def _move(self, problem: InnerProblem, y: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
        return problem.apply(self.projection, y - step.unsqueeze(-1) * gradient)

    def _residual_norm(self, problem: InnerProblem, x: Tensor, gradient: Tensor) -> Tensor:
        dual = self._dual(problem, x) - self._stepsize_of_condition * gradient
        return vector_norm(x - problem.apply(self.projection, dual))
