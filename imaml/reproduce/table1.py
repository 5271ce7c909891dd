"""Table 1: what a meta-gradient costs and how wrong it is, against the condition number κ and the accuracy δ.

Linear regression in 200 unknowns whose G has eigenvalues from 1 to exactly κ, at Chebyshev's points (on which CG is no
better than its bound), λ = ½, in random directions. The solution is drawn at the distance D = 1 from θ, the query
loss has the Hessian I and a gradient of length 1 at the solution. Every algorithm is given δ and stops by itself where
‖∇G‖ ≤ δ, which with a smallest eigenvalue of 1 means ‖φ − φ*‖ ≤ δ (Definition 1); the linear solve of iMAML
stops where ‖g − (I + H/λ)⁻¹v‖ ≤ δ (Definition 2) by the same reasoning.

Compute is counted in the work of one gradient of the support loss, by the floating-point operations of all products:
a Hessian–vector product counts as what it takes. Memory is the peak of the allocator.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import implicitdiff as idf
from imaml.files import write_atomically
from imaml.learners import IMAML, Learner
from imaml.tasks import Task
from implicitdiff.inner_solvers import GradientDescent

from .claims import Claim, check
from .fits import Fit, line, power
from .measure import flops, peak_memory
from .pictures import save, subplots
from .regression import (
    Unrolled,
    exact_meta_gradient,
    gradient,
    hessian,
    meta_gradient,
    model_at,
    mse,
    solution,
)

UNKNOWNS = 200
REGULARIZATION = 0.5
DELTA, KAPPA = 1e-4, 30.0
"""Where the other one varies."""
EPSILON = 0.01
"""Of truncated backpropagation: it keeps as many steps as bring its error down to this."""
MAX_ITERATIONS = 1_000_000


class Problem(NamedTuple):
    """A task whose regularised loss has the eigenvalues 1 … κ, with meta-parameters to start from."""

    task: Task
    theta: Tensor
    kappa: float


class Algorithm(NamedTuple):
    """A row of the table."""

    name: str
    learner: Callable[[Problem, float], Learner]
    compute: str
    memory: str
    error: str
    compute_exponent: float
    memory_exponent: float
    """Of κ, as the paper has it."""


@dataclass
class Measurement:
    algorithm: str
    kappa: float
    delta: float
    seed: int
    steps: int
    gradients: float
    """The work, in gradients of the support loss."""
    distance: float
    """‖φ − φ*‖."""
    error: float
    """Against the exact meta-gradient."""
    error_of_algorithm: float
    """Against the exact derivative of the steps taken; for iMAML again against the exact meta-gradient."""
    memory: float | None = None
    """The peak, in peaks of one gradient of the support loss; of the first seed only, as it is the same for all."""


def problem(kappa: float, seed: int) -> Problem:
    """A random one with that condition number."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    turn = lambda: torch.linalg.qr(draw(UNKNOWNS, UNKNOWNS))[0]  # noqa: E731
    direction = lambda: torch.nn.functional.normalize(draw(UNKNOWNS), dim=0)  # noqa: E731
    angles = torch.linspace(0, math.pi, UNKNOWNS, dtype=torch.float64)
    eigenvalues = (kappa + 1) / 2 + (kappa - 1) / 2 * angles.cos()
    singular_values = ((eigenvalues - REGULARIZATION) * UNKNOWNS / 2).sqrt()
    left, right = turn(), turn()
    X = left @ torch.diag(singular_values) @ right.mT
    Xq = turn() * math.sqrt(UNKNOWNS / 2)
    theta, way, off = direction(), direction(), direction()
    # ∇G = 0 at θ + way says what Xᵀ (y − X (θ + way)) is.
    y = X @ (theta + way) + REGULARIZATION * UNKNOWNS / 2 * torch.linalg.solve(X.mT, way)
    yq = Xq @ (theta + way - off)
    return Problem(Task((X, y.unsqueeze(-1)), (Xq, yq.unsqueeze(-1))), theta, kappa)


def descent(kappa: float, delta: float) -> GradientDescent:
    """By steps of 1/L, until δ-accurate."""
    return GradientDescent(1 / kappa, tol=delta, max_iterations=MAX_ITERATIONS)


def accelerated(kappa: float, delta: float) -> GradientDescent:
    """Nesterov's method for known κ (Nesterov 2004, scheme 2.2.11), until δ-accurate."""
    momentum = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    return GradientDescent(1 / kappa, momentum, nesterov=True, tol=delta, max_iterations=MAX_ITERATIONS)


