"""Straight lines through measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Fit(NamedTuple):
    """Of y = intercept + slope · x, by least squares."""

    slope: float
    half_width: float
    """Of the slope's 95 % confidence interval, by Student's t."""
    intercept: float
    explained: float
    """The share of the variance of y, R²."""

    def __str__(self) -> str:
        interval = "" if math.isnan(self.half_width) else f" ± {self.half_width:.3f}"  # two points have none
        return f"{self.slope:.3f}{interval}"


def line(x: Sequence[float], y: Sequence[float]) -> Fit:
    """
    >>> line([0, 1, 2, 3], [1, 3, 5, 7]).slope
    2.0
    """
    found = stats.linregress(x, y)
    half = stats.t.ppf(0.975, len(x) - 2) * found.stderr
    return Fit(float(found.slope), float(half), float(found.intercept), float(found.rvalue**2))


def power(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Of y ∝ x^slope: a line through the logarithms.

    >>> round(power([1, 10, 100], [5, 50, 500]).slope, 12)
    1.0
    """
    return line(np.log(x), np.log(y))
