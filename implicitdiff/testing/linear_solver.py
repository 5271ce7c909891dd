"""Whether a linear solver keeps what every linear solver must keep.

The residual is always computed here, in float64; what a solver says of itself is held against it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ..info import SolveInfo, Status
from ..linear_solvers import Auto, LinearSolver
from ..linear_solvers.base import as_linear_solver
from ..operators import DenseOperator, FunctionOperator, Structure
from ..operators.base import STRUCTURES
from .systems import SYSTEMS, System, random, rotated, spread

Maker = Callable[..., LinearSolver]
"""From the settings rtol and on_failure to the solver with them."""

RTOL = {torch.float64: 1e-9, torch.float32: 5e-4}
"""In float32, rounding Poisson's x alone moves b by eps·‖A‖·‖x‖/‖b‖ = 6e-8 · 4 · 900 = 2e-4."""

SLACK = 2
"""Products that a method may spend on checking its result, before more than a direct method's are worth a note."""


@dataclass
class LinearSolverReport:
    """What :func:`check_linear_solver` found; printed, it explains each failure.

    >>> report = LinearSolverReport("CG", ["negative curvature: it says that it converged."])
    >>> report.ok
    False
    >>> print(report)
    CG fails 1 check:
    * negative curvature: it says that it converged.
    """

    solver: str
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is no failure, but worth a look."""

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def __str__(self) -> str:
        count = len(self.failures)
        head = f"{self.solver} fails {count} check{'s' if count != 1 else ''}:"
        if self.ok:
            head = f"{self.solver} keeps everything that was checked."
        return "\n".join([head, *(f"* {f}" for f in self.failures), *(f"note: {note}" for note in self.notes)])


def check_linear_solver(solver: Any, structure: Structure = "general") -> LinearSolverReport:
    """Put a linear solver, or any callable (A, b) -> x, through the checks that this library's own solvers pass.

    ``structure`` is what it asks of an operator: it must solve the well-conditioned systems of the bank that have it
    ("general" includes all). On all others it may fail, but must not claim success. Checked in float64 and float32:
    plain, transposed, in a batch, under vmap over A and b and over b alone; b = 0 and b from 1e-30 to 1e30; a batch of
    condition numbers from 1 to 1e8, each with its own stopping; NaNs that must stay in their system; negative
    curvature; and the number of products. The systems have up to 100 unknowns, and one of them has none, n = 0.

    What it cannot see: a method that converges, but slower than it should. More than four products per unknown are a
    failure, more than a direct or a Krylov method takes are a note.

    It returns a :class:`LinearSolverReport`. Raises TypeError for a class in the place of a solver, or for another
    structure; what the solver itself raises is a failure in the report.

    >>> import implicitdiff as idf
    >>> print(check_linear_solver(idf.CG(), structure="positive_definite"))
    CG keeps everything that was checked.
    >>> print(check_linear_solver(lambda A, b: b / A.diagonal()).failures[0])
    solves 'clustered' in float64: the true residual is 2.3e+00, asked were 1.0e-06.
    """
    if isinstance(solver, type) or structure not in STRUCTURES:
        raise TypeError(f"got {solver!r} and {structure!r}: give a solver such as CG() and one of {STRUCTURES}.")
    known: LinearSolver = as_linear_solver(solver, Auto)
    settable = isinstance(solver, LinearSolver)

    def make(**settings: Any) -> LinearSolver:
        made = copy.copy(known)
        vars(made).update(settings if settable else {"on_failure": "ignore"})
        return made

    report = LinearSolverReport(known.name)
    for dtype in (torch.float64, torch.float32):
        rtol = RTOL[dtype] if settable else max(1e-6, RTOL[dtype])
        for name in _promised(structure):
            report.failures += _outcome(solves, make, SYSTEMS[name], dtype, rtol)
        for system in SYSTEMS.values():
            report.failures += _outcome(claims_truly, make, system, dtype, rtol)
        report.failures += _outcome(is_indifferent_to_scale, make, SYSTEMS[_ordinary(structure)], dtype, rtol)
    report.failures += _outcome(keeps_systems_apart, make)
    report.failures += _outcome(stops_per_system, make) if settable else []
    if settable:
        report.failures += _outcome(takes_few_products, make)
    if settable and report.ok:
        report.notes += takes_no_more_than_needed(make)
    return report


def _outcome(check: Callable[..., Iterator[str]], make: Maker, *details: Any) -> list[str]:
    """The failures of one check; an exception is one too."""
    try:
        return list(check(make, *details))
    except Exception as error:
        of = "".join(f" '{d.name}'" for d in details if isinstance(d, System))
        return [f"{check.__name__.replace('_', ' ')}{of}: it raises {type(error).__name__}: {error}"]


WELL_CONDITIONED: dict[Structure, tuple[str, ...]] = {
    "positive_definite": ("scalar", "empty", "clustered", "definite"),
    "symmetric": ("indefinite", "singular"),
    "general": ("general", "contraction"),
}


def _promised(structure: Structure) -> list[str]:
    weaker = STRUCTURES[STRUCTURES.index(structure) :]
    return [name for other in reversed(weaker) for name in WELL_CONDITIONED[other]]


def _ordinary(structure: Structure) -> str:
    return "definite" if structure != "general" else "general"


def true_residual(A: Tensor, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """‖b − A x‖ / ‖b‖ in float64, and what rounding in x's own dtype may add when a solver computes the same."""
    eps = torch.finfo(x.dtype).eps
    A, x, b = A.double(), x.double(), b.double()
    norm = torch.linalg.vector_norm(b, dim=-1)
    norm = torch.where(norm > 0, norm, 1)
    residual = torch.linalg.vector_norm(b - (A @ x.unsqueeze(-1)).squeeze(-1), dim=-1)
    size = torch.linalg.vector_norm(b.abs() + (A.abs() @ x.abs().unsqueeze(-1)).squeeze(-1), dim=-1)
    return residual / norm, 4 * eps * size / norm


