"""Few-shot classification from classes of pictures: what all such data sets share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .decoding import Preparation, load
from .picture_files import Picture
from .task import Split, Task, generator_for

QUARTER_TURNS = 4
Source = TypeVar("Source", bound="ImageClasses")


class ImageClasses:
    """N-way K-shot classification of pictures, as floats in [0, 1].

    Of each task ``ways`` classes are drawn, of each class ``shots`` pictures to adapt on and ``queries`` others to be
    judged by. Classes may have unequal numbers of pictures. A batch of tasks begins with the smaller batches of the
    same (split, seed, index). With ``rotations`` each training class, turned by 0°, 90°, 180° or 270°, is four classes.

    A data set gives its pictures by class and the names of the classes of each split. Raises ValueError where a class
    is in two splits or is missing, has fewer than shots + queries pictures, or a split has fewer than ``ways`` classes.
    """

    is_classification = True

    def __init__(
        self,
        data: Path,
        pictures: Mapping[str, Sequence[Picture]],
        splits: Mapping[Split, Collection[str]],
        *,
        ways: int,
        shots: int,
        queries: int,
        preparation: Preparation,
        rotations: bool,
    ) -> None:
        for name, number in {"ways": ways, "shots": shots, "queries": queries, "side": preparation.side}.items():
            if number < 1:
                raise ValueError(f"{name} is {number}, but must be at least 1.")
        self.ways, self.shots, self.queries = ways, shots, queries
        self.channels, self.side = preparation.channels, preparation.side
        self.splits: frozenset[Split] = frozenset(splits)
        self.classes: dict[Split, list[str]] = {split: sorted(names) for split, names in splits.items()}
        """The names of the classes of each split."""
        self.rotated: frozenset[Split] = frozenset(("train",)) if rotations else frozenset()
        """The splits in which each class, turned, is four."""
        _check(data, pictures, self.classes)
        for split, classes in self.classes.items():
            turns = self._turns(split)
            if ways > turns * len(classes):
                raise ValueError(
                    f"ways is {ways}, but the {split} split of {data} has {len(classes)} classes"
                    f"{' in 4 rotations' if turns > 1 else ''}: ask for fewer, or give it more classes."
                )
            for name in classes:
                if shots + queries > len(pictures[name]):
                    raise ValueError(
                        f"shots + queries is {shots + queries}, but the class {name} of {data} has "
                        f"{len(pictures[name])} pictures: ask for fewer, or give it more pictures."
                    )
        used = sorted(name for classes in self.classes.values() for name in classes)
        self._preparation = preparation
        self._images = load([p for name in used for p in pictures[name]], preparation, type(self).__name__, data)
        ranges: dict[str, tuple[int, int]] = {}
        first = 0
        for name in used:
            ranges[name] = first, len(pictures[name])
            first += len(pictures[name])
        self._ranges = {split: [ranges[name] for name in classes] for split, classes in self.classes.items()}

    def sample(self, count: int, split: Split, seed: int, index: int) -> Task:
        """A batch of ``count`` tasks: inputs (count, ways · examples, channels, side, side), targets (count, ways ·
        examples), the classes of a task being 0, …, ways − 1 in turn. Raises ValueError for a split it does not have.
        """
        if split not in self.splits:
            raise ValueError(f"there is no split {split!r} here, but {', '.join(sorted(self.splits))}.")
        generator = generator_for(split, seed, index)
        turns, ranges = self._turns(split), self._ranges[split]
        each = self.shots + self.queries
        drawn, firsts, turned = [], [], []
        for _ in range(count):
            for c in torch.randperm(turns * len(ranges), generator=generator)[: self.ways].tolist():
                first, number = ranges[c // turns]
                drawn.append(torch.randperm(number, generator=generator)[:each])
                firsts.append(first)
                turned.append(c % turns)
        rows = torch.stack(drawn) + torch.tensor(firsts)[:, None]
        pixels = self._images.index_select(0, rows.flatten()).unflatten(0, rows.shape).numpy()
        for turn in range(1, turns):
            chosen = np.array(turned) == turn  # in NumPy as it is four times as fast at this
            pixels[chosen] = np.rot90(pixels[chosen], turn, (-2, -1))
        inputs = (torch.from_numpy(pixels).float() / 255).unflatten(0, (count, self.ways))
        labels = torch.arange(self.ways).reshape(1, self.ways, 1).expand(count, self.ways, each)
        parts = []
        for part in (slice(None, self.shots), slice(self.shots, None)):
            parts.append((inputs[:, :, part].flatten(1, 2), labels[:, :, part].flatten(1, 2)))
        return Task(*parts)

    def turned(self: Source) -> Source:
        """The same pictures with the classes of every split turned, those to test on as well.

        The published code of MAML and of iMAML tests on turned characters of Omniglot, which are easier to tell apart.
        """
        other = copy(self)
        other.rotated = self.splits
        return other

    def image(self, picture: str | Path | bytes) -> Tensor:
        """A picture of one's own, prepared as those of the tasks are: (channels, side, side), floats in [0, 1].

        Takes a path or the content of a file. Raises FileNotFoundError, and ValueError for one that is no picture.
        """
        content, name = (picture, "it") if isinstance(picture, bytes) else (Path(picture).read_bytes(), str(picture))
        return torch.from_numpy(self._preparation(content, name).copy()).float() / 255

    def _turns(self, split: Split) -> int:
        return QUARTER_TURNS if split in self.rotated else 1


def _check(data: Path, pictures: Mapping[str, Sequence[Picture]], classes: Mapping[Split, list[str]]) -> None:
    """Raises ValueError where a class is in two splits, or in a split but not in the data."""
    for (one, its), (other, others) in combinations(classes.items(), 2):
        shared = sorted(set(its) & set(others))
        if shared:
            raise ValueError(
                f"{len(shared)} classes of {data} are in the {one} and in the {other} split, {shared[0]} for one: "
                f"few-shot learning is judged by classes that training never shows, so each belongs to one split."
            )
    for split, names in classes.items():
        missing = [name for name in names if name not in pictures]
        if missing:
            raise ValueError(
                f"{data} lacks {len(missing)} of the {len(names)} classes of the {split} split, {missing[0]} for one: "
                f"add their pictures, or take them out of the split."
            )
