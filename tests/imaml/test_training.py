"""The outer loop below the command line: evaluation, TensorBoard over a resume, and stops that change no number."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from typer.testing import CliRunner

from imaml import checkpoint
from imaml.cli import app
from imaml.learners import MAML, MetaLoss
from imaml.models import MLP
from imaml.tasks import Sinusoids, Task
from imaml.tasks.task import Split
from imaml.training import evaluate

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
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not ((folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count("\n") >= 2):
        assert time.monotonic() < deadline, "no step was done"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    stopped = checkpoint.load(folder)["step"]
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
    assert state["step"] == 1  # the first step leads to 1e30, where the loss is not finite
    assert all(bool(p.isfinite().all()) for p in state["learner"].values())


def test_a_checkpoint_of_another_model_is_one_clear_error(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"learner": MLP([1, 3, 1]).state_dict()})
    with pytest.raises(checkpoint.CheckpointError, match="does not fit the settings"):
        checkpoint.fit(tmp_path, checkpoint.load(tmp_path), MLP([1, 4, 1]))
