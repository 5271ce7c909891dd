"""mini-ImageNet's layout: three csv files and a folder or a zip of pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from imaml.tasks import MiniImageNet

from .pictures import marks, picture, write

PARTS = {"train": range(4), "val": range(4, 6), "test": range(6, 9)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def name(klass: int, number: int) -> str:
    return f"n{klass:08}{number:08}.jpg"


def make(folder: Path, zipped: bool = False, deeper: str = "") -> Path:
    """Nine classes of six photos that are wider than high."""
    for part, classes in PARTS.items():
        rows = [f"{name(c, k)},n{c:08}" for c in classes for k in range(6)]
        write(folder, {f"{part}.csv": "\n".join(["filename,label", *rows, ""]).encode()})
    numbers = [(c, k) for classes in PARTS.values() for c in classes for k in range(6)]
    images = {f"{deeper}{name(c, k)}": picture(c, k, "JPEG", (32, 24)) for c, k in numbers}
    write(folder / "images", images, zipped)
    return folder


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "folder"])
@pytest.mark.parametrize("deeper", ["", "all/"])
def test_each_split_shows_its_classes(tmp_path: Path, zipped: bool, deeper: str) -> None:
    source = MiniImageNet(make(tmp_path / "data", zipped, deeper), ways=2, shots=1, queries=5, side=16)
    assert source.splits == set(PARTS)
    for part, classes in PARTS.items():
        (xs, _), (xq, yq) = source.sample(20, part, 0, 0)
        assert xq.shape == (20, 10, 3, 16, 16)
        assert {c for c, _ in marks(xq)} == set(classes)
        for i in range(20):
            shown = [c for c, _ in marks(xs[i])]
            assert [shown[label] for label in yq[i].tolist()] == [c for c, _ in marks(xq[i])]


def damage(data: Path, how: str) -> None:
    table = data / "test.csv"
    text = table.read_text()
    if how == "no csv":
        table.unlink()
    elif how == "no images":
        (data / "images").rename(data / "pictures")
    elif how == "no such image":
        (data / "images" / name(6, 2)).unlink()
    elif how == "heading":
        table.write_text(text.replace("filename,label", "file,class"))
    elif how == "cut":
        table.write_text(text[: -len("n00000008") - 2])
    elif how == "not text":
        table.write_bytes(b"\xff\xfe\x00")
    elif how == "twice":
        table.write_text(f"{text}{name(8, 0)},n00000007\n")
    elif how == "shared picture":
        table.write_text(f"{text}{name(0, 0)},n00000007\n")
    elif how == "shared class":
        table.write_text(text.replace(",n00000008", ",n00000000"))
    elif how == "truncated":
        path = data / "images" / name(3, 0)
        path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("no csv", FileNotFoundError, r"no split file .*test\.csv"),
        ("no images", FileNotFoundError, "neither a folder images nor images.zip"),
        ("no such image", ValueError, r"test\.csv names n0+6000+2\.jpg, of which .*images holds none"),
        ("heading", ValueError, r"test\.csv is not a split file with the heading filename,label"),
        ("cut", ValueError, r"test\.csv has no filename,label in line 19: was it cut short"),
        ("not text", ValueError, r"test\.csv is not a split file"),
        ("twice", ValueError, r"test\.csv names n0+80+\.jpg twice"),
        ("shared picture", ValueError, r"0\.jpg is in train\.csv and in .*test\.csv"),
        ("shared class", ValueError, "1 classes of .* are in the train and in the test split, n00000000"),
        ("truncated", ValueError, r"images/n0+3000+\.jpg is not a readable picture"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, how: str, error: type[Exception], words: str) -> None:
    data = make(tmp_path / "data")
    damage(data, how)
    with pytest.raises(error, match=words):
        MiniImageNet(data, ways=2, queries=5, side=16)


def test_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        MiniImageNet(tmp_path / "nowhere")
