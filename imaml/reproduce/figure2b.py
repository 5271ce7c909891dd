"""Figure 2b: time and peak memory of one meta-gradient against the number of inner steps.

The Omniglot network on a 20-way 5-shot task with 5 query drawings a class, one task at a time; images are random, as
neither depends on what is in them. iMAML takes 5 CG steps. Algorithms are timed in turns, so that a busy
machine slows all of them alike, and their medians are compared.

Each number of inner steps is written to figure2b.json when it is done, and not measured again there.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import implicitdiff as idf
from imaml.files import write_atomically
from imaml.learners import IMAML, MAML, Learner
from imaml.models import ConvNet
from imaml.tasks import Task
from implicitdiff.inner_solvers import GradientDescent

from .claims import Claim, check
from .fits import Fit, line
from .measure import peak_memory
from .pictures import save, subplots

WAYS, CG_STEPS, STEPSIZE = 20, 5, 0.01
REGULARIZATION = 10.0
"""Large enough that random images show CG no negative curvature, at which it would stop early."""
MIB = 2**20


class Size(NamedTuple):
    """Of the comparison."""

    inner_steps: list[int]
    shots: int
    queries: int
    filters: int
    repeats: int


QUICK = Size([1, 2, 4, 8], shots=1, queries=1, filters=16, repeats=3)
FULL = Size([1, 2, 4, 8, 16, 32], shots=5, queries=5, filters=64, repeats=5)

Cell = dict[str, dict[str, Any]]
"""What was measured at one number of inner steps: for each algorithm ``seconds`` (one per repeat), ``bytes`` (peak),
and ``cg_steps``."""


def implicit(model: nn.Module, steps: int) -> Learner:
    return IMAML(
        model,
        nn.functional.cross_entropy,
        inner_solver=GradientDescent(STEPSIZE, max_iterations=steps, tol=0.0, on_failure="ignore"),
        linear_solver=idf.CG(rtol=0.0, max_iterations=CG_STEPS, on_failure="ignore"),
        regularization=REGULARIZATION,
    )


def unrolled(**settings: bool) -> Callable[[nn.Module, int], Learner]:
    return lambda model, steps: MAML(model, nn.functional.cross_entropy, steps=steps, stepsize=STEPSIZE, **settings)


IMPLICIT, UNROLLED, CHECKPOINTED, FIRST_ORDER = "iMAML", "MAML", "MAML, checkpointed", "first-order MAML"
ALGORITHMS: dict[str, Callable[[nn.Module, int], Learner]] = {
    IMPLICIT: implicit,
    UNROLLED: unrolled(),
    CHECKPOINTED: unrolled(checkpoint=True),
    FIRST_ORDER: unrolled(first_order=True),
}


def run(out: Path, *, quick: bool) -> None:
    """Measure what is not there yet, write figure2b.json and figure2b.png into ``out``, and check the claims.

    Raises ValueError where ``out`` has measurements of another size, by another torch or on other threads.
    """
    out.mkdir(parents=True, exist_ok=True)
    size = QUICK if quick else FULL
    settings = {**size._asdict(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    cells = read(out / "figure2b.json", settings)
    for steps in track([s for s in size.inner_steps if s not in cells], "figure 2b"):
        cells[steps] = measure(size, steps)
        content = {"settings": settings, "cells": {str(k): cells[k] for k in sorted(cells)}}
        write_atomically(out / "figure2b.json", json.dumps(content, indent=2).encode())
    report(cells, out, judge_time=not quick)


def read(path: Path, settings: dict[str, Any]) -> dict[int, Cell]:
    """The cells of an earlier run with the same settings."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["settings"] != settings:
        raise ValueError(
            f"{path} was measured with {content['settings']}, and this run has {settings}: choose another --out, or "
            f"delete the file."
        )
    return {int(steps): cell for steps, cell in content["cells"].items()}


