"""A solver that is called directly is differentiable in b and in every tensor that A holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.operators import DenseOperator, FunctionOperator

from ..problems import random, rotated, vector
from .table import MinimalResidual

SOLVERS: dict[str, tuple[Any, Any]] = {
    "CG": (idf.CG, "positive_definite"),
    "MINRES": (idf.MINRES, "symmetric"),
    "GMRES": (idf.GMRES, "general"),
    "Dense": (idf.Dense, "general"),
    "Neumann": (lambda **s: idf.Neumann(terms=40, scale=1.0, **s), "general"),
    "a user's own": (MinimalResidual, "general"),
}
EACH = pytest.mark.parametrize("name", SOLVERS)
B = random(2, 3)


def matrix(structure: str) -> Tensor:
    """Near the identity; not symmetric where that is not asked for, so that A for Aᵀ is found out."""
    part = random(1, 3, 3) if structure == "general" else rotated(vector(1, 2, 3))
    return torch.eye(3, dtype=torch.float64) + 0.1 * part


def solve_by(name: str) -> Any:
    make, structure = SOLVERS[name]
    solver = make(rtol=1e-13, on_failure="raise")

    def solve(M: Tensor, b: Tensor) -> Tensor:
        M = M if structure == "general" else (M + M.mT) / 2
        return solver(DenseOperator(M, structure), b).value

    return solve


@EACH
def test_derivatives_by_finite_differences(name: str) -> None:
    """First and second, in M and b, in reverse and forward mode, batched: fails for A in the place of Aᵀ."""
    leaves = (matrix(SOLVERS[name][1]).requires_grad_(), B.clone().requires_grad_())
    solve = solve_by(name)
    assert torch.autograd.gradcheck(solve, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(solve, leaves, fast_mode=True)


@EACH
def test_transforms_by_the_inverse(name: str) -> None:
    """jacrev and jacfwd over b are A⁻¹; vmap(grad) over both; all against torch's own inverse."""
    M, solve = matrix(SOLVERS[name][1]), solve_by(name)
    inverse = torch.linalg.inv(M)
    same = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(jacrev(solve, 1)(M, B), inverse, **same)
    torch.testing.assert_close(jacfwd(solve, 1)(M, B), inverse, **same)
    Ms, Bs = torch.stack([M, 1.2 * M]), torch.stack([B, B.flip(0)])
    symmetric = SOLVERS[name][1] != "general"

    def closed(M: Tensor, b: Tensor) -> Tensor:
        return (torch.linalg.inv((M + M.mT) / 2 if symmetric else M) @ b).square().sum()

    got = vmap(grad(lambda M, b: solve(M, b).square().sum(), (0, 1)))(Ms, Bs)
    for i in range(2):
        for g, w in zip(got, grad(closed, (0, 1))(Ms[i], Bs[i]), strict=True):
            torch.testing.assert_close(g[i], w, **same)


def test_captured_tensors_get_gradients_in_every_transform() -> None:
    """What a FunctionOperator closes over: fails where the graph of the capture is lost."""
    d = vector(1, 2, 4)

    def total(d: Tensor) -> Tensor:
        A = FunctionOperator(lambda v: d * v, n=3, structure="positive_definite", dtype=torch.float64)
        return idf.CG(rtol=1e-12)(A, torch.ones_like(d)).value.sum()

    torch.testing.assert_close(grad(total)(d), -1 / d**2)
    torch.testing.assert_close(hessian(total)(d), torch.diag(2 / d**3))
    ds = torch.stack([d, 2 * d])
    torch.testing.assert_close(vmap(grad(total))(ds), -1 / ds**2)


def test_the_start_gets_no_gradient() -> None:
    x0 = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    A = DenseOperator(matrix("general"))
    assert not idf.GMRES()(A, B, x0).value.requires_grad
    b = B.clone().requires_grad_()
    idf.GMRES()(A, b, x0).value.sum().backward()
    assert x0.grad is None


def test_a_backward_solve_that_fails_is_reported() -> None:
    """Fails where only the forward solve follows the policy."""
    A = rotated(torch.arange(1, 13, dtype=torch.float64), 4)
    eigenvector = torch.linalg.eigh(A)[1][:, 0].clone().requires_grad_()
    with idf.record() as history:
        x = idf.CG(max_iterations=2, on_failure="ignore")(DenseOperator(A, "positive_definite"), eigenvector).value
        (x @ random(7, 12)).backward()
    assert [solve.kind for solve in history] == ["linear", "backward"]
    assert [bool(solve.info.converged) for solve in history] == [True, False]
