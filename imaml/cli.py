"""The command line: ``imaml train``, ``evaluate``, ``adapt``, ``plot`` and ``reproduce``."""

from __future__ import annotations

import sys
import warnings
from dataclasses import asdict, fields, replace
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import distributed, training
from .adapt import Adapted, Prediction, confusion, write_predictions
from .adapt import adapt as adapt_to
from .checkpoint import CheckpointError, fit, load
from .config import Algorithm, Config, InnerSolver, LinearSolver, Outer, Share, Tasks, option
from .learners import Learner
from .presets import build_learner, build_optimizer, build_schedule, build_source
from .reproduce.omniglot import Setting
from .tasks import TaskSource, omniglot
from .tasks.image_classes import ImageClasses

app = typer.Typer(
    help="Implicit MAML and the algorithms it is compared with.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
reproduce = typer.Typer(help="The paper's tables and figures, one command each.", no_args_is_help=True)
app.add_typer(reproduce, name="reproduce")

EVALUATION_SEED = 2_000_003
LISTED = 40
"""Predictions that are shown on the terminal; the file has all of them."""
USER_ERRORS = (CheckpointError, OSError, ValueError)

TASKS = "Tasks"
MODEL = "Adapting to a task"
IMPLICIT = "Implicit gradient (imaml)"
UNROLLED = "Gradient through the steps (maml)"
OUTER = "Meta-training"
RUN = "The run"

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Data = Annotated[str | None, typer.Option(metavar="DIR", help="Where the data is now, if it has moved.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch.", rich_help_panel=RUN)]


def main() -> None:
    """The entry point; what a user can mend is one line, not a traceback."""
    warnings.formatwarning = lambda message, *details: f"imaml: {message}\n"  # type: ignore[assignment]
    try:
        with distributed.started():
            sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except typer.TyperException as error:  # a bad option, which typer would frame over several lines
        typer.echo(f"imaml: {' '.join(error.format_message().split())}", err=True)
        sys.exit(2)


@app.command()
def train(
    context: typer.Context,
    tasks: Annotated[Tasks, typer.Argument(help="What to learn from.")],
    algorithm: Annotated[Algorithm, typer.Option(help="How to learn.")] = Algorithm.imaml,
    data: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of the images, or of their archives.", rich_help_panel=TASKS),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Which classes are for what (folder).",
            show_default="split.json in the data",
            rich_help_panel=TASKS,
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the official files first (omniglot).", rich_help_panel=TASKS)
    ] = False,
    ways: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Classes of a task (images).", show_default="5", rich_help_panel=TASKS),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Support examples, per class for images.",
            show_default="images 1, else 10",
            rich_help_panel=TASKS,
        ),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Query images per class.",
            show_default="5; mini-imagenet, cifar-fs 15",
            rich_help_panel=TASKS,
        ),
    ] = None,
    side: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=16,
            help="Pixels of an image's side (mini-imagenet, cifar-fs, folder).",
            show_default="84, cifar-fs 32",
            rich_help_panel=TASKS,
        ),
    ] = None,
    grayscale: Annotated[
        bool, typer.Option("--grayscale", help="Drop the colours (folder).", rich_help_panel=TASKS)
    ] = False,
    rotations: Annotated[
        bool,
        typer.Option("--rotations", help="Turned images are classes of their own in training.", rich_help_panel=TASKS),
    ] = False,
    hold_out: Annotated[
        bool,
        typer.Option("--hold-out", help="Validate on the 172 validation characters (omniglot).", rich_help_panel=TASKS),
    ] = False,
    head_only: Annotated[
        bool,
        typer.Option(
            "--head-only",
            help="Adapt the last layer, share the features (images; with maml: ANIL).",
            rich_help_panel=MODEL,
        ),
    ] = False,
    inner_solver: Annotated[
        InnerSolver | None,
        typer.Option(
            help="What adapts; maml and fomaml take gd or nesterov.", show_default="gd", rich_help_panel=MODEL
        ),
    ] = None,
    inner_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Its steps, at most.",
            show_default="imaml by solver, else 5",
            rich_help_panel=MODEL,
        ),
    ] = None,
    inner_stepsize: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.0,
            help="Its step (gd, nesterov, adam).",
            show_default="imaml with gd: line search",
            rich_help_panel=MODEL,
        ),
    ] = None,
    regularization: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.0,
            help="λ, or where its learning starts.",
            show_default="2, photos 0.5",
            rich_help_panel=IMPLICIT,
        ),
    ] = None,
    learn_regularization: Annotated[
        Share | None, typer.Option(help="Learn λ: one for each of what.", rich_help_panel=IMPLICIT)
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            metavar="X", min=0.0, help="δ: adapt until ‖φ − φ*‖ ≤ δ (Definition 1).", rich_help_panel=IMPLICIT
        ),
    ] = None,
    linear_solver: Annotated[
        LinearSolver | None,
        typer.Option(help="What solves (I + H/λ) g = v.", show_default="cg", rich_help_panel=IMPLICIT),
    ] = None,
    linear_steps: Annotated[
        int | None,
        typer.Option(
            "--linear-steps",
            "--cg-steps",
            metavar="N",
            min=1,
            help="Its steps, at most.",
            show_default="5, 100 with --delta-prime",
            rich_help_panel=IMPLICIT,
        ),
    ] = None,
    delta_prime: Annotated[
        float | None,
        typer.Option(
            metavar="X", min=0.0, help="δ′: solve until g is that accurate (Definition 2).", rich_help_panel=IMPLICIT
        ),
    ] = None,
    truncate: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Differentiate the last so many steps only.", rich_help_panel=UNROLLED),
    ] = None,
    checkpoint: Annotated[
        bool,
        typer.Option(
            "--checkpoint", help="Take each step again for the gradient: less memory.", rich_help_panel=UNROLLED
        ),
    ] = False,
    outer: Annotated[
        Outer, typer.Option(help="What optimises the meta-parameters.", rich_help_panel=OUTER)
    ] = Outer.adam,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.0,
            help="Its step.",
            show_default="by optimizer; adam 0.001",
            rich_help_panel=OUTER,
        ),
    ] = None,
    cosine_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Let the learning rate fall to 0 over so many meta-steps.",
            show_default="constant",
            rich_help_panel=OUTER,
        ),
    ] = None,
    tasks_per_step: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tasks in a meta-gradient.", rich_help_panel=OUTER)
    ] = 16,
    task_chunk: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tasks solved together: less memory.", rich_help_panel=OUTER)
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Of the initialisation and of the tasks.", rich_help_panel=OUTER)
    ] = 0,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Meta-steps in all.", rich_help_panel=RUN)
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="X", min=0.0, help="Minutes of training in all.", rich_help_panel=RUN)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run folder.", show_default="runs/TASKS-ALGORITHM", rich_help_panel=RUN),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the run folder.", rich_help_panel=RUN)
    ] = False,
    threads: Threads = None,
) -> None:
    """Meta-train a model; with --resume, go on with a run by its own settings.

    An option that does not belong to the tasks or to the algorithm is refused.
    """
    given = dict(locals())
    asked = Config(**{field.name: given[field.name] for field in fields(Config)})
    run = out or Path("runs") / f"{tasks.value}-{algorithm.value}"
    first = distributed.rank() == 0  # who writes
    if steps is None and minutes is None:
        _refuse("give --steps or --minutes: how long to train.")
    if download and (tasks is not Tasks.omniglot or data is None):
        _refuse("--download fetches the files of omniglot, into the folder that --data names.")
    if threads is not None:
        torch.set_num_threads(threads)
    asked = replace(asked, **{n: str(Path(p).absolute()) for n, p in (("data", data), ("split", split)) if p})
    try:
        if resume:
            config = _resumed(run, asked, context)
        else:
            config = asked.completed()
            if first and run.exists() and any(run.iterdir()):
                _refuse(f"{run} is not empty: choose another --out, or --resume to go on with it.")
        if download:
            distributed.from_first(lambda: omniglot.download(Path(config.data)))
        source, learner = _build(config)
        if first:
            run.mkdir(parents=True, exist_ok=True)
            config.write(run)
        _to_gpu(learner)
        done = training.train(
            learner,
            source,
            build_optimizer(config, learner),
            run,
            steps=steps,
            minutes=minutes,
            tasks_per_step=config.tasks_per_step,
            seed=config.seed,
            resume=resume,
            learning_rate=build_schedule(config),
        )
    except USER_ERRORS as error:
        _refuse(str(error))
    _tell(f"{done} meta-steps done; the run is in {run}.")


