"""Any folder of classes: what is drawn of it, how it is split, and plain words for what is wrong with it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from imaml.tasks import ImageFolder, Task, decoding
from imaml.tasks.decoding import Preparation
from imaml.tasks.image_folder import divide

from .pictures import classes, marks, picture, write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "imaml"


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Classes 0 to 3 to train on, 4 and 5 to choose settings by, 6 to 8 to test."""
    parts = {"train": range(4), "val": range(4, 6), "test": range(6, 9)}
    return write(tmp_path / "data", {k: v for p, c in parts.items() for k, v in classes(c, at=f"{p}/").items()})


def same(one: Task, other: Task) -> bool:
    return all(torch.equal(a, b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True))


# what is drawn


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ways=st.integers(1, 2),
    shots=st.integers(1, 3),
    queries=st.integers(1, 3),
    part=st.sampled_from(["train", "val", "test"]),
    seed=st.integers(0, 10**9),
    index=st.integers(0, 10**6),
)
def test_an_episode_is_what_it_should_be(
    split: Path, ways: int, shots: int, queries: int, part: str, seed: int, index: int
) -> None:
    source, again = (ImageFolder(split, ways, shots, queries, side=4) for _ in range(2))
    task = source.sample(3, part, seed, index)
    (xs, ys), (xq, yq) = task
    assert (xs.shape, xq.shape) == ((3, ways * shots, 3, 4, 4), (3, ways * queries, 3, 4, 4))
    allowed = {"train": range(4), "val": range(4, 6), "test": range(6, 9)}[part]
    for i in range(3):
        support, query = marks(xs[i]), marks(xq[i])
        assert len({*support, *query}) == ways * (shots + queries)  # no picture twice
        labels = torch.cat([ys[i], yq[i]]).tolist()
        named = {(label, c) for label, (c, _) in zip(labels, [*support, *query], strict=True)}
        assert sorted(label for label, _ in named) == list(range(ways))  # a label has one class
        assert len({c for _, c in named}) == ways
        assert {c for _, c in named} <= set(allowed)
    assert same(task, again.sample(3, part, seed, index))
    fewer = source.sample(2, part, seed, index)
    assert all(torch.equal(a, b[:2]) for p, q in zip(fewer, task, strict=True) for a, b in zip(p, q, strict=True))


def test_classes_may_have_unequal_numbers_of_pictures(tmp_path: Path) -> None:
    files = {**classes([0], 9, at="train/"), **classes([1], 2, at="train/"), **classes([2, 3], 2, at="test/")}
    source = ImageFolder(write(tmp_path / "data", files), ways=2, shots=1, queries=1, side=4)
    seen = {mark for i in range(60) for mark in marks(source.sample(1, "train", 0, i).query[0])}
    assert seen == {*((0, k) for k in range(9)), (1, 0), (1, 1)}


def test_turned_classes_are_classes_of_their_own_in_training_only(tmp_path: Path) -> None:
    half = Image.new("L", (8, 8))
    half.paste(255, (0, 0, 8, 4))  # white above, black below
    half.save(buffer := io.BytesIO(), "PNG")
    files = {f"{p}/{c}/{k}.png": buffer.getvalue() for p, c in (("train", "a"), ("test", "b")) for k in range(4)}
    data = write(tmp_path / "data", files)
    source = ImageFolder(data, ways=1, shots=1, queries=1, side=2, grayscale=True, rotations=True)
    up = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    for part, expected in (("train", [torch.rot90(up, k) for k in range(4)]), ("test", [up])):
        (support, _), (query, _) = source.sample(40, part, 0, 0)
        assert torch.equal(support, query)  # of the same turn
        assert {tuple(x.flatten().tolist()) for x in query.round()} == {tuple(x.flatten().tolist()) for x in expected}
    source.ways = 4
    assert len({tuple(x.flatten().tolist()) for x in source.sample(1, "train", 0, 0).support[0][0]}) == 4


