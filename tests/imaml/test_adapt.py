"""Adapting a run to new classes of pictures: any number of them, of any sizes, with no need of the training data."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from imaml import checkpoint
from imaml.adapt import Prediction, adapt, confusion, write_predictions
from imaml.checkpoint import CheckpointError
from imaml.config import Algorithm, Config, Share, Tasks
from imaml.presets import build_learner
from imaml.tasks import Omniglot

from .test_tasks import make_omniglot

KINDS = ("bar", "disc", "cross", "frame")


def draw(kind: str, number: int, path: Path) -> Path:
    """One of four shapes in black on white, a little to the right with each number."""
    image = Image.new("L", (60, 60), 255)
    pen, x = ImageDraw.Draw(image), 10 + 2 * number
    if kind == "bar":
        pen.rectangle((x, 26, x + 30, 32), fill=0)
    elif kind == "disc":
        pen.ellipse((x, 15, x + 30, 45), fill=0)
    elif kind == "cross":
        pen.line((x, 15, x + 30, 45), fill=0, width=4)
        pen.line((x + 30, 15, x, 45), fill=0, width=4)
    else:
        pen.rectangle((x, 15, x + 30, 45), outline=0, width=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def folder_of(place: Path, first: int = 0, **numbers: int) -> Path:
    """So many pictures of each kind, in a folder of its name, numbered from ``first``."""
    for kind, number in numbers.items():
        for k in range(first, first + number):
            draw(kind, k, place / kind / f"{k}.png")
    return place


def make_run(run: Path, **given: object) -> Path:
    """The run folder of a network for Omniglot that has learned nothing yet; it names data that is not there."""
    config = Config(Tasks.omniglot, data="/nowhere", **given).completed()  # type: ignore[arg-type]
    run.mkdir()
    config.write(run)
    torch.manual_seed(0)
    checkpoint.save(run, {"learner": build_learner(config).state_dict()})
    return run


def test_new_pictures_are_named_rightly(tmp_path: Path) -> None:
    """A network that has learned nothing can tell a bar from a disc: its features are random, but they are features."""
    model = adapt(make_run(tmp_path / "run"), folder_of(tmp_path / "s", bar=3, disc=3, frame=3))
    assert model.classes == ["bar", "disc", "frame"]
    predictions = model.predict(folder_of(tmp_path / "q", first=3, bar=2, disc=2, frame=2))
    assert [p.label for p in predictions] == [p.truth for p in predictions]
    assert all(1 / 3 < p.probability <= 1 for p in predictions)
    assert model.left_out() == pytest.approx(1.0)


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_more_and_fewer_classes_than_in_training(tmp_path: Path, algorithm: Algorithm) -> None:
    run = make_run(tmp_path / "run", ways=3, algorithm=algorithm)
    features = checkpoint.load(run)["learner"]["model.features.0.weight"]
    for numbers in ({"bar": 1, "disc": 1}, dict.fromkeys(KINDS, 1)):
        model = adapt(run, folder_of(tmp_path / str(len(numbers)), **numbers))
        assert len(model.probabilities(model.support[0][0])) == len(numbers)
        assert torch.equal(model.learner.meta_parameters()["features.0.weight"], features)


def test_the_answer_hangs_on_no_other_picture(tmp_path: Path) -> None:
    model = adapt(make_run(tmp_path / "run"), folder_of(tmp_path / "s", bar=1, disc=1, cross=1))
    query = folder_of(tmp_path / "q", first=2, disc=4)
    alone = [model.predict(path)[0] for path in sorted((query / "disc").iterdir())]
    assert [p._replace(truth="disc") for p in alone] == model.predict(query)


def test_classes_of_unequal_size_count_alike(tmp_path: Path) -> None:
    """The same picture three times in one class changes nothing."""
    support, run = folder_of(tmp_path / "s", bar=1, disc=1), make_run(tmp_path / "run")
    once = adapt(run, support).parameters
    for k in range(1, 3):
        (support / "bar" / f"{k}.png").write_bytes((support / "bar" / "0.png").read_bytes())
    thrice = adapt(run, support).parameters
    for name, value in once.items():
        torch.testing.assert_close(thrice[name], value, rtol=0, atol=1e-4)  # float32: the order of sums differs


def test_a_picture_that_is_left_out_is_not_learned_from(tmp_path: Path) -> None:
    """A bar and a disc in each class: what is left out looks like a picture of the other class."""
    for name, numbers in (("a", (1, 2)), ("b", (2, 1))):
        for kind, number in zip(("bar", "disc"), numbers, strict=True):
            draw(kind, number, tmp_path / "s" / name / f"{kind}.png")
    assert adapt(make_run(tmp_path / "run"), tmp_path / "s").left_out() == 0.0


def test_one_picture_of_a_class_leaves_nothing_to_judge_by(tmp_path: Path) -> None:
    assert adapt(make_run(tmp_path / "run"), folder_of(tmp_path / "s", bar=2, disc=1)).left_out() is None


def test_pictures_of_a_query(tmp_path: Path) -> None:
    support = folder_of(tmp_path / "s", bar=1, disc=1)
    model = adapt(make_run(tmp_path / "run"), support)
    flat = [draw("bar", k, tmp_path / "flat" / f"{k}.PNG") for k in range(2)]
    (tmp_path / "flat" / "notes.txt").write_text("no picture")
    (tmp_path / "flat" / ".hidden.png").write_text("no picture")
    assert [(p.picture, p.truth) for p in model.predict(tmp_path / "flat")] == [(str(path), None) for path in flat]
    assert [p.picture for p in model.predict(flat[0])] == [str(flat[0])]
    shutil.make_archive(str(tmp_path / "zipped"), "zip", support)
    assert [p.truth for p in model.predict(tmp_path / "zipped.zip")] == ["bar", "disc"]
    draw("bar", 0, support / "one.png")
    with pytest.raises(ValueError, match="beside folders of pictures"):
        model.predict(support)


def test_pictures_are_prepared_as_those_of_the_tasks(tmp_path: Path) -> None:
    """Omniglot needs its data to be built, the adapted model does not: both make the same of a picture."""
    source, path = (
        Omniglot(make_omniglot(tmp_path / "data", True), ways=2),
        draw("cross", 1, tmp_path / "s" / "a" / "1.png"),
    )
    draw("bar", 1, tmp_path / "s" / "b" / "1.png")
    assert torch.equal(adapt(make_run(tmp_path / "run"), tmp_path / "s").support[0][0], source.image(path))


def test_predictions_are_counted_and_written(tmp_path: Path) -> None:
    taken = [("a", "a"), ("a", "b"), ("a", "b"), ("b", "b"), (None, "a")]
    predictions = [Prediction(f"{k}, x.png", truth, label, 0.5) for k, (truth, label) in enumerate(taken)]
    assert confusion(predictions) == {("a", "a"): 1, ("a", "b"): 2, ("b", "b"): 1}
    write_predictions(predictions, tmp_path / "p.csv")
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [(row["class"] or None, row["prediction"]) for row in rows] == taken
    assert rows[4] == {"picture": "4, x.png", "class": "", "prediction": "a", "probability": "0.5000"}


def test_what_cannot_be_adapted_is_named(tmp_path: Path) -> None:
    run, support = make_run(tmp_path / "run"), folder_of(tmp_path / "s", bar=1, disc=1)
    with pytest.raises(ValueError, match="a folder of pictures for each class, two at least"):
        adapt(run, support / "bar")
    with pytest.raises(ValueError, match="has pictures of cross, but adapted to were bar, disc"):
        adapt(run, support).predict(folder_of(tmp_path / "q", cross=1))
    (support / "bar" / "bad.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"bad\.png"):
        adapt(run, support)
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        adapt(tmp_path, support)
    regression = tmp_path / "regression"
    regression.mkdir()
    Config(Tasks.sinusoids).completed().write(regression)
    with pytest.raises(ValueError, match="is a run on sinusoids, but adapting takes pictures"):
        adapt(regression, support)


@pytest.mark.parametrize("share", list(Share))
def test_a_learned_regularization_comes_along(tmp_path: Path, share: Share) -> None:
    run = make_run(tmp_path / "run", ways=3, learn_regularization=share)
    model = adapt(run, folder_of(tmp_path / "s", **dict.fromkeys(KINDS[:3], 1)))
    stored = checkpoint.load(run)["learner"]
    learned = {name: p for name, p in model.learner.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, stored[name]) for name, p in learned.items())
    more = folder_of(tmp_path / "more", **dict.fromkeys(KINDS, 1))
    if share is Share.parameter:  # one λ for each weight of the head, which has a row for each class
        with pytest.raises(CheckpointError, match="not trained on tasks of 4 classes"):
            adapt(run, more)
    else:
        assert len(adapt(run, more).classes) == 4