def by_descent(problem: Problem, delta: float) -> Learner:
    return Unrolled(model_at(problem.theta), descent(problem.kappa, delta), REGULARIZATION)


def by_acceleration(problem: Problem, delta: float) -> Learner:
    return Unrolled(model_at(problem.theta), accelerated(problem.kappa, delta), REGULARIZATION)


def truncated(problem: Problem, delta: float) -> Learner:
    # The number of steps is known beforehand, as the layer would else find it by taking them twice.
    with idf.record() as history:
        by_descent(problem, delta).adapt(problem.task.support)
    steps = int(history[0].info.iterations)
    fixed = GradientDescent(1 / problem.kappa, tol=0.0, max_iterations=steps, on_failure="ignore")
    return Unrolled(model_at(problem.theta), fixed, REGULARIZATION, truncate=kept_steps(problem.kappa))


def implicit(problem: Problem, delta: float) -> Learner:
    # Our system is (H + λI) u = v with the meta-gradient λu, so that a residual of δ/λ is an error of at most δ.
    linear_solver = idf.CG(rtol=0.0, atol=delta / REGULARIZATION)
    return IMAML(
        model_at(problem.theta),
        mse,
        inner_solver=accelerated(problem.kappa, delta),
        linear_solver=linear_solver,
        regularization=REGULARIZATION,
    )


def kept_steps(kappa: float) -> int:
    """So many that (1 − 1/κ)^steps ≤ ε."""
    return math.ceil(math.log(EPSILON) / math.log1p(-1 / kappa))


IMPLICIT = "iMAML"
TRUNCATED = "truncated backprop"
ALGORITHMS = (
    Algorithm("MAML, GD", by_descent, "κ log(D/δ)", "Mem κ log(D/δ)", "0", 1.0, 1.0),
    Algorithm("MAML, Nesterov", by_acceleration, "√κ log(D/δ)", "Mem √κ log(D/δ)", "0", 0.5, 0.5),
    Algorithm(TRUNCATED, truncated, "κ log(D/δ)", "Mem κ log(1/ε)", "ε", 1.0, 1.0),
    Algorithm(IMPLICIT, implicit, "√κ log(D/δ)", "Mem", "δ", 0.5, 0.0),
)


def measure(algorithm: Algorithm, problem: Problem, delta: float, seed: int, with_memory: bool) -> Measurement:
    """One meta-gradient: its cost and its errors."""
    task, theta = problem.task, problem.theta
    learner, plain = algorithm.learner(problem, delta), model_at(theta)
    found: list[Tensor] = []
    work = flops(lambda: found.append(meta_gradient(learner, task)))
    inner_gradient = lambda: torch.autograd.grad(mse(plain(task.support[0]), task.support[1]), plain.weight)  # noqa: E731
    with idf.record() as history:
        (phi,) = learner.adapt(task.support).values()
    steps = int(history[0].info.iterations)
    exact = exact_meta_gradient(task, theta, REGULARIZATION)
    by_hand = exact if algorithm.name == IMPLICIT else derivative_of_steps(problem, algorithm.name, steps)
    memory = peak_memory(lambda: meta_gradient(learner, task)) / peak_memory(inner_gradient) if with_memory else None
    return Measurement(
        algorithm.name,
        problem.kappa,
        delta,
        seed,
        steps,
        work / flops(inner_gradient),
        float((phi.flatten() - solution(task, theta, REGULARIZATION)).norm()),
        float((found[0] - exact).norm()),
        float((found[0] - by_hand).norm()),
        memory,
    )


def derivative_of_steps(problem: Problem, name: str, steps: int) -> Tensor:
    """(dφ_K/dθ)ᵀ ∇L(φ_K) of the algorithm from θ, with no autograd: in eigenvectors of H, number by number."""
    task, theta = problem.task, problem.theta
    h, Q = torch.linalg.eigh(hessian(task.support[0]))
    start, pull = Q.mT @ theta, Q.mT @ gradient(torch.zeros_like(theta), task.support)
    momentum = accelerated(problem.kappa, 0.0).momentum if name == "MAML, Nesterov" else 0.0
    # φ and dφ/dθ follow the same recurrence; ∇G = (h + λ)φ − λθ + pull.
    x = torch.stack([start, torch.ones_like(start)])
    constant = torch.stack([pull - REGULARIZATION * start, torch.full_like(start, -REGULARIZATION)])
    velocity = torch.zeros_like(x)
    for _ in range(steps):
        slope = (h + REGULARIZATION) * x + constant
        velocity = momentum * velocity + slope
        x = x - (slope + momentum * velocity) / problem.kappa
    phi, derivative = x
    return Q @ (derivative * (Q.mT @ gradient(Q @ phi, task.query)))


