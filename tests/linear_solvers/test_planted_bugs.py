"""The bugs that peers have had, planted in CG: the checks of this folder must fail for each of them.

Each is planted twice: as it is, where the base class still verifies the true residual, and together with
``Trusting``, where what the loop believes is reported, so that the checks stand alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff._iteration import iterate

from ..problems import SYSTEMS, System
from .table import Maker, check_never_claims_falsely, check_per_system, check_scales, check_solves
from .test_against_scipy import check_iterations


class Trusting(idf.CG):
    """Believes its recursive residual."""

    def _run(self, A: Any, b: Tensor, x: Any, threshold: Tensor) -> Any:
        ended = iterate(lambda state: self.step(A, state), self.start(A, b, x), threshold, 300)
        return self.finish(A, ended.state), ended.iterations, ended.status, ended.state.residual_norm, None


class IterateBeforeLast(idf.CG):
    """Computes the residual of the new iterate and returns the old one."""

    def step(self, A: Any, state: Any) -> Any:
        self.before = state.x
        return super().step(A, state)

    def finish(self, A: Any, state: Any) -> Tensor:
        return getattr(self, "before", state.x)


class OldResidualInDirection(idf.CG):
    """d ← r_old + β d in the place of r_new + β d."""

    def step(self, A: Any, state: Any) -> Any:
        new = super().step(A, state)
        return new._replace(direction=state.residual + new.rho / state.rho * state.direction)


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
        frozen = new.status == idf.Status.INDEFINITE
        return new._replace(status=state.status, residual_norm=torch.where(frozen, 0, new.residual_norm))


def never_claims_falsely(make: Maker, system: System) -> None:
    check_never_claims_falsely(make, system, torch.float64, 1e-2)


def takes_cgs_iterations(make: Maker, system: System) -> None:
    check_iterations(make, "CG", system)


def stops_per_system(make: Maker, system: System) -> None:
    check_per_system(make)


BUGS: list[tuple[type[idf.CG], Callable[..., None], str]] = [
    (IterateBeforeLast, check_solves, "definite"),
    (IterateBeforeLast, check_scales, "definite"),
    (OldResidualInDirection, takes_cgs_iterations, "definite"),
    (MeanResidual, stops_per_system, "definite"),
    (AbsoluteTolerance, check_scales, "definite"),
    (AbsoluteTolerance, never_claims_falsely, "definite"),
    (FrozenAtNegativeCurvature, check_solves, "indefinite"),
]
CLAIMS_FALSELY = [
    (IterateBeforeLast, "definite"),
    (MeanResidual, "definite"),
    (FrozenAtNegativeCurvature, "indefinite"),
]
FAILED = (AssertionError, idf.ConvergenceError)


@pytest.mark.parametrize("trusting", [False, True], ids=["verified", "trusting"])
@pytest.mark.parametrize(("bug", "check", "system"), BUGS)
def test_a_planted_bug_is_found(bug: type[idf.CG], check: Callable[..., None], system: str, trusting: bool) -> None:
    make = type(bug.__name__, (bug, Trusting), {}) if trusting else bug
    with pytest.raises(FAILED):
        check(make, SYSTEMS[system])


@pytest.mark.parametrize(("bug", "system"), CLAIMS_FALSELY)
def test_a_false_claim_is_found_and_the_base_class_makes_none(bug: type[idf.CG], system: str) -> None:
    """The check sees through a claim; and the base class turns each of these bugs into a reported failure."""
    with pytest.raises(AssertionError, match="claimed"):
        never_claims_falsely(type(bug.__name__, (bug, Trusting), {}), SYSTEMS[system])
    never_claims_falsely(bug, SYSTEMS[system])


@pytest.mark.parametrize("solver", [idf.CG, Trusting])
def test_the_checks_pass_without_a_bug(solver: Maker) -> None:
    """So that the failures above are those of the bugs."""
    for _, check, system in BUGS:
        if system != "indefinite":
            check(solver, SYSTEMS[system])
