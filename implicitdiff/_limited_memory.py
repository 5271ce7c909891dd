"""The inverse Hessian that L-BFGS builds from its steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._vectors import inner


class Pair(NamedTuple):
    """A step s, the change y of the gradient along it, and 1/sᵀy, 0 where the pair is skipped."""

    step: Tensor
    change: Tensor
    weight: Tensor  # (*batch, 1)


class LimitedMemory(NamedTuple):
    """The last pairs, and the inverse Hessian's scale before they correct it, (*batch, 1)."""

    pairs: tuple[Pair | None, ...]  # the last one last; None where there is none yet
    scale: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """The two-loop recursion (Nocedal and Wright 2006, Algorithm 7.4)."""
        pairs, lengths = [pair for pair in self.pairs if pair is not None], []
        for pair in reversed(pairs):
            length = inner(pair.step, v) * pair.weight
            lengths.append(length)
            v = torch.addcmul(v, length, pair.change, value=-1)
        v = self.scale * v
        for pair, length in zip(pairs, reversed(lengths), strict=True):
            v = torch.addcmul(v, length - inner(pair.change, v) * pair.weight, pair.step)
        return v
