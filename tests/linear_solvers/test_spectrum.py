"""What CG and MINRES say of the spectrum and of the error, against eigvalsh and dense solves."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

import implicitdiff as idf
from implicitdiff.operators import DenseOperator
from implicitdiff.preconditioners import Jacobi

from ..problems import SYSTEMS, random, rotated, spread

EIGENVALUES = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


@given(EIGENVALUES, st.integers(0, 2**16), st.floats(1e-6, 1e6))
def test_ritz_values_of_definite_systems(eigenvalues: list[float], seed: int, scale: float) -> None:
    """Fails for a wrong entry of the tridiagonal matrix: a Ritz value then leaves the spectrum."""
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    A, b = rotated(values, seed), scale * random(seed + 1, len(values))
    for solver in (idf.CG(rtol=1e-12, on_failure="ignore"), idf.MINRES(rtol=1e-12, on_failure="ignore")):
        solution = solver(DenseOperator(A, "positive_definite"), b)
        low, high = solution.info.eigenvalue_range
        slack = 1e-7 * values.max()  # rounding of A, as the solver saw it
        assert values.min() - slack <= low <= high <= values.max() + slack
        assert solution.info.condition_number <= values.max() / values.min() * (1 + 1e-6)
        error = (solution.value - torch.linalg.solve(A, b)).norm()
        rounding = 1e-12 * values.max() / values.min() * solution.value.norm()
        assert error <= 1.1 * solution.info.distance + rounding


def test_the_ends_of_the_spectrum_are_found() -> None:
    """At a relative residual of 1e-6 the condition number is right to 6 %, from below, of each system of a batch."""
    conditions = (1.0, 1e1, 1e3, 1e4)
    A = rotated(torch.stack([spread(c, 60) for c in conditions]), 1)
    for solver in (idf.CG(), idf.MINRES()):
        info = solver(DenseOperator(A, "positive_definite"), random(2, 4, 60)).info
        for found, condition in zip(info.condition_number.tolist(), conditions, strict=True):
            assert 0.9 * condition <= found <= condition * (1 + 1e-9)


def test_a_negative_ritz_value_betrays_an_indefinite_operator() -> None:
    s = SYSTEMS["indefinite"]
    for solver in (idf.CG(on_failure="ignore"), idf.MINRES()):
        low, high = solver(s.operator(), s.b).info.eigenvalue_range
        assert low < 0 < high
    eigenvalues = torch.linalg.eigvalsh(s.matrix)
    found = torch.stack(idf.MINRES(rtol=1e-12)(s.operator(), s.b).info.eigenvalue_range)
    torch.testing.assert_close(found, eigenvalues[[0, -1]], rtol=1e-8, atol=0)


def test_the_distance_bounds_the_error() -> None:
    """Along a run that is cut short ever later; the smallest Ritz value comes down to the eigenvalue from above."""
    s = SYSTEMS["definite"]
    exact = torch.linalg.solve(s.matrix, s.b)
    for steps in range(12, 31, 3):
        solution = idf.CG(max_iterations=steps, on_failure="ignore")(s.operator(), s.b)
        assert (solution.value - exact).norm() <= 1.5 * solution.info.distance


def test_no_steps_and_preconditioners_know_nothing_of_the_spectrum() -> None:
    s = SYSTEMS["definite"]
    b = torch.stack([s.b, 0 * s.b])
    info = idf.CG()(DenseOperator(s.matrix, s.structure), b).info
    assert info.condition_number.isnan().tolist() == [False, True]
    assert float(info.distance[1]) == 0
    assert idf.CG(preconditioner=Jacobi())(s.operator(), s.b).info.condition_number is None
    assert idf.GMRES()(s.operator(), s.b).info.distance is None


def test_the_spectrum_costs_no_product() -> None:
    s = SYSTEMS["definite"]
    info = idf.CG()(s.operator(), s.b).info
    assert info.matvecs == int(info.iterations)  # and none for the true residual, which rounding cannot have moved


def test_a_backward_pass_reports_it() -> None:
    H = rotated(spread(50, 8), 3)
    layer = idf.ArgminLayer(lambda x, t: 0.5 * x @ H @ x - x @ t, linear_solver=idf.CG())
    t = random(4, 8).requires_grad_()
    solution = layer.solve(torch.zeros(8, dtype=torch.float64), t)
    solution.value.sum().backward()
    assert solution.backward is not None
    torch.testing.assert_close(float(solution.backward.condition_number), 50.0, rtol=1e-6, atol=0)
