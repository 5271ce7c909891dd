"""Pictures of a run: they show what the metrics and the tasks hold."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from imaml import plots
from imaml.learners import MetaLoss
from imaml.tasks import Omniglot, Task

from .test_tasks import make_omniglot


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[plt.Figure]:
    """The figures that were saved."""
    figures: list[plt.Figure] = []
    save = plots._save

    def keep(figure: plt.Figure, *arguments: object, **named: object) -> Path:
        figures.append(figure)
        return save(figure, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def write_metrics(run: Path, **entry: float) -> None:
    lines = [{"step": s, "seconds": 60.0 * s, "loss": 1.0 / s, **entry} for s in range(1, 4)]
    lines[1]["validation_accuracy"] = 0.25
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def labels(axis: plt.Axes) -> list[str]:
    return [str(line.get_label()) for line in axis.lines]


def test_the_curve_shows_scores_reports_and_accuracies(tmp_path: Path, drawn: list[plt.Figure]) -> None:
    write_metrics(tmp_path, accuracy=0.5, inner_not_converged=0.125, linear_not_converged=0.0, delta=1e-3)
    assert plots.learning_curve(tmp_path).read_bytes().startswith(b"\x89PNG")
    score, shares, reached = drawn[0].axes
    assert "validation tasks" in labels(score)
    assert list(score.lines[1].get_ydata()) == [0.25]
    assert list(score.lines[1].get_xdata()) == [2.0]
    assert list(shares.lines[0].get_ydata()) == [0.125] * 3
    assert labels(reached) == ["reached δ, ‖φ − φ*‖"]


def test_a_run_without_reports_has_one_panel(tmp_path: Path, drawn: list[plt.Figure]) -> None:
    write_metrics(tmp_path, inner_not_converged=1.0)  # as MAML's fixed steps report
    plots.learning_curve(tmp_path)
    assert len(drawn[0].axes) == 1
    assert list(drawn[0].axes[0].lines[0].get_ydata()) == pytest.approx([1.0, 0.75, (1 + 1 / 2 + 1 / 3) / 3])


def test_learned_regularizations_are_drawn_by_name(tmp_path: Path, drawn: list[plt.Figure]) -> None:
    write_metrics(tmp_path)
    assert plots.regularization_history(tmp_path) is None
    write_metrics(tmp_path, **{"lambda/head.weight": 2.0, "lambda/head.bias": 3.0})
    assert plots.regularization_history(tmp_path) == tmp_path / "regularization.png"
    assert labels(drawn[0].axes[0]) == ["head.weight", "head.bias"]


@pytest.mark.parametrize("content", [None, ""])
def test_a_run_without_metrics_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(FileNotFoundError, match="train for at least one step"):
        plots.learning_curve(tmp_path)


class Shades:
    """Tasks of three classes, images of one shade each: class c of task t is (10 t + c) / 100."""

    is_classification = True

    def sample(self, count: int, split: str, seed: int, index: int) -> Task:
        task = 10 * (index + torch.arange(count))
        order = torch.tensor([0, 1, 2, 0, 1, 2])
        shade = (task[:, None] + order[None]) / 100
        images = shade[:, :, None, None, None].expand(count, 6, 3, 4, 4)
        return Task((images, order.expand(count, 6)), (images, order.expand(count, 6)))


class Taker:
    """Names each image by its own class, but takes class 2 of two tasks for class 0, that of the second surely."""

    def meta_step(self, tasks: Task) -> MetaLoss:
        images, labels = tasks.query
        logits = 2.0 * torch.nn.functional.one_hot(labels, 3)
        shade = (100 * images[..., 0, 0, 0]).round()
        logits[(shade == 2).nonzero(as_tuple=True)] = torch.tensor([1.0, 0.0, 0.5])
        logits[(shade == 12).nonzero(as_tuple=True)] = torch.tensor([9.0, 0.0, 0.0])
        return MetaLoss(torch.zeros(()), logits)


def shade(axis: plt.Axes) -> float:
    return round(float(axis.images[0].get_array()[0, 0, 0]), 2)


def test_the_surest_mistakes_come_first_beside_what_they_are(tmp_path: Path, drawn: list[plt.Figure]) -> None:
    assert plots.mistakes(Taker(), Shades(), tmp_path, 0, 5) == tmp_path / "mistakes.png"  # type: ignore[arg-type]
    axes = [axis for axis in drawn[0].axes if axis.images]
    assert [shade(axis) for axis in axes] == [0.12, 0.1, 0.12, 0.02, 0.0, 0.02]  # each picture once
    assert axes[1].get_title() == "100 % sure"
    assert axes[4].get_title() == "51 % sure"  # e / (e + 1 + √e)


def test_no_mistakes_no_picture(tmp_path: Path) -> None:
    class Right(Taker):
        def meta_step(self, tasks: Task) -> MetaLoss:
            return MetaLoss(torch.zeros(()), torch.nn.functional.one_hot(tasks.query[1], 3).float())

    assert plots.mistakes(Right(), Shades(), tmp_path, 0, 5) is None  # type: ignore[arg-type]


def test_an_episode_shows_each_class_and_what_its_queries_were_taken_for(
    tmp_path: Path, drawn: list[plt.Figure]
) -> None:
    plots.episode(Taker(), Shades(), tmp_path, 0)  # type: ignore[arg-type]
    rows = [axis for axis in drawn[0].axes if axis.images]
    assert [shade(axis) for axis in rows] == [0.0] * 4 + [0.01] * 4 + [0.02] * 4  # two to learn from, two to name
    taken: list[str] = [axis.get_title() for axis in rows]
    assert taken == [""] * 10 + ["taken for 1"] * 2


@pytest.mark.parametrize("ink", [True, False])
def test_ink_is_black_and_grey_is_grey(tmp_path: Path, ink: bool) -> None:
    source = Omniglot(make_omniglot(tmp_path / "data", True), ways=2) if ink else Shades()
    figure, axis = plt.subplots()
    plots._show(axis, torch.full((1, 2, 2), 0.25), source, "black")  # type: ignore[arg-type]
    assert axis.images[0].get_array()[0, 0].tolist() == [0.75 if ink else 0.25] * 3
    plt.close(figure)
