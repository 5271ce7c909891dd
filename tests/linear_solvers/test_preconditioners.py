"""Preconditioners: what they save, that they leave the solution alone, and the side they stand on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers import LBFGS
from implicitdiff.operators import DenseOperator, FunctionOperator
from implicitdiff.preconditioners import InverseLBFGS, Jacobi, Nystrom

from ..problems import SYSTEMS, orthogonal, random, rotated, spread


def ill_conditioned_logistic_regression() -> tuple[Tensor, Tensor]:
    """The Hessian of a logistic regression at zero whose features have very unequal scales, and a right-hand side."""
    X = random(1, 2000, 200) * torch.logspace(0, -3.4, 200, dtype=torch.float64) @ orthogonal(2, 200, 200)
    y = (X @ random(3, 200) > 0).double()

    def objective(w: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(X @ w, y) + 0.5e-8 * (w * w).sum()

    return torch.func.hessian(objective)(torch.zeros(200, dtype=torch.float64)), random(4, 200)


def test_nystrom_saves_most_steps_of_an_ill_conditioned_logistic_regression() -> None:
    H, b = ill_conditioned_logistic_regression()
    assert float(torch.linalg.cond(H)) >= 1e6
    A = DenseOperator(H, "positive_definite")
    without, with_it = (idf.CG(max_iterations=20_000, preconditioner=p)(A, b).info for p in (None, Nystrom(rank=100)))
    assert 5 * int(with_it.iterations) <= int(without.iterations)
    assert 5 * with_it.matvecs <= without.matvecs  # its own products included


def test_nystrom_is_exact_at_full_rank_and_in_a_batch() -> None:
    """Fails for a wrong factor between the subspace and its complement, or for a sketch shared by the batch."""
    A = rotated(torch.stack([spread(1e3, 20), spread(10, 20)]), 1)
    info = idf.CG(preconditioner=Nystrom(rank=20), rtol=1e-8)(
        DenseOperator(A, "positive_definite"), random(2, 2, 20)
    ).info
    assert info.iterations.tolist() == [1, 1]


@pytest.mark.parametrize("preconditioner", [Nystrom(rank=5), Jacobi(probes=3), Jacobi()], ids=str)
@pytest.mark.parametrize("solver", [idf.CG, idf.MINRES, idf.GMRES, idf.BiCGStab])
def test_a_preconditioner_leaves_the_solution_alone(solver: type, preconditioner: object) -> None:
    s = SYSTEMS["definite"]
    A = FunctionOperator(lambda v: v @ s.matrix.mT, 30, structure=s.structure, dtype=torch.float64)
    x = solver(preconditioner=preconditioner, rtol=1e-10)(A, s.b).value
    torch.testing.assert_close(x, s.x, rtol=1e-7, atol=1e-8)


def test_nystrom_does_nothing_where_it_cannot() -> None:
    s = SYSTEMS["indefinite"]
    x = idf.MINRES(preconditioner=Nystrom(rank=8), rtol=1e-10)(s.operator(), s.b).value
    torch.testing.assert_close(x, s.x, rtol=1e-7, atol=1e-8)


def test_jacobi_is_exact_where_that_is_cheap_and_estimated_otherwise() -> None:
    d = torch.logspace(0, 4, 200, dtype=torch.float64)
    M = torch.diag(d) + 0.01 * rotated(spread(10, 200), 1)
    calls = [0]

    def matvec(v: Tensor) -> Tensor:
        calls[0] += 1
        return v @ M

    exact = Jacobi()(DenseOperator(M, "positive_definite"))(torch.ones_like(d))
    torch.testing.assert_close(exact, 1 / M.diagonal(), rtol=1e-15, atol=0)
    operator = FunctionOperator(matvec, 200, structure="positive_definite", dtype=d.dtype)
    estimated = Jacobi(probes=16)(operator)(torch.ones_like(d))
    assert calls[0] == 16
    # The error of an entry is the sum of its row's other entries with random signs, over √probes.
    off = (M - torch.diag(M.diagonal())).norm(dim=-1) / 16**0.5
    assert bool(((1 / estimated - M.diagonal()).abs() <= 5 * off).all())
    without, with_it = (idf.CG(preconditioner=p)(operator, random(2, 200)).info for p in (None, Jacobi()))
    assert 3 * int(with_it.iterations) <= int(without.iterations)


H = rotated(spread(1e3, 40), 5)


def quartic(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x @ H @ x + 0.1 * (x**4).sum() - x @ t


def derivative(t: Tensor, **settings: object) -> tuple[Tensor, idf.SolveInfo]:
    # A tolerance well above rounding: the pairs of steps that rounding rules say nothing of the curvature.
    layer = idf.ArgminLayer(
        quartic, inner_solver=LBFGS(history=60, tol=1e-3), linear_solver=idf.CG(rtol=1e-9, **settings)
    )
    t = t.clone().requires_grad_()
    solution = layer.solve(torch.zeros(40, dtype=torch.float64), t)
    solution.value.backward(random(10, 40))
    assert solution.backward is not None
    return t.grad, solution.backward


def test_the_inverse_of_lbfgs_preconditions_the_backward_pass() -> None:
    """Fails where the pairs of another call, or of none, reach the solver: then nothing is saved."""
    t = random(6, 40)
    without, info = derivative(t)
    with_it, preconditioned = derivative(t, preconditioner=InverseLBFGS())
    torch.testing.assert_close(with_it, without, rtol=1e-5, atol=1e-7)
    assert 2 * int(preconditioned.iterations) <= int(info.iterations)


def test_the_inverse_of_lbfgs_under_vmap_and_with_several_cotangents() -> None:
    layers = [
        idf.ArgminLayer(quartic, inner_solver=LBFGS(history=30, tol=1e-7), linear_solver=solver)
        for solver in (idf.Dense(), idf.CG(rtol=1e-10, preconditioner=InverseLBFGS()))
    ]
    zero, t = torch.zeros(40, dtype=torch.float64), random(7, 2, 40)
    for function in (lambda f: vmap(jacrev(f))(t), lambda f: jacrev(vmap(f))(t)):
        expected, found = (function(lambda t, layer=layer: layer(zero, t)) for layer in layers)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_the_inverse_as_the_solver_is_reported_for_what_it_is() -> None:
    def shine(A: idf.LinearOperator, b: Tensor) -> Tensor:
        return InverseLBFGS()(A)(b)

    layer = idf.ArgminLayer(quartic, inner_solver=LBFGS(history=60, tol=1e-10), linear_solver=shine)
    t = random(6, 40).requires_grad_()
    solution = layer.solve(torch.zeros(40, dtype=torch.float64), t)
    with pytest.warns(idf.ConvergenceWarning, match="shine did not solve the backward linear system"):
        solution.value.sum().backward()
    assert 0 < float(solution.backward.residual_norm) < 1  # better than no inverse at all


def test_the_inverse_of_lbfgs_needs_lbfgs() -> None:
    layer = idf.ArgminLayer(
        quartic, inner_solver=idf.inner_solvers.Newton(), linear_solver=idf.CG(preconditioner=InverseLBFGS())
    )
    t = random(6, 40).requires_grad_()
    with pytest.raises(idf.ImplicitDiffError, match=r"needs the steps of an ArgminLayer's inner solver LBFGS\(\)"):
        layer(torch.zeros(40, dtype=torch.float64), t).sum().backward()


def test_a_backward_pass_preconditions_the_transpose() -> None:
    """Fails where the preconditioner is built from A and applied to Aᵀ: for a permutation-like A that is far off."""
    P = torch.eye(30, dtype=torch.float64).roll(1, 0)
    A = P @ torch.diag(spread(1e4, 30)) + 1e-3 * random(8, 30, 30)

    def exact_inverse(A: idf.LinearOperator) -> object:
        inverse = torch.linalg.inv(A.to_dense())
        return lambda v: v @ inverse.mT

    layer = idf.RootLayer(
        lambda x, t: A @ x - t,
        inner_solver=idf.inner_solvers.Newton(linear_solver=idf.Dense()),
        linear_solver=idf.GMRES(preconditioner=exact_inverse),
    )
    t = random(9, 30).requires_grad_()
    solution = layer.solve(torch.zeros(30, dtype=torch.float64), t)
    solution.value.sum().backward()
    assert int(solution.backward.iterations) <= 2
    torch.testing.assert_close(t.grad, torch.linalg.inv(A).sum(0), rtol=1e-6, atol=1e-9)


def test_settings_are_checked() -> None:
    for make in (lambda: Nystrom(0), lambda: Jacobi(0), lambda: Nystrom(1.5)):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            make()