@app.command()
def evaluate(
    run: Run,
    tasks: Annotated[int, typer.Option(min=2, help="Test tasks.")] = 600,
    turned: Annotated[
        bool, typer.Option("--turned", help="Turn the test classes too, like the published code (images).")
    ] = False,
    data: Data = None,
    threads: Threads = None,
) -> None:
    """Mean score of a trained model on test tasks, with its 95 % interval."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        _, source, learner = _restored(run, data)
        if turned and not isinstance(source, ImageClasses):
            raise ValueError("--turned turns pictures, and this run has none.")
        if turned:
            source = source.turned()
        _to_gpu(learner)
        mean, half = training.evaluate(learner, source, tasks, EVALUATION_SEED)
    except USER_ERRORS as error:
        _refuse(str(error))
    if source.is_classification:
        _tell(f"accuracy {100 * mean:.2f} % ± {100 * half:.2f} over {tasks} test tasks")
    else:
        _tell(f"query loss {mean:.4f} ± {half:.4f} over {tasks} test tasks")


@app.command()
def adapt(
    run: Run,
    support: Annotated[
        Path, typer.Option(metavar="DIR", help="The new task: in it, a folder of pictures for each class.")
    ],
    query: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Pictures to classify; in folders by class: to be judged by as well."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="CSV file of the predictions.", show_default="RUN/predictions.csv"),
    ] = None,
    threads: Threads = None,
) -> None:
    """Adapt a trained model to new classes from a few pictures of each, and classify other pictures.

    Without --query it tells how many support pictures the others would name rightly.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if out is not None and query is None:
        _refuse("--out is the file of the predictions, which need --query.")
    try:
        model = adapt_to(run, support)
        if query is not None:
            predictions, path = model.predict(query), out or run / "predictions.csv"
            write_predictions(predictions, path)
    except USER_ERRORS as error:
        _refuse(str(error))
    counts = model.support[1].bincount().tolist()
    listed = ", ".join(f"{name} ({count})" for name, count in zip(model.classes, counts, strict=True))
    typer.echo(f"adapted to {len(counts)} classes from {sum(counts)} pictures: {listed}")
    if query is None:
        _print_left_out(model)
    else:
        _print_predictions(predictions, query)
        typer.echo(f"the predictions are in {path}.")