@pytest.mark.parametrize("format", ["BMP", "GIF", "JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "folder"])
def test_every_format_in_folders_and_zips(tmp_path: Path, format: str, zipped: bool) -> None:
    files = {**classes([1, 2], format=format, at="train/"), **classes([3, 4], format=format, at="test/deeper/")}
    files = {name.replace("test/deeper/class_3", "test/class_3/deeper/still").replace("deeper/class_4", "class_4"): v
             for name, v in files.items()}  # fmt: skip
    files |= {"train/class_1/notes.txt": b"no picture", "train/.hidden/x.png": b"", "__MACOSX/train/._a.png": b""}
    source = ImageFolder(write(tmp_path / "data", files, zipped), ways=2, shots=2, queries=4, side=16)
    assert sorted(marks(torch.cat([part[0][0] for part in source.sample(1, "train", 0, 0)]))) == [
        (c, k) for c in (1, 2) for k in range(6)
    ]
    assert {c for c, _ in marks(source.sample(1, "test", 0, 0).query[0])} == {3, 4}


# one picture


def test_a_picture_is_resized_and_cut_around_its_centre(split: Path, tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20], wide[:, 20:40], wide[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for pixels in (wide, wide.transpose(1, 0, 2)):
        Image.fromarray(pixels).save(tmp_path / "own.png")
        own = ImageFolder(split, 2, side=5).image(tmp_path / "own.png")
        # Rounded: the smoothing reaches over the cut.
        assert torch.equal(own.round(), torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1).expand(3, 5, 5))


def test_a_picture_of_ones_own_equals_the_one_in_the_tasks(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (30, 41, 3), np.uint8)
    Image.fromarray(noise).save(buffer := io.BytesIO(), "JPEG")
    files = {f"{part}/a/{k}.jpg": buffer.getvalue() for part in ("train", "test") for k in range(2)}
    files = {name.replace("test/a", "test/b"): content for name, content in files.items()}
    source = ImageFolder(write(tmp_path / "data", files), ways=1, shots=1, queries=1, side=16)
    own = source.image(buffer.getvalue())
    assert torch.equal(own, source.sample(1, "train", 0, 0).query[0][0, 0])
    assert 0 <= float(own.min()) < 0.5 < float(own.max()) <= 1
    with pytest.raises(FileNotFoundError, match="absent"):
        source.image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="it is not a readable picture"):
        source.image(b"no picture")


def prepared(image: Image.Image, channels: int = 3, **options: object) -> list[float]:
    """What becomes of a picture of one colour."""
    image.save(buffer := io.BytesIO(), "PNG", **options)
    return Preparation(channels, 3)(buffer.getvalue(), "it").mean((1, 2)).tolist()


def test_kinds_of_pixels() -> None:
    assert prepared(Image.new("RGBA", (9, 9), (200, 0, 0, 0))) == [255, 255, 255]  # transparent is white
    assert prepared(Image.new("P", (9, 9), 0), transparency=0) == [255, 255, 255]
    assert prepared(Image.new("L", (9, 9), 70)) == [70, 70, 70]
    assert prepared(Image.new("1", (9, 9), 1), channels=1) == [255]
    assert prepared(Image.fromarray(np.full((9, 9), 70 * 256, np.uint16)), channels=1) == [70]  # 16 bits


def test_a_photo_is_turned_upright_as_the_camera_noted() -> None:
    image = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 2, 0).repeat(8, 0).repeat(8, 1))  # dark | bright
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90°
    image.save(buffer := io.BytesIO(), "JPEG", exif=exif, quality=100)
    upright = Preparation(1, 2)(buffer.getvalue(), "it")[0] > 127
    assert upright.tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("format", ["BMP", "GIF", "JPEG", "PNG", "WEBP"])
def test_a_picture_cut_short_anywhere_is_refused_or_loses_no_pixel(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)
    Image.fromarray(noise).save(buffer := io.BytesIO(), format)
    content, prepare = buffer.getvalue(), Preparation(3, 12)
    whole, accepted = prepare(content, "it"), []
    for length in range(len(content)):
        with contextlib.suppress(ValueError):
            accepted.append(prepare(content[:length], "it"))
    assert all(np.array_equal(pixels, whole) for pixels in accepted)
    assert len(accepted) < 0.1 * len(content)


def test_half_pictures_are_refused_also_where_pil_is_told_to_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is on"):
        Preparation(3, 12)(picture(0, 0)[:-30], "it")


# the split


def test_without_a_split_one_is_made_written_and_kept_to(tmp_path: Path) -> None:
    data = write(tmp_path / "data", classes(range(10)))
    with pytest.warns(UserWarning, match=r"divided \(6 train, 2 val, 2 test\).*split.json written"):
        first = ImageFolder(data, ways=2, side=4)
    assert first.classes == divide([f"class_{c}" for c in range(10)], 2)
    assert {k: sorted(v) for k, v in json.loads((data / "split.json").read_text()).items()} == first.classes
    write(data, classes(range(10, 16)))
    with pytest.warns(UserWarning, match="6 classes of .* are in no split and are not used, class_10 for one"):
        later = ImageFolder(data, ways=2, side=4)
    assert later.classes == first.classes
    assert same(later.sample(2, "test", 0, 0), first.sample(2, "test", 0, 0))


