"""CIFAR-FS's layout: cifar100/data and cifar100/splits/bertinetto."""

from __future__ import annotations

from pathlib import Path

import pytest

from imaml.tasks import CIFARFS

from .pictures import classes, marks, write

PARTS = {"train": range(4), "val": range(4, 6), "test": range(6, 9)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(folder: Path, zipped: bool = False) -> Path:
    """The folder that cifar100 lies in, or cifar100.zip."""
    files = classes(range(10), at="data/")  # the tenth is in no split
    for part, numbers in PARTS.items():
        files[f"splits/bertinetto/{part}.txt"] = "\n".join(f"class_{c}" for c in numbers).encode()
    path = write(folder / "cifar100", files, zipped)
    return path if zipped else folder


@pytest.mark.parametrize("level", ["", "cifar100", "cifar100/data", "cifar100/splits", "cifar100/splits/bertinetto"])
def test_every_level_will_do(tmp_path: Path, level: str) -> None:
    source = CIFARFS(make(tmp_path / "files") / level, ways=2, shots=1, queries=5)
    assert (source.channels, source.side, source.splits) == (3, 32, set(PARTS))
    for part, numbers in PARTS.items():
        assert {c for c, _ in marks(source.sample(20, part, 0, 0).query[0])} == set(numbers)


def test_a_zip_will_do(tmp_path: Path) -> None:
    source = CIFARFS(make(tmp_path / "files", zipped=True), ways=2, shots=1, queries=5)
    assert {c for c, _ in marks(source.sample(20, "val", 0, 0).query[0])} == set(PARTS["val"])


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        CIFARFS(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is not laid out as CIFAR-FS"):
        CIFARFS(tmp_path)
    data = make(tmp_path / "files")
    table = data / "cifar100" / "splits" / "bertinetto" / "val.txt"
    table.write_text("class_4\nclass_11\n")
    with pytest.raises(ValueError, match="lacks 1 of the 2 classes of the val split, class_11"):
        CIFARFS(data, ways=2, queries=5)
    table.write_text("class_4\nclass_6\n")
    with pytest.raises(ValueError, match="in the val and in the test split, class_6"):
        CIFARFS(data, ways=2, queries=5)
    table.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"val\.txt in .* is not a text file"):
        CIFARFS(data, ways=2, queries=5)
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no split file splits/bertinetto/val\.txt"):
        CIFARFS(data, ways=2, queries=5)
