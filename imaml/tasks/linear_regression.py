"""Few-shot linear regression, where the exact meta-gradient is known."""

from __future__ import annotations

import torch

from .task import Examples, Split, Task, generator_for


class LinearRegression:
    """y = xᵀ(c + w) + noise: weights w ~ N(0, I) of each task around a common c = (1, …, 1), x ~ N(0, I).

    * ``dimension``: of x; ``shots``, ``queries``: the examples of the support and of the query set;
    * ``noise``: its standard deviation.

    Inputs are (tasks, examples, dimension), targets (tasks, examples, 1). The splits train, val and test differ by
    their draws only; another one raises ValueError.

    >>> LinearRegression(dimension=3, shots=5).sample(2, "train", seed=0, index=0).support[0].shape
    torch.Size([2, 5, 3])
    """

    is_classification = False
    splits: frozenset[Split] = frozenset(("train", "val", "test"))

    def __init__(self, dimension: int = 20, shots: int = 10, queries: int = 30, noise: float = 0.1) -> None:
        self.dimension, self.shots, self.queries, self.noise = dimension, shots, queries, noise

    def sample(self, count: int, split: Split, seed: int, index: int) -> Task:
        """A batch of ``count`` tasks: inputs (count, examples, dimension), targets (count, examples, 1)."""
        generator = generator_for(split, seed, index)
        weights = 1 + torch.randn(count, self.dimension, 1, generator=generator)

        def examples(number: int) -> Examples:
            x = torch.randn(count, number, self.dimension, generator=generator)
            return x, x @ weights + self.noise * torch.randn(count, number, 1, generator=generator)

        return Task(examples(self.shots), examples(self.queries))
