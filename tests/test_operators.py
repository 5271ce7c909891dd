"""Operators against dense matrices: products, transposes, algebra, and what structure it may keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from implicitdiff._jacobian import JacobianOperator
from implicitdiff.operators import DenseOperator, FunctionOperator, LinearOperator

from .problems import random, rotated, spread, vector

P = rotated(spread(10, 3), 1)
S = rotated(vector(-1, 2, 3), 2)
G = random(3, 3, 3)
Z = random(4, 3, 3, dtype=torch.complex128)
BATCH = random(5, 2, 3, 3)
V = random(6, 3)


def dense(matrix: Tensor, structure: Any = "general") -> LinearOperator:
    return DenseOperator(matrix, structure)


def function(matrix: Tensor, structure: Any = "general", transpose: bool = True) -> LinearOperator:
    """The same matrix behind a function."""
    return FunctionOperator(
        lambda v: (matrix @ v.unsqueeze(-1)).squeeze(-1),
        matrix.shape[-1],
        rmatvec=(lambda v: (matrix.mH @ v.unsqueeze(-1)).squeeze(-1)) if transpose else None,
        structure=structure,
        batch_shape=tuple(matrix.shape[:-2]),
        dtype=matrix.dtype,
    )


def without_transpose(matrix: Tensor, structure: Any = "general") -> LinearOperator:
    return function(matrix, structure, transpose=False)


def jacobian(matrix: Tensor, structure: Any = "general") -> LinearOperator:
    x = torch.zeros(matrix.shape[:-1], dtype=matrix.dtype)
    return JacobianOperator(lambda x: (matrix @ x.unsqueeze(-1)).squeeze(-1), x, structure)


KINDS: list[Callable[..., LinearOperator]] = [dense, function, without_transpose, jacobian]
MATRICES = {"general": G, "batch": BATCH, "complex": Z, "scalar": vector(3).unsqueeze(-1)}


def assert_is(A: LinearOperator, matrix: Tensor) -> None:
    """Every way of asking the operator gives the matrix: products, adjoint products, to_dense, diagonal, T."""
    v = random(7, *matrix.shape[:-1]).to(matrix.dtype)
    if matrix.is_complex():
        v = v * (1 + 2j)

    def times(M: Tensor) -> Tensor:
        return (M @ v.unsqueeze(-1)).squeeze(-1)

    same = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(A(v), times(matrix), **same)
    torch.testing.assert_close(A @ v, times(matrix), **same)
    torch.testing.assert_close(A.rmatvec(v), times(matrix.mH), **same)
    torch.testing.assert_close(A.T(v), times(matrix.mH), **same)
    torch.testing.assert_close(A.T.T(v), times(matrix), **same)
    torch.testing.assert_close(A.to_dense(), matrix, **same)
    torch.testing.assert_close(A.T.to_dense(), matrix.mH, **same)
    torch.testing.assert_close(A.diagonal(), matrix.diagonal(dim1=-2, dim2=-1), **same)
    torch.testing.assert_close(A.T.diagonal(), matrix.diagonal(dim1=-2, dim2=-1).conj(), **same)
    assert A.shape == (matrix.shape[-1],) * 2
    assert A.batch_shape == A.T.batch_shape == tuple(matrix.shape[:-2])
    assert A.dtype == A.T.dtype == matrix.dtype


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_operator_is_its_matrix(kind: Callable[..., LinearOperator], matrix: Tensor) -> None:
    """Fails for a transpose that does not conjugate, and for rows in the place of columns."""
    assert_is(kind(matrix), matrix)


@pytest.mark.parametrize("kind", KINDS)
def test_a_symmetric_operator_is_its_own_transpose(kind: Callable[..., LinearOperator]) -> None:
    for matrix, structure in ((P, "positive_definite"), (S, "symmetric"), (Z + Z.mH, "symmetric")):
        A = kind(matrix, structure)
        assert A.T is A
        assert_is(A, matrix)


EYE = torch.eye(3, dtype=torch.float64)
ALGEBRA: dict[str, tuple[Callable[[Any, Any], LinearOperator], Callable[[Any, Any], Tensor]]] = {
    "A + B": (lambda A, B: A + B, lambda A, B: A + B),
    "A @ B": (lambda A, B: A @ B, lambda A, B: A @ B),
    "2·A": (lambda A, B: 2 * A, lambda A, B: 2 * A),
    "A·(−3)": (lambda A, B: A * -3.0, lambda A, B: -3.0 * A),
    "tensor·A": (lambda A, B: torch.tensor(0.5) * A, lambda A, B: 0.5 * A),
    "shift": (lambda A, B: A.shift(1.5), lambda A, B: A + 1.5 * EYE),
    "shift of −A": (lambda A, B: (-1 * A).shift(-2), lambda A, B: -A - 2 * EYE),
    "(A @ B)ᵀ + A": (lambda A, B: (A @ B).T + A, lambda A, B: (A @ B).mH + A),
    "complex": (lambda A, B: (2 - 1j) * A.shift(1j), lambda A, B: (2 - 1j) * (A + 1j * EYE)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expression", ALGEBRA)
def test_algebra_is_that_of_matrices(expression: str, kind: Callable[..., LinearOperator]) -> None:
    """Fails for (AB)ᵀ = AᵀBᵀ, for a scalar that is not conjugated in the adjoint, for a shift of the wrong sign."""
    of_operators, of_matrices = ALGEBRA[expression]
    A, B = (Z, Z.mT.contiguous()) if expression == "complex" else (G, P)
    assert_is(of_operators(kind(A), kind(B)), of_matrices(A, B))


def test_algebra_of_batches() -> None:
    """A factor or a shift for each system makes a batch, whatever the operator was."""
    s = vector(2, -3)
    wide = s.reshape(2, 1, 1)
    assert_is(s * dense(BATCH), wide * BATCH)
    assert_is(dense(BATCH).shift(s), BATCH + wide * EYE)
    assert_is(s * dense(G), wide * G)
    assert_is(dense(G).shift(s), G + wide * EYE)
    assert_is(dense(G) + dense(BATCH), G + BATCH)
    assert_is(dense(BATCH) @ dense(G), BATCH @ G)


PD, SYM, GEN = dense(P, "positive_definite"), dense(S, "symmetric"), dense(G)


@pytest.mark.parametrize(
    ("A", "structure"),
    [
        (PD, "positive_definite"),
        (2 * PD, "positive_definite"),
        (torch.tensor([1.0, 2.0]) * PD, "positive_definite"),
        (PD + PD, "positive_definite"),
        (PD.shift(0.0), "positive_definite"),
        (PD.shift(3), "positive_definite"),
        (-1 * PD, "symmetric"),
        (0 * PD, "symmetric"),
        (float("nan") * PD, "symmetric"),
        (torch.tensor([1.0, -2.0]) * PD, "symmetric"),
        (PD.shift(-1e-9), "symmetric"),
        (PD + SYM, "symmetric"),
        (-2 * SYM, "symmetric"),
        (SYM.shift(9.0), "symmetric"),
        (PD + -1 * PD, "symmetric"),
        (PD @ PD, "general"),
        (SYM + GEN, "general"),
        (GEN.T, "general"),
        (1j * PD, "general"),
        (SYM.shift(1j), "general"),
    ],
)
def test_algebra_keeps_only_what_it_can_prove(A: LinearOperator, structure: str) -> None:
    """Fails for −1·A or a negative shift that stays positive definite: CG would then be promised what is not so."""
    assert A.structure == structure
    assert A.is_symmetric == (structure != "general")


def test_a_factor_inside_a_transform_proves_nothing() -> None:
    """Its sign cannot be looked at under vmap; fails with a data-dependent branch."""
    structures = []

    def product(s: Tensor) -> Tensor:
        structures.append((s * PD).structure)
        return (s * PD)(V)

    torch.testing.assert_close(torch.func.vmap(product)(vector(1, 2)), torch.stack([P @ V, 2 * P @ V]))
    assert structures == ["symmetric"]


def test_a_function_operator_takes_the_dtype_of_the_vector() -> None:
    A = FunctionOperator(lambda v: 2 * v, 3)
    assert A.dtype is None
    for dtype in (torch.float32, torch.float64, torch.complex64):
        assert A(torch.ones(3, dtype=dtype)).dtype == dtype
        assert A.T(torch.ones(3, dtype=dtype)).dtype == dtype


def test_a_given_transpose_is_used_and_a_symmetric_one_not_differentiated() -> None:
    """Functions that autograd cannot follow (NumPy) can be transposed all the same."""

    def opaque(v: Tensor) -> Tensor:
        return torch.from_numpy(P.numpy() @ v.detach().numpy())

    assert_is(FunctionOperator(opaque, 3, structure="positive_definite", dtype=torch.float64), P)
    assert_is(FunctionOperator(opaque, 3, rmatvec=opaque, dtype=torch.float64), P)


@pytest.mark.parametrize("A", [dense(torch.zeros(2, 0, 0)), FunctionOperator(lambda v: v, 0, batch_shape=(2,))])
def test_no_unknowns(A: LinearOperator) -> None:
    """Fails where columns are stacked and there are none."""
    for B in (A, A.T, 2 * A, A + A, A @ A):
        assert B(torch.ones(2, 0)).shape == (2, 0)
        assert B.to_dense().shape == (2, 0, 0)
        assert B.diagonal().shape == (2, 0)


def test_the_jacobian_of_a_nonlinear_function() -> None:
    """At its point, with the value there; and of a function that does not depend on x it is 0."""
    x = vector(0.5, -1, 2)
    A = JacobianOperator(lambda x: torch.sin(x) * x.roll(1), x, "general")
    assert_is(A, torch.func.jacrev(lambda x: torch.sin(x) * x.roll(1))(x))
    assert torch.equal(A.value, torch.sin(x) * x.roll(1))
    assert_is(JacobianOperator(lambda x: torch.ones_like(x), x, "general"), torch.zeros(3, 3, dtype=torch.float64))


def test_the_jacobian_pulls_to_other_tensors() -> None:
    """(∂F/∂t)ᵀu, and zeros for a tensor that F does not use."""
    t, unused = vector(1, 2, 3).requires_grad_(), vector(1).requires_grad_()
    A = JacobianOperator(lambda x: t * x * x, vector(1, 2, 3), "general")
    pulled = A.pull_to([t, unused], vector(1, 1, 2))
    assert torch.equal(pulled[0], vector(1, 4, 18))
    assert torch.equal(pulled[1], vector(0))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: DenseOperator(torch.ones(2, 3), "symmetric"), ValueError, "is not square, so it cannot be symmetric"),
        (lambda: DenseOperator(torch.ones(3)), ValueError, "must be a matrix"),
        (lambda: DenseOperator(torch.eye(2), "spd"), ValueError, "structure is 'spd'"),  # type: ignore[arg-type]
        (lambda: PD(torch.ones(2)), ValueError, "met a vector of shape"),
        (lambda: PD @ torch.ones(3, 2), ValueError, "last dimension must be 3"),
        (lambda: PD(torch.tensor(1.0)), ValueError, "met a vector of shape"),
        (lambda: PD + dense(torch.eye(2)), ValueError, "cannot be added"),
        (lambda: PD @ dense(torch.eye(2)), ValueError, "cannot be multiplied"),
        (lambda: PD + 3, TypeError, "unsupported operand"),
        (lambda: PD * SYM, TypeError, "unsupported operand"),
        (lambda: SYM * None, TypeError, "unsupported operand"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[], object], error: type[Exception], words: str) -> None:
    """Fails for A·B that silently builds something that is not an operator."""
    with pytest.raises(error, match=words):
        make()


def test_operators_print_what_they_are() -> None:
    assert repr(dense(BATCH)) == "DenseOperator(n=3, structure='general', batch_shape=(2,))"