def _unsolved(what: str, A: Tensor, x: Tensor, b: Tensor, rtol: float) -> Iterator[str]:
    residual, rounding = true_residual(A, x, b)
    if not bool((x.isfinite().all(-1) & (residual <= 1.001 * rtol + rounding)).all()):
        worst = float(residual.max()) if residual.numel() else math.nan
        yield f"{what}: the true residual is {worst:.1e}, asked were {rtol:.1e}."


def solves(make: Maker, system: System, dtype: torch.dtype, rtol: float) -> Iterator[str]:
    """Plain, transposed, in a batch, and under vmap over A and b and over b alone; and says so."""
    solver = make(rtol=rtol, on_failure="ignore")
    A, b, x = system.matrix.to(dtype), system.b.to(dtype), system.x.to(dtype)
    what = f"solves '{system.name}' in {str(dtype).removeprefix('torch.')}"

    def solve(A: Tensor, b: Tensor) -> Tensor:
        return solver(DenseOperator(A, system.structure), b).value

    solution = solver(system.operator(dtype), b)
    failures = list(_unsolved(what, A, solution.value, b, rtol))
    if failures:
        yield from failures
        return  # the other forms will fail as well
    if not bool(solution.info.converged):
        yield f"{what}: it does, and the report says {Status(int(solution.info.status)).name}."
    # A relative residual r lets x be off by condition · r; rounding of A and b alone makes it eps.
    error = float((solution.value - x).norm() / x.norm().clamp(min=1e-30)) if x.numel() else 0.0
    if error > 1.01 * system.condition * (rtol + 4 * torch.finfo(dtype).eps):
        yield f"{what}: the error is {error:.1e}, at a condition number of {system.condition:.1e}."

    transposed = (A.mT @ x.unsqueeze(-1)).squeeze(-1)
    found = solver(DenseOperator(A, system.structure).T, transposed).value
    yield from _unsolved(f"{what}, transposed", A.mT, found, transposed, rtol)
    As, bs = torch.stack([A, 1.1 * A, A]), torch.stack([b, 3 * b, transposed])
    yield from _unsolved(f"{what}, in a batch", As, solve(As, bs), bs, rtol)
    yield from _unsolved(f"{what}, under vmap", As, vmap(solve)(As, bs), bs, rtol)
    yield from _unsolved(f"{what}, under vmap over b", A, vmap(solve, (None, 0))(A, bs), bs, rtol)


def claims_truly(make: Maker, system: System, dtype: torch.dtype, rtol: float) -> Iterator[str]:
    """Whatever the system and the tolerance: converged means that the residual computed here is small too."""
    A, b = system.matrix.to(dtype), torch.stack([1e-3 * system.b, random(40, len(system.b))]).to(dtype)
    solution = make(rtol=rtol, on_failure="ignore")(DenseOperator(A, system.structure), b)
    residual, rounding = true_residual(A, solution.value, b)
    false = solution.info.converged & ~(residual <= 1.001 * rtol + rounding)
    what = f"claims on '{system.name}' in {str(dtype).removeprefix('torch.')} at rtol {rtol:.0e}"
    if bool(false.any()):
        claimed, found = (float(t[false].max()) for t in (solution.info.residual_norm, residual))
        yield f"{what}: it says that it converged to {claimed:.1e}, but the true residual is {found:.1e}."
    if not torch.equal(solution.info.converged, solution.info.status == Status.CONVERGED):
        yield f"{what}: converged and status contradict each other."


