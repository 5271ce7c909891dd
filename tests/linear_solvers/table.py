"""The table of linear solvers, and what each of them promises to solve."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

import implicitdiff as idf
from implicitdiff.linear_solvers.system import initial
from implicitdiff.preconditioners import Jacobi
from implicitdiff.testing.linear_solver import Maker, true_residual

from ..problems import SYSTEMS


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
    "MixedPrecision": Entry(
        lambda **s: idf.MixedPrecision(idf.CG(**s)), DEFINITE - {"Poisson"}, iterative=False
    ),
    "Auto": Entry(idf.Auto, ALL, iterative=False),
    "a user's own": Entry(MinimalResidual, WELL_CONDITIONED),
}
ITERATIVE = [name for name, entry in SOLVERS.items() if entry.iterative]
CLAIMS = [(name, system) for name, entry in SOLVERS.items() for system in sorted(entry.claims)]


def assert_passes(failures: Iterable[str]) -> None:
    found = list(failures)
    assert not found, found


def assert_solved(A: Tensor, x: Tensor, b: Tensor, rtol: float) -> None:
    residual, rounding = true_residual(A, x, b)
    assert bool((residual <= 1.001 * rtol + rounding).all()), f"residual {residual}, asked {rtol}"
