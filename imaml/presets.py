"""From the settings of a run to its tasks, its learner and its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import implicitdiff as idf
from implicitdiff import inner_solvers

from .config import IMAGES, Algorithm, Config, InnerSolver, LinearSolver, Outer, Tasks
from .learners import IMAML, MAML, LearnedRegularization, Learner, Reptile
from .models import MLP, ConvNet
from .tasks import CIFARFS, ImageFolder, LinearRegression, MiniImageNet, Omniglot, Sinusoids, TaskSource, omniglot
from .tasks.decoding import Preparation


def build_source(config: Config) -> TaskSource:
    """The tasks of a run. Raises FileNotFoundError and ValueError where the data is not usable."""
    if config.tasks is Tasks.sinusoids:
        return Sinusoids(shots=config.shots)
    if config.tasks is Tasks.linear:
        return LinearRegression(shots=config.shots)
    if config.data is None:
        raise ValueError(f"{config.tasks.value} needs --data, the folder that holds its files.")
    size = {"ways": config.ways, "shots": config.shots, "queries": config.queries}
    if config.tasks is Tasks.omniglot:
        return Omniglot(config.data, **size, hold_out=config.hold_out)
    photos = size | {"side": config.side, "rotations": config.rotations}
    if config.tasks is Tasks.folder:
        return ImageFolder(config.data, **photos, grayscale=config.grayscale, split=config.split)
    return (MiniImageNet if config.tasks is Tasks.mini_imagenet else CIFARFS)(config.data, **photos)


def build_preparation(config: Config) -> Preparation:
    """From a picture to what the network of a run takes, as its tasks do it; needs no data."""
    if config.tasks is Tasks.omniglot:
        return Preparation(channels=1, side=omniglot.SIDE, inverted=True)
    return Preparation(channels=1 if config.grayscale else 3, side=config.side)


def build_learner(config: Config) -> Learner:
    """The model of the tasks with the algorithm of a run."""
    return learner_of(build_model(config), config)


def learner_of(model: nn.Module, config: Config) -> Learner:
    """A model with the algorithm of a run."""
    loss = nn.functional.cross_entropy if config.tasks in IMAGES else nn.functional.mse_loss
    steps = {"steps": config.inner_steps, "stepsize": config.inner_stepsize}
    shared: dict[str, Any] = {"task_chunk": config.task_chunk}
    if config.algorithm is Algorithm.reptile:
        return Reptile(model, loss, **steps, **shared)
    if config.head_only:
        model, shared["body"] = model.head, model.features
    if config.algorithm is Algorithm.imaml:
        strength: Any = config.regularization
        if config.learn_regularization is not None:
            strength = LearnedRegularization(model, strength, per=config.learn_regularization.value)
        return IMAML(
            model,
            loss,
            inner_solver=build_inner_solver(config),
            linear_solver=build_linear_solver(config),
            regularization=strength,
            delta=config.delta,
            delta_prime=config.delta_prime,
            **shared,
        )
    return MAML(
        model,
        loss,
        **steps,
        nesterov=config.inner_solver is InnerSolver.nesterov,
        truncate=config.truncate,
        first_order=config.algorithm is Algorithm.fomaml,
        checkpoint=config.checkpoint,
        **shared,
    )


def build_model(config: Config) -> nn.Module:
    """The network for the tasks of a run."""
    if config.tasks is Tasks.sinusoids:
        return MLP([1, 40, 40, 1])
    if config.tasks is Tasks.linear:
        return nn.Linear(LinearRegression().dimension, 1)
    if config.tasks is Tasks.omniglot:
        return ConvNet(config.ways)
    return ConvNet(config.ways, channels=1 if config.grayscale else 3, filters=32, pooling=True)


def build_inner_solver(config: Config) -> inner_solvers.InnerSolver:
    """What adapts an implicit learner."""
    # Failures are not warned of at every step: they stand in the metrics.
    limits: dict[str, Any] = {"tol": 1e-3, "max_iterations": config.inner_steps, "on_failure": "ignore"}
    stepsize = config.inner_stepsize
    if config.inner_solver is InnerSolver.nesterov:
        return inner_solvers.GradientDescent(stepsize, momentum=0.9, nesterov=True, **limits)
    if config.inner_solver is InnerSolver.adam:
        return inner_solvers.TorchOptimizer(torch.optim.Adam, lr=stepsize, **limits)
    if config.inner_solver is InnerSolver.lbfgs:
        return inner_solvers.LBFGS(**limits)
    if config.inner_solver is InnerSolver.hessian_free:
        return inner_solvers.NewtonCG(**limits)
    return inner_solvers.GradientDescent(stepsize, **limits)


def build_linear_solver(config: Config) -> idf.LinearSolver:
    """What solves for the gradient of an implicit learner."""
    limits: dict[str, Any] = {"rtol": 1e-3, "on_failure": "ignore"}
    if config.linear_solver is LinearSolver.dense:
        return idf.Dense(**limits)
    if config.linear_solver is LinearSolver.neumann:
        return idf.Neumann(config.linear_steps, **limits)
    iterative = {
        LinearSolver.cg: idf.CG,
        LinearSolver.minres: idf.MINRES,
        LinearSolver.gmres: idf.GMRES,
        LinearSolver.bicgstab: idf.BiCGStab,
        LinearSolver.normal_cg: idf.NormalCG,
        LinearSolver.auto: idf.Auto,
    }
    return iterative[config.linear_solver](max_iterations=config.linear_steps, **limits)


def build_optimizer(config: Config, learner: Learner) -> torch.optim.Optimizer:
    """The optimizer of the meta-parameters.

    Adam's second moments are over 100 steps. Over 1,000, as is usual, they are too slow where meta-gradients grow from
    one step to the next: on Omniglot the accuracy then fell back twice in 1,200 steps, and took 100 steps to recover.
    L-BFGS searches along its direction on the tasks of the step.
    """
    parameters, rate = [p for p in learner.parameters() if p.requires_grad], config.learning_rate
    if config.outer is Outer.lbfgs:
        return torch.optim.LBFGS(parameters, lr=rate, max_iter=4, history_size=10, line_search_fn="strong_wolfe")
    if config.outer is Outer.adam:
        return torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99))
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9 if config.outer is Outer.momentum else 0.0)


def build_schedule(config: Config) -> Callable[[int], float] | None:
    """The learning rate after so many meta-steps, half a cosine down to 0; None where it is constant."""
    rate, total = config.learning_rate, config.cosine_steps
    if total is None:
        return None
    return lambda step: rate * (1 + math.cos(math.pi * min(step / total, 1.0))) / 2