def sweep(kappas: list[float], deltas: list[float], seeds: int) -> list[Measurement]:
    """All algorithms at each κ for the usual δ, and at each δ for the usual κ."""
    points = sorted({(kappa, DELTA) for kappa in kappas} | {(KAPPA, delta) for delta in deltas})
    cells = list(itertools.product(points, range(seeds), ALGORITHMS))
    return [
        measure(algorithm, problem(kappa, seed), delta, seed, with_memory=seed == 0 and delta == DELTA)
        for (kappa, delta), seed, algorithm in track(cells, "table 1")
    ]


def run(out: Path, *, quick: bool) -> None:
    """Measure, write table1.csv, table1.json and table1.png into ``out``, and check the paper's claims."""
    out.mkdir(parents=True, exist_ok=True)
    kappas = [10.0, 20.0, 30.0, 50.0] if quick else [10.0, 30.0, 100.0, 300.0, 1000.0]
    deltas = [10.0**-k for k in ((2, 3, 6) if quick else range(1, 9))]
    measurements = sweep(kappas, deltas, seeds=2 if quick else 5)
    rows = [asdict(m) for m in measurements]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / "table1.csv", text.getvalue().encode())
    report(measurements, out)


class Fits(NamedTuple):
    """What the measurements of an algorithm say."""

    compute: Fit
    """Work ∝ κ^slope."""
    memory: Fit
    """Peak memory ∝ κ^slope."""
    decades: Fit
    """Work = intercept + slope · log₁₀(1/δ)."""
    error: Fit
    """Error against the exact meta-gradient ∝ δ^slope."""


def fits_of(measurements: list[Measurement], name: str) -> Fits:
    """The fits of one algorithm."""
    ours = [m for m in measurements if m.algorithm == name]
    by_kappa, by_delta = [m for m in ours if m.delta == DELTA], [m for m in ours if m.kappa == KAPPA]
    # Where δ is not well below ε, truncated backpropagation keeps all its steps.
    below = [m for m in by_delta if m.delta < 0.2 * EPSILON]
    in_memory = [m for m in by_kappa if m.memory is not None]
    return Fits(
        power([m.kappa for m in by_kappa], [m.gradients for m in by_kappa]),
        power([m.kappa for m in in_memory], [m.memory for m in in_memory]),
        line([-math.log10(m.delta) for m in below], [m.gradients for m in below]),
        power([m.delta for m in by_delta], [m.error for m in by_delta]),
    )


def report(measurements: list[Measurement], out: Path) -> None:
    """Fit, print the table, draw, and check the claims."""
    fits = {a.name: fits_of(measurements, a.name) for a in ALGORITHMS}
    content = {name: {k: v._asdict() for k, v in fit._asdict().items()} for name, fit in fits.items()}
    write_atomically(out / "table1.json", json.dumps(content, indent=2).encode())
    # iMAML's in units of δ.
    rows = {a.name: [m for m in measurements if m.algorithm == a.name] for a in ALGORITHMS}
    worst = {
        name: max(m.error_of_algorithm / (m.delta if name == IMPLICIT else 1) for m in row)
        for name, row in rows.items()
    }
    table = Table(title="Table 1: the paper's (Õ) | measured, exponents of κ with 95 % confidence intervals")
    for column in ("algorithm", "compute", "", "memory", "", "error", "", "error to the exact one"):
        table.add_column(column)
    for a in ALGORITHMS:
        fit = fits[a.name]
        error = f"≤ {worst[a.name]:.2g}" + (" δ" if a.name == IMPLICIT else "")
        table.add_row(
            a.name,
            a.compute,
            f"κ^({fit.compute})",
            a.memory,
            f"κ^({fit.memory})",
            a.error,
            error,
            "levels off" if a.name == TRUNCATED else f"δ^({fit.error})",
        )
    Console().print(table)
    draw(measurements, fits, out)
    check(claims(measurements, fits, worst))


