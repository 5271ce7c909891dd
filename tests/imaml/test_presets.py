"""From settings to objects: every setting arrives, the usual values are filled in, and what is not taken is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import implicitdiff as idf
from imaml.checkpoint import CheckpointError
from imaml.config import Algorithm, Config, InnerSolver, LinearSolver, Outer, Share, Tasks
from imaml.learners import IMAML, MAML, Reptile
from imaml.models import ConvNet
from imaml.presets import (
    build_inner_solver,
    build_learner,
    build_linear_solver,
    build_model,
    build_optimizer,
    build_source,
)
from implicitdiff.inner_solvers import LBFGS, GradientDescent, NewtonCG, TorchOptimizer


def settings(tasks: Tasks = Tasks.linear, **given: object) -> Config:
    return Config(tasks, **given).completed()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"algorithm": Algorithm.maml, "linear_steps": 5}, "--linear-steps is a setting of imaml, and maml does not"),
        (
            {"algorithm": Algorithm.reptile, "inner_solver": InnerSolver.gd},
            "--inner-solver is a setting of imaml, maml",
        ),
        ({"algorithm": Algorithm.fomaml, "truncate": 2}, "--truncate is a setting of maml, and fomaml"),
        ({"algorithm": Algorithm.imaml, "checkpoint": True}, "--checkpoint is a setting of maml, and imaml"),
        ({"algorithm": Algorithm.maml, "regularization": 0.0}, "--regularization is a setting of imaml"),
        ({"algorithm": Algorithm.maml, "inner_solver": InnerSolver.lbfgs}, "--inner-solver lbfgs is for imaml: maml"),
        (
            {"inner_solver": InnerSolver.lbfgs, "inner_stepsize": 0.1},
            "--inner-stepsize is a setting of gd, nesterov and",
        ),
        ({"linear_solver": LinearSolver.dense, "linear_steps": 3}, "--linear-steps is a setting of cg, minres"),
        ({"ways": 5}, "--ways is a setting of omniglot, mini-imagenet, cifar-fs and folder, and linear does not"),
        ({"head_only": True}, "--head-only is a setting of omniglot"),
        ({"tasks": Tasks.folder, "hold_out": True}, "--hold-out is a setting of omniglot, and folder"),
        ({"tasks": Tasks.omniglot, "side": 28}, "--side is a setting of mini-imagenet"),
        ({"tasks": Tasks.cifar_fs, "grayscale": True}, "--grayscale is a setting of folder"),
        ({"tasks": Tasks.omniglot, "linear_solver": LinearSolver.dense}, "take it with --head-only"),
    ],
)
def test_what_the_choices_do_not_take_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**given)  # type: ignore[arg-type]


def test_the_usual_values_are_those_of_the_choices() -> None:
    omniglot, folder, maml = settings(Tasks.omniglot), settings(Tasks.folder), settings(algorithm=Algorithm.maml)
    assert (omniglot.ways, omniglot.shots, omniglot.queries, omniglot.learning_rate) == (5, 1, 5, 3e-3)
    assert (folder.shots, folder.queries, folder.side, folder.learning_rate, folder.regularization) == (
        1,
        5,
        84,
        1e-3,
        0.5,
    )
    assert (omniglot.inner_stepsize, omniglot.inner_steps, omniglot.linear_steps) == (None, 8, 5)
    assert (maml.inner_steps, maml.inner_stepsize, maml.shots, maml.ways) == (5, 0.01, 10, None)
    assert (maml.linear_solver, maml.linear_steps, maml.regularization) == (None, None, None)
    assert settings(delta=1e-3, delta_prime=1e-3).inner_steps == 200
    assert settings(linear_solver=LinearSolver.dense).linear_steps is None
    assert settings(algorithm=Algorithm.reptile).inner_solver is None


def test_a_completed_config_is_stored_and_read_back(tmp_path: Path) -> None:
    config = settings(
        Tasks.folder, data="pictures", grayscale=True, learn_regularization=Share.layer, outer=Outer.lbfgs
    )
    config.write(tmp_path)
    assert Config.read(tmp_path) == config
    assert config.completed() == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: {"tasks": "linear", "algorithm": "imaml", "cg_steps": 5}, "not from this version of imaml"),
        (lambda c: [c], "not from this version"),
        (lambda c: c | {"outer": "adagrad"}, "'adagrad' is not a valid Outer"),
    ],
)
def test_foreign_configs_are_refused(tmp_path: Path, change: object, words: str) -> None:
    settings().write(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=words):
        Config.read(tmp_path)


@pytest.mark.parametrize(
    ("solver", "kind", "expected"),
    [
        (InnerSolver.gd, GradientDescent, {"stepsize": None, "momentum": 0.0}),
        (InnerSolver.nesterov, GradientDescent, {"stepsize": 0.01, "nesterov": True}),
        (InnerSolver.adam, TorchOptimizer, {"settings": {"lr": 0.01}, "optimizer_class": torch.optim.Adam}),
        (InnerSolver.lbfgs, LBFGS, {}),
        (InnerSolver.hessian_free, NewtonCG, {}),
    ],
)
def test_inner_solvers(solver: InnerSolver, kind: type, expected: dict[str, object]) -> None:
    built = build_inner_solver(settings(inner_solver=solver, inner_steps=7))
    assert type(built) is kind
    assert built.max_iterations == 7
    assert {name: getattr(built, name) for name in expected} == expected


@pytest.mark.parametrize("solver", LinearSolver)
def test_linear_solvers(solver: LinearSolver) -> None:
    steps = None if solver is LinearSolver.dense else 7
    built = build_linear_solver(settings(linear_solver=solver, linear_steps=steps))
    assert type(built).__name__.lower() == solver.value.replace("-", "")
    assert steps in (None, getattr(built, "max_iterations", None), getattr(built, "terms", None))
    assert isinstance(built, idf.LinearSolver)


def test_algorithms() -> None:
    imaml = build_learner(settings(delta=1e-2, delta_prime=1e-3, regularization=3.0, task_chunk=2))
    assert isinstance(imaml, IMAML)
    assert imaml.task_chunk == 2
    maml = build_learner(
        settings(algorithm=Algorithm.maml, truncate=2, inner_solver=InnerSolver.nesterov, checkpoint=True)
    )
    assert isinstance(maml, MAML)
    assert maml.layer.inner_solver.nesterov  # type: ignore[union-attr]
    assert isinstance(build_learner(settings(algorithm=Algorithm.reptile)), Reptile)


@pytest.mark.parametrize("share", Share)
def test_a_learned_regularization_is_optimised(share: Share) -> None:
    learner = build_learner(settings(Tasks.omniglot, learn_regularization=share))
    more = len(list(learner.parameters())) - len(list(build_learner(settings(Tasks.omniglot)).parameters()))
    assert more >= 1
    optimised = {
        id(p) for group in build_optimizer(settings(Tasks.omniglot), learner).param_groups for p in group["params"]
    }
    assert {id(p) for p in learner.parameters() if p.requires_grad} == optimised


@pytest.mark.parametrize("algorithm", [Algorithm.imaml, Algorithm.maml, Algorithm.fomaml])
def test_the_head_alone_is_adapted_and_the_features_are_learned(algorithm: Algorithm) -> None:
    learner = build_learner(settings(Tasks.omniglot, algorithm=algorithm, head_only=True))
    assert set(learner.meta_parameters()) == {"weight", "bias"}
    features = {id(p) for p in learner.parameters() if p.requires_grad}
    assert len(features) == len(list(ConvNet(5).features.parameters()))


@pytest.mark.parametrize(
    ("outer", "kind", "momentum"),
    [
        (Outer.adam, torch.optim.Adam, None),
        (Outer.sgd, torch.optim.SGD, 0.0),
        (Outer.momentum, torch.optim.SGD, 0.9),
        (Outer.lbfgs, torch.optim.LBFGS, None),
    ],
)
def test_optimizers(outer: Outer, kind: type, momentum: float | None) -> None:
    config = settings(outer=outer, learning_rate=0.125)
    optimizer = build_optimizer(config, build_learner(config))
    assert type(optimizer) is kind
    assert optimizer.defaults["lr"] == 0.125
    assert optimizer.defaults.get("momentum") == momentum


def test_networks() -> None:
    assert isinstance(build_model(settings()), nn.Linear)
    colours = build_model(settings(Tasks.mini_imagenet, ways=3))
    assert colours(torch.rand(2, 3, 84, 84)).shape == (2, 3)
    assert build_model(settings(Tasks.folder, grayscale=True))(torch.rand(2, 1, 20, 20)).shape == (2, 5)


@pytest.mark.parametrize("tasks", [t for t in Tasks if t not in (Tasks.sinusoids, Tasks.linear)])
def test_images_need_data(tasks: Tasks) -> None:
    with pytest.raises(ValueError, match=f"{tasks.value} needs --data"):
        build_source(settings(tasks))
