"""A line search for the strong Wolfe conditions, each system with its own bracket."""

from __future__ import annotations

import torch
from torch import Tensor

from .._iteration import any_of, select
from .._vectors import inner
from ._line_search import (
    ROUNDING_DECREASE,
    SUFFICIENT_DECREASE,
    Iterate,
    Trial,
    arrive,
    descent,
    not_searched,
    slack,
)
from .base import InnerProblem

MAX_TRIALS = 20


def advance_wolfe(problem: InnerProblem, here: Iterate, direction: Tensor, step: Tensor, curvature: float) -> Iterate:
    """A point along the direction, or along −gradient where that does not descend, with the strong Wolfe conditions:
    f ≤ f₀ + 10⁻⁴ · step · slope₀ and |slope| ≤ curvature · |slope₀|.

    By bracketing and zoom (Nocedal and Wright 2006, Algorithms 3.5 and 3.6). Where rounding hides the decrease of f the
    slope decides instead (the approximate Wolfe condition of Hager and Zhang 2005, Eq. 4.1). After 20 trials the best
    point of the bracket is taken, if it decreases f at all.
    """
    direction, slope = descent(here, direction)
    found = _zoom(problem, here, direction.detach(), slope.detach(), step, curvature)
    return arrive(problem, here, here.x + found.step.unsqueeze(-1) * direction, found)


def _zoom(problem: InnerProblem, here: Iterate, d: Tensor, slope: Tensor, step: Tensor, curvature: float) -> Trial:
    """Both algorithms in one loop: while ``high`` is at infinity it brackets, then it zooms.

    ``low`` has a sufficient decrease, or is the start, and a slope that descends towards ``high``; it ends as the
    point that was found.
    """
    x, f, g = (t.detach() for t in (here.x, here.value, here.gradient))
    low = Trial(torch.zeros_like(f), f, g, slope)
    high = low._replace(step=torch.full_like(f, torch.inf))
    settled = not_searched(here, slope)
    hidden = slack(f)
    for _ in range(MAX_TRIALS):
        value, gradient = (t.detach() for t in problem.value_and_gradient(x + step.unsqueeze(-1) * d))
        trial = Trial(step, value, gradient, inner(d, gradient).squeeze(-1))
        decreased = value <= f + SUFFICIENT_DECREASE * step * slope
        close = ~decreased & ((value - f).abs() <= hidden)
        descended = decreased | close & (trial.slope <= (2 * ROUNDING_DECREASE - 1) * slope)
        found = descended & (trial.slope.abs() <= -curvature * slope)
        if not any_of(~(settled | found)):
            return select(found & ~settled, trial, low)
        # The minimum lies before a point that is not low enough, or higher than low. A NaN is never low enough.
        fits = (decreased | close & (trial.slope < 0)) & (value <= low.value + hidden)
        past = ~found & ~fits
        turned = ~found & fits & (trial.slope * (high.step - low.step) >= 0)
        before, width = low, (high.step - low.step).abs()
        high = select(~settled & past, trial, select(~settled & turned, low, high))
        low = select(~settled & ~past, trial, low)
        settled = settled | found
        next_step = torch.where(high.step.isfinite(), _inside(low, high, hidden, width), _outside(before, low))
        step = torch.where(settled, low.step, next_step)
    return low


def _inside(low: Trial, high: Trial, hidden: Tensor, width: Tensor) -> Tensor:
    """The minimum of the cubic through both ends (Eq. 3.59), kept off them; the middle where it shrinks slowly.

    Where rounding hides the difference of the values, the slopes decide alone: the cubic is a parabola.
    """
    length = high.step - low.step
    rise = high.value - low.value
    chord = torch.where(rise.abs() <= hidden, (low.slope + high.slope) / 2, rise / length)
    d1 = low.slope + high.slope - 3 * chord
    d2 = (d1**2 - low.slope * high.slope).clamp(min=0).sqrt() * length.sign()
    fraction = 1 - (high.slope + d2 - d1) / (high.slope - low.slope + 2 * d2)
    fraction = torch.where(length.abs() > 0.66 * width, 0.5, fraction.nan_to_num(0.5).clamp(0.1, 0.9))
    return low.step + torch.where(high.value.isfinite() & high.slope.isfinite(), fraction, 0.1) * length


def _outside(before: Trial, last: Trial) -> Tensor:
    """Further on, to where the secant of the slopes vanishes, but one to ten times as far as the last advance."""
    length = last.step - before.step
    ahead = -last.slope * length / (last.slope - before.slope)
    ahead = torch.where(last.slope > before.slope, ahead, torch.inf)
    return last.step + torch.maximum(torch.minimum(ahead, 10 * length), length)