@app.command()
def plot(
    run: Run,
    tasks: Annotated[int, typer.Option(min=1, help="Test tasks to look for mistakes in, of images.")] = 100,
    data: Data = None,
    threads: Threads = None,
) -> None:
    """Save pictures in the run folder: learning curve, adaptation, the history of a learned λ, mistakes."""
    from . import plots  # matplotlib takes a second to load, which the other commands need not wait for

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        config, source, learner = _restored(run, data)
        pictures = [plots.learning_curve(run), plots.regularization_history(run)]
        if config.tasks is Tasks.sinusoids:
            pictures.append(plots.sinusoid_adaptation(learner, source, run, EVALUATION_SEED))
        if source.is_classification:
            pictures.append(plots.episode(learner, source, run, EVALUATION_SEED))
            pictures.append(plots.mistakes(learner, source, run, EVALUATION_SEED, tasks))
    except USER_ERRORS as error:
        _refuse(str(error))
    for picture in pictures:
        if picture is not None:
            typer.echo(picture)


Quick = Annotated[bool, typer.Option("--quick", help="Fewer points: the same claims in less time.")]
Into = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder.", show_default="reproduced/NAME")]


@reproduce.command()
def table1(quick: Quick = False, out: Into = None) -> None:
    """Cost of a meta-gradient against its condition number and accuracy."""
    _reproduce("table1", out, quick=quick)


@reproduce.command()
def figure2a(quick: Quick = False, out: Into = None) -> None:
    """Error of the meta-gradient against inner steps, where the exact one is known."""
    _reproduce("figure2a", out, quick=quick)


@reproduce.command()
def figure2b(quick: Quick = False, out: Into = None) -> None:
    """Time and memory against inner steps, on the network for Omniglot."""
    _reproduce("figure2b", out, quick=quick)


