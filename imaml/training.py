"""The outer loop: tasks in, meta-gradient, optimiser step; metrics, checkpoints, resuming, and evaluation.

Under torchrun every rank runs this same code: each takes its share of a step's tasks, one sum over the ranks gives all
of them the same meta-gradient, and rank 0 writes the files.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.tensorboard import SummaryWriter

import implicitdiff as idf

from . import checkpoint, distributed
from .files import remove_leftovers, write_atomically
from .learners import Learner
from .tasks import Task, TaskSource
from .tasks.task import Split

SECONDS_BETWEEN_CHECKPOINTS = 30.0
VALIDATE_EVERY = 50
VALIDATION_TASKS = 64
VALIDATION_SEED = 1_000_003
"""Validation and evaluation draw by seeds that differ."""
EVALUATION_BATCH = 20


class DivergedError(ValueError):
    """The loss or the meta-gradient is not finite any more; the parameters are the last at which both were.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from imaml import MAML
    >>> from imaml.models import MLP
    >>> from imaml.tasks import Sinusoids
    >>> learner = MAML(MLP([1, 8, 1]), torch.nn.functional.mse_loss, steps=1, stepsize=0.01)
    >>> optimizer = torch.optim.SGD(learner.parameters(), lr=1e30)
    >>> settings = {"steps": 3, "minutes": None, "tasks_per_step": 4, "seed": 0}
    >>> with tempfile.TemporaryDirectory() as run:
    ...     try:
    ...         train(learner, Sinusoids(), optimizer, Path(run), **settings)
    ...     except DivergedError as error:
    ...         print(error)
    step 1 ...
    the training diverged: the loss is ... The last good parameters are in the checkpoint. ...
    >>> all(bool(p.isfinite().all()) for p in learner.parameters())
    True
    """

    step_began_well = False
    """Whether they were at the start of the step: an optimiser that evaluates several points may meet a bad one."""


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
    learning_rate: Callable[[int], float] | None = None,
) -> int:
    """Train until ``steps`` meta-steps or ``minutes`` of training time in all, whichever comes first (Algorithm 1).

    Writes into ``run``: metrics.jsonl (a line per step), TensorBoard events and checkpoints. Ctrl-C ends after the step
    at hand with a checkpoint. ``resume`` goes on from the checkpoint, bit for bit as if there had been no stop; with
    another number of processes, up to rounding. ``learning_rate`` is a schedule, from the number of steps done; None
    keeps the optimizer's. Returns the number of steps done.

    * ``learner``: an :class:`~imaml.Learner`; its device is where the tasks go;
    * ``source``: a :class:`~imaml.tasks.TaskSource`, asked for ``tasks_per_step`` tasks of the split train a step, by
      ``seed`` and the number of steps done;
    * ``run``: a folder; ``steps``, ``minutes``: None for no limit of that kind.

    Raises DivergedError where the loss or its gradient is not finite, and :class:`imaml.distributed.LostRankError`
    where another process has died; both after a checkpoint of the last good step. Raises
    ``imaml.checkpoint.CheckpointError`` where ``resume`` finds none that fits.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from imaml import MAML
    >>> from imaml.models import MLP
    >>> from imaml.tasks import Sinusoids
    >>> learner = MAML(MLP([1, 8, 1]), torch.nn.functional.mse_loss, steps=1, stepsize=0.01)
    >>> optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    >>> with tempfile.TemporaryDirectory() as run:
    ...     train(learner, Sinusoids(), optimizer, Path(run), steps=3, minutes=None, tasks_per_step=4, seed=0)
    ...     sorted(path.name for path in Path(run).glob("*.*"))
    step 3 ...
    3
    ['checkpoint.previous.pt', 'checkpoint.pt', 'metrics.jsonl']
    """

    def begin() -> dict[str, Any]:
        """The state that every rank starts from, as rank 0 has it."""
        state = checkpoint.load(run) if resume else _state(learner, optimizer, step=0, seconds=0.0)
        remove_leftovers(run)
        _cut_metrics(run / "metrics.jsonl", state["step"])
        if not resume:
            checkpoint.save(run, state)
        return state

    before = last = saved = distributed.from_first(begin)
    _restore(last, learner, optimizer, run)
    writes = distributed.rank() == 0
    saved_at = time.monotonic()
    began = saved_at - last["seconds"]

    with _stop_on_signal() as received, _log(run, last["step"], steps, minutes) as log:

        def asked_to_stop() -> bool:
            """By a signal to any rank, or by the clock of rank 0."""
            late = minutes is not None and time.monotonic() - began >= 60 * minutes
            return bool(received) or (late and distributed.rank() == 0)

        try:
            stop = minutes is not None and last["seconds"] >= 60 * minutes
            while not stop and (steps is None or last["step"] < steps):
                if learning_rate is not None:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(last["step"])
                tasks = source.sample(tasks_per_step, "train", seed, last["step"])
                entry, stop = _step(learner, optimizer, tasks, source, asked_to_stop)
                step = last["step"] + 1
                if step % VALIDATE_EVERY == 0:
                    entry |= _validation(learner, source)
                before, last = last, _state(learner, optimizer, step, time.monotonic() - began)
                log({"step": step, "seconds": round(last["seconds"], 3)} | entry)
                if writes and time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
                    checkpoint.save(run, last)
                    saved, saved_at = last, time.monotonic()
        except DivergedError as error:
            last = last if error.step_began_well else before
            _restore(last, learner, optimizer, run)
            raise
        except distributed.LostRankError:
            writes = True  # whoever is left
            _restore(last, learner, optimizer, run)
            raise
        finally:
            if writes and last is not saved:
                checkpoint.save(run, last)
    distributed.from_first(lambda: None)  # no rank goes on, to read the checkpoint perhaps, before it is there
    return last["step"]


def evaluate(learner: Learner, source: TaskSource, tasks: int, seed: int, split: Split = "test") -> tuple[float, float]:
    """Mean score on ``tasks`` tasks of a split and the half-width of its 95 % interval (1.96 standard errors).

    The score of a task is its query accuracy, in [0, 1], or for regression its mean query loss. Both are numbers, the
    second NaN for one task. Raises ValueError for a split that the source does not have.

    >>> from imaml import MAML
    >>> from imaml.models import MLP
    >>> from imaml.tasks import Sinusoids
    >>> learner = MAML(MLP([1, 8, 1]), torch.nn.functional.mse_loss, steps=1, stepsize=0.01)
    >>> loss, half_width = evaluate(learner, Sinusoids(), tasks=20, seed=0)
    >>> loss > half_width > 0
    True
    """
    scores = _scores(learner, source, split, tasks, seed)
    spread = float(scores.std()) if tasks > 1 else math.nan
    return float(scores.mean()), 1.96 * spread / math.sqrt(tasks)


def _step(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    tasks: Task,
    source: TaskSource,
    asked_to_stop: Callable[[], bool],
) -> tuple[dict[str, float], bool]:
    """One meta-step; what it tells of the parameters that it started from, and whether it is to be the last."""
    part, weight = distributed.share(len(tasks.query[0]))
    tasks = _on_device_of(learner, tree_map(lambda t: t[part], tasks))
    entries: list[dict[str, float]] = []
    stops: list[bool] = []

    def meta_gradient() -> Tensor:
        optimizer.zero_grad()
        with idf.record() as history:
            result = learner.meta_step(tasks)
            result.loss.backward()
        entry = {"loss": float(result.loss.detach())}
        if source.is_classification:
            entry["accuracy"] = float((result.outputs.argmax(-1) == tasks.query[1]).float().mean())
        entry |= _solver_report(history) | learner.report()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        numbers = torch.tensor(list(entry.values()), dtype=torch.float64)
        stops.append(distributed.sum_([*gradients, numbers], weight, asked_to_stop()))
        entry = dict(zip(entry, numbers.tolist(), strict=True))
        if not (math.isfinite(entry["loss"]) and all(bool(g.isfinite().all()) for g in gradients)):
            error = DivergedError(
                f"the training diverged: the loss is {entry['loss']:.3g}, or its gradient is not finite. The "
                f"last good parameters are in the checkpoint. Try a lower --learning-rate or --inner-stepsize."
            )
            error.step_began_well = bool(entries)
            raise error
        entries.append(entry)
        return numbers[0]

    strengths = _learned_strengths(learner)
    optimizer.step(meta_gradient)
    return entries[0] | strengths, any(stops)


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


def _learned_strengths(learner: Learner) -> dict[str, float]:
    """The means of λ, where it is learned, by what of the model they belong to."""
    regularization = getattr(learner, "regularization", None)
    strengths = regularization.strengths() if hasattr(regularization, "strengths") else {}
    return {f"lambda/{name}": float(value.mean()) for name, value in strengths.items()}


def _validation(learner: Learner, source: TaskSource) -> dict[str, float]:
    """The score on tasks to choose settings by where the source has some, else on test tasks; the name says which."""
    split: Split = "val" if "val" in source.splits else "test"
    name = ("validation" if split == "val" else "test") + ("_accuracy" if source.is_classification else "_loss")
    return {name: float(_scores(learner, source, split, VALIDATION_TASKS, VALIDATION_SEED).mean())}


def _scores(learner: Learner, source: TaskSource, split: Split, tasks: int, seed: int) -> Tensor:
    """The score of each task, (tasks,); the ranks take the batches in turn."""
    scores = torch.zeros(tasks, dtype=torch.float64)
    firsts = list(enumerate(range(0, tasks, EVALUATION_BATCH)))
    for index, first in firsts[distributed.rank() :: distributed.world_size()]:
        mine = scores[first : first + EVALUATION_BATCH]
        batch = _on_device_of(learner, source.sample(len(mine), split, seed, index))
        with torch.no_grad():
            outputs = learner.meta_step(batch).outputs
        if source.is_classification:
            mine[:] = (outputs.argmax(-1) == batch.query[1]).float().mean(-1)
        else:
            mine[:] = torch.vmap(learner.loss)(outputs, batch.query[1])
    distributed.sum_([scores])
    return scores


def _on_device_of(learner: Learner, tasks: Task) -> Task:
    device = next((p.device for p in learner.parameters()), None)
    return tree_map(lambda t: t.to(device), tasks)


def _state(learner: Learner, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> dict[str, Any]:
    """All that training goes on from, as a copy."""
    state = {
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
        "random_state": torch.get_rng_state(),
    }
    return tree_map_only(Tensor, torch.clone, state)


def _restore(state: dict[str, Any], learner: Learner, optimizer: torch.optim.Optimizer, run: Path) -> None:
    checkpoint.fit(run, state, learner, optimizer)
    torch.set_rng_state(state["random_state"])


def _cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps after the checkpoint, which will be taken again, and what a crash left half-written."""
    if path.exists():
        lines = path.read_text(errors="replace").splitlines()
        kept = [line for line in lines if 1 <= _step_of(line) <= step]
        write_atomically(path, "".join(line + "\n" for line in kept).encode())


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


