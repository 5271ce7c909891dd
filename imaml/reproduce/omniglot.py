"""Table 2: accuracy on Omniglot, algorithm by algorithm, each cell a run folder.

Called again, finished cells are only read and a begun one goes on where it was, so that a stop costs nothing. The test
characters are shown upright, and turned at random: the published code of MAML and of iMAML turns them, which makes the
classes of a task easier to tell apart, so the turned ones are what the paper's numbers compare with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rich.console import Console

from .. import checkpoint, training
from ..config import Algorithm, Config, InnerSolver, Tasks
from ..files import write_atomically
from ..learners import Learner
from ..presets import build_learner, build_optimizer, build_source
from ..tasks import Omniglot

TEST_SEED = 2_000_003
TEST_TASKS = 600
QUICK_STEPS, QUICK_TEST_TASKS = 2, 20


class Setting(str, Enum):
    """N-way K-shot."""

    five_way_1 = "5w1s"
    five_way_5 = "5w5s"
    twenty_way_1 = "20w1s"
    twenty_way_5 = "20w5s"

    @property
    def numbers(self) -> dict[str, int]:
        """As settings of a run; as many queries as shots, like the published code."""
        ways, shots = map(int, self.value.removesuffix("s").split("w"))
        return {"ways": ways, "shots": shots, "queries": shots}


class Row(NamedTuple):
    """An algorithm, its settings, and the accuracies (%) that Table 2 of the paper has for it."""

    name: str
    settings: dict[str, Any]
    paper: tuple[str, ...]


IMPLICIT = {"algorithm": Algorithm.imaml, "regularization": 2.0, "linear_steps": 5}
HEAD = {
    "algorithm": Algorithm.imaml,
    "head_only": True,
    "regularization": 0.1,
    "inner_solver": InnerSolver.lbfgs,
    "inner_steps": 15,
    "linear_steps": 15,
    "learning_rate": 1e-2,
}
ROWS = {
    "maml": Row("MAML", {"algorithm": Algorithm.maml}, ("98.7 ± 0.4", "99.9 ± 0.1", "95.8 ± 0.3", "98.9 ± 0.2")),
    "fomaml": Row(
        "first-order MAML",
        {"algorithm": Algorithm.fomaml},
        ("98.3 ± 0.5", "99.2 ± 0.2", "89.4 ± 0.5", "97.9 ± 0.1"),
    ),
    "reptile": Row(
        "Reptile",
        {"algorithm": Algorithm.reptile},
        ("97.68 ± 0.04", "99.48 ± 0.06", "89.43 ± 0.14", "97.12 ± 0.32"),
    ),
    "imaml-gd": Row(
        "iMAML, gradient descent", IMPLICIT, ("99.16 ± 0.35", "99.67 ± 0.12", "94.46 ± 0.42", "98.69 ± 0.1")
    ),
    "imaml-hf": Row(
        "iMAML, Hessian-free",
        IMPLICIT | {"inner_solver": InnerSolver.hessian_free},
        ("99.50 ± 0.26", "99.74 ± 0.11", "96.18 ± 0.36", "99.14 ± 0.1"),
    ),
    "imaml-head": Row("iMAML on the head only", HEAD, ("–",) * 4),
}


@dataclass(frozen=True)
class Result:
    """What one run came to: accuracies (%) with half-widths of their 95 % intervals."""

    steps: int
    minutes: float
    upright: tuple[float, float]
    turned: tuple[float, float]


def run(
    out: Path,
    *,
    data: Path,
    minutes: float | None,
    settings: Sequence[Setting] = tuple(Setting),
    seeds: int = 1,
    table_file: Path | None = None,
    quick: bool = False,
) -> None:
    """Train each cell for ``minutes``, test it, and write the table, ``out``/table.md, anew after each.

    Raises ValueError without ``minutes`` (``quick`` needs none), and what the data source raises.
    """
    file = table_file or out / "table.md"
    if quick:
        settings = settings[:1]
    elif minutes is None:
        raise ValueError("give --minutes: how long to train each cell of the table.")
    for seed in range(seeds):
        for setting in settings:
            for slug, row in ROWS.items():
                config = Config(Tasks.omniglot, data=str(data), seed=seed, **setting.numbers, **row.settings)
                cell = out / f"{slug}-{setting.value}-seed{seed}"
                if not finish(cell, config.completed(), steps=QUICK_STEPS if quick else None, minutes=minutes):
                    Console().print(f"stopped in {cell}: the same command goes on from there.")
                    return
                write_atomically(file, table(out, settings, seeds).encode())
    Console().print(file.read_text(), markup=False, soft_wrap=True)


def finish(folder: Path, config: Config, *, steps: int | None, minutes: float | None) -> bool:
    """Train and test one cell, from wherever it is; whether it came to its end. More ``minutes`` than before go on."""
    result = folder / "result.json"
    if result.exists() and (minutes is None or json.loads(result.read_text())["minutes"] >= minutes):
        return True
    begun = (folder / checkpoint.NAME).exists()
    if begun and Config.read(folder) != config:
        raise ValueError(f"{folder} was begun with other settings: choose another --out, or delete it.")
    folder.mkdir(parents=True, exist_ok=True)
    config.write(folder)
    torch.manual_seed(config.seed)
    source, learner = build_source(config), build_learner(config)
    if torch.cuda.is_available():
        learner.cuda()
    done = training.train(
        learner,
        source,
        build_optimizer(config, learner),
        folder,
        steps=steps,
        minutes=minutes,
        tasks_per_step=config.tasks_per_step,
        seed=config.seed,
        resume=begun,
    )
    seconds = checkpoint.load(folder)["seconds"]
    if done != steps and (minutes is None or seconds < 60 * minutes):  # by Ctrl-C
        return False
    number = TEST_TASKS if minutes is not None else QUICK_TEST_TASKS
    reached = Result(done, seconds / 60, accuracy(learner, source, number), accuracy(learner, source.turned(), number))
    write_atomically(result, json.dumps(asdict(reached)).encode())
    return True


def accuracy(learner: Learner, source: Omniglot, tasks: int) -> tuple[float, float]:
    """Of test tasks in %, with the half-width of the 95 % interval."""
    mean, half = training.evaluate(learner, source, tasks, TEST_SEED)
    return 100 * mean, 100 * half


def table(out: Path, settings: Sequence[Setting], seeds: int) -> str:
    """What is finished in ``out``, beside the paper's numbers, in Markdown."""
    lines = [
        "| algorithm | setting | meta-steps | minutes | upright test characters | turned | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for slug, row in ROWS.items():
        for setting in settings:
            files = [out / f"{slug}-{setting.value}-seed{seed}" / "result.json" for seed in range(seeds)]
            results = [Result(**json.loads(file.read_text())) for file in files if file.exists()]
            if not results:
                continue
            paper = row.paper[list(Setting).index(setting)]
            steps, minutes = (
                round(sum(v) / len(results)) for v in zip(*((r.steps, r.minutes) for r in results), strict=True)
            )
            upright, turned = (_mean([getattr(r, kind) for r in results]) for kind in ("upright", "turned"))
            lines.append(f"| {row.name} | {setting.value} | {steps:,} | {minutes} | {upright} | {turned} | {paper} |")
    return "\n".join(lines) + "\n"


def _mean(accuracies: list[tuple[float, float]]) -> str:
    """Of the seeds: each has tested other parameters on the same tasks, so the interval of one is that of the mean."""
    means, halves = zip(*accuracies, strict=True)
    seeds = f" ({len(means)} seeds)" if len(means) > 1 else ""
    return f"{fmean(means):.2f} ± {fmean(halves):.2f}{seeds}"
