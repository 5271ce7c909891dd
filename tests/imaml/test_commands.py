"""The commands: every algorithm and solver trains, and the commands around training tell what a user asked for."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from imaml import checkpoint
from imaml.cli import app
from imaml.config import Config, InnerSolver, LinearSolver, Outer
from imaml.reproduce import ClaimError
from imaml.reproduce.omniglot import Setting

from .test_adapt import KINDS, draw, folder_of, make_run
from .test_runs import run

ONE_STEP = ["--tasks-per-step", 2, "--steps", 1, "--threads", 1]
PLOT = ["--tasks", 2, "--threads", 1]


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def entries(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two shapes to train on and of two to test, six of each."""
    folder = tmp_path_factory.mktemp("pictures")
    folder_of(folder / "train", cross=6, frame=6)
    return folder_of(folder / "test", bar=6, disc=6).parent


def on_folder(data: Path, *options: object) -> list[object]:
    return ["train", "folder", "--data", data, "--ways", 2, "--queries", 2, "--side", 16, *ONE_STEP, *options]


@pytest.mark.parametrize(
    "options",
    [
        *(["--inner-solver", solver.value] for solver in InnerSolver),
        *(["--linear-solver", solver.value] for solver in LinearSolver),
        ["--delta", 1e-3, "--delta-prime", 1e-3],
        *(["--learn-regularization", share] for share in ("model", "layer", "parameter")),
        ["--algorithm", "maml", "--inner-solver", "nesterov", "--truncate", 2],
        ["--algorithm", "maml", "--checkpoint"],
        ["--algorithm", "fomaml", "--inner-solver", "nesterov"],
        *(["--outer", outer.value] for outer in Outer),
        ["--algorithm", "reptile", "--outer", "sgd", "--learning-rate", 0.5],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_every_setting_trains(tmp_path: Path, options: list[object]) -> None:
    run("train", "linear", *ONE_STEP, *options, "--out", tmp_path / "r")
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    for name, value in zip(options[::2], options[1::2], strict=False):
        assert config[str(name)[2:].replace("-", "_")] == value
    assert len(entries(tmp_path / "r")) == 1


def test_reached_accuracies_and_learned_strengths_are_in_the_metrics(tmp_path: Path) -> None:
    options = ["--delta", 1e-2, "--delta-prime", 1e-2, "--learn-regularization", "layer"]
    run("train", "sinusoids", *ONE_STEP, *options, "--out", tmp_path / "r")
    entry = entries(tmp_path / "r")[0]
    assert {"delta", "delta_missed", "delta_prime", "delta_prime_missed"} <= entry.keys()
    assert {name for name in entry if name.startswith("lambda/")} == {"lambda/0", "lambda/2", "lambda/4"}
    pictures = run("plot", tmp_path / "r", *PLOT).split()
    assert [Path(p).name for p in pictures] == ["learning_curve.png", "regularization.png", "adaptation.png"]


@pytest.mark.parametrize("algorithm", ["imaml", "maml"])
def test_a_folder_of_pictures_from_training_to_adapting(tmp_path: Path, data: Path, algorithm: str) -> None:
    folder = tmp_path / "r"
    run(*on_folder(data, "--head-only", "--grayscale", "--algorithm", algorithm), "--out", folder)
    assert "over 4 test tasks" in run("evaluate", folder, "--tasks", 4)
    pictures = [Path(p).name for p in run("plot", folder, *PLOT).split()]
    assert pictures[:2] == ["learning_curve.png", "episode.png"]
    assert all((folder / p).read_bytes().startswith(b"\x89PNG") for p in pictures)
    support = folder_of(tmp_path / "s", **dict.fromkeys(KINDS, 1))
    output = run("adapt", folder, "--support", support, "--query", data / "test", "--threads", 1)
    assert "adapted to 4 classes from 4 pictures: bar (1), cross (1), disc (1), frame (1)" in output
    assert "% of 12 pictures" in output
    assert len((folder / "predictions.csv").read_text().splitlines()) == 13


def test_the_data_may_move(tmp_path: Path, data: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.symlink_to(data)
    run(*on_folder(here, "--algorithm", "fomaml"), "--out", tmp_path / "r")
    here.rename(there)
    assert str(here) in refused("evaluate", tmp_path / "r", "--tasks", 2)
    run("evaluate", tmp_path / "r", "--tasks", 2, "--data", there)
    run("plot", tmp_path / "r", "--data", there, *PLOT)


def test_adapt_tells_what_it_predicts(tmp_path: Path) -> None:
    folder, support = make_run(tmp_path / "run"), folder_of(tmp_path / "s", bar=2, disc=3)
    flat = draw("disc", 4, tmp_path / "q" / "[red]one.png").parent  # a name that the terminal must not take for markup
    output = run("adapt", folder, "--support", support, "--query", flat, "--out", tmp_path / "out.csv")
    assert "adapted to 2 classes from 5 pictures: bar (2), disc (3)" in output
    assert "[red]one.png" in output
    assert "accuracy" not in output
    row = next(csv.DictReader((tmp_path / "out.csv").open()))
    assert (row["picture"], row["class"], row["prediction"]) == (str(flat / "[red]one.png"), "", "disc")
    assert "each support picture named by the others: 100 % right" in run("adapt", folder, "--support", support)
    few = folder_of(tmp_path / "few", bar=1, disc=1)
    assert "or two support pictures of each class" in run("adapt", folder, "--support", few)


def test_adapt_judges_pictures_of_known_classes(tmp_path: Path) -> None:
    folder, support = make_run(tmp_path / "run"), folder_of(tmp_path / "s", bar=2, disc=2)
    query = folder_of(tmp_path / "q", first=3, bar=1, disc=1)
    assert "accuracy 100.0 % of 2 pictures" in run("adapt", folder, "--support", support, "--query", query)
    (query / "bar" / "3.png").write_bytes((query / "disc" / "3.png").read_bytes())
    output = run("adapt", folder, "--support", support, "--query", query)
    assert "accuracy 50.0 % of 2 pictures" in output
    assert "1 of 1" in output


def test_a_longer_list_than_the_terminal_takes_is_cut_there_only(tmp_path: Path) -> None:
    folder, support = make_run(tmp_path / "run"), folder_of(tmp_path / "s", bar=1, disc=1)
    for k in range(43):
        draw("bar", k % 5, tmp_path / "q" / f"{k}.png")
    assert "and 3 more" in run("adapt", folder, "--support", support, "--query", tmp_path / "q")
    assert len((folder / "predictions.csv").read_text().splitlines()) == 44


def test_resuming_refuses_what_the_run_was_begun_without(tmp_path: Path) -> None:
    run("train", "linear", "--algorithm", "fomaml", *ONE_STEP, "--out", tmp_path / "r")
    again = ["train", "linear", "--resume", "--steps", 2, "--out", tmp_path / "r"]
    assert "was begun without --truncate" in refused(*again, "--truncate", 1)
    assert "was begun with outer adam, not sgd" in refused(*again, "--outer", "sgd")
    run(*again, "--outer", "adam")
    assert checkpoint.load(tmp_path / "r")["step"] == 2


def test_paths_of_the_data_are_kept_in_full(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data.parent)
    run(*on_folder(Path(data.name), "--algorithm", "fomaml"), "--out", tmp_path / "r")
    assert Config.read(tmp_path / "r").data == str(data)


@pytest.mark.parametrize("name", ["table1", "figure2a", "figure2b", "omniglot"])
def test_reproduce_hands_its_options_on(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Path, dict[str, object]]] = []
    module = ModuleType(f"imaml.reproduce.{name}")
    module.run = lambda out, **settings: given.append((out, settings))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    more = ["--data", "there", "--minutes", 3, "--setting", "5w5s"] if name == "omniglot" else []
    run("reproduce", name, "--quick", "--out", tmp_path, *more)
    expected: dict[str, object] = {"quick": True}
    if more:
        expected |= {"data": Path("there"), "minutes": 3.0, "settings": [Setting.five_way_5], "seeds": 1}
        expected |= {"table_file": None}
    assert given == [(tmp_path, expected)]


def test_a_claim_that_does_not_hold_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(out: Path, **settings: object) -> None:
        raise ClaimError("not so in this run: memory is flat: 3.1 times")

    module = ModuleType("imaml.reproduce.table1")
    module.run = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    result = CliRunner().invoke(app, ["reproduce", "table1"])
    assert result.exit_code == 1
    assert result.output == "imaml: not so in this run: memory is flat: 3.1 times\n"


def test_help_lists_every_command_and_the_settings_by_what_they_belong_to() -> None:
    commands = run("--help")
    for name in ("train", "evaluate", "adapt", "plot", "reproduce"):
        assert f" {name} " in commands
    settings = run("train", "--help")
    for panel in ("Tasks", "Adapting to a task", "Implicit gradient (imaml)", "Meta-training", "The run"):
        assert f"─ {panel} ─" in settings
