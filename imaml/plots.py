"""Pictures of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .learners import Learner
from .tasks import Omniglot, Task, TaskSource

SMOOTHING = 25
"""Steps over which the curves are averaged."""

RIGHT, WRONG = "tab:green", "tab:red"


def learning_curve(run: Path) -> Path:
    """Loss or accuracy against training time, and what the solvers reported; returns the picture's path.

    Raises FileNotFoundError where the run has no metrics yet.
    """
    entries = _metrics(run)
    # What is unrolled takes its steps whatever they reach, and has no linear solves.
    panels = [
        panel
        for panel in (
            {
                "inner_not_converged": "inner solves above their tolerance",
                "linear_not_converged": "linear solves above their tolerance",
                "linear_indefinite": "linear solves that met negative curvature",
                "delta_missed": "inner solves that missed δ",
                "delta_prime_missed": "linear solves that missed δ′",
            },
            {"delta": "reached δ, ‖φ − φ*‖", "delta_prime": "reached δ′, error of the meta-gradient"},
        )
        if panel.keys() & entries[0].keys() - {"inner_not_converged"}
    ]
    figure, axes = plt.subplots(1 + len(panels), 1, figsize=(7, 3 + 2.2 * len(panels)), sharex=True, squeeze=False)
    _draw_score(axes[0, 0], entries)
    for axis, panel in zip(axes[1:, 0], panels, strict=True):
        # The few solves that fail would hide in a mean what the others reach.
        average = median if "delta" in panel else fmean
        for name, label in panel.items():
            if name in entries[0]:
                axis.plot(*_curve(entries, name, average), label=label)
        if "delta" in panel:
            axis.set_yscale("log")
            axis.set_ylabel(f"median of {SMOOTHING} steps")
        else:
            axis.set_ylim(-0.02, 1.02)
            axis.set_ylabel("share of tasks")
        _finish(axis)
    axes[-1, 0].set_xlabel("minutes of training")
    return _save(figure, run / "learning_curve.png")


def regularization_history(run: Path) -> Path | None:
    """The learned λ against training time, one line each; None where the run learns none."""
    entries = _metrics(run)
    names = [name for name in entries[-1] if name.startswith("lambda/")]
    if not names:
        return None
    figure, axis = plt.subplots(figsize=(8 if len(names) > 1 else 7, 4))
    colours = plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(names)).tolist())
    for name, colour in zip(names, colours, strict=True):
        style = "--" if name.endswith("bias") else "-"
        axis.plot(*_curve(entries, name), style, color=colour, label=name.removeprefix("lambda/"))
    axis.set_yscale("log")
    axis.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(1, 0.4)))
    axis.set_xlabel("minutes of training")
    axis.set_ylabel("λ")
    axis.grid(alpha=0.3)
    if len(names) > 1:
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), title="input first, head last")
    return _save(figure, run / "regularization.png")


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
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4)
    return _save(figure, run / "adaptation.png")


def episode(learner: Learner, source: TaskSource, run: Path, seed: int) -> Path:
    """One test task: a row for each class, its support images, then its queries by what they were taken for."""
    task = source.sample(1, "test", seed, 0)
    guesses = _probabilities(learner, task)[0].argmax(-1)
    (support, labels), (queries, truth) = ((part[0][0], part[1][0]) for part in task)
    rows = [(support[labels == c], queries[truth == c], guesses[truth == c]) for c in range(int(labels.max()) + 1)]
    shots, number = min(len(rows[0][0]), 5), min(len(rows[0][1]), 10)
    widths = [1.0] * shots + [0.35] + [1.0] * number
    figure, axes = plt.subplots(
        len(rows),
        len(widths),
        figsize=(0.8 * sum(widths) + 0.6, 0.95 * len(rows) + 0.7),
        width_ratios=widths,
        squeeze=False,
    )
    for c, (line, (supports, asked, guessed)) in enumerate(zip(axes, rows, strict=True)):
        line[shots].axis("off")
        for axis, image in zip(line[:shots], supports[:shots], strict=True):
            _show(axis, image, source, "black")
        line[0].set_ylabel(f"{c + 1}", rotation=0, labelpad=10, va="center", fontsize=12)
        for axis, image, guess in zip(line[shots + 1 :], asked[:number], guessed[:number].tolist(), strict=True):
            _show(axis, image, source, RIGHT if guess == c else WRONG)
            if guess != c:
                axis.set_title(f"taken for {guess + 1}", fontsize=8, color=WRONG, pad=2)
    accuracy = float((guesses == truth).float().mean())
    axes[0, 0].annotate("support", (0, 1.25), xycoords="axes fraction", fontsize=11)
    axes[0, shots + 1].annotate(
        f"queries: {100 * accuracy:.0f} % of {len(truth)} right", (0, 1.25), xycoords="axes fraction", fontsize=11
    )
    return _save(figure, run / "episode.png", tight=False)


def mistakes(learner: Learner, source: TaskSource, run: Path, seed: int, tasks: int) -> Path | None:
    """The twelve surest wrong answers on test tasks, beside what they were taken for and what they are.

    Labels are drawn anew for each task, so that a table of labels would say nothing: the images do. None where there
    is no mistake.
    """
    found: dict[bytes, tuple[float, Tensor, Tensor, Tensor]] = {}  # each picture once
    for index in range(0, tasks, 10):
        batch = source.sample(min(10, tasks - index), "test", seed, index)
        probabilities = _probabilities(learner, batch)
        sureness, guesses = probabilities.max(-1)
        for t, q in (guesses != batch.query[1]).nonzero().tolist():
            example = [batch.support[0][t][batch.support[1][t] == c][0] for c in (guesses[t, q], batch.query[1][t, q])]
            query, sure = batch.query[0][t, q], float(sureness[t, q])
            key = query.numpy().tobytes()
            if key not in found or found[key][0] < sure:
                found[key] = sure, query, *example
    if not found:
        return None
    shown = sorted(found.values(), key=lambda mistake: -mistake[0])[:12]
    rows = -(-len(shown) // 3)
    widths = ([1.0, 1.0, 1.0, 0.3] * 3)[:-1]
    figure, axes = plt.subplots(rows, len(widths), figsize=(9, 1.15 * rows + 0.6), width_ratios=widths, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (sureness, *images) in enumerate(shown):
        line = axes[i // 3, 4 * (i % 3) :]
        for axis, image, colour in zip(line, images, ("black", WRONG, RIGHT), strict=False):
            axis.axis("on")
            _show(axis, image, source, colour)
        line[1].set_title(f"{100 * sureness:.0f} % sure", fontsize=8, color=WRONG, pad=2)
        if i < 3:
            for axis, title in zip(line, ("query", "taken for", "is"), strict=False):
                axis.annotate(title, (0.5, 1.33), xycoords="axes fraction", ha="center", fontsize=11)
    return _save(figure, run / "mistakes.png", tight=False)


def _draw_score(axis: plt.Axes, entries: list[dict[str, Any]]) -> None:
    score = "accuracy" if "accuracy" in entries[0] else "loss"
    axis.plot(*_curve(entries, score), label=f"training tasks (mean of {SMOOTHING} steps)")
    for split in ("validation", "test"):
        judged = [entry for entry in entries if f"{split}_{score}" in entry]
        if judged:
            values = [entry[f"{split}_{score}"] for entry in judged]
            axis.plot(_minutes(judged), values, "o-", markersize=3, label=f"{split} tasks")
    axis.set_ylabel(f"query {score}")
    losses = [entry["loss"] for entry in entries]
    if score == "loss" and max(losses) > 10 * min(losses) > 0:
        axis.set_yscale("log")
    _finish(axis)


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not entries:
        raise FileNotFoundError(f"{path} is missing or empty: train for at least one step first.")
    return entries


def _curve(
    entries: list[dict[str, Any]], name: str, average: Callable[[list[float]], float] = fmean
) -> tuple[list[float], list[float]]:
    values = [entry[name] for entry in entries]
    return _minutes(entries), [average(values[max(0, i - SMOOTHING + 1) : i + 1]) for i in range(len(values))]


def _minutes(entries: list[dict[str, Any]]) -> list[float]:
    return [entry["seconds"] / 60 for entry in entries]


def _probabilities(learner: Learner, tasks: Task) -> Tensor:
    with torch.no_grad():
        return learner.meta_step(tasks).outputs.softmax(-1)


def _finish(axis: plt.Axes) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _show(axis: plt.Axes, image: Tensor, source: TaskSource, colour: str) -> None:
    """An image (channels, side, side) in a frame; the ink of Omniglot, which is 1, is black on white paper."""
    pixels = (1 - image if isinstance(source, Omniglot) else image).movedim(0, -1)
    axis.imshow(pixels.expand(*pixels.shape[:2], 3).clamp(0, 1).numpy())
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_color(colour)
        side.set_linewidth(2 if colour != "black" else 0.8)


def _save(figure: plt.Figure, path: Path, tight: bool = True) -> Path:
    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
