"""Dense: structured operators without a dense matrix, and factorisations that are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.inner_solvers import Newton
from implicitdiff.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    FunctionOperator,
    LinearOperator,
    LowRankUpdate,
    SparseOperator,
)

from ..problems import random, rotated, second_difference, spread


class Forbidden:
    """Stands in the place of to_dense where a dense matrix must not be formed."""

    def __call__(self) -> Tensor:
        raise AssertionError("a dense matrix was formed")


def sparse(n: int = 40, dtype: torch.dtype = torch.float64) -> SparseOperator:
    matrix = second_difference(n).to(dtype) + torch.diag(0.3 * torch.ones(n - 1, dtype=dtype), 1)
    return SparseOperator(matrix.to_sparse_csr())


STRUCTURED: dict[str, LinearOperator] = {
    "diagonal": DiagonalOperator(spread(1e3, 40)),
    "diagonals of a batch": DiagonalOperator(torch.stack([spread(1e3, 40), -spread(1e2, 40)])),
    "complex diagonal": DiagonalOperator(spread(1e3, 40) * 1j),
    "sparse": sparse(),
    "sparse, transposed": sparse().T,
    "sparse, complex": sparse(dtype=torch.complex128),
    "blocks": BlockDiagonalOperator(sparse(15), DiagonalOperator(spread(10, 25))),
    "low rank on a diagonal": LowRankUpdate(DiagonalOperator(spread(10, 40)), random(1, 40, 3)),
    "low rank on a sparse one": LowRankUpdate(sparse(), random(1, 40, 2), random(2, 40, 2)),
    "low rank, transposed": LowRankUpdate(sparse(), random(1, 40, 2), random(2, 40, 2)).T,
    "low ranks of a batch": LowRankUpdate(DiagonalOperator(spread(10, 40)), random(1, 3, 40, 2)),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_structure_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against LAPACK on the dense matrix, which Dense must not have formed."""
    A = STRUCTURED[name]
    matrix = A.to_dense()
    b = random(3, *A.batch_shape, 40, dtype=A.dtype)
    monkeypatch.setattr(A, "to_dense", Forbidden())
    x = idf.Dense(rtol=1e-10, on_failure="raise")(A, b).value
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", STRUCTURED)
def test_the_products_are_those_of_the_matrix(name: str) -> None:
    A = STRUCTURED[name]
    matrix, v = A.to_dense(), random(4, *A.batch_shape, 40, dtype=A.dtype)
    torch.testing.assert_close(A @ v, (matrix @ v.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(A.rmatvec(v), (matrix.mH @ v.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(A.T @ v, A.rmatvec(v))
    torch.testing.assert_close(A.diagonal(), matrix.diagonal(dim1=-2, dim2=-1))
    columns = torch.stack([A @ e for e in torch.eye(40, dtype=A.dtype).expand(*A.batch_shape, 40, 40).unbind(-1)], -1)
    torch.testing.assert_close(columns, matrix)


def test_structured_and_singular_is_solved_in_the_least_squares_sense() -> None:
    for A in (
        DiagonalOperator(torch.tensor([2.0, 0.0])),
        SparseOperator(torch.diag(torch.tensor([2.0, 0.0])).to_sparse()),
    ):
        x = idf.Dense()(A, torch.tensor([2.0, 0.0])).value
        torch.testing.assert_close(x, torch.tensor([1.0, 0.0]))
        with pytest.warns(idf.ConvergenceWarning, match="BREAKDOWN"):
            idf.Dense()(A, torch.tensor([2.0, 1.0]))


def test_the_derivative_in_the_entries() -> None:
    """Through the sparse values, the diagonal and the factors, against the dense solve."""
    pattern = second_difference(6).to_sparse().coalesce()
    values, U, b = pattern.values().clone(), random(1, 6, 2), random(2, 6)

    def solve(values: Tensor, U: Tensor, d: Tensor, b: Tensor) -> Tensor:
        matrix = torch.sparse_coo_tensor(pattern.indices(), values, (6, 6), check_invariants=False)
        operator = LowRankUpdate(SparseOperator(matrix), U) + DiagonalOperator(d)
        return idf.Dense()(operator, b).value

    def expected(values: Tensor, U: Tensor, d: Tensor, b: Tensor) -> Tensor:
        dense = torch.zeros(6, 6, dtype=b.dtype).index_put(tuple(pattern.indices()), values)
        return torch.linalg.inv(dense + U @ U.mT + torch.diag(d)) @ b

    inputs = (values, U, spread(3, 6), b)
    for argument in range(4):
        found, wanted = (
            torch.autograd.functional.jacobian(
                lambda t, f=f, i=argument: f(*inputs[:i], t, *inputs[i + 1 :]), inputs[argument]
            )
            for f in (solve, expected)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", [idf.Dense(), idf.Auto(), idf.LSMR(rtol=1e-12), idf.GMRES(rtol=1e-12)], ids=str)
def test_a_sparse_operator_under_transforms(solver: idf.LinearSolver) -> None:
    """From entries, as torch makes no sparse tensors there."""
    pattern = second_difference(5).to_sparse().coalesce()
    values, b = pattern.values().clone(), random(1, 5)

    def solve(values: Tensor, b: Tensor) -> Tensor:
        return solver(SparseOperator.from_entries(*pattern.indices(), values, shape=(5, 5)), b).value

    inverse = torch.linalg.inv(pattern.to_dense())
    torch.testing.assert_close(torch.func.jacrev(solve, 1)(values, b), inverse, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(torch.func.jacfwd(solve, 1)(values, b), inverse, rtol=1e-8, atol=1e-10)
    rows, columns = pattern.indices()
    x = inverse @ b
    by_values = -inverse[:, rows] * x[columns]
    torch.testing.assert_close(torch.func.jacrev(solve, 0)(values, b), by_values, rtol=1e-8, atol=1e-10)


def counted(matrix: Tensor, calls: list[int], structure: Any = "general") -> FunctionOperator:
    def product(M: Tensor) -> Any:
        def apply(v: Tensor) -> Tensor:
            calls[0] += 1
            return v @ M.mT

        return apply

    return FunctionOperator(
        product(matrix), len(matrix), rmatvec=product(matrix.mT), structure=structure, dtype=matrix.dtype
    )


@pytest.mark.parametrize("structure", ["general", "positive_definite"])
def test_a_kept_factorisation_solves_a_matrix_nearby(structure: Any) -> None:
    """A few products in the place of n; and the adjoint where the operator is transposed."""
    M = rotated(spread(100, 30), 1) + (0 if structure == "positive_definite" else random(2, 30, 30))
    solver, calls, b = idf.Dense(warm_start=True, rtol=1e-10), [0], random(3, 30)
    solver(counted(M, calls, structure), b)
    for i, factor in enumerate((1.0, 1.001, 1.002)):
        A = counted(factor * M, calls, structure)
        operator, matrix = (A.T, factor * M.mT) if i == 1 else (A, factor * M)
        calls[0] = 0
        x = solver(operator, b).value
        assert 1 <= calls[0] <= 7
        torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-7, atol=1e-9)


def test_a_kept_factorisation_is_given_up_where_it_does_not_serve() -> None:
    solver, b = idf.Dense(warm_start=True), random(1, 20)
    for seed in (2, 3):
        M = random(seed, 20, 20)
        torch.testing.assert_close(solver(DenseOperator(M), b).value, torch.linalg.solve(M, b))
    batch = random(4, 3, 20, 20)  # another shape
    x = solver(DenseOperator(batch), b.expand(3, 20)).value
    torch.testing.assert_close(x, torch.linalg.solve(batch, b.expand(3, 20).unsqueeze(-1)).squeeze(-1))


def test_forward_and_backward_share_a_factorisation() -> None:
    """Newton's last matrix serves the transposed system of the backward pass."""
    W = random(1, 50, 50) / 20
    dense = idf.Dense(warm_start=True, rtol=1e-9)
    layer = idf.RootLayer(
        lambda x, t: x + torch.tanh(W @ x) - t, inner_solver=Newton(linear_solver=dense), linear_solver=dense
    )
    t = random(2, 50).requires_grad_()
    solution = layer.solve(torch.zeros(50, dtype=torch.float64), t)
    solution.value.sum().backward()
    assert solution.backward is not None
    assert solution.backward.matvecs <= 7  # in the place of 50
    x = solution.value.detach()
    jacobian = torch.eye(50) + (1 - torch.tanh(W @ x) ** 2).unsqueeze(-1) * W
    torch.testing.assert_close(t.grad, torch.linalg.inv(jacobian).sum(0), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("structure", ["positive_definite", "general"])
def test_a_call_and_its_derivatives_share_a_factorisation(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    for name in ("cholesky_ex", "lu_factor_ex"):
        original = getattr(torch.linalg, name)

        def counted(*args: Any, original: Any = original) -> Any:
            nonlocal count
            count += 1
            return original(*args)

        monkeypatch.setattr(torch.linalg, name, counted)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(3, 5, 5, dtype=torch.float64, generator=generator)
    A = X @ X.mT + torch.eye(5) if structure == "positive_definite" else X + 3 * torch.eye(5)
    A, b = A.requires_grad_(), torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    solver, inverse = idf.Dense(), torch.linalg.inv
    for factor in (1.0, 2.0):  # another call is another operator
        count = 0
        x = solver(DenseOperator(factor * A, structure), b).value
        grads = torch.autograd.grad((x**3).sum(), (A, b), create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in grads), (A, b))
        assert count == 1
        want = torch.autograd.grad(((inverse(factor * A) @ b.unsqueeze(-1)) ** 3).sum(), (A, b), create_graph=True)
        want_second = torch.autograd.grad(sum((g**2).sum() for g in want), (A, b))
        for got, expected in zip((*grads, *second), (*want, *want_second), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
