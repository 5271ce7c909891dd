"""What one process and several compute alike; ``torchrun ranks.py ALONE FOLDER`` leaves it in FOLDER/results.pt."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from imaml import IMAML, MAML, Learner, distributed
from imaml.cli import app
from imaml.models import MLP
from imaml.tasks import LinearRegression, Sinusoids, Task, TaskSource
from imaml.tasks.task import Split
from imaml.training import evaluate, train
from implicitdiff import CG
from implicitdiff.inner_solvers import GradientDescent

Optimizer = Callable[[Any], torch.optim.Optimizer]


class InDouble:
    """A source of tasks, in float64."""

    is_classification = False

    def __init__(self, source: TaskSource) -> None:
        self.source, self.splits = source, source.splits

    def sample(self, count: int, split: Split, seed: int, index: int) -> Task:
        return tree_map(torch.Tensor.double, self.source.sample(count, split, seed, index))


class Interrupting(LinearRegression):
    """A source that asks the last rank to stop when it draws the third batch."""

    def sample(self, count: int, split: Split, seed: int, index: int) -> Task:
        if index == 2 and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().sample(count, split, seed, index)


def implicit() -> Learner:
    inner = GradientDescent(stepsize=0.01, max_iterations=4, tol=0.0, on_failure="ignore")
    linear = CG(rtol=1e-3, max_iterations=3, on_failure="ignore")
    model = MLP([1, 20, 20, 1])
    return IMAML(model, nn.functional.mse_loss, inner_solver=inner, linear_solver=linear, regularization=2.0)


def explicit() -> Learner:
    return MAML(MLP([1, 20, 20, 1]), nn.functional.mse_loss, steps=3, stepsize=0.01)


def linear() -> Learner:
    return MAML(nn.Linear(20, 1), nn.functional.mse_loss, steps=2, stepsize=0.02)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, max_iter=3, line_search_fn="strong_wolfe")


SINUSOIDS, LINEAR = Sinusoids(shots=5), LinearRegression()
RUNS: dict[str, tuple[Callable[[], Learner], TaskSource, torch.dtype, Optimizer, int, int]] = {
    "imaml": (implicit, InDouble(SINUSOIDS), torch.float64, adam, 5, 12),
    "maml in float32": (explicit, SINUSOIDS, torch.float32, adam, 8, 30),
    "one task": (explicit, SINUSOIDS, torch.float32, adam, 1, 3),
    "lbfgs": (linear, InDouble(LINEAR), torch.float64, lbfgs, 5, 3),
}
"""Learner, source, its dtype, optimiser, tasks per step, steps."""

HALF = "half of imaml"


def trained(name: str, run: Path, until: int | None = None, resume: bool = False) -> dict[str, torch.Tensor]:
    """The parameters after a run, of a learner that did not start from what the other ranks have."""
    make, source, dtype, optimizer, count, steps = RUNS[name]
    torch.manual_seed(distributed.rank() + 10 * resume)
    learner = make().to(dtype)
    run.mkdir(exist_ok=True)
    train(
        learner,
        source,
        optimizer(learner.parameters()),
        run,
        steps=until or steps,
        minutes=None,
        tasks_per_step=count,
        seed=3,
        resume=resume,
    )
    return dict(learner.state_dict())


def steps_until_a_signal(run: Path) -> int:
    """How many steps a run takes in which the last rank is asked to stop while it draws the third batch."""
    learner = linear()
    run.mkdir(exist_ok=True)
    return train(
        learner, Interrupting(), adam(learner.parameters()), run, steps=9, minutes=None, tasks_per_step=2, seed=0
    )


def results(out: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: trained(name, out / name) for name in RUNS}
    trained("imaml", out / HALF, until=5)
    found["imaml resumed"] = trained(
        "imaml", distributed.from_first(lambda: copy(out / HALF, out / "rest")), resume=True
    )
    found["steps until a signal"] = steps_until_a_signal(out / "signal")
    torch.manual_seed(0)
    found["scores"] = torch.tensor(evaluate(explicit(), SINUSOIDS, 50, 1))
    return found


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


if __name__ == "__main__":
    with distributed.started():
        alone, folder = map(Path, sys.argv[1:])
        mine = results(folder)
        half = distributed.from_first(lambda: copy(alone / HALF, folder / "other half"))
        mine["imaml begun by one process"] = trained("imaml", half, resume=True)
        everyones = [None] * distributed.world_size()
        dist.all_gather_object(everyones, mine)
        if distributed.rank() == 0:
            torch.save(everyones, folder / "results.pt")
        run = str(folder / "cli")
        app(["train", "linear", "--algorithm", "fomaml", "--steps", "2", "--out", run], standalone_mode=False)
        app(["evaluate", run, "--tasks", "50"], standalone_mode=False)
