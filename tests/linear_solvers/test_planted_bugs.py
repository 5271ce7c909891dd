"""The bugs that peers have had, planted in CG: ``check_linear_solver`` must fail for each of them, for its own reason.

Each is planted twice: as it is, where the base class still verifies the true residual, and together with
``Trusting``, where what the loop believes is reported, so that the checks stand alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff._iteration import iterate
from implicitdiff._vectors import inner
from implicitdiff.linear_solvers import System as LinearSystem
from implicitdiff.operators import FunctionOperator
from implicitdiff.preconditioners import Jacobi
from implicitdiff.testing import check_linear_solver


class Trusting(idf.CG):
    """Believes its recursive residual."""

    def _run(self, A: Any, b: Tensor, x: Any, threshold: Tensor) -> Any:
        ended = iterate(lambda state: self.step(A, state), self.start(A, b, x), threshold, 300)
        return self.finish(A, ended.state), ended.iterations, ended.status, ended.state.residual_norm, None


class IterateBeforeLast(idf.CG):
    """Computes the residual of the new iterate and returns the old one."""

    def step(self, A: Any, state: Any) -> Any:
        self.before = state.x.clone()
        return super().step(A, state)

    def finish(self, A: Any, state: Any) -> Tensor:
        return getattr(self, "before", state.x)


class OldResidualInDirection(idf.CG):
    """d ← r_old + β d in the place of r_new + β d."""

    def step(self, A: Any, state: Any) -> Any:
        residual, direction = state.residual.clone(), state.direction.clone()  # the step writes over them
        new = super().step(A, state)
        ratio = torch.as_tensor(new.rho / state.rho).unsqueeze(-1)
        return new._replace(direction=residual + ratio * direction)


class MeanResidual(idf.CG):
    """Stops the batch as one, when its mean residual is small."""

    def step(self, A: Any, state: Any) -> Any:
        new = super().step(A, state)
        norm = new.residual.norm(dim=-1)
        return new._replace(residual_norm=norm.mean().expand(norm.shape))


class AbsoluteTolerance(idf.CG):
    """‖r‖ ≤ rtol, whatever ‖b‖."""

    def _threshold(self, norm: Tensor) -> Tensor:
        return self.rtol / torch.where(norm > 0, norm, 1)


class FrozenAtNegativeCurvature(idf.CG):
    """Takes no step there, and takes that for the end."""

    def step(self, A: Any, state: Any) -> Any:
        new = super().step(A, state)
        frozen = torch.as_tensor(new.status) == idf.Status.INDEFINITE
        norm = torch.where(frozen, 0, torch.as_tensor(new.residual_norm))
        return new._replace(status=state.status, residual_norm=norm)


class NormalEquations(idf.CG):
    """Solves AᵀA x = Aᵀb to the tolerance and calls that solved: its error goes with the square."""

    def solve(self, A: idf.LinearOperator, b: Tensor, x0: Tensor | None = None) -> idf.LinearSolution:
        square = FunctionOperator(
            lambda v: A.rmatvec(A.matvec(v)),
            A.shape[0],
            structure="symmetric",
            dtype=b.dtype,
            batch_shape=A.batch_shape,
        )
        return super().solve(square, A.rmatvec(b), x0)


class ConjugateResiduals(idf.IterativeLinearSolver):
    """Conjugate residuals (Saad 2003, section 6.8), β times a factor that is 1 where it is right."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def start(self, A: Any, b: Tensor, x0: Tensor | None) -> Any:
        x = torch.zeros_like(b) if x0 is None else x0
        r = b - A(x)
        Ar = A(r)
        return ResidualsState(x, r, r, Ar, Ar, inner(r, Ar), r.norm(dim=-1))

    def step(self, A: Any, state: Any) -> Any:
        r, d, Ad = state.residual, state.direction, state.product_of_direction
        alpha = state.rho / inner(Ad, Ad)
        r = r - alpha * Ad
        Ar = A(r)
        beta = self.factor * inner(r, Ar) / state.rho
        return ResidualsState(state.x + alpha * d, r, r + beta * d, Ar, Ar + beta * Ad, inner(r, Ar), r.norm(dim=-1))


class ResidualsState(NamedTuple):
    x: Tensor
    residual: Tensor
    direction: Tensor
    product: Tensor
    product_of_direction: Tensor
    rho: Tensor  # rᵀ A r
    residual_norm: Tensor


def test_a_slow_recurrence_is_worth_a_note() -> None:
    """It converges, so that no check fails; the right recurrence, and a direct method, get no note."""
    wrong, right = (check_linear_solver(ConjugateResiduals(f), "positive_definite") for f in (0.5, 1.0))
    assert wrong.ok, str(wrong)
    assert "note: " in str(wrong)
    assert "Is a direction updated wrongly?" in wrong.notes[0]
    for report in (right, check_linear_solver(idf.Dense()), check_linear_solver(idf.NormalCG())):
        assert report.ok
        assert not report.notes


