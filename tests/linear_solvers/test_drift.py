"""CG saves the product for the true residual only where its own residual cannot have drifted from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import implicitdiff as idf
from implicitdiff.operators import DenseOperator, FunctionOperator

N = 40


def rotated(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64))
    return (Q * eigenvalues) @ Q.T


MATRIX = rotated(torch.linspace(1, 10, N, dtype=torch.float64))


def solved(A: FunctionOperator | DenseOperator, b: Tensor, rtol: float) -> tuple[idf.SolveInfo, Tensor]:
    """The report, and the true relative residual in double precision."""
    solution = idf.CG(rtol=rtol, on_failure="ignore")(A, b)
    matrix = A.to_dense().double()
    residual = b.double() - matrix @ solution.value.double()
    return solution.info, residual.norm() / b.double().norm()


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 12), st.floats(-12, -1), st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
def test_what_is_claimed_is_the_true_residual(decades: float, log_rtol: float, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = rotated(torch.logspace(-decades, 0, N, dtype=torch.float64), seed).to(dtype)
    b = torch.randn(N, generator=generator, dtype=dtype)
    info, residual = solved(DenseOperator(matrix, "positive_definite"), b, 10**log_rtol)
    if bool(info.converged):
        # A product of N terms, whichever way it is summed, is good to N ε ‖A‖ ‖x‖ with ‖A‖ = 1.
        size = torch.linalg.lstsq(matrix.double(), b.double()).solution.norm() / b.double().norm()
        rounding = N * torch.finfo(dtype).eps * size
        assert residual <= 1.02 * 10**log_rtol + rounding
        assert abs(residual - info.residual_norm) <= 0.02 * 10**log_rtol + rounding


def products(info: idf.SolveInfo) -> int:
    return info.matvecs - int(info.iterations)


def test_an_easy_system_is_verified_without_a_product() -> None:
    info, residual = solved(DenseOperator(MATRIX, "positive_definite"), vector(), 1e-6)
    assert products(info) == 0
    torch.testing.assert_close(info.residual_norm, residual, rtol=1e-6, atol=0)


def vector() -> Tensor:
    return torch.linspace(-1, 2, N, dtype=torch.float64)


def rounded(v: Tensor) -> Tensor:
    return v.to(torch.bfloat16).double()


SKEW = torch.triu(torch.full((N, N), 1e-6, dtype=torch.float64), 1)
NOT_TO_BE_BELIEVED: dict[str, Callable[[Tensor], Tensor]] = {
    "products in bfloat16": lambda v: rounded(MATRIX @ v),
    "products in float32": lambda v: (MATRIX.float() @ v.float()).double(),
    "not quite symmetric": lambda v: MATRIX @ v + SKEW @ v - SKEW.T @ v,
    "not linear": lambda v: MATRIX @ v + 1e-7 * v.abs(),
    "another one each time": lambda v: MATRIX @ v + 1e-9 * torch.rand(N, dtype=torch.float64),
}


@pytest.mark.parametrize("name", NOT_TO_BE_BELIEVED)
def test_products_that_are_not_exact_are_verified_by_one_more(name: str) -> None:
    matvec = NOT_TO_BE_BELIEVED[name]
    A = FunctionOperator(matvec, N, structure="positive_definite", dtype=torch.float64)
    solution = idf.CG(rtol=1e-6, on_failure="ignore")(A, vector())
    assert products(solution.info) >= 1
    if bool(solution.info.converged):
        residual = (vector() - matvec(solution.value)).norm() / vector().norm()
        # The solver scales b, and these products of a scaled vector are others: by 1e-7 in float32.
        torch.testing.assert_close(solution.info.residual_norm, residual, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("solver", "x0", "dtype", "rtol"),
    [
        (idf.CG(rtol=1e-12), None, torch.float64, "near rounding"),
        (idf.CG(rtol=1e-5), None, torch.float32, "near rounding, in float32"),
        (idf.CG(rtol=1e-6), vector(), torch.float64, "not from zero"),
        (idf.CG(rtol=1e-6, preconditioner=lambda A: lambda v: v / 3), None, torch.float64, "preconditioned"),
    ],
)
def test_where_the_bound_does_not_serve_a_product_verifies(
    solver: idf.CG, x0: Tensor | None, dtype: torch.dtype, rtol: str
) -> None:
    info = solver(DenseOperator(MATRIX.to(dtype), "positive_definite"), vector().to(dtype), x0).info
    assert bool(info.converged)
    assert products(info) == (1 if x0 is None else 2)
