"""Pictures of a run."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .learners import Learner
from .tasks import TaskSource

SMOOTHING = 25
"""Steps over which the curves are averaged."""


def learning_curve(run: Path) -> Path:
    """Loss or accuracy against training time, and what the solvers reported; returns the picture's path.

    Raises FileNotFoundError where the run has no metrics yet.
    """
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if not entries:
        raise FileNotFoundError(f"{run / 'metrics.jsonl'} is empty: train for at least one step first.")
    score = "accuracy" if "accuracy" in entries[0] else "loss"
    reports = {
        "inner_not_converged": "inner solves above their tolerance",
        "linear_not_converged": "linear solves above their tolerance",
        "linear_indefinite": "linear solves that met negative curvature",
    }
    shown = {name: label for name, label in reports.items() if name in entries[0]}
    figure, axes = plt.subplots(1 + bool(shown), 1, figsize=(7, 3 + 2.2 * bool(shown)), sharex=True, squeeze=False)
    top, minutes = axes[0, 0], [e["seconds"] / 60 for e in entries]
    top.plot(minutes, _smooth([e[score] for e in entries]), label=f"training tasks (mean of {SMOOTHING} steps)")
    validated = [e for e in entries if f"validation_{score}" in e]
    if validated:
        top.plot(
            [e["seconds"] / 60 for e in validated],
            [e[f"validation_{score}"] for e in validated],
            "o-",
            markersize=3,
            label="test tasks",
        )
    top.set_ylabel(f"query {score}")
    top.grid(alpha=0.3)
    top.legend()
    if shown:
        bottom = axes[1, 0]
        for name, label in shown.items():
            bottom.plot(minutes, _smooth([e[name] for e in entries]), label=label)
        bottom.set_ylabel("share of tasks")
        bottom.set_ylim(-0.02, 1.02)
        bottom.grid(alpha=0.3)
        bottom.legend(fontsize="small")
    axes[-1, 0].set_xlabel("minutes of training")
    return _save(figure, run / "learning_curve.png")


def sinusoid_adaptation(learner: Learner, source: TaskSource, run: Path, seed: int) -> Path:
    """The model on three unseen sinusoids, before and after adapting to the support points; returns the path."""
    batch = source.sample(3, "test", seed, 0)
    grid = torch.linspace(-5, 5, 200).unsqueeze(-1)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
    for i, axis in enumerate(axes):
        support, query = ((part[0][i], part[1][i]) for part in batch)
        adapted = learner.adapt(support)
        with torch.no_grad():
            before, after = (learner.predict(p, grid) for p in (learner.meta_parameters(), adapted))
        order = query[0].flatten().argsort()
        axis.plot(query[0].flatten()[order], query[1].flatten()[order], "k.", markersize=4, label="query points")
        axis.plot(grid, before, "--", color="tab:gray", label="before adaptation")
        axis.plot(grid, after, color="tab:blue", label="after adaptation")
        axis.plot(*support, "o", color="tab:orange", label="support points")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return _save(figure, run / "adaptation.png")


def _smooth(values: list[float]) -> list[float]:
    return [sum(values[max(0, i - SMOOTHING + 1) : i + 1]) / min(i + 1, SMOOTHING) for i in range(len(values))]


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