def measure(size: Size, steps: int) -> Cell:
    """All algorithms with so many inner steps."""
    generator = torch.Generator().manual_seed(0)

    def examples(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.rand(1, number * WAYS, 1, 28, 28, generator=generator)
        return images, torch.arange(WAYS).repeat(number).unsqueeze(0)

    task = Task(examples(size.shots), examples(size.queries))
    torch.manual_seed(0)
    model = ConvNet(WAYS, filters=size.filters)

    def meta_gradient(learner: Learner) -> None:
        learner.zero_grad()
        learner.meta_loss(task).backward()

    learners = {name: build(model, steps) for name, build in ALGORITHMS.items()}
    cell: Cell = {}
    for name, learner in learners.items():
        with idf.record() as history:
            peak = peak_memory(lambda learner=learner: meta_gradient(learner))
        linear = [int(solve.info.iterations) for solve in history if solve.kind == "backward"]
        cell[name] = {"bytes": peak, "seconds": [], "cg_steps": max(linear, default=0)}
    for _ in range(size.repeats):
        for name, learner in learners.items():
            start = time.perf_counter()
            meta_gradient(learner)
            cell[name]["seconds"].append(time.perf_counter() - start)
    return cell


class Growth(NamedTuple):
    """Of an algorithm, per inner step: lines through the measurements."""

    seconds: Fit
    bytes: Fit


def growth(cells: dict[int, Cell], name: str) -> Growth:
    """Of the medians."""
    steps = sorted(cells)
    seconds = [statistics.median(cells[k][name]["seconds"]) for k in steps]
    return Growth(line(steps, seconds), line(steps, [cells[k][name]["bytes"] for k in steps]))


def crossing(ours: Fit, theirs: Fit) -> float:
    """The number of inner steps beyond which ours is the lower line; infinite where it grows as fast."""
    if ours.slope >= theirs.slope:
        return float("inf")
    return max(0.0, (ours.intercept - theirs.intercept) / (theirs.slope - ours.slope))


def report(cells: dict[int, Cell], out: Path, *, judge_time: bool) -> None:
    """Print the measurements, draw them, and check the claims; times of a few short runs are not judged."""
    table = Table("inner steps", *ALGORITHMS, title="One meta-gradient: median seconds, peak MiB")
    for steps in sorted(cells):
        values = (cells[steps][name] for name in ALGORITHMS)
        table.add_row(
            str(steps), *(f"{statistics.median(v['seconds']):.2f} s  {v['bytes'] / MIB:.0f} MiB" for v in values)
        )
    growths = {name: growth(cells, name) for name in ALGORITHMS}
    each = (f"{g.seconds.slope:.3f} s  {g.bytes.slope / MIB:.2f} MiB" for g in growths.values())
    table.add_row("each more", *each)
    crossings = Table("iMAML needs less than", "time, beyond", "memory, beyond")
    for name in (UNROLLED, CHECKPOINTED):
        ours, theirs = growths[IMPLICIT], growths[name]
        beyond = (crossing(ours.seconds, theirs.seconds), crossing(ours.bytes, theirs.bytes))
        crossings.add_row(name, *(f"{k:.1f} inner steps" for k in beyond))
    Console().print(table, crossings)
    draw(cells, growths, out)
    said = claims(cells, growths)
    check(said if judge_time else said[:-1])


def claims(cells: dict[int, Cell], growths: dict[str, Growth]) -> list[Claim]:
    """What the paper says of the figure; what it says of time comes last."""
    maml = growths[UNROLLED]
    a_step = maml.bytes.slope / MIB
    said: list[Claim] = []
    for name in (IMPLICIT, FIRST_ORDER):
        ours = growths[name].bytes.slope / MIB
        said.append(
            Claim(
                f"{name}: memory is flat",
                f"{ours:.3f} MiB a step, MAML's grows by {a_step:.2f}",
                abs(ours) <= 0.02 * a_step,
            )
        )
    linear = f"{a_step:.2f} MiB a step, R² {maml.bytes.explained:.5f}"
    said.append(Claim("MAML: memory grows linearly", linear, a_step > 0 and maml.bytes.explained > 0.999))
    saved = growths[CHECKPOINTED].bytes.slope / MIB
    said.append(Claim("checkpointing saves memory of MAML", f"{saved:.2f} MiB a step", saved < 0.5 * a_step))
    most = max(cells)
    beyond = crossing(growths[IMPLICIT].bytes, maml.bytes)
    said.append(Claim("iMAML needs less memory than MAML", f"beyond {beyond:.1f} inner steps", beyond < most))
    taken = {cell[IMPLICIT]["cg_steps"] for cell in cells.values()}
    said.append(Claim(f"iMAML took {CG_STEPS} CG steps", f"took {sorted(taken)}", taken == {CG_STEPS}))
    time_of_ours = growths[IMPLICIT].seconds
    measured = (
        f"{time_of_ours.slope:.3f} s a step against {maml.seconds.slope:.3f}: less in all beyond "
        f"{crossing(time_of_ours, maml.seconds):.1f} inner steps"
    )
    # Twice as many where nothing disturbs the measurement.
    said.append(Claim("iMAML's time grows slower than MAML's", measured, 1.2 * time_of_ours.slope < maml.seconds.slope))
    return said


def draw(cells: dict[int, Cell], growths: dict[str, Growth], out: Path) -> None:
    """Time and memory against inner steps, with the points where the curves of MAML and iMAML cross."""
    figure, (times, memory) = subplots(1, 2, figsize=(10, 4))
    steps = sorted(cells)
    for name, marker, color in zip(ALGORITHMS, "Dos^", ("tab:red", "tab:blue", "tab:cyan", "tab:gray"), strict=True):
        seconds = [statistics.median(cells[k][name]["seconds"]) for k in steps]
        times.plot(steps, seconds, f"{marker}-", color=color, label=name, markersize=5)
        low, high = ([f(cells[k][name]["seconds"]) for k in steps] for f in (min, max))
        times.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        memory.plot(
            steps, [cells[k][name]["bytes"] / MIB for k in steps], f"{marker}-", color=color, label=name, markersize=5
        )
    for axis, label, kind in ((times, "seconds", "seconds"), (memory, "peak memory, MiB", "bytes")):
        beyond = crossing(getattr(growths[IMPLICIT], kind), getattr(growths[UNROLLED], kind))
        if 0 < beyond < max(steps):
            axis.axvline(beyond, color="black", linestyle=":", linewidth=1, label=f"crossing at {beyond:.1f}")
        axis.set(xlabel="inner steps", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle("One meta-gradient of the Omniglot network")
    figure.tight_layout()
    save(figure, out / "figure2b.png")
