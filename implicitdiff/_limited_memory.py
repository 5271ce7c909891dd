"""The inverse Hessian that L-BFGS builds from its steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._vectors import inner


class Pair(NamedTuple):
    """A step, the change of the gradient along it, and their product sᵀy; all zero where the pair is skipped."""

    step: Tensor
    change: Tensor
    curvature: Tensor  # (*batch, 1)


class LimitedMemory(NamedTuple):
    """The last pairs, and the inverse Hessian's scale before they correct it, (*batch, 1)."""

    pairs: tuple[Pair | None, ...]  # the last one last; None where there is none yet
    scale: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """The two-loop recursion (Nocedal and Wright 2006, Algorithm 7.4); a pair of curvature 0 changes nothing."""
        pairs, weights = [pair for pair in self.pairs if pair is not None], []
        for pair in reversed(pairs):
            weight = _over(inner(pair.step, v), pair.curvature)
            weights.append(weight)
            v = v - weight * pair.change
        v = self.scale * v
        for pair, weight in zip(pairs, reversed(weights), strict=True):
            v = v + (weight - _over(inner(pair.change, v), pair.curvature)) * pair.step
        return v


def _over(product: Tensor, curvature: Tensor) -> Tensor:
    used = curvature > 0
    return torch.where(used, product / torch.where(used, curvature, 1), 0)
