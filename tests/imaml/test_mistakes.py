"""Mistakes at the command line: one line on the error stream, exit code 2, and nothing taken silently."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .test_runs import run


def refused(*arguments: object) -> str:
    """The one line with which ``python -m imaml`` refuses the arguments."""
    command = [sys.executable, "-m", "imaml", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("imaml: ")
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "chess", "--steps", "1"], "'chess' is not one of"),
        (["train", "sinusoids", "--steps", "1", "--ways", "1"], "--ways"),
        (["train", "sinusoids", "--step", "1"], "--step"),
        (["train", "sinusoids", "--steps", "many"], "--steps"),
        (["train"], "tasks"),
        (["learn"], "learn"),
    ],
)
def test_a_bad_option_is_one_line(arguments: list[str], words: str) -> None:
    assert words in refused(*arguments)


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in refused("train", "sinusoids", "--steps", 1, "--out", tmp_path / "file")


@pytest.mark.parametrize("algorithm", ["imaml", "maml", "reptile"])
def test_an_inner_step_of_zero_is_refused(tmp_path: Path, algorithm: str) -> None:
    options = ["--steps", 1, "--inner-stepsize", 0, "--algorithm", algorithm, "--out", tmp_path / "r"]
    assert "stepsize" in refused("train", "sinusoids", *options)


def test_a_run_does_not_go_on_with_other_settings(tmp_path: Path) -> None:
    run("train", "linear", "--algorithm", "fomaml", "--steps", 1, "--seed", 3, "--out", tmp_path / "r")
    again = ["--resume", "--steps", 2, "--out", tmp_path / "r"]
    assert "sinusoids" in refused("train", "sinusoids", *again)
    assert "seed 3, not 4" in refused("train", "linear", "--seed", 4, *again)
    run("train", "linear", "--algorithm", "fomaml", "--seed", 3, *again)  # the same ones may be repeated
