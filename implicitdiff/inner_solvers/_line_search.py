"""Backtracking along a descent direction, each system with its own step length."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base import InnerProblem

SUFFICIENT_DECREASE = 1e-4
MAX_TRIALS = 40


class Trial(NamedTuple):
    x: Tensor
    step: Tensor  # (*batch,), 0 where no step was found
    by_rounding: Tensor  # (*batch,), whether the step was taken only because the values cannot be told apart


def backtrack(problem: InnerProblem, x: Tensor, value: Tensor, slope: Tensor, direction: Tensor, step: Tensor) -> Trial:
    """The first trial point with f ≤ f₀ + 10⁻⁴ · step · slope (Armijo), the step shortened by a quadratic model.

    Near a minimum f cannot tell neighbours apart any more although the gradient can; there a value within rounding of
    f₀ is taken as well, and said so.
    """
    with torch.no_grad():  # the choice of the step is not differentiated
        f, s, d, at = value.detach(), slope.detach(), direction.detach(), x.detach()
        step = step.detach()
        slack = 10 * torch.finfo(f.dtype).eps * f.abs()
        settled = ~(f.isfinite() & s.isfinite())  # nothing to find there
        for _ in range(MAX_TRIALS):
            trial = problem.objective(at + step.unsqueeze(-1) * d).detach()
            decreased = trial <= f + SUFFICIENT_DECREASE * step * s
            ok = settled | decreased | (trial <= f + slack)
            if bool(ok.all()):
                break
            shorter = -s * step * step / (2 * (trial - f - s * step))
            shorter = torch.where(trial.isfinite(), shorter, 0.1 * step)
            step = torch.where(ok, step, torch.maximum(torch.minimum(shorter, 0.5 * step), 0.1 * step))
        step = torch.where(ok & ~settled, step, 0)
    return Trial(x + step.unsqueeze(-1) * direction, step, ~decreased)
