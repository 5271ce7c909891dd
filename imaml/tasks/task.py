"""What a task is, and what a source of tasks is."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

Split = Literal["train", "test", "val"]
"""Tasks to learn from, and two kinds of tasks that training never shows: to report on, and to choose settings by."""

Examples = tuple[Tensor, Tensor]
"""(inputs, targets), with a leading dimension for the examples."""


class Task(NamedTuple):
    """One task, or a batch of tasks whose tensors have a leading task dimension.

    ``support`` and ``query`` are pairs (inputs, targets), of shapes (examples, …), or (tasks, examples, …) in a batch.
    :meth:`stack` raises ValueError for no tasks, or tasks of unequal shapes.

    >>> one = Task((torch.zeros(5, 1), torch.zeros(5, 1)), (torch.zeros(9, 1), torch.zeros(9, 1)))
    >>> Task.stack([one, one]).query[0].shape
    torch.Size([2, 9, 1])
    """

    support: Examples
    """What the model is adapted on."""
    query: Examples
    """What the adapted model is judged on."""

    @staticmethod
    def stack(tasks: list[Task]) -> Task:
        """The tasks as one batch. Raises ValueError for none, or for tasks of unequal shapes."""
        if not tasks:
            raise ValueError("there is no task in the list: a batch needs at least one.")
        shapes = {tuple(tuple(t.shape) for part in task for t in part) for task in tasks}
        if len(shapes) > 1:
            raise ValueError(f"tasks of a batch must have equal shapes, but these have {sorted(shapes)}.")
        parts = [
            tuple(torch.stack(tensors) for tensors in zip(*part, strict=True)) for part in zip(*tasks, strict=True)
        ]
        return Task(*parts)  # type: ignore[arg-type]


class TaskSource(Protocol):
    """Draws tasks; the same (split, seed, index) gives the same tasks on every machine and worker.

    What training and evaluation ask of a source: any class with these members serves. Tensors of a batch of tasks are
    (tasks, examples, …); a split that there is not is to raise ValueError.

    >>> class Lines:
    ...     is_classification, splits = False, frozenset(("train", "test"))
    ...     def sample(self, count, split, seed, index):
    ...         generator = torch.Generator().manual_seed(2 * (1000 * seed + index) + (split == "test"))
    ...         slope = torch.randn(count, 1, 1, generator=generator)
    ...         x = torch.randn(count, 10, 1, generator=generator)
    ...         return Task((x[:, :5], slope * x[:, :5]), (x[:, 5:], slope * x[:, 5:]))
    >>> source: TaskSource = Lines()
    >>> source.sample(4, "train", seed=0, index=0).query[1].shape
    torch.Size([4, 5, 1])
    """

    is_classification: bool
    splits: frozenset[Split]
    """Those it has; train and test always."""

    def sample(self, count: int, split: Split, seed: int, index: int) -> Task:
        """A batch of ``count`` tasks."""


def generator_for(split: Split, seed: int, index: int) -> torch.Generator:
    """A random generator of its own for each (split, seed, index). Raises ValueError for another split."""
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}, but it must be one of {', '.join(map(repr, get_args(Split)))}.")
    entropy = np.random.SeedSequence((get_args(Split).index(split), seed, index))
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
