"""The table of linear solvers, and the checks that each of them must pass.

The residual is always computed here, in float64; what a solver says of itself is held against it. A check takes a
maker ``settings -> solver``, so that a broken solver can be put through it too (``test_planted_bugs.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

import implicitdiff as idf
from implicitdiff.linear_solvers.system import initial
from implicitdiff.operators import DenseOperator
from implicitdiff.preconditioners import Jacobi

from ..problems import SYSTEMS, System, random, rotated, spread

Maker = Callable[..., idf.LinearSolver]


class MinimalResidualState(NamedTuple):
    x: Tensor
    residual: Tensor
    residual_norm: Tensor


class MinimalResidual(idf.IterativeLinearSolver):
    """A user's own: along the residual to the point where it is smallest. No masks, no guards: the base has them."""

    def start(self, A: idf.LinearOperator, b: Tensor, x0: Tensor | None) -> MinimalResidualState:
        x, r = initial(A, b, x0)
        return MinimalResidualState(x, r, r.norm(dim=-1))

    def step(self, A: idf.LinearOperator, state: MinimalResidualState) -> MinimalResidualState:
        x, r, _ = state
        Ar = A(r)
        length = (r * Ar).sum(-1, keepdim=True) / (Ar * Ar).sum(-1, keepdim=True)
        return MinimalResidualState(x + length * r, r - length * Ar, (r - length * Ar).norm(dim=-1))


TRIVIAL = {"scalar", "empty"}
WELL_CONDITIONED = TRIVIAL | {"clustered", "general", "contraction"}
DEFINITE = TRIVIAL | {"definite", "clustered", "Poisson"}
SYMMETRIC = DEFINITE | {"indefinite", "T² − √3·I", "singular"}
ALL = set(SYSTEMS)


@dataclass(frozen=True)
class Entry:
    make: Maker
    claims: set[str]
    """The systems of the bank that it promises to solve."""
    iterative: bool = True
    """Whether it takes x0, max_iterations, preconditioner and warm_start."""


SOLVERS = {
    "CG": Entry(idf.CG, DEFINITE),
    "CG, Jacobi": Entry(lambda **s: idf.CG(**{"preconditioner": Jacobi(), **s}), DEFINITE),
    "MINRES": Entry(idf.MINRES, SYMMETRIC),
    "MINRES, Jacobi": Entry(lambda **s: idf.MINRES(**{"preconditioner": Jacobi(), **s}), SYMMETRIC - {"singular"}),
    "GMRES": Entry(lambda **s: idf.GMRES(restart=100, **s), ALL),
    "GMRES(5)": Entry(lambda **s: idf.GMRES(restart=5, **s), WELL_CONDITIONED),
    "BiCGStab": Entry(idf.BiCGStab, WELL_CONDITIONED | {"definite", "indefinite", "singular"}),
    "NormalCG": Entry(idf.NormalCG, ALL - {"Poisson", "T² − √3·I"}),
    "LSMR": Entry(idf.LSMR, ALL - {"Poisson"}),
    "SciPy: minres": Entry(partial(idf.SciPy, "minres"), SYMMETRIC - {"Poisson"}, iterative=False),
    "SciPy: lsmr": Entry(partial(idf.SciPy, "lsmr"), ALL, iterative=False),
    "SciPy: bicgstab": Entry(partial(idf.SciPy, "bicgstab"), WELL_CONDITIONED, iterative=False),
    "Neumann": Entry(lambda **s: idf.Neumann(terms=80, **s), {"empty", "contraction"}, iterative=False),
    "Dense": Entry(idf.Dense, ALL, iterative=False),
    "Auto": Entry(idf.Auto, ALL, iterative=False),
    "a user's own": Entry(MinimalResidual, WELL_CONDITIONED),
}
ITERATIVE = [name for name, entry in SOLVERS.items() if entry.iterative]
CLAIMS = [(name, system) for name, entry in SOLVERS.items() for system in sorted(entry.claims)]
RTOL = {torch.float64: 1e-9, torch.float32: 5e-4}
"""In float32, rounding Poisson's x alone moves b by eps·‖A‖·‖x‖/‖b‖ = 6e-8 · 4 · 900 = 2e-4."""


