"""The outer loop: tasks in, meta-gradient, optimiser step; metrics, checkpoints, resuming, and evaluation."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import implicitdiff as idf

from . import checkpoint
from .files import write_atomically
from .learners import Learner
from .tasks import Task, TaskSource

SECONDS_BETWEEN_CHECKPOINTS = 30.0
VALIDATE_EVERY = 50
VALIDATION_TASKS = 64
VALIDATION_SEED = 1_000_003
"""Validation and evaluation draw from the test split by seeds that differ."""


class DivergedError(ValueError):
    """The loss or the meta-gradient is not finite any more; the parameters are those before it happened."""


def train(
    learner: Learner,
    source: TaskSource,
    optimizer: torch.optim.Optimizer,
    run: Path,
    *,
    steps: int | None,
    minutes: float | None,
    tasks_per_step: int,
    seed: int,
    resume: bool = False,
) -> int:
    """Train until ``steps`` meta-steps or ``minutes`` of training time in all, whichever comes first.

    Writes into ``run``: metrics.jsonl (a line per step), TensorBoard events and checkpoints. Ctrl-C ends after the step
    at hand with a checkpoint. ``resume`` goes on from the checkpoint, bit for bit as if there had been no stop. Returns
    the number of steps done.

    Raises DivergedError, after a checkpoint of the last good parameters, where the loss or its gradient is not finite.
    """
    step, before = _restore(learner, optimizer, run) if resume else (0, 0.0)
    _cut_metrics(run / "metrics.jsonl", step)
    start = last_save = time.monotonic()
    elapsed = before

    def save() -> None:
        checkpoint.save(
            run,
            {
                "learner": learner.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": elapsed,
                "random_state": torch.get_rng_state(),
            },
        )

    with (
        _stop_on_signal() as stopped,
        _progress(steps, minutes) as progress,
        SummaryWriter(str(run / "tensorboard"), purge_step=step + 1) as board,
        (run / "metrics.jsonl").open("a") as metrics,
    ):
        bar = progress.add_task("training", total=1.0, numbers="")
        while not stopped and (steps is None or step < steps) and (minutes is None or elapsed < 60 * minutes):
            try:
                entry = _step(learner, optimizer, source.sample(tasks_per_step, "train", seed, step), source)
            except DivergedError:
                save()
                raise
            step += 1
            if step % VALIDATE_EVERY == 0:
                entry |= _validation(learner, source)
            elapsed = before + time.monotonic() - start
            entry = {"step": step, "seconds": round(elapsed, 3)} | entry
            metrics.write(json.dumps(entry) + "\n")
            metrics.flush()
            for name, value in entry.items():
                board.add_scalar(name, value, step)
            share = max(step / steps if steps else 0.0, elapsed / (60 * minutes) if minutes else 0.0)
            progress.update(bar, completed=min(share, 1.0), numbers=_numbers(entry))
            if time.monotonic() - last_save > SECONDS_BETWEEN_CHECKPOINTS:
                save()
                last_save = time.monotonic()
        save()
    return step


def evaluate(learner: Learner, source: TaskSource, tasks: int, seed: int) -> tuple[float, float]:
    """Mean score on ``tasks`` test tasks and the half-width of its 95 % interval (1.96 standard errors).

    The score of a task is its query accuracy, or for regression its mean query loss.
    """
    scores: list[Tensor] = []
    size = 20
    for index, first in enumerate(range(0, tasks, size)):
        batch = source.sample(min(size, tasks - first), "test", seed, index)
        with torch.no_grad():
            outputs = learner.meta_step(batch).outputs
        if source.is_classification:
            scores.append((outputs.argmax(-1) == batch.query[1]).float().mean(-1))
        else:
            scores.append(torch.vmap(learner.loss)(outputs, batch.query[1]))
    values = torch.cat(scores)
    spread = float(values.std()) if len(values) > 1 else math.nan
    return float(values.mean()), 1.96 * spread / math.sqrt(len(values))


def _step(learner: Learner, optimizer: torch.optim.Optimizer, tasks: Task, source: TaskSource) -> dict[str, Any]:
    optimizer.zero_grad()
    with idf.record() as history:
        result = learner.meta_step(tasks)
        result.loss.backward()
    gradients = [p.grad for p in learner.parameters() if p.grad is not None]
    if not (result.loss.isfinite() and all(bool(g.isfinite().all()) for g in gradients)):
        raise DivergedError(
            f"the training diverged: the loss is {float(result.loss.detach()):.3g}, or its gradient is not finite. The "
            f"last good parameters are in the checkpoint. Try a lower --learning-rate or --inner-stepsize."
        )
    optimizer.step()
    entry: dict[str, Any] = {"loss": float(result.loss.detach())}
    if source.is_classification:
        entry["accuracy"] = float((result.outputs.argmax(-1) == tasks.query[1]).float().mean())
    return entry | _solver_report(history)


def _solver_report(history: list[Any]) -> dict[str, float]:
    """What the solves of a step tell, over all its systems: shares that failed, and medians."""
    report: dict[str, float] = {}
    for kind, name in (("forward", "inner"), ("backward", "linear")):
        infos = [solve.info for solve in history if solve.kind == kind]
        if not infos:
            continue
        status = torch.cat([info.status.flatten() for info in infos])
        residual = torch.cat([info.residual_norm.flatten() for info in infos]).float()
        iterations = torch.cat([info.iterations.flatten() for info in infos]).float()
        report[f"{name}_not_converged"] = float((status != idf.Status.CONVERGED).float().mean())
        report[f"{name}_residual"] = float(residual.median())
        report[f"{name}_iterations"] = float(iterations.mean())
        if name == "linear":
            report["linear_indefinite"] = float((status == idf.Status.INDEFINITE).float().mean())
    return report


def _validation(learner: Learner, source: TaskSource) -> dict[str, float]:
    score, _ = evaluate(learner, source, VALIDATION_TASKS, VALIDATION_SEED)
    return {"validation_accuracy" if source.is_classification else "validation_loss": score}


def _restore(learner: Learner, optimizer: torch.optim.Optimizer, run: Path) -> tuple[int, float]:
    state = checkpoint.load(run)
    checkpoint.fit(run, state, learner)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random_state"])
    return state["step"], state["seconds"]


def _cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps after the checkpoint, which will be taken again."""
    if path.exists():
        lines = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        write_atomically(path, "".join(line + "\n" for line in lines).encode())


def _numbers(entry: dict[str, Any]) -> str:
    accuracy = f"  accuracy {entry['accuracy']:.3f}" if "accuracy" in entry else ""
    return f"step {entry['step']}  loss {entry['loss']:.4f}{accuracy}"


def _progress(steps: int | None, minutes: float | None) -> Progress:
    return Progress(
        TextColumn("{task.fields[numbers]}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn()
    )


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """A list that a first Ctrl-C (or SIGTERM) makes non-empty; a second one interrupts at once."""
    received: list[int] = []
    handlers: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, handlers[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.getsignal(number)
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
