"""Pictures of one's own: a folder for each class."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import get_args

from ..files import write_atomically
from .decoding import Preparation
from .image_classes import ImageClasses
from .picture_files import ENDINGS, Files, Picture
from .task import Split

SPLIT_FILE = "split.json"
TEST_SHARE, VAL_SHARE = 0.20, 0.16


class ImageFolder(ImageClasses):
    """N-way K-shot classification of any folder of classes, or of a zip of it: colour or ``grayscale``, in [0, 1].

    The pictures (bmp, gif, jpg, png or webp) of a class lie in its folder or deeper; other files, and pictures outside
    of the folders of classes, are not used. The shorter side is resized to ``side``, the longer one cut around the
    centre. With ``rotations`` each training class, turned by quarters, is four.
    Which classes are trained on, and which are for choosing settings and for testing, is said

    * by folders: ``data/train/CLASS/…``, ``data/test/CLASS/…`` and, if you like, ``data/val/CLASS/…``; or
    * by a file ``data/split.json``, {"train": [classes], "val": [classes], "test": [classes]}, or one given as
      ``split``; for a zip it may also lie beside: ``flowers.split.json`` for ``flowers.zip``; or
    * not at all: then the classes ``data/CLASS/…`` are divided (:func:`~imaml.tasks.image_folder.divide`), and that
      file is written, with a warning. Later runs keep to it: a class that is added is left out, with a warning, until
      it is named there, and a test class is never trained on.

    The decoded pictures are cached in one file in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Tasks have inputs (tasks, ways · examples, channels, side, side), ``shots`` or ``queries`` examples of each
    class, and targets (tasks, ways · examples), the classes of a task being 0, …, ways − 1.

    Raises FileNotFoundError and ValueError, which name the file and what is wrong with it.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as data:
    ...     for name in ("train/daisy", "train/rose", "test/iris", "test/lily"):
    ...         Path(data, name).mkdir(parents=True)
    ...         for i in range(3):
    ...             Image.new("RGB", (100, 80), (80 * i, 0, 0)).save(Path(data, name, f"{i}.png"))
    ...     flowers = ImageFolder(data, ways=2, shots=1, queries=2, side=32)
    >>> flowers.sample(4, "train", seed=0, index=0).query[0].shape
    torch.Size([4, 4, 3, 32, 32])
    """

    def __init__(
        self,
        data: str | Path,
        ways: int = 5,
        shots: int = 1,
        queries: int = 5,
        *,
        side: int = 84,
        grayscale: bool = False,
        rotations: bool = False,
        split: str | Path | None = None,
    ) -> None:
        place = Path(data)
        files = Files(place)
        classes = files.pictures()
        if not any(classes.values()):
            raise ValueError(
                f"{place} has no folders with pictures ({', '.join(ENDINGS)}): each class needs a folder of its own."
            )
        record = place / SPLIT_FILE if place.is_dir() else place.with_suffix(f".{SPLIT_FILE}")
        divided: dict[Split, list[str]] | None = None
        splits: Mapping[Split, Collection[str]]
        if {"train", "test"} <= set(classes):
            if split is not None or record.exists() or SPLIT_FILE in files.stamps:
                raise ValueError(f"{place} has folders train and test, and there is a split file: keep one of both.")
            classes, splits = _split_by_folders(files, set(classes))
        elif split is not None:
            splits = _read_split(Path(split), _content(Path(split)))
        elif SPLIT_FILE in files.stamps:
            splits = _read_split(place / SPLIT_FILE, files.read(SPLIT_FILE))
        elif record.exists():
            splits = _read_split(record, _content(record))
        elif set(classes) <= set(get_args(Split)):
            raise ValueError(f"{place} has {' and '.join(sorted(classes))}, but needs train/CLASS/… and test/CLASS/….")
        else:
            splits = divided = divide(classes, ways)
        unused = sorted(set(classes).difference(*splits.values()))
        if unused:
            warnings.warn(
                f"{len(unused)} classes of {place} are in no split and are not used, {unused[0]} for one: name them in "
                f"the split file to use them.",
                stacklevel=2,
            )
        super().__init__(
            place,
            classes,
            splits,
            ways=ways,
            shots=shots,
            queries=queries,
            preparation=Preparation(channels=1 if grayscale else 3, side=side),
            rotations=rotations,
        )
        if divided is not None:
            _record(divided, record)


def divide(classes: Collection[str], ways: int = 5) -> dict[Split, list[str]]:
    """Classes by split: 20 % to test, 16 % to choose settings by, at least ``ways`` of each, and the rest to train on.

    The names alone decide, by their SHA-256 sums, not their order. Raises ValueError for fewer than 3 · ways classes.

    >>> divide(["ant", "bee", "cow", "dog", "eel", "fox", "gnu"], ways=2)
    {'train': ['cow', 'dog', 'gnu'], 'val': ['eel', 'fox'], 'test': ['ant', 'bee']}
    """
    number = len(classes)
    test, val = (max(ways, round(share * number)) for share in (TEST_SHARE, VAL_SHARE))
    if number - test - val < ways:
        raise ValueError(
            f"{number} classes cannot be divided to train on, to choose settings by and to test, with {ways} ways in "
            f"each: that takes {3 * ways}. Ask for fewer ways, add classes, or write a {SPLIT_FILE} without val."
        )
    drawn = sorted(classes, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    return {
        "train": sorted(drawn[test + val :]),
        "val": sorted(drawn[test : test + val]),
        "test": sorted(drawn[:test]),
    }


def _split_by_folders(files: Files, folders: set[str]) -> tuple[dict[str, list[Picture]], dict[Split, list[str]]]:
    foreign = sorted(folders - set(get_args(Split)))
    if foreign:
        raise ValueError(
            f"{files.path} has folders train and test, but also {foreign[0]}: beside them there may only be val."
        )
    pictures: dict[str, list[Picture]] = {}
    splits: dict[Split, list[str]] = {}
    for split in get_args(Split):
        if split in folders:
            found = files.pictures(f"{split}/")
            splits[split] = list(found)
            pictures |= found
    return pictures, splits


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"there is no split file {path}.")
    return path.read_bytes()


def _read_split(path: Path, content: bytes) -> dict[Split, list[str]]:
    expected = '{"train": [classes], "val": [classes], "test": [classes]}, val if you like'
    try:
        tree = json.loads(content)
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path} is not a split file, {expected}: {error}.") from error
    if not isinstance(tree, dict) or not {"train", "test"} <= set(tree) <= set(get_args(Split)):
        raise ValueError(f"{path} is not a split file, {expected}.")
    for split, names in tree.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} is not a split file, {expected}: {split} is not a list of names.")
    return {split: sorted(set(tree[split])) for split in ("train", "val", "test") if tree.get(split)}


def _record(splits: Mapping[Split, list[str]], path: Path) -> None:
    try:
        write_atomically(path, (json.dumps(splits, indent=1) + "\n").encode())
    except OSError as error:
        raise ValueError(
            f"the split of the classes must be kept, so that no later run trains on test classes, but {path} could not "
            f"be written ({error}). Write what imaml.tasks.image_folder.divide returns to a json file, and give it as "
            f"split."
        ) from error
    numbers = ", ".join(f"{len(names)} {split}" for split, names in splits.items())
    warnings.warn(f"the classes were divided ({numbers}), and {path} written: keep it.", stacklevel=3)
