"""Several processes against one: the same training, the same scores; dead ranks end a run, with a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from imaml import checkpoint, distributed

from . import ranks
from .test_runs import run, same

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(processes: int, *arguments: object) -> subprocess.Popen[str]:
    command = [*TORCHRUN, str(processes), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


def finished(process: subprocess.Popen[str]) -> tuple[str, int]:
    """What it printed, and its exit code."""
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its ranks too
        raise
    return output, process.returncode


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, ranks.results(folder)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_compute_what_one_does(
    tmp_path: Path, alone: tuple[Path, dict[str, Any]], processes: int
) -> None:
    folder, expected = alone
    output, code = finished(torchrun(processes, ranks.__file__, folder, tmp_path))
    assert code == 0, output
    everyones = torch.load(tmp_path / "results.pt")
    assert len(everyones) == processes
    for mine in everyones:
        assert same(mine, everyones[0])
        for name in ranks.RUNS:
            assert difference(mine[name], expected[name]) < 1e-6, name
        # Where no inner or linear solve can end an iteration earlier by rounding, float64 leaves only rounding. (In
        # float32 the curvature of implicit gradients multiplies it: by 10⁴ in ten steps on these tasks.)
        assert difference(mine["imaml"], expected["imaml"]) < 1e-10
        assert difference(mine["imaml begun by one process"], expected["imaml"]) < 1e-10
        assert same(mine["imaml"], mine["imaml resumed"])
        assert mine["steps until a signal"] == expected["steps until a signal"] == 3
        assert torch.equal(mine["scores"], expected["scores"])
    for name in ranks.RUNS:
        assert losses(tmp_path / name) == pytest.approx(losses(folder / name), rel=1e-6), name
    last = [json.loads((f / "imaml" / "metrics.jsonl").read_text().splitlines()[-1]) for f in (tmp_path, folder)]
    assert last[0].keys() == last[1].keys()
    for number in ("linear_iterations", "linear_not_converged", "delta", "delta_prime"):
        assert last[0][number] == pytest.approx(last[1][number], rel=1e-6), number
    # At the command line only one process speaks.
    assert output.count("meta-steps done") == 1
    assert output.count(run("evaluate", tmp_path / "cli", "--tasks", 50)) == 1


def test_the_shares_of_the_ranks_are_all_of_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, size in ((5, 2), (16, 4), (3, 4), (1, 4), (7, 7)):
        monkeypatch.setattr(distributed, "world_size", lambda size=size: size)
        weights = torch.zeros(count, dtype=torch.float64)
        for rank in range(size):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            part, weight = distributed.share(count)
            assert len(weights[part]) >= 1
            weights[part] += weight / len(weights[part])  # of each task in the mean
        assert torch.allclose(weights, torch.full_like(weights, 1 / count), rtol=1e-12)


def workers(process: subprocess.Popen[str]) -> dict[int, int]:
    """The process of each rank."""
    found = {}
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(v[5:]): int(child) for v in variables if v.startswith(b"RANK=")}
    return found


def until_steps(folder: Path, count: int) -> None:
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert time.monotonic() < deadline, "no step was done"
        time.sleep(0.02)


OPTIONS = ["train", "linear", "--algorithm", "fomaml", "--tasks-per-step", "5", "--threads", "1"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_with_an_error_and_a_checkpoint(tmp_path: Path, victim: int) -> None:
    folder = tmp_path / "killed"
    process = torchrun(2, "-m", "imaml", *OPTIONS, "--steps", 10**6, "--out", folder)
    until_steps(folder, 5)
    os.kill(workers(process)[victim], signal.SIGKILL)
    started = time.monotonic()
    output, code = finished(process)
    assert time.monotonic() - started < 30
    assert code != 0
    assert f"imaml: rank {1 - victim} of 2 has lost another one" in output
    steps = checkpoint.load(folder)["step"]
    assert steps >= 4  # of a step that rank 0 has told of, the other one may not have heard
    # Another number of processes goes on from there, to what an undisturbed run gives.
    run(*OPTIONS[:2], "--steps", steps + 3, "--out", folder, "--resume", "--threads", 1)
    run(*OPTIONS, "--steps", steps + 3, "--out", tmp_path / "whole")
    assert difference(checkpoint.load(folder)["learner"], checkpoint.load(tmp_path / "whole")["learner"]) < 1e-6
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