def is_indifferent_to_scale(make: Maker, system: System, dtype: torch.dtype, rtol: float) -> Iterator[str]:
    """b = 0 gives exactly 0 in 0 iterations; 1e-30·b and 1e30·b solve as b does, in one batch and 1e-30·b alone."""
    factors = (1.0, 0.0, 1e-30, 1e30)
    b = torch.stack([factor * system.b for factor in factors]).to(dtype)
    A, solver = system.matrix.to(dtype), make(rtol=rtol, on_failure="ignore")
    if any(_unsolved("", A, solver(system.operator(dtype), b[0]).value, b[0], rtol)):
        return  # said already, and not due to a scale
    alone = f"b scaled by 1e-30, alone, in {str(dtype).removeprefix('torch.')}"
    for failure in _unsolved(alone, A, solver(system.operator(dtype), b[2]).value, b[2], rtol):
        yield f"{failure} Is the tolerance an absolute one?"
    solution = solver(system.operator(dtype), b)
    if bool((solution.value[1] != 0).any()) or int(solution.info.iterations[1]) != 0:
        yield "b = 0: the solution must be exactly 0, after 0 iterations."
    residual, rounding = true_residual(A, solution.value, b)
    steps = solution.info.iterations.tolist()
    for i in (0, 2, 3):
        what = f"b scaled by {factors[i]:.0e} in {str(dtype).removeprefix('torch.')}"
        if not (bool(solution.info.converged[i]) and residual[i] <= 1.001 * rtol + rounding[i]):
            yield f"{what}: the relative residual is {float(residual[i]):.1e}. Is the tolerance an absolute one?"
        # ‖b‖ is not a power of two, so that b / ‖b‖ rounds, and residuals drift, otherwise at another scale.
        elif abs(steps[i] - steps[0]) > 1 + 0.1 * steps[0]:
            yield f"{what}: {steps[i]} iterations in the place of {steps[0]}. Is the tolerance an absolute one?"


def stops_per_system(make: Maker, dtype: torch.dtype = torch.float64) -> Iterator[str]:
    """Condition numbers 1 … 1e8 in one batch: each system takes the steps that it takes alone, and is solved."""
    # eps · condition bounds what can be reached.
    conditions, rtol = ((1.0, 1e2, 1e5, 1e8), 1e-6) if dtype == torch.float64 else ((1.0, 1e1, 1e2, 1e3), 1e-3)
    A = rotated(torch.stack([1 / spread(c, 8) for c in conditions]), 3).to(dtype)
    b = random(5, 4, 8, dtype=dtype)
    solver = make(rtol=rtol, on_failure="ignore")
    together = solver(DenseOperator(A, "positive_definite"), b)
    residual, rounding = true_residual(A, together.value, b)
    for i, condition in enumerate(conditions):
        alone = solver(DenseOperator(A[i], "positive_definite"), b[i]).info
        what = f"a system of condition number {condition:.0e} in a batch of others"
        if bool(alone.converged) and not residual[i] <= 1.001 * rtol + rounding[i]:
            found = f"a residual of {float(residual[i]):.1e}"
            yield f"{what}: {found}, but alone it is solved. Is the batch stopped as one?"
        steps, steps_alone = int(together.info.iterations[i]), int(alone.iterations)
        # Batches round in another order, and past n steps rounding decides: a late step may come earlier or later.
        if abs(steps - steps_alone) > 0.5 * steps_alone:
            yield f"{what}: {steps} iterations, but alone {steps_alone}. Is the batch stopped as one?"


def keeps_systems_apart(make: Maker) -> Iterator[str]:
    """A NaN in one system is named there, and the others are as right as without it."""
    s = SYSTEMS["clustered"]
    A, b = s.matrix.expand(3, *s.matrix.shape).clone(), s.b.expand(3, *s.b.shape).clone()
    b[1, 0] = torch.nan
    solver = make(rtol=1e-6, on_failure="ignore")
    solution = solver(DenseOperator(A, s.structure), b)
    if int(solution.info.status[1]) != Status.NON_FINITE:
        yield f"a NaN in one system of a batch: its status is {Status(int(solution.info.status[1])).name}."
    yield from _unsolved("a NaN in one system of a batch: the others", A[::2], solution.value[::2], b[::2], 1e-6)


def takes_few_products(make: Maker) -> Iterator[str]:
    """A Krylov method ends after about n steps of one or two products, and a direct one after n products."""
    counted, n, info = _products(make)
    if counted > 4 * n:
        yield f"{counted} products for {n} unknowns with four distinct eigenvalues: is a direction updated wrongly?"
    if info.matvecs != counted:
        yield f"the report counts {info.matvecs} products, but there were {counted}."


def takes_no_more_than_needed(make: Maker) -> Iterator[str]:
    """With four distinct eigenvalues, a Krylov method takes four steps, and a direct one n products."""
    counted, n, _ = _products(make)
    if n + SLACK < counted <= 4 * n:
        yield (
            f"{counted} products for {n} unknowns with four distinct eigenvalues: a direct method takes {n}, a Krylov "
            f"method five to twelve where no preconditioner changes the eigenvalues. Is a direction updated wrongly?"
        )


def _products(make: Maker) -> tuple[int, int, SolveInfo]:
    """The products for a system with few distinct eigenvalues, the number of unknowns, and the report."""
    s = SYSTEMS["clustered"]
    counts = [0]

    def product(v: Tensor) -> Tensor:
        counts[0] += 1
        return v @ s.matrix.mT

    n = len(s.b)
    operator = FunctionOperator(product, n, rmatvec=product, structure=s.structure, dtype=torch.float64)
    with torch.no_grad():
        solution = make(rtol=1e-8, on_failure="ignore")(operator, s.b)
    return counts[0], n, solution.info
