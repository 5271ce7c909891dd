"""Step lengths of forward–backward and of feasible steps, each system its own, and when rounding ends the progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._iteration import any_of
from .._vectors import dot, vector_norm
from ..info import RUNNING, Status
from .base import InnerProblem

SUFFICIENT_DECREASE = 1e-4
ROUNDING_OF_CURVATURE = 0.01
MAX_TRIALS = 60
PATIENCE = 50
"""Steps, beside a quarter of all, whose change of the value rounding hides and that do not lower the residual: then a
system has stagnated."""

Path = Callable[[Tensor], Tensor]
"""From a step length (*batch,) to the point that it leads to."""


class Progress(NamedTuple):
    """What the steps have gained so far. What they minimise is not known (a prox says nothing of its function's
    value), and the residual may rise on the way: it counts only where the values tell nothing any more."""

    norm: Tensor  # the smallest residual norm
    steps: Tensor
    idle: Tensor  # steps since then whose change of the value was hidden
    status: Tensor


class Found(NamedTuple):
    """The point of a search, as constants: the choice of the step is not differentiated."""

    step: Tensor
    point: Tensor
    value: Tensor | None
    gradient: Tensor | None
    change: Tensor | None  # of the value, where that was asked for
    hidden: Tensor  # whether rounding hides the change of the value
    ok: Tensor


def first_progress(norm: Tensor) -> Progress:
    zero = torch.zeros_like(norm.detach(), dtype=torch.int64)
    return Progress(norm.detach(), zero, zero, zero + RUNNING)


def progress_after(before: Progress, norm: Tensor, hidden: Tensor, ok: Tensor) -> Progress:
    norm = norm.detach()
    smaller = norm < before.norm
    steps, idle = before.steps + 1, torch.where(smaller, 0, before.idle + hidden)
    stuck = (~ok | (idle >= PATIENCE + steps // 4)) & norm.isfinite()
    status = torch.where(stuck, int(Status.STAGNATED), before.status)
    return Progress(torch.where(smaller, norm, before.norm), steps, idle, status)


def unit_step(gradient: Tensor) -> Tensor:
    """A first step length (*batch,), by which −∇f is no longer than 1: the objective's scale is not known."""
    norm = vector_norm(gradient.detach())
    return (1 / torch.where(norm > 0, norm, 1)).clamp(max=1)


def rounding_scale(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """What the rounding unit is relative to, in differences of values near x and in ⟨∇f, p − x⟩."""
    return value.abs() + dot(gradient.abs(), x.abs())


def is_hidden(change: Tensor, scale: Tensor) -> Tensor:
    """Whether rounding hides a change of the value."""
    return change.abs() <= 10 * torch.finfo(scale.dtype).eps * scale


def within_curvature(
    problem: InnerProblem,
    x: Tensor,
    value: Tensor,
    gradient: Tensor,
    step: Tensor,
    path: Path,
    settled: Tensor,
    *,
    with_gradient: bool = False,
) -> Found:
    """The first point p, by shorter and shorter steps, with f(p) ≤ f(x) + ⟨∇f(x), p − x⟩ + ‖p − x‖²/(2 step).

    That is the descent lemma, what forward–backward steps need of f (Beck and Teboulle 2009, Eq. 2.5). Where rounding
    hides what it compares, ⟨∇f(p) − ∇f(x), p − x⟩ ≤ ‖p − x‖²/step decides, the same for a quadratic f (Becker, Candès
    and Grant 2011, §5.3). The gradient at p is evaluated there only, or everywhere at once with ``with_gradient``.
    """
    x, f, g = x.detach(), value.detach(), gradient.detach()
    scale = rounding_scale(x, f, g)
    settled = settled | ~(f.isfinite() & g.isfinite().all(-1))
    for _ in range(MAX_TRIALS):
        with torch.no_grad():
            point = path(step)
        d = point - x
        slope, square = dot(g, d), dot(d, d)
        allowed = square / (2 * step)
        hidden = is_hidden(allowed, scale)
        new_gradient = None
        if with_gradient:
            new, new_gradient = (t.detach() for t in problem.value_and_gradient(point))
        else:
            with torch.no_grad():
                new = problem.objective(point)
        curved = new - f - slope
        if any_of(hidden & ~settled):
            new_gradient = problem.gradient(point).detach() if new_gradient is None else new_gradient
            curved = torch.where(hidden, dot(new_gradient - g, d) / 2, curved)
        still = vector_norm(d) <= 4 * torch.finfo(f.dtype).eps * vector_norm(x)
        ok = (curved <= (1 + ROUNDING_OF_CURVATURE) * allowed) | (still & new.isfinite())
        if not any_of(~(ok | settled | square.isnan())):  # no shorter step heals a NaN of the path
            break
        bent = (curved > 0) & curved.isfinite()
        shorter = torch.where(bent, square / (2 * torch.where(bent, curved, 1)), 0)
        step = torch.where(ok, step, torch.maximum(torch.minimum(shorter, 0.8 * step), 0.1 * step))
    return Found(step, point, new, new_gradient, None, hidden, ok | settled)


def with_decrease(
    problem: InnerProblem,
    x: Tensor,
    value: Tensor,
    gradient: Tensor,
    step: Tensor,
    path: Path,
    descent: Callable[[Tensor, Tensor], Tensor],
    settled: Tensor,
    allowance: Tensor | float = 0.0,
) -> Found:
    """The first point p of a path, by shorter steps, with f(p) ≤ f(x) + allowance + 10⁻⁴ ⟨∇f(x), p − x⟩ (Armijo).

    ``descent(p, step)`` bounds −⟨∇f(x), p − x⟩ from below without its rounding errors, which are as large as those of
    f: across a constraint ∇f does not vanish, and p − x, which should have no part there, is rounded. Where they blur
    what is compared, the bound stands for it and f(p) − f(x) is −descent + ½⟨∇f(p) − ∇f(x), p − x⟩.
    """
    x, f, g = x.detach(), value.detach(), gradient.detach()
    scale = rounding_scale(x, f, g)
    blur = torch.finfo(f.dtype).eps ** (2 / 3) * scale
    settled = settled | ~(f.isfinite() & g.isfinite().all(-1))
    for _ in range(MAX_TRIALS):
        with torch.no_grad():
            point = path(step)
            bound = -descent(point, step)
        d = point - x
        new, new_gradient = (t.detach() for t in problem.value_and_gradient(point))
        blurred = bound.abs() <= blur
        foretold = torch.where(blurred, bound, dot(g, d))
        change = torch.where(blurred & new.isfinite(), bound + dot(new_gradient - g, d) / 2, new - f)
        ok = (foretold <= 0) & (change <= allowance + SUFFICIENT_DECREASE * foretold)
        if not any_of(~(ok | settled | foretold.isnan())):  # no shorter step heals a NaN of the path
            break
        excess = change - foretold
        bent = (excess > 0) & excess.isfinite() & (foretold < 0)
        shorter = torch.where(bent, -foretold * step / (2 * torch.where(bent, excess, 1)), 0)
        step = torch.where(ok, step, torch.maximum(torch.minimum(shorter, 0.5 * step), 0.1 * step))
    return Found(step, point, new, new_gradient, change, is_hidden(foretold, scale), ok | settled)