def claims(measurements: list[Measurement], fits: dict[str, Fits], worst: dict[str, float]) -> list[Claim]:
    """The rows of the table as sentences. Õ hides logarithms, which over these κ may look like a power of 0.1."""
    said: list[Claim] = []
    accurate = max(m.distance / m.delta for m in measurements)
    said.append(Claim("every inner solution is δ-accurate", f"‖φ − φ*‖ ≤ {accurate:.3f} δ", accurate <= 1))
    for a in ALGORITHMS:
        fit = fits[a.name]
        near = abs(fit.compute.slope - a.compute_exponent) <= 0.1
        said.append(Claim(f"{a.name}: compute ∝ κ^{a.compute_exponent:g}", f"κ^({fit.compute})", near))
        linear = fit.decades.explained >= 0.98
        said.append(
            Claim(
                f"{a.name}: compute grows as log(1/δ)",
                f"{fit.decades.slope:.0f} gradients a decade, R² {fit.decades.explained:.4f}",
                linear,
            )
        )
        # What iMAML's grows by is two numbers for each CG step, from which the condition number is reported.
        near = abs(fit.memory.slope - a.memory_exponent) <= (0.1 if a.memory_exponent else 0.05)
        growth = f"∝ κ^{a.memory_exponent:g}" if a.memory_exponent else "does not depend on κ"
        said.append(Claim(f"{a.name}: memory {growth}", f"κ^({fit.memory})", near))
    for name in ("MAML, GD", "MAML, Nesterov"):
        said.append(Claim(f"{name}: the exact derivative of its steps", f"to {worst[name]:.1e}", worst[name] <= 1e-10))
    said.append(Claim(f"{TRUNCATED}: error ≤ ε", f"{worst[TRUNCATED]:.4f}, ε = {EPSILON}", worst[TRUNCATED] <= EPSILON))
    # The inner error passes through (I + H/λ)⁻¹, whose norm is at most λ = ½ here, and the linear solve adds its δ.
    bound = 1 + REGULARIZATION
    said.append(Claim(f"{IMPLICIT}: error ≤ {bound:g} δ", f"{worst[IMPLICIT]:.3f} δ", worst[IMPLICIT] <= bound))
    slope = fits[IMPLICIT].error
    said.append(Claim(f"{IMPLICIT}: error ∝ δ", f"δ^({slope})", abs(slope.slope - 1) <= 0.1))
    return said


def draw(measurements: list[Measurement], fits: dict[str, Fits], out: Path) -> None:
    """Compute and memory against κ, error against δ."""
    figure, (compute, memory, error) = subplots(1, 3, figsize=(13, 4.6))
    for a, marker in zip(ALGORITHMS, "os^D", strict=True):
        ours, fit = [m for m in measurements if m.algorithm == a.name], fits[a.name]
        by_kappa, by_delta = [m for m in ours if m.delta == DELTA], [m for m in ours if m.kappa == KAPPA]
        in_memory = [m for m in by_kappa if m.memory is not None]
        _points(compute, [(m.kappa, m.gradients) for m in by_kappa], marker, fit.compute, f"{a.name}: κ")
        _points(memory, [(m.kappa, m.memory) for m in in_memory], marker, fit.memory, f"{a.name}: κ")
        levels_off = a.name == TRUNCATED
        label = f"{a.name}: levels off" if levels_off else f"{a.name}: δ"
        _points(error, [(m.delta, m.error) for m in by_delta], marker, None if levels_off else fit.error, label)
    kappas = sorted({m.kappa for m in measurements})
    for axis in (compute, memory):
        axis.set_xticks(kappas, [f"{k:g}" for k in kappas])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("condition number κ")
    compute.set(ylabel="work, in gradients of the support loss", title=f"Compute (δ = {_power_of_ten(DELTA)})")
    memory.set(ylabel="peak memory, in peaks of one gradient", title=f"Memory (δ = {_power_of_ten(DELTA)})")
    error.set(xlabel="accuracy δ", ylabel="error of the meta-gradient", title=f"Error to the exact one (κ = {KAPPA:g})")
    error.invert_xaxis()
    for axis in (compute, memory, error):
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize="small", frameon=False)
    figure.tight_layout()
    save(figure, out / "table1.png")


def _points(axis: Axes, points: list[tuple[float, Any]], marker: str, fit: Fit | None, label: str) -> None:
    """On logarithmic axes, with the fitted line."""
    named = label if fit is None else f"{label}$^{{{fit.slope:.2f}}}$"
    x, y = zip(*points, strict=True)
    (dots,) = axis.loglog(x, y, marker, markersize=6, alpha=0.6, markeredgewidth=0, label=named)
    if fit is not None:
        ends = np.array([min(x), max(x)])
        axis.loglog(ends, np.exp(fit.intercept) * ends**fit.slope, color=dots.get_color(), linewidth=1)


def _power_of_ten(value: float) -> str:
    return f"10$^{{{math.log10(value):.0f}}}$"
