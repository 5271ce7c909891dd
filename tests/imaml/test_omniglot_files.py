"""Omniglot's files: which drawings a split shows, the cache of the decoded ones, and the download."""

from __future__ import annotations

import hashlib
import io
import os
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from imaml.files import write_atomically
from imaml.tasks import Omniglot, Task, decoding, omniglot

from .test_tasks import drawing, make_omniglot

TRAIN, TEST = range(5), range(5, 8)
"""The characters of make_omniglot; train is train + val."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "imaml"


@pytest.fixture
def zips(tmp_path: Path) -> Path:
    return make_omniglot(tmp_path / "zips", True)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return make_omniglot(tmp_path / "folders", False)


def load(data: Path) -> Task:
    return Omniglot(data, ways=3).sample(4, "test", 0, 0)


def same(one: Task, other: Task) -> bool:
    return all(torch.equal(a, b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True))


def recognised(images: Tensor) -> set[tuple[int, int]]:
    """The (character, quarter turns) of images (..., 28, 28), each of which must equal a drawing made by the tests."""
    known: dict[bytes, tuple[int, int]] = {}
    for character in (*TRAIN, *TEST):
        for number in range(20):
            picture = Image.open(io.BytesIO(drawing(character, number))).convert("L")
            small = 255 - np.asarray(picture.resize((28, 28), Image.Resampling.BILINEAR))
            known |= {np.rot90(small, turn).tobytes(): (character, turn) for turn in range(4)}
    return {known[image.mul(255).round().byte().numpy().tobytes()] for image in images.reshape(-1, 28, 28)}


def test_testing_shows_every_test_character_upright_and_nothing_else(zips: Path) -> None:
    shown = recognised(Omniglot(zips, ways=3).sample(30, "test", 0, 0).query[0])
    assert shown == {(character, 0) for character in TEST}


def test_training_shows_every_turn_of_every_training_character_and_nothing_else(zips: Path) -> None:
    shown = recognised(Omniglot(zips, ways=3).sample(80, "train", 0, 0).query[0])
    assert shown == {(character, turn) for character in TRAIN for turn in range(4)}


def test_zips_and_folders_are_the_same_data(zips: Path, folders: Path) -> None:
    assert same(load(zips), load(folders))


def test_the_second_load_reads_the_cache(zips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(zips)
    monkeypatch.setattr(decoding, "_decode", lambda *_: pytest.fail("the drawings were decoded again"))
    assert same(first, load(zips))


@pytest.mark.parametrize("damage", [b"", b"not a tensor file", None], ids=["empty", "foreign", "truncated"])
def test_a_damaged_cache_is_made_again(zips: Path, cache: Path, damage: bytes | None) -> None:
    first = load(zips)
    (file,) = cache.glob("*.pt")
    file.write_bytes(file.read_bytes()[:1000] if damage is None else damage)
    assert same(first, load(zips))


def test_a_changed_drawing_is_not_hidden_by_the_cache(folders: Path) -> None:
    before = load(folders)
    for number in range(20):  # in place: neither the size nor the time of any folder changes
        (path,) = folders.rglob(f"0005_{number + 1:02}.png")
        path.write_bytes(drawing(0, number))
    assert not same(before, load(folders))


def test_a_cache_that_cannot_be_written_is_a_warning(
    zips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be cached"):
        load(zips)


def test_a_split_file_that_is_not_text_is_named(zips: Path) -> None:
    (zips / "vinyals_val.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"vinyals_val\.json is not a split file"):
        load(zips)


def test_a_zip_with_a_damaged_member_is_named(zips: Path) -> None:
    content = bytearray((zips / "images_evaluation.zip").read_bytes())
    content[100:130] = bytes(30)
    (zips / "images_evaluation.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"images_evaluation\.zip"):
        load(zips)


def test_a_drawing_of_ones_own_is_prepared_as_those_of_the_tasks(zips: Path, tmp_path: Path) -> None:
    (tmp_path / "own.png").write_bytes(drawing(6, 3))
    source = Omniglot(zips, ways=3)
    own = source.image(tmp_path / "own.png")
    assert own.shape == (source.channels, source.side, source.side) == (1, 28, 28)
    assert recognised(own) == {(6, 0)}
    assert torch.equal(own, source.image(drawing(6, 3)))


def serve(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Answer requests with the files of a folder, in place of the network."""
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, **_: (folder / url.rsplit("/", 1)[1]).open("rb"))


def test_a_download_fetches_what_is_missing_and_keeps_what_is_there(
    zips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = {name: hashlib.md5((zips / name).read_bytes()).hexdigest() for name in omniglot.CHECKSUMS}
    monkeypatch.setattr(omniglot, "CHECKSUMS", sums)
    serve(monkeypatch, zips)
    new = tmp_path / "new"
    new.mkdir()
    (new / "images_background.zip").write_bytes(b"the user's own")
    omniglot.download(new)
    assert (new / "images_background.zip").read_bytes() == b"the user's own"
    assert (new / "images_evaluation.zip").read_bytes() == (zips / "images_evaluation.zip").read_bytes()
    assert os.stat(new / "images_evaluation.zip").st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    """The permissions that new files do not get."""
    current = os.umask(0)
    os.umask(current)
    return current


def test_a_file_that_is_not_the_official_one_is_refused_and_leaves_nothing(
    zips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, zips)
    with pytest.raises(ValueError, match="not the official file"):
        omniglot.download(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_no_network_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, tmp_path / "absent")
    with pytest.raises(ConnectionError, match="could not be fetched"):
        omniglot.download(tmp_path / "new")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "file", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_the_split_of_the_package_serves_a_folder_without_one(tmp_path: Path) -> None:
    splits = omniglot.read_splits(tmp_path)
    assert {name: len(characters) for name, characters in splits.items()} == {"train": 1200, "test": 423}
    (tmp_path / "vinyals_train.json").write_text("{}")  # a folder with a part of a split is a mistake
    with pytest.raises(FileNotFoundError, match="vinyals_val"):
        omniglot.read_splits(tmp_path)