def test_a_zip_has_its_split_file_beside_or_inside(tmp_path: Path) -> None:
    archive = write(tmp_path / "data", classes(range(6)), zipped=True)
    with pytest.warns(UserWarning, match=r"data\.split\.json written"):
        ImageFolder(archive, ways=2, side=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageFolder(archive, ways=2, side=4)
        own = {"train": ["class_0", "class_1", "class_2"], "test": ["class_3", "class_4", "class_5"], "val": []}
        inside = write(tmp_path / "other", classes(range(6)) | {"split.json": json.dumps(own).encode()}, zipped=True)
        source = ImageFolder(inside, ways=3, side=4)
    assert source.splits == {"train", "test"}
    assert source.classes["train"] == own["train"]


def test_a_split_file_may_be_given(tmp_path: Path) -> None:
    data = write(tmp_path / "data", classes(range(4)))
    (tmp_path / "own.json").write_text(json.dumps({"train": ["class_0", "class_3"], "test": ["class_1", "class_2"]}))
    source = ImageFolder(data, ways=2, side=4, split=tmp_path / "own.json")
    assert source.classes == {"train": ["class_0", "class_3"], "test": ["class_1", "class_2"]}
    assert not (data / "split.json").exists()


@given(st.sets(st.text(min_size=1, max_size=3), max_size=40), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_a_division_is_whole_disjoint_and_does_not_depend_on_the_order(names: set[str], ways: int) -> None:
    if len(names) < 3 * ways:
        with pytest.raises(ValueError, match=f"takes {3 * ways}"):
            divide(names, ways)
        return
    splits = divide(sorted(names), ways)
    assert sorted(name for part in splits.values() for name in part) == sorted(names)
    assert min(len(part) for part in splits.values()) >= ways
    assert splits == divide(sorted(names, reverse=True), ways)


def test_a_split_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "data", classes(range(6)))

    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("imaml.tasks.image_folder.write_atomically", refuse)
    with pytest.raises(ValueError, match=r"split\.json could not be written \(read-only\)"):
        ImageFolder(data, ways=2, side=4)


# what may be wrong


def damage(data: Path, how: str) -> None:
    victim = data / "train" / "class_1" / "3.png"
    if how == "truncated":
        (victim.parent / "3.jpg").write_bytes(picture(1, 3, "JPEG", (200, 200))[:-200])
        victim.unlink()
    elif how == "text":
        victim.write_text("no picture")
    elif how == "empty file":
        victim.write_bytes(b"")
    elif how == "few pictures":
        for k in range(3):
            (victim.parent / f"{k}.png").unlink()
    elif how == "empty class":
        (data / "train" / "void").mkdir()
    elif how == "few classes":
        for path in (data / "test" / "class_6").iterdir():
            path.unlink()
        (data / "test" / "class_6").rmdir()
        (data / "test" / "class_7").rename(data / "train" / "class_7")
    elif how == "overlap":
        write(data, classes([1], at="test/"))
    elif how == "third":
        write(data, classes([1], at="more/"))
    elif how == "no test":
        (data / "test").rename(data.parent / "elsewhere")
    elif how == "two ways":
        (data / "split.json").write_text("{}")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", r"class_1/3\.jpg is not a readable picture \(.*truncated"),
        ("text", r"class_1/3\.png is not a readable picture"),
        ("empty file", r"class_1/3\.png is not a readable picture"),
        ("few pictures", r"shots \+ queries is 6, but the class class_1 of .* has 3 pictures"),
        ("empty class", "the class void of .* has 0 pictures"),
        ("few classes", "ways is 2, but the test split of .* has 1 classes"),
        ("overlap", "1 classes of .* are in the train and in the test split, class_1 for one"),
        ("third", "train and test, but also more"),
        ("no test", r"has train and val, but needs train/CLASS/… and test/CLASS/…"),
        ("two ways", "keep one of both"),
    ],
)
def test_what_is_wrong_is_named(split: Path, how: str, words: str) -> None:
    damage(split, how)
    with pytest.raises(ValueError, match=words):
        ImageFolder(split, ways=2, side=4)


