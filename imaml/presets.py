"""From the settings of a run to its tasks and its learner: what the command line offers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import nn

import implicitdiff as idf
from implicitdiff.inner_solvers import GradientDescent

from .checkpoint import CheckpointError
from .files import write_atomically
from .learners import IMAML, MAML, Learner, Reptile
from .models import MLP, ConvNet
from .tasks import LinearRegression, Omniglot, Sinusoids, TaskSource


class Tasks(str, Enum):
    """What to learn from."""

    sinusoids = "sinusoids"
    linear = "linear"
    omniglot = "omniglot"


class Algorithm(str, Enum):
    """How to learn."""

    imaml = "imaml"
    maml = "maml"
    fomaml = "fomaml"
    reptile = "reptile"


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; stored beside its checkpoints as config.json."""

    tasks: Tasks
    algorithm: Algorithm = Algorithm.imaml
    ways: int = 5
    shots: int = 1
    queries: int = 5
    data: str | None = None
    tasks_per_step: int = 16
    seed: int = 0
    learning_rate: float = 1e-3
    inner_steps: int | None = None
    inner_stepsize: float | None = None
    regularization: float = 2.0
    cg_steps: int = 5
    task_chunk: int | None = None

    def write(self, run: Path) -> None:
        """Write config.json into the run folder."""
        write_atomically(run / "config.json", json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def read(cls, run: Path) -> Config:
        """The settings of a run. Raises CheckpointError where the folder is not one of a run."""
        path = run / "config.json"
        try:
            settings = json.loads(path.read_text())
            return cls(**{**settings, "tasks": Tasks(settings["tasks"]), "algorithm": Algorithm(settings["algorithm"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{run} is not the folder of a run: {path.name} is missing or not readable."
            ) from error


def build_source(config: Config) -> TaskSource:
    """The tasks of a run. Raises FileNotFoundError and ValueError where the data is not usable."""
    if config.tasks is Tasks.sinusoids:
        return Sinusoids(shots=config.shots)
    if config.tasks is Tasks.linear:
        return LinearRegression(shots=config.shots)
    if config.data is None:
        raise ValueError("omniglot needs --data, the folder that holds the Omniglot files.")
    return Omniglot(config.data, ways=config.ways, shots=config.shots, queries=config.queries)


def build_learner(config: Config) -> Learner:
    """The model of the tasks with the algorithm of a run."""
    model: nn.Module
    if config.tasks is Tasks.omniglot:
        model, loss = ConvNet(config.ways), nn.functional.cross_entropy
    elif config.tasks is Tasks.linear:
        model, loss = nn.Linear(LinearRegression().dimension, 1), nn.functional.mse_loss
    else:
        model, loss = MLP([1, 40, 40, 1]), nn.functional.mse_loss
    chunk = config.task_chunk
    if config.algorithm is Algorithm.imaml:
        # A fixed step diverges once training has raised the curvature: a line search follows it, task by task.
        inner = GradientDescent(
            stepsize=config.inner_stepsize, max_iterations=config.inner_steps or 8, tol=1e-3, on_failure="ignore"
        )
        # Failures are not warned of at every step: they stand in the metrics.
        linear = idf.CG(rtol=1e-3, max_iterations=config.cg_steps, on_failure="ignore")
        return IMAML(
            model,
            loss,
            inner_solver=inner,
            linear_solver=linear,
            regularization=config.regularization,
            task_chunk=chunk,
        )
    steps = config.inner_steps or 5
    usual = 0.1 if config.tasks is Tasks.omniglot else 0.01
    stepsize = usual if config.inner_stepsize is None else config.inner_stepsize
    if config.algorithm is Algorithm.reptile:
        return Reptile(model, loss, steps=steps, stepsize=stepsize, task_chunk=chunk)
    first_order = config.algorithm is Algorithm.fomaml
    return MAML(model, loss, steps=steps, stepsize=stepsize, first_order=first_order, task_chunk=chunk)


def build_optimizer(config: Config, learner: Learner) -> torch.optim.Optimizer:
    """Adam on the meta-parameters, its second moments over 100 steps.

    Over 1,000, as is usual, they are too slow where meta-gradients grow from one step to the next: on Omniglot the
    accuracy then fell back twice in 1,200 steps, and took 100 steps to recover.
    """
    parameters = [p for p in learner.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, 0.99))
