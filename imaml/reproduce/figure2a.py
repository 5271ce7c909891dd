"""Figure 2a: the error of the meta-gradient against the number of inner steps, where the exact one is known.

Linear regression in 20 unknowns from 4 examples, λ = 1, from θ = 0 by gradient descent with steps of 1/L, L the largest
eigenvalue of the task's G. H has rank 4, so I + H/λ has 5 different eigenvalues: 5 CG steps solve
the system, but for rounding, and 2 do not. MAML differentiates through the same inner steps.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import implicitdiff as idf
from imaml.files import write_atomically
from imaml.learners import IMAML, Learner
from imaml.tasks import LinearRegression, Task
from implicitdiff.inner_solvers import GradientDescent

from .claims import Claim, check
from .pictures import save, subplots
from .regression import Unrolled, exact_meta_gradient, hessian, meta_gradient, model_at, mse

UNKNOWNS, SHOTS = 20, 4
REGULARIZATION = 1.0
CG_STEPS = (2, 5, 10)
ROUNDING = 1e-12
"""Errors below it are not compared."""

Errors = dict[str, np.ndarray]
"""Relative errors of each algorithm, (inner step counts, tasks)."""


def run(out: Path, *, quick: bool) -> None:
    """Measure, write figure2a.csv and figure2a.png into ``out``, and check the paper's claims."""
    out.mkdir(parents=True, exist_ok=True)
    steps = [1, 2, 4, 8, 16, 32, 64] if quick else [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64]
    tasks = draw_tasks(10 if quick else 50)
    errors = measure(tasks, steps)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("algorithm", "inner steps", "task", "relative error"))
    for name, values in errors.items():
        writer.writerows((name, steps[k], task, value) for (k, task), value in np.ndenumerate(values))
    write_atomically(out / "figure2a.csv", text.getvalue().encode())
    table = Table("inner steps", *errors, title="Mean relative error of the meta-gradient")
    for k, count in enumerate(steps):
        table.add_row(str(count), *(f"{values[k].mean():.1e}" for values in errors.values()))
    Console().print(table)
    draw(steps, errors, out)
    check(claims(errors))


def draw_tasks(count: int) -> list[Task]:
    """In double precision, one by one."""
    batch = LinearRegression(dimension=UNKNOWNS, shots=SHOTS).sample(count, "test", 0, 0)
    return [Task(*(tuple(t[i].double() for t in part) for part in batch)) for i in range(count)]


def descent(task: Task, count: int) -> GradientDescent:
    """So many steps of 1/L."""
    largest = float(torch.linalg.matrix_norm(hessian(task.support[0]), 2)) + REGULARIZATION
    return GradientDescent(1 / largest, max_iterations=count, tol=0.0, on_failure="ignore")


def measure(tasks: list[Task], steps: list[int]) -> Errors:
    """The errors of all algorithms on all tasks after so many steps."""
    theta = torch.zeros(UNKNOWNS, dtype=torch.float64)

    def implicit(inner_solver: GradientDescent, cg_steps: int) -> Learner:
        return IMAML(
            model_at(theta),
            mse,
            inner_solver=inner_solver,
            linear_solver=idf.CG(rtol=1e-15, max_iterations=cg_steps, on_failure="ignore"),
            regularization=REGULARIZATION,
        )

    algorithms: dict[str, Callable[[GradientDescent], Learner]] = {
        "MAML": lambda inner_solver: Unrolled(model_at(theta), inner_solver, REGULARIZATION),
        **{f"iMAML, {k} CG steps": lambda inner_solver, k=k: implicit(inner_solver, k) for k in CG_STEPS},
    }
    exact = [exact_meta_gradient(task, theta, REGULARIZATION) for task in tasks]
    errors = {name: np.zeros((len(steps), len(tasks))) for name in algorithms}
    for k, count in enumerate(track(steps, "figure 2a")):
        for name, learner in algorithms.items():
            for i, (task, g) in enumerate(zip(tasks, exact, strict=True)):
                errors[name][k, i] = (meta_gradient(learner(descent(task, count)), task) - g).norm() / g.norm()
    return errors


def claims(errors: Errors) -> list[Claim]:
    """What the paper says of the figure."""
    means = {name: values.mean(1) for name, values in errors.items()}
    maml = means.pop("MAML")
    two, five, ten = means.values()
    comparable = maml > ROUNDING
    said = [
        Claim(f"{name} converges to the exact meta-gradient", f"error {last:.1e} at the end", last <= 1e-5)
        for name, last in {"MAML": maml[-1], "iMAML, 5 CG steps": five[-1], "iMAML, 10 CG steps": ten[-1]}.items()
    ]
    for count, ours in ((5, five), (10, ten)):
        ratios = (ours / maml)[comparable]
        measured = f"{ratios.min():.2f} to {ratios.max():.2f} of MAML's error"
        said.append(Claim(f"iMAML, {count} CG steps, is closer at equal steps", measured, bool((ratios < 1).all())))
    change = abs(two[-1] / two[-2] - 1)
    measured = f"error {two[-1]:.3f}, {100 * change:.2f} % off the one before"
    said.append(Claim("2 CG steps leave a floor", measured, bool(two[-1] > 1e-3 and change < 0.01)))
    worst = float((five / ten)[comparable].max())
    said.append(Claim("5 CG steps leave none", f"at most {worst:.4f} times the error with 10", worst < 1.01))
    return said


def draw(steps: list[int], errors: Errors, out: Path) -> None:
    """Means over the tasks, with bands from the 10th to the 90th percentile."""
    figure, axis = subplots(figsize=(7, 4.5))
    styles = ("tab:gray", "-"), ("tab:red", "-"), ("tab:blue", "-"), ("black", ":")
    for (name, values), (color, line) in zip(errors.items(), styles, strict=True):
        axis.semilogy(steps, values.mean(1), line, color=color, label=name, linewidth=2)
        if line == "-":  # that of the dotted line is the one below it
            axis.fill_between(steps, *np.percentile(values, (10, 90), axis=1), color=color, alpha=0.15, linewidth=0)
    axis.set(xlabel="inner gradient descent steps", ylabel="relative error of the meta-gradient")
    axis.set_ylim(bottom=1e-10)  # there are tasks, and with them the bands, that are solved to rounding earlier
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, out / "figure2a.png")
