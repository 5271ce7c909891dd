"""Tasks: the same ones for the same seed, disjoint splits, and plain words for damaged data."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from imaml.tasks import LinearRegression, Omniglot, Sinusoids, Task, TaskSource
from imaml.tasks.omniglot import read_splits

REAL = Path(os.environ.get("IMAML_DATA", "")) / "omniglot"
needs_real_data = pytest.mark.skipif(
    "IMAML_DATA" not in os.environ or not REAL.is_dir(), reason="$IMAML_DATA names no folder with omniglot/ in it"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real" not in request.node.name:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def drawing(character: int, number: int) -> bytes:
    """A character as a bar in its own row, drawn the more to the right the later."""
    image = Image.new("1", (105, 105), 1)
    for dx in range(40):
        for dy in range(8):
            image.putpixel((number + dx, 10 * character + dy), 0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_omniglot(folder: Path, zipped: bool) -> Path:
    """Eight characters in the official layout: 4 to train on, 1 to validate, 3 to test."""
    folder.mkdir()
    members = {}
    for c in range(8):
        part = "background" if c < 5 else "evaluation"
        for k in range(20):
            name = f"images_{part}/Alpha_{c // 4}/character{c:02d}/{c:04d}_{k + 1:02d}.png"
            members[name] = drawing(c, k)
    for part in ("images_background", "images_evaluation"):
        chosen = {n: v for n, v in members.items() if n.startswith(part)}
        if zipped:
            with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
                for name, content in chosen.items():
                    archive.writestr(name, content)
        else:
            for name, content in chosen.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
    for split, characters in {"train": range(4), "val": [4], "test": range(5, 8)}.items():
        tree: dict[str, dict[str, list[str]]] = {}
        for c in characters:
            part = "background" if c < 5 else "evaluation"
            tree.setdefault(part, {}).setdefault(f"Alpha_{c // 4}", []).append(f"character{c:02d}")
        (folder / f"vinyals_{split}.json").write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize("source", [Sinusoids(), LinearRegression()], ids=lambda s: type(s).__name__)
def test_the_same_seed_and_index_give_the_same_tasks(source: TaskSource) -> None:
    draw = lambda *key: torch.cat([t.flatten() for part in source.sample(3, *key) for t in part])  # noqa: E731
    assert torch.equal(draw("train", 0, 5), draw("train", 0, 5))
    for other in (("train", 0, 6), ("train", 1, 5), ("test", 0, 5)):
        assert not torch.equal(draw("train", 0, 5), draw(*other))


def test_sinusoids_are_sinusoids() -> None:
    (x, y), (xq, yq) = Sinusoids(shots=50).sample(20, "train", 0, 0)
    x, y = torch.cat([x, xq], 1).double(), torch.cat([y, yq], 1).double()
    basis = torch.cat([torch.sin(x), torch.cos(x)], -1)
    fitted = basis @ torch.linalg.lstsq(basis, y).solution
    torch.testing.assert_close(fitted, y, rtol=0, atol=1e-5)  # float32 draws
    assert float(x.abs().max()) <= 5
    assert float(y.abs().amax((1, 2)).min()) >= 0.1


@pytest.mark.parametrize("zipped", [True, False], ids=["zips", "folders"])
def test_reads_zips_and_folders_alike(tmp_path: Path, zipped: bool) -> None:
    data = make_omniglot(tmp_path / "data", zipped)
    source = Omniglot(data, ways=3, shots=2, queries=4)
    task = source.sample(5, "train", 0, 0)
    assert task.support[0].shape == (5, 6, 1, 28, 28)
    assert task.query[1].shape == (5, 12)
    assert task.support[1][0].tolist() == [0, 0, 1, 1, 2, 2]
    assert float(task.support[0].max()) > 0.9  # ink is 1 on paper 0
    assert float(task.support[0].median()) == 0.0
    again = Omniglot(data, ways=3, shots=2, queries=4).sample(5, "train", 0, 0)  # from the cache
    assert all(torch.equal(a, b) for p, q in zip(task, again, strict=True) for a, b in zip(p, q, strict=True))


def test_support_and_query_share_no_drawing_and_turns_are_classes_in_training_only(tmp_path: Path) -> None:
    source = Omniglot(make_omniglot(tmp_path / "data", True), ways=3, shots=5, queries=15)
    for tasks, split, turned in (
        (source.turned(), "test", True),
        (source, "train", True),
        (source, "test", False),
    ):
        (xs, _), (xq, _) = tasks.sample(4, split, 0, 0)
        for i in range(4):
            rows = {tuple(image.flatten().tolist()) for image in torch.cat([xs[i], xq[i]])}
            assert len(rows) == 60
        bars = (xs > 0.5).sum(-1).amax((1, 2, 3)) > 8  # some row with a long bar: not all turned by 90°
        upright = [(image > 0.5).any(-1).sum() < (image > 0.5).any(-2).sum() for image in xs.flatten(0, 2)]
        assert turned != all(upright)
        assert bars.numel()


def test_more_ways_than_characters_by_turning(tmp_path: Path) -> None:
    source = Omniglot(make_omniglot(tmp_path / "data", True), ways=3, shots=1, queries=1)
    classes = 20
    source.ways = classes  # 5 training characters in 4 turns
    assert source.sample(1, "train", 0, 0).support[0].shape[1] == classes


def damage(folder: Path, how: str) -> None:
    archive = folder / "images_background.zip"
    if how == "missing":
        archive.unlink()
    elif how == "truncated":
        archive.write_bytes(archive.read_bytes()[:2000])
    elif how == "foreign":
        archive.write_bytes(b"<html>not found</html>")
    elif how == "incomplete":
        with zipfile.ZipFile(archive, "w") as new:
            new.writestr("images_background/Alpha_0/character00/0000_01.png", drawing(0, 0))
    elif how == "bad image":
        with zipfile.ZipFile(archive, "a") as old, pytest.warns(UserWarning, match="Duplicate name"):
            old.writestr("images_background/Alpha_0/character00/0000_20.png", b"no image")
    elif how == "no split":
        (folder / "vinyals_test.json").unlink()
    elif how == "bad split":
        (folder / "vinyals_test.json").write_text("{")
    elif how == "overlap":
        (folder / "vinyals_val.json").write_text((folder / "vinyals_test.json").read_text())


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("missing", FileNotFoundError, "images_background.zip nor a folder"),
        ("truncated", ValueError, "not a readable zip"),
        ("foreign", ValueError, "not a readable zip"),
        ("incomplete", ValueError, "1 drawings instead of 20"),
        ("bad image", ValueError, r"0000_20.png in .*images_background.zip is not a readable picture"),
        ("no split", FileNotFoundError, "no split file"),
        ("bad split", ValueError, "is not a split file"),
        ("overlap", ValueError, "in the train and in the test split"),
    ],
)
def test_damaged_data_is_named(tmp_path: Path, how: str, error: type[Exception], words: str) -> None:
    data = make_omniglot(tmp_path / "data", True)
    damage(data, how)
    with pytest.raises(error, match=words):
        Omniglot(data, ways=2)


def test_impossible_settings_are_named(tmp_path: Path) -> None:
    data = make_omniglot(tmp_path / "data", True)
    with pytest.raises(ValueError, match="has 20 pictures"):
        Omniglot(data, shots=10, queries=11)
    with pytest.raises(ValueError, match=r"test split of .* has 3 classes"):
        Omniglot(data, ways=4)
    with pytest.raises(ValueError, match="shots is 0"):
        Omniglot(data, ways=3, shots=0)
    with pytest.raises(ValueError, match="no split 'val' here"):
        Omniglot(data, ways=3).sample(1, "val", 0, 0)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Omniglot(tmp_path / "nowhere")


def test_hold_out_keeps_the_validation_characters_for_validation(tmp_path: Path) -> None:
    data = make_omniglot(tmp_path / "data", True)
    held, all_ = Omniglot(data, ways=1, hold_out=True), Omniglot(data, ways=1)
    assert (held.splits, all_.splits) == ({"train", "val", "test"}, {"train", "test"})
    assert {split: len(names) for split, names in held.classes.items()} == {"train": 4, "val": 1, "test": 3}
    assert set(all_.classes["train"]) == {*held.classes["train"], *held.classes["val"]}
    kept = held.sample(60, "val", 0, 0).query[0]  # all upright, of the fifth character: a bar below the others
    assert len({int((image > 0.5).any(-1).nonzero().min()) for image in kept.flatten(0, 2)}) == 1
    with pytest.raises(ValueError, match=r"val split of .* has 1 classes"):
        Omniglot(data, ways=2, hold_out=True)


@needs_real_data
def test_real_omniglot_has_the_usual_split() -> None:
    splits = read_splits(REAL)
    assert (len(splits["train"]), len(splits["test"])) == (1200, 423)
    assert not splits["train"] & splits["test"]


def digest(task: Task) -> str:
    """Of all numbers of a batch of tasks."""
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for part in task for t in part)).hexdigest()[:16]


@needs_real_data
def test_real_omniglot_is_drawn_as_ever() -> None:
    """Results that name a seed stay reproducible: the draws of the first version of this class."""
    one, other = Omniglot(REAL, ways=5, shots=1, queries=5), Omniglot(REAL, ways=20, shots=5, queries=15)
    assert digest(one.sample(16, "train", 0, 0)) == "27100881c07a2a63"
    assert digest(one.sample(16, "test", 0, 0)) == "b02aa56ed97b444c"
    assert digest(other.sample(2, "train", 1, 2)) == "cadfd78b3f1bd44d"
    assert digest(other.sample(2, "test", 1, 2)) == "305073e0d248928c"


@needs_real_data
def test_real_omniglot_is_read_and_a_task_is_learnable() -> None:
    """The nearest support drawing in pixels beats chance by far: labels and images belong together."""
    source = Omniglot(REAL, ways=5, shots=1, queries=5)
    (xs, ys), (xq, yq) = source.sample(100, "test", 0, 0)
    distance = torch.cdist(xq.flatten(2), xs.flatten(2))
    guesses = ys.gather(1, distance.argmin(-1))
    assert 0.35 < float((guesses == yq).float().mean()) < 0.8


def test_tasks_of_unequal_shapes_do_not_stack() -> None:
    one, other = (Task((torch.zeros(n, 1), torch.zeros(n)), (torch.zeros(3, 1), torch.zeros(3))) for n in (2, 4))
    with pytest.raises(ValueError, match="must have equal shapes"):
        Task.stack([one, other])
