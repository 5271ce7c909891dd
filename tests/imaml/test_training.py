"""The outer loop below the command line: evaluation, TensorBoard over a resume, and stops that change no number."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from typer.testing import CliRunner

from imaml import IMAML, LearnedRegularization, checkpoint, training
from imaml.cli import app
from imaml.learners import MAML, MetaLoss
from imaml.models import MLP
from imaml.tasks import LinearRegression, Sinusoids, Task
from imaml.tasks.task import Split
from imaml.training import DivergedError, evaluate, train

from .test_runs import run, same


class Digits:
    """Two query examples a task, inputs equal to their labels; remembers what was drawn."""

    is_classification = True

    def __init__(self) -> None:
        self.drawn: list[tuple[int, Split, int, int]] = []

    def sample(self, count: int, split: Split, seed: int, index: int) -> Task:
        self.drawn.append((count, split, seed, index))
        labels = torch.tensor([[1, 2]]).expand(count, 2)
        return Task((labels, labels), (labels, labels))


class Guess(nn.Module):
    """Always answers class 1: right for the first example of Digits, and never for the second."""

    def meta_step(self, tasks: Task) -> MetaLoss:
        return MetaLoss(torch.zeros(()), nn.functional.one_hot(torch.ones_like(tasks.query[1]), 3).float())


class Odd(Guess):
    """As Guess, with every other task all wrong."""

    def meta_step(self, tasks: Task) -> MetaLoss:
        outputs = super().meta_step(tasks).outputs
        outputs[::2] = torch.tensor([1.0, 0.0, 0.0])
        return MetaLoss(torch.zeros(()), outputs)


def test_evaluation_draws_the_tasks_asked_for_from_the_test_split() -> None:
    source = Digits()
    assert evaluate(Guess(), source, 50, 7) == (0.5, 0.0)  # type: ignore[arg-type]
    assert sum(count for count, *_ in source.drawn) == 50
    assert all(split == "test" and seed == 7 for _, split, seed, _ in source.drawn)
    assert len({index for *_, index in source.drawn}) == len(source.drawn)


def test_the_interval_is_that_of_the_mean_over_tasks() -> None:
    mean, half = evaluate(Odd(), Digits(), 40, 0)  # type: ignore[arg-type]
    scores = torch.tensor([0.0, 0.5] * 20)
    assert mean == pytest.approx(0.25)
    assert half == pytest.approx(1.96 * float(scores.std()) / math.sqrt(40))


def test_evaluation_of_regression_is_the_query_loss_and_changes_nothing() -> None:
    learner = MAML(MLP([1, 4, 1]), nn.functional.mse_loss, steps=1, stepsize=0.01)
    before, random = {k: v.clone() for k, v in learner.state_dict().items()}, torch.get_rng_state()
    source = Sinusoids(shots=5)
    mean, half = evaluate(learner, source, 20, 3)
    assert mean == pytest.approx(float(learner.meta_loss(source.sample(20, "test", 3, 0)).detach()), rel=1e-5)
    assert half > 0
    assert same(before, dict(learner.state_dict()))
    assert torch.equal(random, torch.get_rng_state())


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    options = ["--tasks-per-step", 2, "--algorithm", "fomaml", "--threads", 1]
    run("train", "linear", *options, "--steps", 3, "--out", tmp_path / "r")
    run("train", "linear", "--steps", 5, "--out", tmp_path / "r", "--resume", "--threads", 1)
    board = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_a_run_that_ctrl_c_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    options = ["train", "linear", "--algorithm", "fomaml", "--tasks-per-step", "2", "--threads", "1"]
    folder = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "imaml", *options, "--steps", "1000000", "--out", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not ((folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count("\n") >= 2):
        assert time.monotonic() < deadline, "no step was done"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "meta-steps done" in output
    stopped = checkpoint.load(folder)["step"]
    assert stopped == (folder / "metrics.jsonl").read_text().count("\n")
    run(*options, "--steps", stopped + 2, "--out", folder, "--resume")
    run(*options, "--steps", stopped + 2, "--out", tmp_path / "whole")
    one, other = checkpoint.load(folder), checkpoint.load(tmp_path / "whole")
    for key in ("learner", "optimizer", "step", "random_state"):
        assert same(one[key], other[key]), key


def test_a_run_that_diverges_stops_with_its_last_good_parameters(tmp_path: Path) -> None:
    options = ["--algorithm", "fomaml", "--learning-rate", "1e30", "--steps", "9", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["train", "sinusoids", *options])
    assert result.exit_code == 2
    assert "imaml: the training diverged: the loss is inf" in result.output
    state = checkpoint.load(tmp_path)
    assert state["step"] == 0  # the first step leads to 1e30, where the loss is not finite
    assert all(bool(p.isfinite().all()) for p in state["learner"].values())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3, history_size=4),
    "lbfgs with line search": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
}
LINEAR = LinearRegression(dimension=3)


def linear() -> MAML:
    torch.manual_seed(0)
    return MAML(nn.Linear(3, 1), nn.functional.mse_loss, steps=1, stepsize=0.05)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_of_torch_takes_the_outer_steps(tmp_path: Path, name: str) -> None:
    def trained(run: Path, *stops: int) -> tuple[MAML, dict[str, Any]]:
        run.mkdir()
        for steps in stops:
            learner = linear()
            settings: Any = {"minutes": None, "tasks_per_step": 4, "seed": 1}
            optimizer = OPTIMIZERS[name](learner.parameters())
            assert train(learner, LINEAR, optimizer, run, steps=steps, resume=steps != stops[0], **settings) == steps
        return learner, checkpoint.load(run)

    by_hand = linear()
    optimizer = OPTIMIZERS[name](by_hand.parameters())
    for step in range(6):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = by_hand.meta_loss(LINEAR.sample(4, "train", 1, step))
            loss.backward()
            return loss

        optimizer.step(closure)
    learner, whole = trained(tmp_path / "whole", 6)
    assert same(dict(learner.state_dict()), dict(by_hand.state_dict()))
    learner, parts = trained(tmp_path / "parts", 3, 6)
    assert same(dict(learner.state_dict()), dict(by_hand.state_dict()))
    assert same(whole["optimizer"], parts["optimizer"])
    metrics = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    first = linear().meta_loss(LINEAR.sample(4, "train", 1, 0))
    assert json.loads(metrics[0])["loss"] == float(first.detach())  # of the parameters that the step started from


@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [
        (lambda p: torch.optim.LBFGS(p, lr=1e30, max_iter=3), 0),  # within the first step, which had begun well
        (lambda p: torch.optim.SGD(p, lr=1e25), 0),  # at the start of the second step
        (lambda p: torch.optim.SGD(p, lr=3e38), 0),  # the parameters overflow
    ],
)
def test_the_last_good_parameters_are_those_of_finite_loss_and_gradient(
    tmp_path: Path, optimizer: Callable[[Any], torch.optim.Optimizer], steps: int
) -> None:
    learner, start = linear(), linear()
    with pytest.raises(DivergedError, match="the training diverged"):
        train(
            learner,
            LINEAR,
            optimizer(learner.parameters()),
            tmp_path,
            steps=9,
            minutes=None,
            tasks_per_step=4,
            seed=1,
        )
    state = checkpoint.load(tmp_path)
    assert state["step"] == steps
    assert same(dict(learner.state_dict()), dict(start.state_dict()))
    assert same(dict(state["learner"]), dict(start.state_dict()))


@pytest.mark.parametrize(
    ("splits", "name", "split"),
    [(("train", "test", "val"), "validation_loss", "val"), (("train", "test"), "test_loss", "test")],
)
def test_validation_uses_the_tasks_to_choose_settings_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: tuple[Split, ...], name: str, split: Split
) -> None:
    class Source(LinearRegression):
        def __init__(self) -> None:
            super().__init__(dimension=3)
            self.splits = frozenset(splits)

    monkeypatch.setattr(training, "VALIDATE_EVERY", 2)
    learner, source = linear(), Source()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.0)
    train(learner, source, optimizer, tmp_path, steps=2, minutes=None, tasks_per_step=2, seed=0)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [key for key in second if key not in first] == [name]
    scores = training._scores(learner, source, split, training.VALIDATION_TASKS, training.VALIDATION_SEED)
    assert second[name] == pytest.approx(float(scores.mean()))


def test_metrics_hold_the_accuracy_reached_and_the_learned_regularization(tmp_path: Path) -> None:
    model = MLP([3, 2, 1])
    learner = IMAML(
        model, nn.functional.mse_loss, regularization=LearnedRegularization(model, 2.0, per="layer"), delta=1e-2
    )
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    train(learner, LINEAR, optimizer, tmp_path, steps=2, minutes=None, tasks_per_step=2, seed=0)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["delta"] <= 1e-2
    assert first["delta_missed"] == 0
    assert first["lambda/0"] == first["lambda/2"] == pytest.approx(2.0)
    assert second["lambda/0"] != second["lambda/2"]


def test_time_that_is_used_up_is_not_exceeded_by_resuming(tmp_path: Path) -> None:
    settings: Any = {"steps": None, "minutes": 0.001, "tasks_per_step": 2, "seed": 0}
    learner = linear()
    done = train(learner, LINEAR, torch.optim.SGD(learner.parameters(), lr=0.01), tmp_path, **settings)
    again = train(learner, LINEAR, torch.optim.SGD(learner.parameters(), lr=0.01), tmp_path, resume=True, **settings)
    assert again == done >= 1


def test_a_checkpoint_of_another_model_is_one_clear_error(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"learner": MLP([1, 3, 1]).state_dict()})
    with pytest.raises(checkpoint.CheckpointError, match="does not fit the settings"):
        checkpoint.fit(tmp_path, checkpoint.load(tmp_path), MLP([1, 4, 1]))


def test_a_checkpoint_of_another_optimizer_is_one_clear_error(tmp_path: Path) -> None:
    learner = linear()
    settings: Any = {"minutes": None, "tasks_per_step": 2, "seed": 0}
    train(learner, LINEAR, torch.optim.Adam(learner.parameters()), tmp_path, steps=1, **settings)
    for other in (torch.optim.SGD(learner.parameters()), torch.optim.Adam([learner.model.weight])):
        with pytest.raises(checkpoint.CheckpointError, match="does not fit the settings"):
            train(learner, LINEAR, other, tmp_path, steps=2, resume=True, **settings)