def true_residual(A: Tensor, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """‖b − A x‖ / ‖b‖ in float64, and what rounding in x's own dtype may add when a solver computes the same."""
    eps = torch.finfo(x.dtype).eps
    A, x, b = A.double(), x.double(), b.double()
    norm = torch.linalg.vector_norm(b, dim=-1)
    norm = torch.where(norm > 0, norm, 1)
    residual = torch.linalg.vector_norm(b - (A @ x.unsqueeze(-1)).squeeze(-1), dim=-1)
    size = torch.linalg.vector_norm(b.abs() + (A.abs() @ x.abs().unsqueeze(-1)).squeeze(-1), dim=-1)
    return residual / norm, 4 * eps * size / norm


def assert_solved(A: Tensor, x: Tensor, b: Tensor, rtol: float) -> None:
    residual, rounding = true_residual(A, x, b)
    assert bool((residual <= 1.001 * rtol + rounding).all()), f"residual {residual}, asked {rtol}"


def check_solves(make: Maker, system: System, dtype: torch.dtype = torch.float64) -> None:
    """Solves, and says so: plain, transposed, in a batch, and under vmap over A and b and over b alone."""
    rtol = RTOL[dtype]
    solver = make(rtol=rtol, on_failure="raise")
    A, b, x = system.matrix.to(dtype), system.b.to(dtype), system.x.to(dtype)

    def solve(A: Tensor, b: Tensor) -> Tensor:
        return solver(DenseOperator(A, system.structure), b).value

    value = solve(A, b)
    assert_solved(A, value, b, rtol)
    # A relative residual r lets x be off by condition · r; rounding of A and b alone makes it eps.
    error = system.condition * (rtol + 4 * torch.finfo(dtype).eps)
    assert float((value - x).norm()) <= 1.01 * error * float(x.norm())

    transposed = (A.mT @ x.unsqueeze(-1)).squeeze(-1)
    assert_solved(A.mT, solver(DenseOperator(A, system.structure).T, transposed).value, transposed, rtol)

    As, bs = torch.stack([A, 1.1 * A, A]), torch.stack([b, 3 * b, transposed])
    assert_solved(As, solve(As, bs), bs, rtol)
    assert_solved(As, vmap(solve)(As, bs), bs, rtol)
    assert_solved(A, vmap(solve, (None, 0))(A, bs), bs, rtol)


def check_never_claims_falsely(make: Maker, system: System, dtype: torch.dtype, rtol: float) -> None:
    """Whatever the system and the tolerance: converged means that the test's own residual is small too."""
    A, b = system.matrix.to(dtype), torch.stack([1e-3 * system.b, random(40, len(system.b))]).to(dtype)
    solution = make(rtol=rtol, on_failure="ignore")(DenseOperator(A, system.structure), b)
    residual, rounding = true_residual(A, solution.value, b)
    false = solution.info.converged & ~(residual <= 1.001 * rtol + rounding)
    assert not bool(false.any()), f"claimed {solution.info.residual_norm}, is {residual}"
    assert torch.equal(solution.info.converged, solution.info.status == idf.Status.CONVERGED)


def check_scales(make: Maker, system: System, dtype: torch.dtype = torch.float64) -> None:
    """b = 0 gives exactly 0 in 0 iterations; 1e-30·b and 1e30·b solve as b does, in one batch."""
    b = torch.stack([factor * system.b for factor in (1.0, 0.0, 1e-30, 1e30)]).to(dtype)
    solution = make(rtol=RTOL[dtype], on_failure="ignore")(system.operator(dtype), b)
    assert bool(solution.info.converged.all()), solution.info
    assert torch.equal(solution.value[1], torch.zeros_like(solution.value[1]))
    assert int(solution.info.iterations[1]) == 0
    assert_solved(system.matrix.to(dtype), solution.value, b, RTOL[dtype])
    x = solution.value.double() / torch.tensor([[1.0], [1.0], [1e-30], [1e30]], dtype=torch.float64)
    for i in (2, 3):
        assert float((x[i] - x[0]).norm()) <= 2 * system.condition * RTOL[dtype] * float(x[0].norm())
        # ‖b‖ is not a power of two, so that b / ‖b‖ rounds, and residuals drift, otherwise at another scale.
        steps, at_one = (int(solution.info.iterations[j]) for j in (i, 0))
        assert abs(steps - at_one) <= 1 + 0.1 * at_one


def check_per_system(make: Maker, dtype: torch.dtype = torch.float64) -> None:
    """Condition numbers 1 … 1e8 in one batch: each system takes the steps that it takes alone, and is solved."""
    # eps · condition bounds what can be reached.
    conditions, rtol = ((1.0, 1e2, 1e5, 1e8), 1e-6) if dtype == torch.float64 else ((1.0, 1e1, 1e2, 1e3), 1e-3)
    A = rotated(torch.stack([1 / spread(c, 8) for c in conditions]), 3).to(dtype)
    b = random(5, 4, 8, dtype=dtype)
    solver = make(rtol=rtol, on_failure="ignore")
    together = solver(DenseOperator(A, "positive_definite"), b)
    assert bool(together.info.converged.all()), together.info
    assert_solved(A, together.value, b, rtol)
    for i in range(4):
        alone = solver(DenseOperator(A[i], "positive_definite"), b[i])
        # Batched products round in another order: a late step may come a few earlier or later.
        some = 0.1 * int(alone.info.iterations)
        assert abs(int(together.info.iterations[i]) - int(alone.info.iterations)) <= some