@pytest.mark.filterwarnings("ignore:.*are in no split")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not a split file"),
        ("[]", "is not a split file"),
        ('{"train": ["class_0"]}', "is not a split file"),
        ('{"train": "class_0", "test": []}', "train is not a list of names"),
        ('{"train": ["class_0"], "test": ["class_1"], "valid": []}', "is not a split file"),
        ('{"train": ["class_0"], "test": ["class_9"]}', "lacks 1 of the 1 classes of the test split, class_9"),
        ('{"train": ["class_0"], "test": ["class_0"]}', "in the train and in the test split"),
    ],
)
def test_a_wrong_split_file_is_named(tmp_path: Path, content: str, words: str) -> None:
    data = write(tmp_path / "data", classes(range(2)) | {"split.json": content.encode()})
    with pytest.raises(ValueError, match=words):
        ImageFolder(data, ways=1, side=4)


def test_no_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no folders with pictures"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(ValueError, match="flat has no folders with pictures"):
        ImageFolder(write(tmp_path / "flat", {"a.png": picture(0, 0)}))
    with pytest.raises(FileNotFoundError, match=r"no folder or zip .*nowhere"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no split file .*gone\.json"):
        ImageFolder(write(tmp_path / "data", classes(range(2))), split=tmp_path / "gone.json")
    archive = write(tmp_path / "data", classes(range(6)), zipped=True)
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"data\.zip is not a readable zip file"):
        ImageFolder(archive)


# the cache


def test_the_decoded_pictures_are_mapped_and_made_again_when_the_data_or_the_cache_changes(
    split: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = decoding._decode
    monkeypatch.setattr(decoding, "_decode", lambda *a: decoded.append(1) or decode(*a))

    def load() -> Task:
        return ImageFolder(split, ways=2, side=4).sample(4, "train", 0, 0)

    first = load()
    assert same(first, load())
    assert len(decoded) == 1
    (file,) = cache.glob("*.pt")
    content = file.read_bytes()
    middle = len(content) // 2
    for wrong in (b"", b"foreign", content[:-100], content[:middle], content[:middle] + b"!" + content[middle + 1 :]):
        file.write_bytes(wrong)  # the last one: a byte of a pixel
        assert same(first, load())
    assert len(decoded) == 6
    one, other = split / "train" / "class_0" / "0.png", split / "train" / "class_0" / "1.png"
    spare = one.with_name("spare")
    for old, new in ((one, spare), (other, one), (spare, other)):  # two pictures change names
        old.rename(new)
    assert not same(first, load())
    assert len(decoded) == 7


def test_other_classes_of_files_of_equal_sizes_and_times_are_not_taken_for_those_in_the_cache(tmp_path: Path) -> None:
    data = write(tmp_path / "data", classes(range(3), format="BMP"))
    for path in data.rglob("*.bmp"):
        os.utime(path, (1e9, 1e9))
    for klass in (1, 2):
        (tmp_path / "own.json").write_text(json.dumps({"train": ["class_0"], "test": [f"class_{klass}"]}))
        with pytest.warns(UserWarning, match="1 classes of .* are in no split"):
            source = ImageFolder(data, ways=1, side=4, split=tmp_path / "own.json")
        assert {c for c, _ in marks(source.sample(1, "test", 0, 0).query[0])} == {klass}


def test_a_bad_picture_leaves_no_cache(split: Path, cache: Path) -> None:
    damage(split, "text")
    with pytest.raises(ValueError, match="not a readable picture"):
        ImageFolder(split, ways=2, side=4)
    assert not list(cache.glob("*.pt"))


def test_of_those_that_start_together_one_decodes(split: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for processes: the lock belongs to the open file, of which each has its own."""
    decoded = []
    decode = decoding._decode

    def slowly(*arguments: Any) -> torch.Tensor:
        decoded.append(1)
        time.sleep(0.2)
        return decode(*arguments)

    monkeypatch.setattr(decoding, "_decode", slowly)
    with ThreadPoolExecutor(3) as threads:
        sources = list(threads.map(lambda _: ImageFolder(split, ways=2, side=4), range(3)))
    assert len(decoded) == 1
    assert all(same(source.sample(2, "test", 0, 0), sources[0].sample(2, "test", 0, 0)) for source in sources)
    assert not list(cache.glob("*.writing"))
