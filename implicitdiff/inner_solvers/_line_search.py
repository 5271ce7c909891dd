"""Iterates along descent directions, each system with its own step length; backtracking; and when to give up."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._captures import is_differentiated
from .._iteration import any_of
from .._vectors import inner, vector_norm
from ..info import RUNNING, Status
from .base import InnerProblem

SUFFICIENT_DECREASE = 1e-4
ROUNDING_DECREASE = 0.1
MAX_TRIALS = 40
PATIENCE = 30
"""Steps, beside a quarter of those before, that lower neither the value visibly nor the residual: then a system has
stagnated. Where progress is slow the residual has long plateaus, and the values show nothing any more."""

Projection = Callable[[Tensor], Tensor]


class Progress(NamedTuple):
    """What the steps have gained so far: where rounding hides the decrease of the values, the residual must tell."""

    value: Tensor  # the last value that was visibly lower than all before
    norm: Tensor  # the smallest residual norm
    steps: Tensor
    gained: Tensor  # the number of the last step that improved either
    status: Tensor


class Iterate(NamedTuple):
    """A point with what is known there."""

    x: Tensor
    value: Tensor
    gradient: Tensor
    residual_norm: Tensor
    step: Tensor  # (*batch,), the step length that led here; 0 where none was found
    progress: Progress


class Trial(NamedTuple):
    """A point of a line search, as constants: the choice of the step is not differentiated."""

    step: Tensor
    value: Tensor
    gradient: Tensor
    slope: Tensor  # (*batch,), the derivative along the line


def first_iterate(problem: InnerProblem, x: Tensor, project: Projection | None = None) -> Iterate:
    """The start; with the projection onto a feasible set, ‖x − project(x − ∇f)‖ is the residual norm."""
    value, gradient = problem.value_and_gradient(x)
    norm = _residual_norm(x, gradient, project)
    zero = torch.zeros_like(norm, dtype=torch.int64)
    status = torch.where(value.detach().isnan(), int(Status.NON_FINITE), zero + RUNNING)  # no step could be judged
    progress = Progress(value.detach(), norm.detach(), zero, zero, status)
    return Iterate(x, value, gradient, norm, torch.ones_like(norm.detach()), progress)


def arrive(problem: InnerProblem, here: Iterate, x: Tensor, found: Trial, project: Projection | None = None) -> Iterate:
    """The iterate x at the end of a line search."""
    # The gradient that the search has found has no graph.
    value, gradient = problem.value_and_gradient(x) if is_differentiated(x) else (found.value, found.gradient)
    norm = _residual_norm(x, gradient, project)
    return Iterate(x, value, gradient, norm, found.step, _progress(here.progress, value, norm, found.step))


def _residual_norm(x: Tensor, gradient: Tensor, project: Projection | None) -> Tensor:
    return vector_norm(gradient if project is None else x - project(x - gradient))


def _progress(before: Progress, value: Tensor, norm: Tensor, step: Tensor) -> Progress:
    value, norm = value.detach(), norm.detach()
    lower = value < before.value - 10 * torch.finfo(value.dtype).eps * before.value.abs()
    smaller = norm < before.norm
    steps = before.steps + 1
    gained = torch.where(lower | smaller, steps, before.gained)
    stuck = ((step == 0) | (steps - gained >= PATIENCE + gained // 4)) & norm.isfinite()
    return Progress(
        torch.where(lower, value, before.value),
        torch.where(smaller, norm, before.norm),
        steps,
        gained,
        torch.where(stuck, int(Status.STAGNATED), before.status),
    )


def unit_length(gradient: Tensor) -> Tensor:
    """The factor (*batch, 1) of a first step −factor · ∇f: no longer than 1, as the objective's scale is not known."""
    norm = vector_norm(gradient.detach()).unsqueeze(-1)
    return (1 / torch.where(norm > 0, norm, 1)).clamp(max=1)


def descent(here: Iterate, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The direction, or −gradient where that does not descend, and the slope along it."""
    slope = inner(direction, here.gradient)
    downhill = slope < 0
    slope = torch.where(downhill, slope, -inner(here.gradient, here.gradient))
    return torch.where(downhill, direction, -here.gradient), slope.squeeze(-1)


def slack(value: Tensor) -> Tensor:
    """The change of f that may be one of rounding: sums of large terms are good to much less than the rounding unit."""
    return torch.finfo(value.dtype).eps ** (2 / 3) * value.abs()


def not_searched(here: Iterate, slope: Tensor) -> Tensor:
    """Systems where there is nothing to find."""
    return ~(here.value.detach().isfinite() & slope.isfinite()) | (here.progress.status != RUNNING)


def advance(problem: InnerProblem, here: Iterate, direction: Tensor, step: Tensor) -> Iterate:
    """The first point along the direction, or along −gradient where that does not descend, with sufficient decrease.

    Sufficient is f ≤ f₀ + 10⁻⁴ · step · slope (Armijo), each shorter step by a quadratic model. Near a minimum f cannot
    tell neighbours apart any more although the gradient can: there the slope at the point decides instead (the
    approximate Wolfe condition of Hager and Zhang 2005, Eq. 4.1).
    """
    direction, slope = descent(here, direction)
    x, d, s = (t.detach() for t in (here.x, direction, slope))
    found = _backtrack(problem, here, step, lambda step: (x + step.unsqueeze(-1) * d, step * s))
    return arrive(problem, here, here.x + found.step.unsqueeze(-1) * direction, found)


def advance_projected(
    problem: InnerProblem, here: Iterate, direction: Tensor, free: Tensor, step: Tensor, project: Projection
) -> Iterate:
    """The first point of the arc project(x + step · direction) with sufficient decrease (Bertsekas 1982, Eq. 31).

    That is 10⁻⁴ of what the slope foretells: by the whole step for the free variables, and for the others, whose
    direction is −gradient, by as far as they can go.
    """
    x, g, d = (t.detach() for t in (here.x, here.gradient, direction))

    def arc(step: Tensor) -> tuple[Tensor, Tensor]:
        length = step.unsqueeze(-1)
        point = project(x + length * d).detach()
        return point, (g * torch.where(free, length * d, point - x)).sum(-1)

    found = _backtrack(problem, here, step, arc)
    return arrive(problem, here, project(here.x + found.step.unsqueeze(-1) * direction), found, project)


def _backtrack(
    problem: InnerProblem, here: Iterate, step: Tensor, path: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Trial:
    """The path leads from a step length to a point and to the change of f that the gradient foretells there."""
    x, f, g = (t.detach() for t in (here.x, here.value, here.gradient))
    settled = not_searched(here, path(step)[1])
    for _ in range(MAX_TRIALS):
        point, foretold = path(step)
        value, gradient = (t.detach() for t in problem.value_and_gradient(point))
        change = inner(point - x, gradient).squeeze(-1)
        decreased = value <= f + SUFFICIENT_DECREASE * foretold
        close = ((value - f).abs() <= slack(f)) & (change <= (2 * ROUNDING_DECREASE - 1) * foretold)
        ok = decreased | close
        if not any_of(~(ok | settled)):
            break
        shorter = -foretold * step / (2 * (value - f - foretold))
        shorter = torch.where(value.isfinite(), shorter, 0.1 * step)
        step = torch.where(ok, step, torch.maximum(torch.minimum(shorter, 0.5 * step), 0.1 * step))
    found = ok & ~settled
    return Trial(
        torch.where(found, step, 0),
        torch.where(found, value, f),
        torch.where(found.unsqueeze(-1), gradient, g),
        change,
    )