class AbsoluteOverTheBatch(idf.CG):
    """Takes the tolerance for an absolute one where the largest ‖b‖ of the batch is below 1."""

    def _threshold(self, norm: Tensor) -> Tensor:
        return torch.full_like(norm, self.rtol) / norm.nan_to_num(1.0).max().clamp(max=1)


def test_a_small_b_is_solved_alone_too() -> None:
    report = check_linear_solver(AbsoluteOverTheBatch(), "positive_definite")
    assert len(report.failures) == 2, str(report)  # in two dtypes
    assert all("b scaled by 1e-30, alone" in f and "an absolute one?" in f for f in report.failures)


def test_the_scale_is_not_blamed_where_nothing_is_solved() -> None:
    report = check_linear_solver(Diagonal(), "positive_definite")
    assert report.failures
    assert "absolute" not in str(report)


class Diagonal(idf.LinearSolver):
    """Solves with the diagonal alone."""

    def solve(self, A: idf.LinearOperator, b: Tensor, x0: Tensor | None = None) -> idf.LinearSolution:
        steps = torch.zeros(b.shape[:-1], dtype=torch.int64)
        x = b / A.diagonal()
        return idf.LinearSolution(x, self._info(LinearSystem(A, b), b, x, steps, steps + idf.Status.STAGNATED))


REASONS = [
    (IterateBeforeLast, "solves 'definite' in float64: the true residual is"),
    (
        OldResidualInDirection,
        "with four distinct eigenvalues: is a direction updated wrongly?",
    ),
    (MeanResidual, "Is the batch stopped as one?"),
    (AbsoluteTolerance, "Is the tolerance an absolute one?"),
    (FrozenAtNegativeCurvature, "claims on 'indefinite' in float64"),
    (NormalEquations, "in float64: the true residual is"),
]


@pytest.mark.parametrize("trusting", [False, True], ids=["verified", "trusting"])
@pytest.mark.parametrize(("bug", "reason"), REASONS)
def test_a_planted_bug_is_found_and_explained(bug: type[idf.CG], reason: str, trusting: bool) -> None:
    make = type(bug.__name__, (bug, Trusting), {}) if trusting else bug
    report = check_linear_solver(make(), "positive_definite")
    explained = [failure for failure in report.failures if reason in failure]
    if bug is FrozenAtNegativeCurvature and not trusting:  # the base class turns it into a reported failure
        assert report.ok
    else:
        assert explained, str(report)
        assert reason in str(report)


@pytest.mark.parametrize("bug", [IterateBeforeLast, OldResidualInDirection, MeanResidual, FrozenAtNegativeCurvature])
def test_the_base_class_lets_no_bug_claim_falsely(bug: type[idf.CG]) -> None:
    report = check_linear_solver(bug(), "positive_definite")
    assert not [failure for failure in report.failures if failure.startswith("claims")]


OURS = {
    "CG": (idf.CG(), "positive_definite"),
    "CG, Jacobi": (idf.CG(preconditioner=Jacobi()), "positive_definite"),
    "what is checked without a bug": (Trusting(), "positive_definite"),
    "MINRES": (idf.MINRES(), "symmetric"),
    "GMRES": (idf.GMRES(), "general"),
    "GMRES(5)": (idf.GMRES(restart=5), "positive_definite"),
    "BiCGStab": (idf.BiCGStab(), "general"),
    "NormalCG": (idf.NormalCG(), "general"),
    "LSMR": (idf.LSMR(), "general"),
    "Dense": (idf.Dense(), "general"),
    "Dense, kept": (idf.Dense(warm_start=True), "general"),
    "Auto": (idf.Auto(), "general"),
    "SciPy: lsmr": (idf.SciPy("lsmr"), "general"),
}


@pytest.mark.parametrize("name", OURS)
def test_our_own_solvers_pass(name: str) -> None:
    solver, structure = OURS[name]
    report = check_linear_solver(solver, structure)
    assert report.ok, str(report)


def test_a_plain_callable_is_checked_too() -> None:
    right = check_linear_solver(lambda A, b: torch.linalg.solve(A.to_dense(), b.unsqueeze(-1)).squeeze(-1))
    assert right.failures  # LU does not solve a singular system, though it is a consistent one
    assert all("'singular'" in failure for failure in right.failures)
    wrong = check_linear_solver(lambda A, b: b / A.diagonal())
    assert "the true residual is" in wrong.failures[0]
    crashing = check_linear_solver(lambda A, b: b @ torch.ones(7))
    assert "it raises RuntimeError" in crashing.failures[0]
    with pytest.raises(TypeError, match=r"give a solver such as CG\(\)"):
        check_linear_solver(idf.CG)
