"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake et al. 2015)."""

from __future__ import annotations

import hashlib
import json
import urllib.request
from pathlib import Path

from ..files import write_atomically
from .decoding import Preparation
from .image_classes import ImageClasses
from .picture_files import Files, Picture
from .task import Split

PARTS = ("images_background", "images_evaluation")
DRAWINGS = 20
SIDE = 28
SOURCE = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
CHECKSUMS = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
"""MD5 sums of the official files."""


class Omniglot(ImageClasses):
    """N-way K-shot classification of characters, 28×28, floats in [0, 1]: ink 1 on paper 0 (Lake et al. 2015).

    Tasks have inputs (tasks, ways · examples, 1, 28, 28), ``shots`` or ``queries`` examples of each
    class, and targets (tasks, ways · examples), the classes of a task being 0, …, ways − 1.

    ``data`` holds the official ``images_background.zip`` and ``images_evaluation.zip``, or these folders unpacked. The
    split is that of the files ``vinyals_train.json``, ``vinyals_val.json`` and ``vinyals_test.json`` in it, or of those
    that come with the package (Vinyals et al. 2016). Meta-training uses train + val (1,200 characters), each turned by
    0°, 90°, 180° or 270° as a class of its own; testing uses the 423 test characters as they are. ``hold_out`` keeps
    the 172 characters of val out of training, as a split "val" to choose settings by. That no character is in two
    splits is asserted.

    The decoded images are cached in one file in the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``).

    Raises FileNotFoundError and ValueError, which name the file and what is wrong with it.

    With a small data set of the same layout, blank and with a split of its own:

    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> characters = {"Greek": ["character01", "character02"]}
    >>> split = {"train": {"images_background": characters}, "val": {}, "test": {"images_evaluation": characters}}
    >>> with tempfile.TemporaryDirectory() as data:
    ...     for part in ("images_background", "images_evaluation"):
    ...         for character in characters["Greek"]:
    ...             place = Path(data, part, "Greek", character)
    ...             place.mkdir(parents=True)
    ...             for i in range(20):
    ...                 Image.new("1", (105, 105)).save(place / f"{i:02}.png")
    ...     for name, its in split.items():
    ...         _ = Path(data, f"vinyals_{name}.json").write_text(json.dumps(its))
    ...     omniglot = Omniglot(data, ways=2, shots=1, queries=5)
    >>> omniglot.sample(4, "test", seed=0, index=0).query[0].shape
    torch.Size([4, 10, 1, 28, 28])
    """

    def __init__(
        self, data: str | Path, ways: int = 5, shots: int = 1, queries: int = 5, *, hold_out: bool = False
    ) -> None:
        folder = Path(data)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}: give the folder that holds the Omniglot files.")
        characters: dict[str, list[Picture]] = {}
        for part in PARTS:
            for picture in _drawings(folder, part):
                character = picture.name.rsplit("/", 1)[0]
                characters.setdefault(f"{part}/{character}", []).append(picture)
        for name, drawings in characters.items():
            if len(drawings) != DRAWINGS:
                raise ValueError(
                    f"{folder} is not complete: {name} has {len(drawings)} drawings instead of {DRAWINGS}."
                )
        super().__init__(
            folder,
            characters,
            read_splits(folder, hold_out=hold_out),
            ways=ways,
            shots=shots,
            queries=queries,
            preparation=Preparation(channels=1, side=SIDE, inverted=True),
            rotations=True,
        )


def read_splits(folder: Path, *, hold_out: bool = False) -> dict[Split, set[str]]:
    """The characters of the splits, as "part/Alphabet/characterNN": train + val and test, or all three held apart.

    The package's own split is taken where the folder has none of the three files.
    """
    if not any((folder / f"vinyals_{name}.json").exists() for name in ("train", "val", "test")):
        folder = Path(__file__).parent / "omniglot_splits"
    train, val, test = (_read_split(folder / f"vinyals_{name}.json") for name in ("train", "val", "test"))
    return {"train": train, "val": val, "test": test} if hold_out else {"train": train | val, "test": test}


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


def _drawings(folder: Path, part: str) -> list[Picture]:
    """The drawings of a part, named Alphabet/characterNN/file.png, in the order of the names."""
    path = next((p for p in (folder / part, folder / f"{part}.zip") if p.exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} has neither {part}.zip nor a folder {part}: `--download` fetches the official files."
        )
    files = Files(path)
    drawings = [Picture(files, name) for name in sorted(files.stamps) if name.endswith(".png")]
    if not drawings:
        raise ValueError(f"{path} is not complete: there are no drawings Alphabet/characterNN/*.png in it.")
    return drawings
