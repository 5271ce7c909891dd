"""CIFAR-FS: the 100 classes of CIFAR-100, 600 photos each, for few-shot learning (Bertinetto et al. 2019)."""

from __future__ import annotations

from pathlib import Path

from .decoding import Preparation
from .image_classes import ImageClasses
from .picture_files import Files
from .task import Split

SPLITS = "splits/bertinetto"


class CIFARFS(ImageClasses):
    """N-way K-shot classification of small photos in colour, floats in [0, 1] (Bertinetto et al. 2019).

    ``data`` is the folder ``cifar100`` or the one that it lies in, or ``data``, ``splits`` or ``splits/bertinetto`` in
    it, or a zip of it. The pictures are ``cifar100/data/CLASS/*.png``, the classes of each split stand line by line in
    ``cifar100/splits/bertinetto/train.txt``, ``val.txt`` and ``test.txt`` (64, 16 and 20). The pictures are of 32 × 32
    pixels, and resized where ``side`` is another. With ``rotations`` each training class, turned by quarters, is four.

    The decoded pictures are cached in one file in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Tasks have inputs (tasks, ways · examples, 3, side, side), ``shots`` or ``queries`` examples of each
    class, and targets (tasks, ways · examples), the classes of a task being 0, …, ways − 1.

    Raises FileNotFoundError and ValueError, which name the file and what is wrong with it.

    With a small data set of the same layout:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as data:
    ...     splits = Path(data, "cifar100", "splits", "bertinetto")
    ...     splits.mkdir(parents=True)
    ...     for split in ("train", "val", "test"):
    ...         _ = (splits / f"{split}.txt").write_text(f"{split}_a\\n{split}_b")
    ...         for name in (f"{split}_a", f"{split}_b"):
    ...             place = Path(data, "cifar100", "data", name)
    ...             place.mkdir(parents=True)
    ...             for i in range(2):
    ...                 Image.new("RGB", (32, 32)).save(place / f"{i}.png")
    ...     photos = CIFARFS(data, ways=2, shots=1, queries=1)
    >>> photos.sample(4, "train", seed=0, index=0).support[0].shape
    torch.Size([4, 2, 3, 32, 32])
    """

    def __init__(
        self,
        data: str | Path,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        *,
        side: int = 32,
        rotations: bool = False,
    ) -> None:
        root = _root(Path(data))
        files = Files(root)
        splits: dict[Split, list[str]] = {
            "train": _read_split(files, "train"),
            "val": _read_split(files, "val"),
            "test": _read_split(files, "test"),
        }
        super().__init__(
            root,
            files.pictures("data/"),
            splits,
            ways=ways,
            shots=shots,
            queries=queries,
            preparation=Preparation(channels=3, side=side),
            rotations=rotations,
        )


def _root(data: Path) -> Path:
    """The folder that data/ and splits/ lie in, or the zip of it."""
    if data.is_file():
        return data
    if not data.is_dir():
        raise FileNotFoundError(f"there is no folder {data}: give the one that holds the CIFAR-FS files.")
    here = data.resolve()
    for folder in (data / "cifar100", data, here.parent, here.parent.parent):
        if (folder / "data").is_dir() and (folder / SPLITS).is_dir():
            return folder
    raise FileNotFoundError(
        f"{data} is not laid out as CIFAR-FS: there should be cifar100/data/CLASS/*.png in it, and "
        f"cifar100/{SPLITS}/train.txt, val.txt and test.txt."
    )


def _read_split(files: Files, split: Split) -> list[str]:
    name = f"{SPLITS}/{split}.txt"
    if name not in files.stamps:
        raise FileNotFoundError(f"{files.path} has no split file {name}: it lists the classes of the split.")
    try:
        return sorted({line.strip() for line in files.read(name).decode().splitlines() if line.strip()})
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} in {files.path} is not a text file of class names: {error}.") from error
