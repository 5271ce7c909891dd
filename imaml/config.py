"""The settings of a run: what the command line offers, and which choices take which setting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError
from .files import write_atomically


class Tasks(str, Enum):
    """What to learn from."""

    sinusoids = "sinusoids"
    linear = "linear"
    omniglot = "omniglot"
    mini_imagenet = "mini-imagenet"
    cifar_fs = "cifar-fs"
    folder = "folder"


class Algorithm(str, Enum):
    """How to learn."""

    imaml = "imaml"
    maml = "maml"
    fomaml = "fomaml"
    reptile = "reptile"


class InnerSolver(str, Enum):
    """What adapts to a task."""

    gd = "gd"
    nesterov = "nesterov"
    adam = "adam"
    lbfgs = "lbfgs"
    hessian_free = "hessian-free"


class LinearSolver(str, Enum):
    """What solves the linear system of the implicit gradient."""

    cg = "cg"
    minres = "minres"
    gmres = "gmres"
    bicgstab = "bicgstab"
    normal_cg = "normal-cg"
    neumann = "neumann"
    dense = "dense"
    auto = "auto"


class Share(str, Enum):
    """What shares one learned λ."""

    model = "model"
    layer = "layer"
    parameter = "parameter"


class Outer(str, Enum):
    """What optimises the meta-parameters."""

    adam = "adam"
    sgd = "sgd"
    momentum = "momentum"
    lbfgs = "lbfgs"


IMAGES = frozenset((Tasks.omniglot, Tasks.mini_imagenet, Tasks.cifar_fs, Tasks.folder))
PHOTOS = IMAGES - {Tasks.omniglot}
IMPLICIT = frozenset((Algorithm.imaml,))
UNROLLED = frozenset((Algorithm.maml,))
ALL_BUT_REPTILE = frozenset(Algorithm) - {Algorithm.reptile}

TASKS_OF: Mapping[str, frozenset[Enum]] = {
    **dict.fromkeys(("data", "ways", "queries", "head_only"), IMAGES),
    "hold_out": frozenset((Tasks.omniglot,)),
    "side": PHOTOS,
    "rotations": PHOTOS,
    **dict.fromkeys(("split", "grayscale"), frozenset((Tasks.folder,))),
}
ALGORITHMS_OF: Mapping[str, frozenset[Enum]] = {
    **dict.fromkeys(("linear_solver", "linear_steps", "delta", "delta_prime"), IMPLICIT),
    **dict.fromkeys(("regularization", "learn_regularization"), IMPLICIT),
    **dict.fromkeys(("truncate", "checkpoint"), UNROLLED),
    **dict.fromkeys(("inner_solver", "head_only"), ALL_BUT_REPTILE),
}
INNER_SOLVERS_OF: Mapping[str, frozenset[Enum]] = {
    "inner_stepsize": frozenset((InnerSolver.gd, InnerSolver.nesterov, InnerSolver.adam)),
}
LINEAR_SOLVERS_OF: Mapping[str, frozenset[Enum]] = {
    "linear_steps": frozenset(LinearSolver) - {LinearSolver.dense},
}
"""The settings that not every choice takes, and which do."""


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; stored beside its checkpoints as config.json.

    None means the usual value, which :meth:`completed` puts in, or that the setting is not one of these tasks or of
    this algorithm. The values are those of the options of ``imaml train``. A setting that does not go with
    the others raises ValueError in :meth:`completed`, and :meth:`read` raises ``CheckpointError``.

    >>> config = Config(Tasks.sinusoids, Algorithm.imaml, delta=1e-2).completed()
    >>> config.shots, config.inner_steps, config.regularization
    (10, 200, 2.0)
    >>> Config(Tasks.sinusoids, ways=5).completed()
    Traceback (most recent call last):
    ...
    ValueError: --ways is a setting of ..., and sinusoids does not take it.
    """

    tasks: Tasks
    algorithm: Algorithm = Algorithm.imaml
    data: str | None = None
    split: str | None = None
    ways: int | None = None
    shots: int | None = None
    queries: int | None = None
    side: int | None = None
    grayscale: bool = False
    rotations: bool = False
    hold_out: bool = False
    head_only: bool = False
    inner_solver: InnerSolver | None = None
    inner_steps: int | None = None
    inner_stepsize: float | None = None
    delta: float | None = None
    linear_solver: LinearSolver | None = None
    linear_steps: int | None = None
    delta_prime: float | None = None
    regularization: float | None = None
    learn_regularization: Share | None = None
    truncate: int | None = None
    checkpoint: bool = False
    outer: Outer = Outer.adam
    learning_rate: float | None = None
    cosine_steps: int | None = None
    tasks_per_step: int = 16
    task_chunk: int | None = None
    seed: int = 0

    def write(self, run: Path) -> None:
        """Write config.json into the run folder."""
        write_atomically(run / "config.json", json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def read(cls, run: Path) -> Config:
        """The settings of a run. Raises CheckpointError where the folder is not one of a run."""
        path = run / "config.json"
        try:
            settings = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{run} is not the folder of a run: {path.name} is missing or not readable."
            ) from error
        names = {field.name for field in fields(cls)}
        if not isinstance(settings, dict) or settings.keys() != names:
            raise CheckpointError(f"{path} is not from this version of imaml: train anew, into another folder.")
        try:
            chosen = {name: kind(settings[name]) for name, kind in CHOICES.items() if settings[name] is not None}
        except ValueError as error:
            raise CheckpointError(f"{path} holds a setting that there is not: {error}.") from error
        return cls(**{**settings, **chosen})

    def completed(self) -> Config:
        """With the usual values in the place of None.

        Raises ValueError for a setting that its tasks, its algorithm or its solvers do not take.
        """
        self._check_inner_solver()
        for choice, table in self._choices():
            for name, takers in table.items():
                if choice not in takers and _is_set(getattr(self, name)):
                    raise ValueError(
                        f"{option(name)} is a setting of {_listed(takers)}, and {choice.value} does not take it."
                    )
        inner = replace(self, **self._missing({"inner_solver": InnerSolver.gd, "linear_solver": LinearSolver.cg}))
        completed = replace(inner, **inner._missing(inner._usual()))
        if completed.linear_solver is LinearSolver.dense and self.tasks in IMAGES and not self.head_only:
            raise ValueError("--linear-solver dense forms a matrix as large as the network: take it with --head-only.")
        return completed

    def _check_inner_solver(self) -> None:
        if self.algorithm in (Algorithm.maml, Algorithm.fomaml) and self.inner_solver not in (
            None,
            InnerSolver.gd,
            InnerSolver.nesterov,
        ):
            raise ValueError(
                f"--inner-solver {self.inner_solver.value} is for imaml: {self.algorithm.value} differentiates through "
                f"its steps, which are those of gd or nesterov."
            )

    def _choices(self) -> list[tuple[Enum, Mapping[str, frozenset[Enum]]]]:
        return [
            (self.tasks, TASKS_OF),
            (self.algorithm, ALGORITHMS_OF),
            (self.inner_solver or InnerSolver.gd, INNER_SOLVERS_OF),
            (self.linear_solver or LinearSolver.cg, LINEAR_SOLVERS_OF),
        ]

    def _missing(self, usual: dict[str, Any]) -> dict[str, Any]:
        """Those of the usual values that are not set, and that these choices take."""
        return {
            name: value
            for name, value in usual.items()
            if getattr(self, name) is None
            and all(choice in table.get(name, (choice,)) for choice, table in self._choices())
        }

    def _usual(self) -> dict[str, Any]:
        images, implicit = self.tasks in IMAGES, self.algorithm is Algorithm.imaml
        # A fixed step diverges once training has raised the curvature: a line search follows it, task by task.
        searches = implicit and self.inner_solver is InnerSolver.gd
        plain = self.inner_solver in (None, InnerSolver.gd)
        stepsize = None if searches else 0.1 if images and plain else 0.01
        steps = {InnerSolver.gd: 8, InnerSolver.lbfgs: 8, InnerSolver.hessian_free: 4}.get(self.inner_solver, 16)
        adam = 3e-3 if self.tasks is Tasks.omniglot else 1e-3
        return {
            "ways": 5,
            "shots": 1 if images else 10,
            "queries": 15 if self.tasks in (Tasks.mini_imagenet, Tasks.cifar_fs) else 5,
            "side": 32 if self.tasks is Tasks.cifar_fs else 84,
            "inner_steps": 5 if not implicit else steps if self.delta is None else 200,
            "inner_stepsize": stepsize,
            "linear_steps": 5 if self.delta_prime is None else 100,
            "regularization": 0.5 if self.tasks in PHOTOS else 2.0,
            "learning_rate": {Outer.adam: adam, Outer.sgd: 0.1, Outer.momentum: 0.01, Outer.lbfgs: 1.0}[self.outer],
        }


CHOICES = {
    "tasks": Tasks,
    "algorithm": Algorithm,
    "inner_solver": InnerSolver,
    "linear_solver": LinearSolver,
    "learn_regularization": Share,
    "outer": Outer,
}


def option(name: str) -> str:
    """The option of the command line for a setting."""
    return f"--{name.replace('_', '-')}"


def _is_set(value: object) -> bool:
    return value is not None and value is not False


def _listed(choices: frozenset[Enum]) -> str:
    names = [choice.value for choice in type(next(iter(choices))) if choice in choices]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
