"""Rectangular and rank-deficient systems, against NumPy's least-squares solution of minimum norm."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from torch.func import vmap

import implicitdiff as idf
from implicitdiff import Status
from implicitdiff.operators import DenseOperator, FunctionOperator, SparseOperator

from ..problems import random

SOLVERS = {"LSMR": idf.LSMR(rtol=1e-12), "Dense": idf.Dense(rtol=1e-9)}
EACH = pytest.mark.parametrize("name", SOLVERS)


@EACH
@given(m=st.integers(1, 9), n=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_finds_the_solution_of_minimum_norm(name: str, m: int, n: int, rank: int, seed: int) -> None:
    """Fails for a start outside the range of Aᵀ, for A in the place of Aᵀ, and for a wrong rotation."""
    A = random(seed, m, rank) @ random(seed + 1, rank, n)
    b = random(seed + 2, m)
    if m == n:  # then only a solution is promised; and Dense finds any, where rounding hides that A is singular
        assume(name == "LSMR")
        b = A @ random(seed + 3, n)
    solver = idf.LSMR(rtol=1e-12, on_failure="ignore") if name == "LSMR" else SOLVERS[name]
    x = solver(DenseOperator(A), b).value
    expected = torch.from_numpy(np.linalg.lstsq(A.numpy(), b.numpy(), rcond=1e-12)[0])
    kept = torch.linalg.svdvals(A)
    condition = kept[0] / kept[kept > 1e-12 * kept[0]][-1]
    # LSMR squares the condition number where a residual is left, and both stop at a relative 1e-12 of it.
    assert (x - expected).norm() <= 1e-11 * condition**2 * (1 + expected.norm() + b.norm())


@EACH
def test_a_batch_and_vmap(name: str) -> None:
    A, b = random(1, 4, 7, 3), random(2, 4, 7)
    expected = torch.linalg.lstsq(A, b.unsqueeze(-1)).solution.squeeze(-1)
    together = SOLVERS[name](DenseOperator(A), b)
    assert together.info.converged.tolist() == [True] * 4
    torch.testing.assert_close(together.value, expected, rtol=1e-8, atol=1e-10)
    mapped = vmap(lambda A, b: SOLVERS[name](DenseOperator(A), b).value)(A, b)
    torch.testing.assert_close(mapped, expected, rtol=1e-8, atol=1e-10)


@EACH
def test_a_square_system_without_solution_is_a_breakdown(name: str) -> None:
    """The least-squares solution is there, but a solution it is not: a derivative must not be made of it unwarned."""
    A, b = torch.diag(torch.tensor([1.0, 2.0, 0.0])).double(), torch.ones(3).double()
    with pytest.warns(idf.ConvergenceWarning, match="BREAKDOWN"):
        solution = SOLVERS[name](DenseOperator(A), b)
    assert int(solution.info.status) == Status.BREAKDOWN
    torch.testing.assert_close(solution.value, torch.tensor([1.0, 0.5, 0.0]).double())


@EACH
def test_differentiable_in_b_by_the_pseudo_inverse(name: str) -> None:
    A, b = random(1, 6, 3), random(2, 6)
    jacobian = torch.func.jacrev(lambda b: SOLVERS[name](DenseOperator(A), b).value)(b)
    torch.testing.assert_close(jacobian, torch.linalg.pinv(A), rtol=1e-8, atol=1e-10)
    with pytest.raises(idf.ImplicitDiffError, match="least-squares solution is differentiated in b only"):
        SOLVERS[name](DenseOperator(A.requires_grad_()), b)


def test_other_kinds_of_rectangular_operators() -> None:
    A, b = random(1, 6, 3) * (random(2, 6, 3) > 0), random(3, 6)
    expected = torch.linalg.pinv(A) @ b
    for operator in (SparseOperator(A.to_sparse()), FunctionOperator(lambda v: v @ A.mT, (6, 3), dtype=A.dtype)):
        for solver in SOLVERS.values():
            torch.testing.assert_close(solver(operator, b).value, expected, rtol=1e-8, atol=1e-10)


def test_wrong_shapes_are_named() -> None:
    A = DenseOperator(torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"b must be \(\*batch, 5\)"):
        idf.LSMR()(A, torch.ones(2))
    with pytest.raises(ValueError, match=r"the solution will have the shape \(2,\)"):
        idf.LSMR()(A, torch.ones(5), torch.ones(5))
    for solver in (idf.CG(), idf.MINRES(), idf.GMRES(), idf.BiCGStab(), idf.NormalCG(), idf.Neumann(3)):
        with pytest.raises(ValueError, match="square"):
            solver(A, torch.ones(5))
