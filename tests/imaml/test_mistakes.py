"""Mistakes at the command line: one line on the error stream, exit code 2, and nothing taken silently."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

from imaml.cli import main

from .test_adapt import draw, folder_of, make_run
from .test_runs import run


def refused(*arguments: object) -> str:
    """The one line with which ``imaml`` refuses the arguments."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["imaml", *map(str, arguments)]),
        redirect_stdout(output),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as exit_,
    ):
        main()
    return only_line(int(exit_.value.code or 0), output.getvalue(), errors.getvalue())


def only_line(code: int, output: str, errors: str) -> str:
    assert code == 2, errors
    assert output == ""
    assert errors.count("\n") == 1, errors
    assert errors.startswith("imaml: ")
    return errors


def test_a_process_tells_a_mistake_in_one_line() -> None:
    command = [
        sys.executable,
        "-m",
        "imaml",
        "train",
        "linear",
        "--steps",
        "1",
        "--algorithm",
        "maml",
        "--cg-steps",
        "3",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    line = only_line(result.returncode, result.stdout, result.stderr)
    assert line == "imaml: --linear-steps is a setting of imaml, and maml does not take it.\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "chess", "--steps", "1"], "'chess' is not one of"),
        (["train", "omniglot", "--steps", "1", "--ways", "1"], "--ways"),
        (["train", "sinusoids", "--step", "1"], "--step"),
        (["train", "sinusoids", "--steps", "1", "--inner-solver", "newton"], "'newton' is not one of"),
        (["train"], "tasks"),
        (["learn"], "learn"),
        (["reproduce", "table3"], "table3"),
        (["reproduce", "table1", "--minutes", "3"], "--minutes"),
        (["reproduce", "omniglot"], "--data"),
        (["adapt", "run"], "--support"),
    ],
)
def test_a_bad_option_is_one_line(arguments: list[str], words: str) -> None:
    assert words in refused(*arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["linear", "--algorithm", "maml", "--delta", "0.1"],
            "--delta is a setting of imaml, and maml does not take it",
        ),
        (["linear", "--algorithm", "reptile", "--head-only"], "--head-only is a setting of"),
        (["linear", "--data", "."], "--data is a setting of omniglot"),
        (["linear", "--ways", "3"], "--ways is a setting of omniglot"),
        (["linear", "--inner-solver", "lbfgs", "--inner-stepsize", "0.1"], "--inner-stepsize is a setting of gd"),
        (["linear", "--download"], "--download fetches the files of omniglot"),
        (["omniglot", "--download"], "--download fetches the files of omniglot, into the folder that --data names"),
        (["linear", "--regularization", "0"], "must be positive"),
        (["linear", "--learn-regularization", "model", "--regularization", "0"], "must be positive"),
        (["linear", "--delta", "0"], "delta is 0.0, but it must be a positive number"),
        (["linear", "--delta-prime", "0"], "delta_prime is 0.0, but it must be a positive number"),
        (["mini-imagenet"], "mini-imagenet needs --data"),
        (["mini-imagenet", "--data", "/nowhere"], "/nowhere"),
        (["cifar-fs", "--data", "/nowhere"], "/nowhere"),
        (["folder", "--data", "/nowhere"], "/nowhere"),
    ],
)
def test_settings_that_do_not_go_together_leave_no_run_behind(tmp_path: Path, arguments: list[str], words: str) -> None:
    assert words in refused("train", *arguments, "--steps", 1, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()


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


def test_an_old_run_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"tasks": "linear", "algorithm": "imaml", "cg_steps": 5}')
    for command in (["evaluate", tmp_path], ["plot", tmp_path], ["adapt", tmp_path, "--support", tmp_path]):
        assert "not from this version of imaml: train anew" in refused(*command)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda place: folder_of(place, bar=1), "must hold a folder of pictures for each class, two at least"),
        (lambda place: draw("bar", 0, place / "bar.png").parent, "must hold a folder of pictures for each class"),
        (lambda place: place.mkdir(), "holds no pictures"),
        (lambda place: None, "there is no"),
        (lambda place: (folder_of(place, bar=1, disc=1) / "cross").mkdir(), "the folder cross of"),
    ],
    ids=["one class", "no classes", "empty", "missing", "empty class"],
)
def test_a_support_of_no_use_is_refused(tmp_path: Path, make: object, words: str) -> None:
    make(tmp_path / "s")  # type: ignore[operator]
    assert words in refused("adapt", make_run(tmp_path / "run"), "--support", tmp_path / "s")


def test_a_query_of_no_use_is_refused(tmp_path: Path) -> None:
    adapt = ["adapt", make_run(tmp_path / "run"), "--support", folder_of(tmp_path / "s", bar=1, disc=1)]
    assert "which need --query" in refused(*adapt, "--out", tmp_path / "p.csv")
    (tmp_path / "one.png").write_text("no picture")
    for query, words in ((tmp_path / "nowhere", "there is no"), (tmp_path / "one.png", "one.png")):
        assert words in refused(*adapt, "--query", query)
