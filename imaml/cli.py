"""The command line: ``imaml train``, ``imaml evaluate``, ``imaml plot``."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer

from . import checkpoint, plots, training
from .learners import Learner
from .presets import Algorithm, Config, Tasks, build_learner, build_optimizer, build_source
from .tasks import TaskSource, omniglot

app = typer.Typer(
    help="Implicit MAML and the algorithms it is compared with.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

EVALUATION_SEED = 2_000_003
USER_ERRORS = (checkpoint.CheckpointError, OSError, ValueError)


def main() -> None:
    """The entry point; what a user can mend is one line, not a traceback."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except typer.TyperException as error:  # a bad option, which typer would frame over several lines
        typer.echo(f"imaml: {' '.join(error.format_message().split())}", err=True)
        sys.exit(2)


@app.command()
def train(
    context: typer.Context,
    tasks: Annotated[Tasks, typer.Argument(help="What to learn from.")],
    algorithm: Annotated[Algorithm, typer.Option(help="How to learn.")] = Algorithm.imaml,
    ways: Annotated[int, typer.Option(min=2, help="Classes of a task.")] = 5,
    shots: Annotated[
        int | None, typer.Option(min=1, help="Support examples (per class); 1 for omniglot, else 10.")
    ] = None,
    queries: Annotated[int, typer.Option(min=1, help="Query drawings per class, for omniglot.")] = 5,
    data: Annotated[Path | None, typer.Option(help="Folder of the data, for omniglot.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Meta-steps in all.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="Minutes of training in all.")] = None,
    tasks_per_step: Annotated[int, typer.Option(min=1, help="Tasks in a meta-gradient.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the initialisation and of the tasks.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/TASKS-ALGORITHM by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch the official Omniglot files first.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Of Adam, on the meta-parameters; 0.003 for omniglot, else 0.001.")
    ] = None,
    inner_steps: Annotated[int | None, typer.Option(min=1, help="Steps of the inner solver.")] = None,
    inner_stepsize: Annotated[
        float | None, typer.Option(min=0.0, help="Fixed inner step; imaml without it: line search.")
    ] = None,
    regularization: Annotated[float, typer.Option(min=0.0, help="λ of imaml.")] = 2.0,
    cg_steps: Annotated[int, typer.Option(min=1, help="CG steps of imaml's linear solve.")] = 5,
    task_chunk: Annotated[int | None, typer.Option(min=1, help="Tasks solved together: less memory.")] = None,
) -> None:
    """Meta-train a model; with --resume, go on with a run by its own settings."""
    run = out or Path("runs") / f"{tasks.value}-{algorithm.value}"
    if steps is None and minutes is None:
        _refuse("give --steps or --minutes: how long to train.")
    if threads is not None:
        torch.set_num_threads(threads)
    config = Config(
        tasks=tasks,
        algorithm=algorithm,
        ways=ways,
        shots=shots or (1 if tasks is Tasks.omniglot else 10),
        queries=queries,
        data=None if data is None else str(data),
        tasks_per_step=tasks_per_step,
        seed=seed,
        learning_rate=learning_rate or (3e-3 if tasks is Tasks.omniglot else 1e-3),
        inner_steps=inner_steps,
        inner_stepsize=inner_stepsize,
        regularization=regularization,
        cg_steps=cg_steps,
        task_chunk=task_chunk,
    )
    try:
        if resume:
            config = _resumed(run, config, context)
        elif run.exists() and any(run.iterdir()):
            _refuse(f"{run} is not empty: choose another --out, or --resume to go on with it.")
        if download and config.data is not None:
            omniglot.download(Path(config.data))
        source, learner = _build(config)
        run.mkdir(parents=True, exist_ok=True)
        config.write(run)
        optimizer = build_optimizer(config, learner)
        done = training.train(
            learner,
            source,
            optimizer,
            run,
            steps=steps,
            minutes=minutes,
            tasks_per_step=config.tasks_per_step,
            seed=config.seed,
            resume=resume,
        )
    except USER_ERRORS as error:
        _refuse(str(error))
    typer.echo(f"{done} meta-steps done; the run is in {run}.")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    tasks: Annotated[int, typer.Option(min=2, help="Test tasks.")] = 600,
) -> None:
    """Mean score of a trained model on test tasks, with its 95 % interval."""
    try:
        _, source, learner = _restored(run)
        mean, half = training.evaluate(learner, source, tasks, EVALUATION_SEED)
    except USER_ERRORS as error:
        _refuse(str(error))
    if source.is_classification:
        typer.echo(f"accuracy {100 * mean:.2f} % ± {100 * half:.2f} over {tasks} test tasks")
    else:
        typer.echo(f"query loss {mean:.4f} ± {half:.4f} over {tasks} test tasks")


@app.command()
def plot(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Save the learning curve, and for sinusoids the adaptation, as pictures in the run folder."""
    try:
        config, source, learner = _restored(run)
        typer.echo(plots.learning_curve(run))
        if config.tasks is Tasks.sinusoids:
            typer.echo(plots.sinusoid_adaptation(learner, source, run, EVALUATION_SEED))
    except USER_ERRORS as error:
        _refuse(str(error))


def _resumed(run: Path, asked: Config, context: typer.Context) -> Config:
    """The settings of a run. Raises ValueError where the command line asks for others; only the data may have moved."""
    stored = Config.read(run)
    sources = {name: context.get_parameter_source(name) for name in asdict(asked)}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    for name in sorted(given - {"data"}):
        was, now = (_plain(getattr(config, name)) for config in (stored, asked))
        if was != now:
            raise ValueError(f"{run} was begun with {name} {was}, not {now}: leave it out, or choose another --out.")
    return replace(stored, data=asked.data) if "data" in given else stored


def _plain(setting: object) -> object:
    return setting.value if isinstance(setting, Enum) else setting


def _build(config: Config) -> tuple[TaskSource, Learner]:
    source = build_source(config)
    torch.manual_seed(config.seed)
    return source, build_learner(config)


def _restored(run: Path) -> tuple[Config, TaskSource, Learner]:
    config = Config.read(run)
    state = checkpoint.load(run)
    source, learner = _build(config)
    checkpoint.fit(run, state, learner)
    return config, source, learner


def _refuse(message: str) -> NoReturn:
    typer.echo(f"imaml: {message}", err=True)
    raise typer.Exit(2)
