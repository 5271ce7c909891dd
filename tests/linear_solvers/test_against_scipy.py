"""As many iterations as SciPy's solvers take to the same tolerance: a slow method is a wrong method."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

import implicitdiff as idf
from implicitdiff.preconditioners import Jacobi

from ..problems import SYSTEMS, System
from .table import SOLVERS, Maker

RTOL = 1e-8
CASES = [
    ("CG", "definite"),
    ("CG", "clustered"),
    ("CG", "Poisson"),
    ("CG, Jacobi", "definite"),
    ("MINRES", "definite"),
    ("MINRES", "indefinite"),
    ("MINRES", "singular"),
    ("MINRES", "T² − √3·I"),
    ("GMRES", "general"),
    ("GMRES", "cyclic shift"),
    ("GMRES", "T² − √3·I"),
    ("GMRES(5)", "general"),
    ("GMRES(5)", "contraction"),
    ("GMRES", "2 by 2"),
    ("BiCGStab", "definite"),
    ("BiCGStab", "Poisson"),
    ("BiCGStab", "singular"),
    ("BiCGStab", "general"),
    ("BiCGStab", "contraction"),
    ("LSMR", "definite"),
    ("LSMR", "indefinite"),
    ("LSMR", "singular"),
    ("LSMR", "general"),
    ("LSMR", "cyclic shift"),
    ("LSMR", "2 by 2"),
]


def iterations_of_scipy(name: str, system: System) -> int:
    method = name.split("(")[0].split(",")[0].lower()
    A, b = system.matrix.numpy(), system.b.numpy()
    notes: list[float] = []
    settings: dict[str, object] = {"rtol": RTOL, "callback": lambda _: notes.append(0.0)}
    if method == "gmres":
        settings |= {"restart": 5 if name == "GMRES(5)" else 100, "callback_type": "pr_norm"}
    if method == "minres":
        # SciPy stops it by ‖r‖ ≤ rtol·‖A‖·‖x‖: count its steps to our criterion instead.
        settings = {"rtol": 1e-14, "callback": lambda x: notes.append(np.linalg.norm(b - A @ x))}
    if method == "lsmr":
        return int(scipy.sparse.linalg.lsmr(A, b, atol=0, btol=RTOL, conlim=0, maxiter=10 * len(b))[2])
    if "Jacobi" in name:
        settings["M"] = np.diag(1 / np.diag(A))
    getattr(scipy.sparse.linalg, method)(A, b, **settings)
    if method == "minres":
        return 1 + next(i for i, norm in enumerate(notes) if norm <= RTOL * np.linalg.norm(b))
    return len(notes)


def check_iterations(make: Maker, name: str, system: System) -> None:
    info = make(rtol=RTOL, on_failure="ignore")(system.operator(), system.b).info
    assert bool(info.converged)
    assert abs(int(info.iterations) - iterations_of_scipy(name, system)) <= 2


@pytest.mark.parametrize(("name", "system"), CASES)
def test_takes_as_many_iterations_as_scipy(name: str, system: str) -> None:
    """Fails for the old residual in the direction's update, and for a restart that nobody needed."""
    check_iterations(SOLVERS[name].make, name, SYSTEMS[system])


def test_minres_takes_the_25_iterations_of_the_textbook_problem() -> None:
    s = SYSTEMS["T² − √3·I"]
    assert abs(int(idf.MINRES(rtol=1e-10)(s.operator(), s.b).info.iterations) - 25) <= 1


def test_krylov_methods_are_exact_after_as_many_steps_as_eigenvalues() -> None:
    """Three distinct eigenvalues and a cluster within 1e-8 of 5: four or five steps."""
    s = SYSTEMS["clustered"]
    for solver in (idf.CG(rtol=RTOL), idf.MINRES(rtol=RTOL), idf.GMRES(rtol=RTOL), idf.CG(preconditioner=Jacobi())):
        steps = int(solver(s.operator(), s.b).info.iterations)
        assert steps <= 5 or solver.preconditioner is not None
    assert torch.linalg.eigvalsh(s.matrix).round(decimals=6).unique().numel() == 4
