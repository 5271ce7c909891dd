"""A run that is killed again and again ends where an undisturbed one does, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imaml import checkpoint

from .test_runs import same

KILLS, STEPS = 20, 400
COMMAND = """
import sys
from imaml import training
training.SECONDS_BETWEEN_CHECKPOINTS = 0.02  # so that many a kill meets the writing of one
from imaml.cli import main
main()
"""
OPTIONS = ["train", "sinusoids", "--algorithm", "fomaml", "--tasks-per-step", "2", "--steps", str(STEPS), "--out"]


def begun(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMAND, *OPTIONS, str(folder), "--threads", "1", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def until_step(folder: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    lines, deadline = folder / "metrics.jsonl", time.monotonic() + 300
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= step):
        assert time.monotonic() < deadline, "no step was done"
        assert process.poll() is None, "the run has ended by itself"
        time.sleep(0.001)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    chance, folder, step = random.Random(0), tmp_path / "killed", 0
    for life in range(KILLS):
        process = begun(folder, *(["--resume"] if life else []))
        try:
            until_step(folder, step + chance.randint(2, 15), process)
            time.sleep(chance.uniform(0.0, 0.02))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        step = checkpoint.load(folder)["step"]
    assert 0 < step < STEPS
    assert begun(folder, "--resume").wait() == 0
    assert begun(tmp_path / "whole").wait() == 0
    killed, whole = checkpoint.load(folder), checkpoint.load(tmp_path / "whole")
    for key in ("learner", "optimizer", "step", "random_state"):
        assert same(killed[key], whole[key]), key
    assert metrics(folder) == metrics(tmp_path / "whole")
    assert len(metrics(folder)) == STEPS
    assert not list(folder.glob(".*"))