@contextmanager
def _log(run: Path, step: int, steps: int | None, minutes: float | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Takes the entry of each step to metrics.jsonl, TensorBoard and the progress bar; on rank 0 only."""
    if distributed.rank() > 0:
        yield lambda entry: None
        return
    with (
        Progress(
            TextColumn("{task.fields[numbers]}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f}%"),
            TimeRemainingColumn(),
        ) as progress,
        SummaryWriter(str(run / "tensorboard"), purge_step=step + 1) as board,
        (run / "metrics.jsonl").open("a") as metrics,
    ):
        bar = progress.add_task("training", total=1.0, numbers="")

        def log(entry: dict[str, Any]) -> None:
            metrics.write(json.dumps(entry) + "\n")
            metrics.flush()
            for name, value in entry.items():
                board.add_scalar(name, value, entry["step"])
            shares = (entry["step"] / steps if steps else 0.0, entry["seconds"] / (60 * minutes) if minutes else 0.0)
            progress.update(bar, completed=min(max(shares), 1.0), numbers=_numbers(entry))

        yield log


def _numbers(entry: dict[str, Any]) -> str:
    accuracy = f"  accuracy {entry['accuracy']:.3f}" if "accuracy" in entry else ""
    return f"step {entry['step']}  loss {entry['loss']:.4f}{accuracy}"


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
    except distributed.LostRankError:
        # torchrun ends the ranks that are left by this signal, but the error is still to be told.
        handlers[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