@reproduce.command("omniglot")
def reproduce_omniglot(
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder that holds the Omniglot files.")],
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Minutes of training for each cell of the table.")
    ] = None,
    setting: Annotated[
        list[Setting] | None, typer.Option(help="Columns of the table; repeatable.", show_default="all")
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Runs for each cell.")] = 1,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the table goes.", show_default="OUT/table.md")
    ] = None,
    quick: Quick = False,
    out: Into = None,
    threads: Threads = None,
) -> None:
    """Accuracy on Omniglot, algorithm by algorithm: Table 2. Goes on where it was stopped."""
    if threads is not None:
        torch.set_num_threads(threads)
    settings = setting or list(Setting)
    _reproduce(
        "omniglot", out, quick=quick, data=data, minutes=minutes, settings=settings, seeds=seeds, table_file=table
    )


def _reproduce(name: str, out: Path | None, **settings: Any) -> None:
    from .reproduce import ClaimError

    try:
        import_module(f"imaml.reproduce.{name}").run(out or Path("reproduced") / name, **settings)
    except ClaimError as error:
        typer.echo(f"imaml: {error}", err=True)
        raise typer.Exit(1) from error
    except USER_ERRORS as error:
        _refuse(str(error))


def _print_left_out(model: Adapted) -> None:
    share = model.left_out()
    if share is None:
        typer.echo(
            "give --query to classify pictures, or two support pictures of each class for an estimate of accuracy."
        )
    else:
        typer.echo(f"each support picture named by the others: {100 * share:.0f} % right.")


def _print_predictions(predictions: list[Prediction], query: Path) -> None:
    """A table of pictures and, where their classes are known, how right it is and what was taken for what."""
    console = Console()
    known = predictions[0].truth is not None
    table = Table("picture", *(["class"] if known else []), "prediction", "probability")
    for p in predictions[:LISTED]:
        truth = [] if p.truth is None else [p.truth]
        cells = [p.picture.removeprefix(f"{query}/"), *truth, p.label, f"{p.probability:.3f}"]
        table.add_row(*map(escape, cells), style="red" if truth and truth != [p.label] else "")
    console.print(table)
    if len(predictions) > LISTED:
        console.print(f"… and {len(predictions) - LISTED} more.")
    if not known:
        return
    counts = confusion(predictions)
    right = sum(count for (truth, label), count in counts.items() if truth == label)
    console.print(f"accuracy {100 * right / len(predictions):.1f} % of {len(predictions)} pictures")
    wrong = Table("class", "taken for", "pictures")
    for (truth, label), count in counts.most_common():
        if truth != label:
            total = sum(n for (other, _), n in counts.items() if other == truth)
            wrong.add_row(escape(truth), escape(label), f"{count} of {total}")
    if wrong.row_count:
        console.print(wrong)


def _resumed(run: Path, asked: Config, context: typer.Context) -> Config:
    """The settings of a run. Raises ValueError where the command line asks for others; only the data may have moved."""
    stored = Config.read(run)
    sources = {name: context.get_parameter_source(name) for name in asdict(asked)}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    for name in sorted(given - {"data"}):
        was, now = (_plain(getattr(config, name)) for config in (stored, asked))
        if was != now:
            begun = f"without {option(name)}" if was in (None, False) else f"with {name} {was}, not {now}"
            raise ValueError(f"{run} was begun {begun}: leave it out, or choose another --out.")
    return replace(stored, data=asked.data) if "data" in given else stored


def _plain(setting: object) -> object:
    return setting.value if isinstance(setting, Enum) else setting


def _build(config: Config) -> tuple[TaskSource, Learner]:
    source = build_source(config)
    torch.manual_seed(config.seed)
    return source, build_learner(config)


def _restored(run: Path, data: str | None) -> tuple[Config, TaskSource, Learner]:
    config = Config.read(run)
    if data is not None:
        config = replace(config, data=data)
    state = load(run)
    source, learner = _build(config)
    fit(run, state, learner)
    return config, source, learner


def _to_gpu(learner: Learner) -> None:
    if torch.cuda.is_available():
        learner.cuda()


def _tell(message: str) -> None:
    """To the user, once: by rank 0."""
    if distributed.rank() == 0:
        typer.echo(message)


def _refuse(message: str) -> NoReturn:
    typer.echo(f"imaml: {message}", err=True)
    raise typer.Exit(2)
