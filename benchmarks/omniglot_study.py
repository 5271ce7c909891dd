"""What limits the accuracy on Omniglot per unit of compute: one change at a time, judged by characters held out.

5-way 1-shot. Every variant trains for the same seconds of CPU time on one thread, on the 1,028 training characters, and
is judged by tasks of the 172 validation characters, upright and turned; the test characters are not looked at. Written
to OUT/study.json after each variant; what is there is not run again. ``python -m benchmarks.omniglot_study --help``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from imaml import presets, training
from imaml.config import Algorithm, Config, InnerSolver, Share, Tasks
from imaml.files import write_atomically
from imaml.tasks import Omniglot, Task

VALIDATION_TASKS, VALIDATION_SEED = 100, 1

WHOLE = Config(Tasks.omniglot, hold_out=True, queries=1)
HEAD = replace(WHOLE, head_only=True, regularization=0.1, inner_solver=InnerSolver.lbfgs, inner_steps=15)
HEAD = replace(HEAD, linear_steps=15, learning_rate=1e-2)


def group_norm(model: nn.Module) -> None:
    """Norms that look at one drawing at a time: no query sees the others."""
    features = model.features
    for i, layer in enumerate(features):
        if isinstance(layer, nn.BatchNorm2d):
            norm = nn.GroupNorm(8, layer.num_features)
            norm.load_state_dict(layer.state_dict())
            features[i] = norm


def torch_initialisation(model: nn.Module) -> None:
    """Torch's own, of all layers; the head is learned too."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            layer.reset_parameters()
    model.head.requires_grad_(True)


def unchanged(model: nn.Module) -> None:
    """The network as it is."""


HEAD_NAME = "head only: 15 steps of L-BFGS, λ = 0.1, 15 CG steps, learning rate 0.01"
WHOLE_NAME = "whole network: 8 steps with line search, λ = 2, 5 CG steps"
VARIANTS: dict[str, tuple[Config, Callable[[nn.Module], None]]] = {
    HEAD_NAME: (HEAD, unchanged),
    "head only, learning rate 0.003": (replace(HEAD, learning_rate=3e-3), unchanged),
    "head only, λ = 2": (replace(HEAD, regularization=2.0), unchanged),
    "head only, λ = 0.005": (replace(HEAD, regularization=0.005), unchanged),
    "head only, λ learned": (replace(HEAD, learn_regularization=Share.model), unchanged),
    "head only, group norm": (HEAD, group_norm),
    "head only, torch's own initialisation": (HEAD, torch_initialisation),
    "head only, 5 steps of L-BFGS": (replace(HEAD, inner_steps=5), unchanged),
    "head only, 2 CG steps": (replace(HEAD, linear_steps=2), unchanged),
    "head only, five queries a class, not one": (replace(HEAD, queries=5), unchanged),
    "head only, 4 tasks a step, not 16": (replace(HEAD, tasks_per_step=4), unchanged),
    "first-order MAML": (Config(Tasks.omniglot, Algorithm.fomaml, hold_out=True, queries=1), unchanged),
    WHOLE_NAME: (WHOLE, unchanged),
    "whole network, the paper's 16 steps of 0.1": (replace(WHOLE, inner_steps=16, inner_stepsize=0.1), unchanged),
    "whole network, Hessian-free": (replace(WHOLE, inner_solver=InnerSolver.hessian_free), unchanged),
    "whole network, λ = 0.2": (replace(WHOLE, regularization=0.2), unchanged),
    "whole network, λ = 20": (replace(WHOLE, regularization=20.0), unchanged),
    "whole network, λ learned by layer": (replace(WHOLE, learn_regularization=Share.layer), unchanged),
    "whole network, 1 CG step": (replace(WHOLE, linear_steps=1), unchanged),
    "whole network, 20 CG steps": (replace(WHOLE, linear_steps=20), unchanged),
    "whole network, torch's own initialisation": (WHOLE, torch_initialisation),
    "whole network, group norm": (WHOLE, group_norm),
}


def trained(config: Config, change: Callable[[nn.Module], None], seconds: float, cosine: bool) -> dict[str, Any]:
    """One variant: the meta-steps it took and what it reached."""
    torch.manual_seed(config.seed)
    source, model = presets.build_source(config), presets.build_model(config)
    change(model)
    learner = presets.learner_of(model, config)
    optimizer = presets.build_optimizer(config, learner)
    start, steps, used = time.process_time(), 0, 0.0
    while used < seconds:
        for group in optimizer.param_groups if cosine else []:
            group["lr"] = config.learning_rate * (1 + math.cos(math.pi * used / seconds)) / 2
        tasks: Task = source.sample(config.tasks_per_step, "train", config.seed, steps)
        optimizer.zero_grad()
        loss = learner.meta_loss(tasks)
        if not loss.isfinite():
            return {"steps": steps, "diverged": True}
        loss.backward()
        optimizer.step()
        steps, used = steps + 1, time.process_time() - start
    return {"steps": steps, "upright": score(learner, source), "turned": score(learner, source.turned())}


def score(learner: nn.Module, source: Omniglot) -> tuple[float, float]:
    """Accuracy on validation tasks in %, with the half-width of its 95 % interval."""
    mean, half = training.evaluate(learner, source, VALIDATION_TASKS, VALIDATION_SEED, split="val")
    return 100 * mean, 100 * half


def main(
    data: Annotated[Path, typer.Option(help="Folder that holds the Omniglot files.")],
    out: Annotated[Path, typer.Option(help="Folder of study.json.")] = Path("reproduced/omniglot-study"),
    seconds: Annotated[float, typer.Option(help="CPU time for each variant.")] = 100.0,
) -> None:
    """Run what is not there yet."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "study.json"
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name, (config, change) in VARIANTS.items():
        for label, cosine in ((name, True), *([(f"{name}, constant rate", False)] if name == HEAD_NAME else [])):
            if label not in done:
                done[label] = trained(replace(config, data=str(data)).completed(), change, seconds, cosine)
                write_atomically(file, json.dumps(done, indent=1, ensure_ascii=False).encode())
            print(label, done[label], flush=True)


if __name__ == "__main__":
    typer.run(main)
