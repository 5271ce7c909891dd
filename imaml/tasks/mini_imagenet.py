"""mini-ImageNet: 100 classes of photos, 600 each (Vinyals et al. 2016), in the split of Ravi & Larochelle (2017)."""

from __future__ import annotations

import csv
from pathlib import Path

from .decoding import Preparation
from .image_classes import ImageClasses
from .picture_files import Files, Picture
from .task import Split


class MiniImageNet(ImageClasses):
    """N-way K-shot classification of photos in colour, floats in [0, 1] (Vinyals et al. 2016).

    ``data`` holds ``train.csv``, ``val.csv`` and ``test.csv`` with the columns filename and label (64, 16 and 20
    classes: Ravi and Larochelle 2017), and the pictures in a folder ``images`` or in ``images.zip``, of any size and at
    any depth: they are cut square and resized to ``side``. With ``rotations`` each training class, turned by quarters,
    is four.

    The decoded pictures, 1.3 GB at 84 × 84, are cached in one file in ``$XDG_CACHE_HOME`` or ``~/.cache``, which is
    mapped, not read: processes share it.

    Tasks have inputs (tasks, ways · examples, 3, side, side), ``shots`` or ``queries`` examples of each
    class, and targets (tasks, ways · examples), the classes of a task being 0, …, ways − 1.

    Raises FileNotFoundError and ValueError, which name the file and what is wrong with it.

    With a small data set of the same layout:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as data:
    ...     Path(data, "images").mkdir()
    ...     for split in ("train", "val", "test"):
    ...         rows = ["filename,label"]
    ...         for i in range(4):
    ...             rows.append(f"{split}_{i}.png,{split}_class_{i % 2}")
    ...             Image.new("RGB", (100, 80)).save(Path(data, "images", f"{split}_{i}.png"))
    ...         _ = Path(data, f"{split}.csv").write_text("\\n".join(rows))
    ...     photos = MiniImageNet(data, ways=2, shots=1, queries=1)
    >>> photos.sample(4, "train", seed=0, index=0).support[0].shape
    torch.Size([4, 2, 3, 84, 84])
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
