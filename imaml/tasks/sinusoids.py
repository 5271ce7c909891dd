"""Few-shot regression of sinusoids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .task import Examples, Split, Task, generator_for


class Sinusoids:
    """y = a·sin(x − p), a ∈ [0.1, 5], p ∈ [0, π], x ∈ [−5, 5], all uniform (Finn et al. 2017, section 5.1).

    * ``shots``, ``queries``: the examples of the support and of the query set.

    Inputs and targets are (tasks, examples, 1). The splits train, val and test differ by their draws only; another one
    raises ValueError.

    >>> tasks = Sinusoids(shots=10).sample(4, "train", seed=0, index=0)
    >>> tasks.support[0].shape
    torch.Size([4, 10, 1])
    """

    is_classification = False
    splits: frozenset[Split] = frozenset(("train", "val", "test"))

    def __init__(self, shots: int = 10, queries: int = 30) -> None:
        self.shots, self.queries = shots, queries

    def sample(self, count: int, split: Split, seed: int, index: int) -> Task:
        """A batch of ``count`` tasks: inputs and targets of shape (count, shots, 1) and (count, queries, 1)."""
        generator = generator_for(split, seed, index)
        amplitude = 0.1 + 4.9 * torch.rand(count, 1, 1, generator=generator)
        phase = math.pi * torch.rand(count, 1, 1, generator=generator)

        def examples(number: int) -> Examples:
            x: Tensor = 10 * torch.rand(count, number, 1, generator=generator) - 5
            return x, amplitude * torch.sin(x - phase)

        return Task(examples(self.shots), examples(self.queries))
