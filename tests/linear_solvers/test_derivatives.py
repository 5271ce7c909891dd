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
    "BiCGStab": (idf.BiCGStab, "general"),
    "NormalCG": (idf.NormalCG, "general"),
    "LSMR": (idf.LSMR, "general"),
    "SciPy": (lambda **s: idf.SciPy("lsmr", **s), "general"),
    "Dense": (idf.Dense, "general"),
    "MixedPrecision": (lambda **s: idf.MixedPrecision(idf.CG(**s)), "positive_definite"),
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


@pytest.mark.parametrize("several", ["jacrev", "vmap over cotangents", "is_grads_batched"])
def test_several_right_hand_sides_share_one_operator(several: str) -> None:
    """The objective is evaluated as often for 30 cotangents as for 1: fails for a graph a cotangent."""
    H, calls = rotated(torch.linspace(1, 9, 30, dtype=torch.float64)), [0]

    def objective(x: Tensor, t: Tensor) -> Tensor:
        calls[0] += 1
        return 0.5 * x @ H @ x - x @ t

    layer = idf.ArgminLayer(objective, inner_solver=idf.inner_solvers.NewtonCG(), linear_solver=idf.CG(rtol=1e-10))
    counts = []
    for k in (1, 30):
        t = random(4, 30).requires_grad_()
        calls[0] = 0
        with idf.record() as history:
            if several == "jacrev":
                rows = jacrev(lambda t, k=k: layer(torch.zeros_like(t), t)[:k])(t.detach())
            else:
                x = layer(torch.zeros_like(t), t)
                eye = torch.eye(30, dtype=torch.float64)[:k]
                if several == "is_grads_batched":
                    (rows,) = torch.autograd.grad(x, t, eye, is_grads_batched=True)
                else:
                    rows = vmap(lambda g, x=x, t=t: torch.autograd.grad(x, t, g, retain_graph=True)[0])(eye)
        counts.append(calls[0])
        torch.testing.assert_close(rows, torch.linalg.inv(H)[:k], rtol=1e-7, atol=1e-10)
        (backward,) = [solve.info for solve in history if solve.kind == "backward"]
        assert backward.iterations.shape == (k,)  # one solve, each right-hand side with its own stopping
    assert counts[0] == counts[1]


def test_a_warm_start_saves_iterations_along_a_hyperparameter_optimisation() -> None:
    """The penalties of a ridge regression by gradient steps on a validation loss; the same path, fewer iterations."""
    X, y, V, w = random(1, 80, 40), random(2, 80), random(3, 60, 40), random(4, 60)

    def objective(x: Tensor, log_penalty: Tensor) -> Tensor:
        return 0.5 * ((X @ x - y) ** 2).sum() + 0.5 * (log_penalty.exp() * x * x).sum()

    def run(warm: bool) -> tuple[Tensor, int]:
        solver = idf.CG(rtol=1e-8, warm_start=warm)
        layer = idf.ArgminLayer(objective, inner_solver=idf.inner_solvers.NewtonCG(tol=1e-8), linear_solver=solver)
        log_penalty, total, x = torch.zeros(40, dtype=torch.float64, requires_grad=True), 0, torch.zeros(40).double()
        for _ in range(30):
            solution = layer.solve(x, log_penalty)
            ((V @ solution.value - w) ** 2).mean().backward()
            assert solution.backward is not None
            total += int(solution.backward.iterations)
            with torch.no_grad():
                log_penalty -= 0.1 * log_penalty.grad
                log_penalty.grad = None
            x = solution.value.detach()
        return log_penalty.detach(), total

    (cold_end, cold), (warm_end, warm) = run(False), run(True)
    torch.testing.assert_close(warm_end, cold_end, rtol=1e-5, atol=1e-7)
    assert warm <= 0.7 * cold, (warm, cold)
