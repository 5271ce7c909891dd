"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake et al. 2015)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..files import write_atomically
from .task import Split, Task, generator_for

PARTS = ("images_background", "images_evaluation")
DRAWINGS = 20
SIDE = 28
SOURCE = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
CHECKSUMS = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
"""MD5 sums of the official files."""


class Omniglot:
    """N-way K-shot classification of characters, 28×28, ink 1 on paper 0.

    ``data`` holds the official ``images_background.zip`` and ``images_evaluation.zip``, or these folders unpacked. The
    split is that of the files ``vinyals_train.json``, ``vinyals_val.json`` and ``vinyals_test.json`` in it, or of those
    that come with the package (Vinyals et al. 2016). Meta-training uses train + val (1,200 characters), each turned by
    0°, 90°, 180° or 270° as a class of its own; testing uses the 423 test characters as they are. That no character is
    in both is asserted.

    The decoded images are cached in one file in the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``).

    Raises FileNotFoundError and ValueError, which name the file and what is wrong with it.
    """

    is_classification = True
    splits: frozenset[Split] = frozenset(("train", "test"))

    def __init__(self, data: str | Path, ways: int = 5, shots: int = 1, queries: int = 5) -> None:
        if shots + queries > DRAWINGS:
            raise ValueError(f"shots + queries is {shots + queries}, but a character has {DRAWINGS} drawings.")
        self.ways, self.shots, self.queries = ways, shots, queries
        folder = Path(data)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}: give the folder that holds the Omniglot files.")
        names, images = _load(folder)
        splits = read_splits(folder)
        self._images: dict[Split, Tensor] = {}
        for split, characters in splits.items():
            missing = sorted(characters - set(names))
            if missing:
                raise ValueError(
                    f"{folder} lacks {len(missing)} characters of the {split} split, {missing[0]} for one."
                )
            self._images[split] = images[[names.index(c) for c in sorted(characters)]]
        if ways > len(splits["test"]):
            raise ValueError(f"ways is {ways}, but there are {len(splits['test'])} test characters.")

    def sample(self, count: int, split: Split, seed: int, index: int) -> Task:
        """A batch of ``count`` tasks: inputs (count, ways · examples, 1, 28, 28), targets (count, ways · examples)."""
        generator = generator_for(split, seed, index)
        images = self._images[split]
        turns = 4 if split == "train" else 1  # turned characters are classes of their own, in training
        each = self.shots + self.queries
        drawn = []
        for _ in range(count):
            classes = torch.randperm(turns * len(images), generator=generator)[: self.ways]
            for c in classes.tolist():
                drawings = torch.randperm(DRAWINGS, generator=generator)[:each]
                drawn.append(torch.rot90(images[c // turns, drawings], c % turns, (-2, -1)))
        pixels = torch.stack(drawn).reshape(count, self.ways, each, 1, SIDE, SIDE).float() / 255
        labels = torch.arange(self.ways).reshape(1, self.ways, 1).expand(count, self.ways, each)
        parts = []
        for part in (slice(None, self.shots), slice(self.shots, None)):
            parts.append((pixels[:, :, part].flatten(1, 2), labels[:, :, part].flatten(1, 2)))
        return Task(*parts)


def read_splits(folder: Path) -> dict[Split, set[str]]:
    """The characters of the train (train + val) and test split, as "part/Alphabet/characterNN", found disjoint.

    The package's own split is taken where the folder has none of the three files.
    """
    if not any((folder / f"vinyals_{name}.json").exists() for name in ("train", "val", "test")):
        folder = Path(__file__).parent / "omniglot_splits"
    train = _read_split(folder / "vinyals_train.json") | _read_split(folder / "vinyals_val.json")
    test = _read_split(folder / "vinyals_test.json")
    if train & test:
        raise ValueError(
            f"{len(train & test)} characters of {folder} are in the train and in the test split: {min(train & test)}."
        )
    return {"train": train, "test": test}


def _read_split(path: Path) -> set[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no split file {path}: it lists the characters as part -> alphabet -> characters."
        )
    try:
        tree = json.loads(path.read_text())
        return {
            f"{part if part.startswith('images_') else 'images_' + part}/{alphabet}/{character}"
            for part, alphabets in tree.items()
            for alphabet, characters in alphabets.items()
            for character in characters
        }
    except (ValueError, AttributeError, TypeError) as error:  # ValueError: not JSON, or not even text
        raise ValueError(f"{path} is not a split file (part -> alphabet -> characters): {error}.") from error


def download(folder: Path) -> None:
    """Fetch the official image files into a folder and verify them. Raises ConnectionError or ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, checksum in CHECKSUMS.items():
        if (folder / name).exists():
            continue
        try:
            with urllib.request.urlopen(f"{SOURCE}/{name}", timeout=60) as response:
                content = response.read()
        except OSError as error:
            raise ConnectionError(
                f"{SOURCE}/{name} could not be fetched: {error}. Put the file into {folder} by hand."
            ) from error
        if hashlib.md5(content).hexdigest() != checksum:
            raise ValueError(f"{SOURCE}/{name} is not the official file: its MD5 sum differs from {checksum}.")
        write_atomically(folder / name, content)


def _load(folder: Path) -> tuple[list[str], Tensor]:
    """Names and images, uint8 of shape (characters, 20, 28, 28), decoded or from the cache."""
    sources = [_source(folder, part) for part in PARTS]
    key = [_fingerprint(source) for source in sources]
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "imaml"
    place = caches / f"omniglot_{SIDE}_{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.pt"
    cached = _read_cache(place, key)
    if cached is not None:
        return cached
    names, images = _decode(sources)
    buffer = io.BytesIO()
    torch.save({"key": key, "names": names, "images": images}, buffer)
    try:
        caches.mkdir(parents=True, exist_ok=True)
        write_atomically(place, buffer.getvalue())
    except OSError as error:  # a cache is a convenience
        warnings.warn(f"the decoded images could not be cached in {caches}: {error}", stacklevel=2)
    return names, images


def _read_cache(place: Path, key: list[list[object]]) -> tuple[list[str], Tensor] | None:
    """What the cache file holds, or None where there is none, or one of other or of damaged files."""
    try:
        cached = torch.load(place, weights_only=True)
        return (cached["names"], cached["images"]) if cached["key"] == key else None
    except Exception:  # whatever is wrong with a cache, the data is the remedy
        return None


def _fingerprint(source: Path) -> list[object]:
    """What changes when the drawings do. A folder's own size and time do not show what is in its subfolders."""
    stats = [path.stat() for path in (source.rglob("*.png") if source.is_dir() else [source])]
    return [source.name, len(stats), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]


def _source(folder: Path, part: str) -> Path:
    for candidate in (folder / part, folder / f"{part}.zip"):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(
        f"{folder} has neither {part}.zip nor a folder {part}: `--download` fetches the official files."
    )


def _decode(sources: list[Path]) -> tuple[list[str], Tensor]:
    characters: dict[str, list[np.ndarray]] = {}
    for source in sources:
        for member, content in _drawings(source):
            try:
                with Image.open(io.BytesIO(content)) as image:
                    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            except (UnidentifiedImageError, OSError) as error:
                raise ValueError(f"{source} holds {member}, which is not a readable image: {error}.") from error
            characters.setdefault(member.rsplit("/", 1)[0], []).append(255 - np.asarray(small))
    wrong = {name: len(drawings) for name, drawings in characters.items() if len(drawings) != DRAWINGS}
    if wrong or not characters:
        name, number = next(iter(wrong.items()), ("it", 0))
        raise ValueError(f"{sources[0].parent} is not complete: {name} has {number} drawings instead of {DRAWINGS}.")
    names = sorted(characters)
    return names, torch.from_numpy(np.stack([np.stack(characters[name]) for name in names]))


def _drawings(source: Path) -> Iterator[tuple[str, bytes]]:
    """(part/Alphabet/characterNN/file.png, bytes) in the order of the names."""
    if source.is_dir():
        for path in sorted(source.rglob("*.png")):
            yield path.relative_to(source.parent).as_posix(), path.read_bytes()
        return
    try:
        with zipfile.ZipFile(source) as archive:
            for member in sorted(m for m in archive.namelist() if m.endswith(".png") and not m.startswith("__MACOSX")):
                yield member, archive.read(member)
    except (zipfile.BadZipFile, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        raise ValueError(f"{source} is not a readable zip file ({error}): was its download cut short?") from error
