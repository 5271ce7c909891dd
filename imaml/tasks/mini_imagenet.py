"""mini-ImageNet: 100 classes of photos, 600 each (Vinyals et al. 2016), in the split of Ravi & Larochelle (2017)."""

from __future__ import annotations

import csv
from pathlib import Path

from .decoding import Preparation
from .image_classes import ImageClasses
from .picture_files import Files, Picture
from .task import Split


class MiniImageNet(ImageClasses):
    """N-way K-shot classification of photos in colour, floats in [0, 1].

    ``data`` holds ``train.csv``, ``val.csv`` and ``test.csv`` with the columns filename and label (64, 16 and 20
    classes), and the pictures in a folder ``images`` or in ``images.zip``, of any size and at any depth: they are cut
    square and resized to ``side``. With ``rotations`` each training class, turned by quarters, is four.

    The decoded pictures, 1.3 GB at 84 × 84, are cached in one file in ``$XDG_CACHE_HOME`` or ``~/.cache``, which is
    mapped, not read: processes share it.

    Raises FileNotFoundError and ValueError, which name the file and what is wrong with it.
    """

    def __init__(
        self,
        data: str | Path,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        *,
        side: int = 84,
        rotations: bool = False,
    ) -> None:
        folder = Path(data)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}: give the one that holds the mini-ImageNet files.")
        split_files: dict[Split, Path] = {"train": folder / "train.csv", "val": folder / "val.csv"}
        split_files["test"] = folder / "test.csv"
        listed = {split: _read_csv(file) for split, file in split_files.items()}
        images = next((p for p in (folder / "images", folder / "images.zip") if p.exists()), None)
        if images is None:
            raise FileNotFoundError(f"{folder} has neither a folder images nor images.zip: put the pictures there.")
        files = Files(images)
        by_name: dict[str, list[str]] = {}
        for name in files.stamps:
            by_name.setdefault(name.rsplit("/", 1)[-1], []).append(name)
        pictures: dict[str, list[Picture]] = {}
        seen: dict[str, Path] = {}
        for split, rows in listed.items():
            file = split_files[split]
            for name, label in rows:
                found = [name] if name in files.stamps else by_name.get(name.rsplit("/", 1)[-1], [])
                if len(found) != 1:
                    raise ValueError(
                        f"{file} names {name}, of which {images} holds {len(found) or 'none'}: are all pictures there?"
                    )
                if seen.setdefault(found[0], file) is not file:
                    raise ValueError(f"{name} is in {seen[found[0]].name} and in {file}: a picture has one split.")
                pictures.setdefault(label, []).append(Picture(files, found[0]))
        super().__init__(
            folder,
            pictures,
            {split: {label for _, label in rows} for split, rows in listed.items()},
            ways=ways,
            shots=shots,
            queries=queries,
            preparation=Preparation(channels=3, side=side),
            rotations=rotations,
        )


def _read_csv(path: Path) -> list[tuple[str, str]]:
    """The rows (filename, label) of a split file, each file once."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no split file {path}: it lists the pictures of the split under the heading filename,label."
        )
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(row["filename"], row["label"]) for row in csv.DictReader(file)]
    except (csv.Error, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"{path} is not a split file with the heading filename,label: {error}.") from error
    for line, row in enumerate(rows, start=2):
        if not all(row):
            raise ValueError(f"{path} has no filename,label in line {line}: was it cut short?")
    if len({name for name, _ in rows}) < len(rows):
        twice = next(name for i, (name, _) in enumerate(rows) if name in dict(rows[:i]))
        raise ValueError(f"{path} names {twice} twice: a picture has one label.")
    return rows
