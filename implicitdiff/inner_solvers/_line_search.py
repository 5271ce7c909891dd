"""Backtracking along a descent direction, each system with its own step length; and when to give up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._iteration import any_of
from .._vectors import inner, vector_norm
from ..info import RUNNING, Status
from .base import InnerProblem

SUFFICIENT_DECREASE = 1e-4
ROUNDING_DECREASE = 0.1
MAX_TRIALS = 40
PATIENCE = 30
"""Steps that the values cannot justify and that do not lower the gradient either, before a system has stagnated."""


class Progress(NamedTuple):
    """Where a system stands in the regime where rounding hides the decrease of its values."""

    best: Tensor  # the smallest gradient norm so far
    stalls: Tensor  # steps since then that were taken without a visible decrease
    status: Tensor


class Iterate(NamedTuple):
    """A point with what is known there."""

    x: Tensor
    value: Tensor
    gradient: Tensor
    residual_norm: Tensor
    step: Tensor  # (*batch,), the step length that led here
    progress: Progress


def first_iterate(problem: InnerProblem, x: Tensor) -> Iterate:
    value, gradient = problem.value_and_gradient(x)
    norm = vector_norm(gradient)
    zero = torch.zeros_like(norm, dtype=torch.int64)
    return Iterate(
        x, value, gradient, norm, torch.ones_like(norm.detach()), Progress(norm.detach(), zero, zero + RUNNING)
    )


def advance(problem: InnerProblem, here: Iterate, direction: Tensor, step: Tensor) -> Iterate:
    """The first point along the direction, or along −gradient where that does not descend, with sufficient decrease.

    Sufficient is f ≤ f₀ + 10⁻⁴ · step · slope (Armijo), each shorter step by a quadratic model. Near a minimum f cannot
    tell neighbours apart any more although the gradient can: there the slope at the point decides instead (the
    approximate Wolfe condition of Hager and Zhang 2005, Eq. 4.1).
    """
    slope = inner(direction, here.gradient).squeeze(-1)
    downhill = slope < 0
    direction = torch.where(downhill.unsqueeze(-1), direction, -here.gradient)
    slope = torch.where(downhill, slope, -(here.residual_norm**2))
    step, by_rounding = _backtrack(problem, here, direction, slope, step)
    x = here.x + step.unsqueeze(-1) * direction
    value, gradient = problem.value_and_gradient(x)
    norm = vector_norm(gradient)
    progress = _progress(here.progress, norm.detach(), step, by_rounding)
    return Iterate(x, value, gradient, norm, step, progress)


@torch.no_grad()  # the choice of the step is not differentiated
def _backtrack(
    problem: InnerProblem, here: Iterate, direction: Tensor, slope: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """Step lengths, 0 where none was found, and whether rounding hides the decrease."""
    x, f, d, s, step = (t.detach() for t in (here.x, here.value, direction, slope, step))
    slack = 10 * torch.finfo(f.dtype).eps * f.abs()
    settled = ~(f.isfinite() & s.isfinite())  # nothing to find there
    for _ in range(MAX_TRIALS):
        point = x + step.unsqueeze(-1) * d
        trial = problem.objective(point)
        decreased = trial <= f + SUFFICIENT_DECREASE * step * s
        close = ~decreased & (trial <= f + slack) & ~settled
        if any_of(close):
            slope_there = inner(d, problem.gradient(point).detach()).squeeze(-1)
            close = close & (slope_there <= (2 * ROUNDING_DECREASE - 1) * s)
        ok = settled | decreased | close
        if not any_of(~ok):
            break
        shorter = -s * step * step / (2 * (trial - f - s * step))
        shorter = torch.where(trial.isfinite(), shorter, 0.1 * step)
        step = torch.where(ok, step, torch.maximum(torch.minimum(shorter, 0.5 * step), 0.1 * step))
    return torch.where(ok & ~settled, step, 0), f - trial <= slack


def _progress(before: Progress, norm: Tensor, step: Tensor, by_rounding: Tensor) -> Progress:
    better = norm < before.best
    stalls = torch.where(better | ~by_rounding, 0, before.stalls + 1)
    stuck = (step == 0) | (stalls >= PATIENCE)
    status = torch.where(stuck & norm.isfinite(), int(Status.STAGNATED), before.status)
    return Progress(torch.where(better, norm, before.best), stalls, status)
