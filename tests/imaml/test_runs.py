"""Runs from the command line: metrics, checkpoints, resuming bit for bit, stopping, and plain words for mistakes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from imaml import checkpoint
from imaml.cli import app
from imaml.files import write_atomically

COMMON = ["--tasks-per-step", "2", "--shots", "5", "--threads", "1"]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def state(folder: Path) -> dict[str, object]:
    return checkpoint.load(folder)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)  # type: ignore[arg-type]
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)  # type: ignore[attr-defined, index]
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))  # type: ignore[arg-type]
    return a == b


@pytest.mark.parametrize("algorithm", ["imaml", "maml", "fomaml", "reptile"])
def test_resuming_continues_bit_for_bit(tmp_path: Path, algorithm: str) -> None:
    options = ["train", "sinusoids", "--algorithm", algorithm, *COMMON]
    run(*options, "--steps", 6, "--out", tmp_path / "whole")
    run(*options, "--steps", 3, "--out", tmp_path / "parts")
    run("train", "sinusoids", "--steps", 6, "--out", tmp_path / "parts", "--resume", "--threads", "1")
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    for key in ("learner", "optimizer", "step", "random_state"):
        assert same(whole[key], parts[key]), key
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_metrics_of_steps_after_the_checkpoint_are_cut_on_resume(tmp_path: Path) -> None:
    run("train", "linear", *COMMON, "--steps", 2, "--out", tmp_path / "r")
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 99.0}\n')
    with (tmp_path / "r" / "metrics.jsonl").open("ab") as binary:
        binary.write(b'[]\n\xff\x00\n{"step": null}\n{"step": 4, "lo')  # a crash in the middle of a line
    run("train", "linear", "--steps", 3, "--out", tmp_path / "r", "--resume", "--threads", "1")
    steps = [json.loads(line)["step"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_metrics_hold_the_reports_of_the_solvers(tmp_path: Path) -> None:
    run("train", "sinusoids", *COMMON, "--steps", 1, "--out", tmp_path / "r")
    entry = json.loads((tmp_path / "r" / "metrics.jsonl").read_text())
    assert {
        "inner_not_converged",
        "inner_residual",
        "linear_not_converged",
        "linear_indefinite",
        "linear_iterations",
    } <= set(entry)
    assert 0 <= entry["linear_indefinite"] <= entry["linear_not_converged"] <= 1
    assert list((tmp_path / "r" / "tensorboard").iterdir())


def test_evaluate_and_plot(tmp_path: Path) -> None:
    run("train", "sinusoids", *COMMON, "--steps", 2, "--out", tmp_path / "r")
    assert "query loss" in run("evaluate", tmp_path / "r", "--tasks", 20)
    run("plot", tmp_path / "r")
    for name in ("learning_curve.png", "adaptation.png"):
        assert (tmp_path / "r" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "sinusoids"], "give --steps or --minutes"),
        (["train", "omniglot", "--steps", "1"], "omniglot needs --data"),
        (["train", "omniglot", "--steps", "1", "--data", "/nowhere"], "there is no folder /nowhere"),
        (["train", "sinusoids", "--steps", "1", "--regularization", "0"], "regularization must be positive"),
        (["train", "chess", "--steps", "1"], "'chess' is not one of"),
        (["evaluate", "nowhere"], "not the folder of a run"),
        (["plot", "nowhere"], "not the folder of a run"),
    ],
)
def test_mistakes_get_a_line_and_no_traceback(tmp_path: Path, arguments: list[str], words: str) -> None:
    out = ["--out", str(tmp_path / "r")] if arguments[0] == "train" else []
    result = CliRunner().invoke(app, [*arguments, *out])
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run("train", "linear", *COMMON, "--steps", 1, "--out", tmp_path / "r")
    result = CliRunner().invoke(app, ["train", "linear", *COMMON, "--steps", "1", "--out", str(tmp_path / "r")])
    assert result.exit_code == 2
    assert "--resume" in result.output


def test_damaged_checkpoints_are_refused_and_the_previous_one_is_offered(tmp_path: Path) -> None:
    for step in range(2):
        checkpoint.save(tmp_path, {"step": step})
    assert state(tmp_path)["step"] == 1
    path = tmp_path / checkpoint.NAME
    for content in (path.read_bytes()[:100], b"", b"something else"):
        path.write_bytes(content)
        with pytest.raises(checkpoint.CheckpointError, match=r"damaged.*rename it"):
            checkpoint.load(tmp_path)
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(checkpoint.CheckpointError, match="not a checkpoint of imaml"):
        checkpoint.load(tmp_path)
    os.replace(tmp_path / checkpoint.PREVIOUS, path)
    assert state(tmp_path)["step"] == 0


def test_only_a_checkpoint_that_can_be_read_is_offered(tmp_path: Path) -> None:
    for step in range(2):
        checkpoint.save(tmp_path, {"step": step})
    (tmp_path / checkpoint.NAME).unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"there is no checkpoint.*of step 0.*rename it"):
        checkpoint.load(tmp_path)
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read either"):
        checkpoint.load(tmp_path)


def test_a_file_and_its_name_are_on_the_disk_once_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically(tmp_path / "file", b"content")
    assert events == ["file", "rename", "folder"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    run("train", "linear", *COMMON, "--steps", 1, "--out", tmp_path / "r")
    left = tmp_path / "r" / f".{checkpoint.NAME}.x7.writing"
    left.mkdir()
    (left / checkpoint.NAME).write_bytes(b"PK")
    run("train", "linear", "--steps", 2, "--out", tmp_path / "r", "--resume", "--threads", "1")
    assert not left.exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, {"step": 1})

    def broken(source: str, target: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path, {"step": 2})
    assert state(tmp_path)["step"] == 1
