"""The inexact linear solvers: the derivative of one step, and the truth about it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers import FixedPointIteration
from implicitdiff.linear_solvers.jacobian_free import JacobianFree
from implicitdiff.linear_solvers.one_step import OneStep
from implicitdiff.operators import DenseOperator

from ..problems import random, rotated

D = torch.float64
W = 0.4 * rotated(torch.linspace(-1, 1, 5, dtype=D), 1)


def update(x: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(W @ x + b)


@pytest.mark.parametrize("solver", [JacobianFree(), OneStep(), OneStep(1.0)], ids=repr)
def test_a_fixed_point_is_differentiated_through_one_more_iteration(solver: idf.LinearSolver) -> None:
    b = random(2, 5)
    layer = idf.FixedPointLayer(update, linear_solver=solver)
    run = lambda b: layer(torch.zeros(5, dtype=D), b)  # noqa: E731
    x = run(b).detach()
    want = jacrev(lambda b: update(x, b))(b)
    exact = torch.linalg.solve(torch.eye(5, dtype=D) - jacrev(update)(x, b), want)
    assert not torch.allclose(want, exact, rtol=1e-2)
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(run)(b), want, rtol=1e-12, atol=1e-13)
    batch = torch.stack([b, -b, 0 * b])
    torch.testing.assert_close(vmap(jacrev(run))(batch)[0], want, rtol=1e-12, atol=1e-13)
    leaf, v = b.clone().requires_grad_(), random(3, 5)
    torch.testing.assert_close(torch.autograd.grad(run(leaf) @ v, leaf)[0], v @ want, rtol=1e-12, atol=1e-13)


def test_an_objective_is_differentiated_through_one_gradient_step() -> None:
    H, c, s = rotated(torch.linspace(1, 3, 4, dtype=D), 1), random(2, 4), 0.3
    objective = lambda x, c: 0.5 * x @ (H @ x) + 0.1 * (x**4).sum() - (c**2) @ x  # noqa: E731
    layer = idf.ArgminLayer(objective, linear_solver=OneStep(s))
    x = layer(torch.zeros(4, dtype=D), c).detach()
    want = jacrev(lambda c: x - s * grad(objective)(x, c))(c)
    got = jacrev(lambda c: layer(torch.zeros(4, dtype=D), c))(c)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_it_is_exact_for_an_iteration_of_newton() -> None:
    y = torch.tensor([4.0, 9.0], dtype=D)
    inner_solver = FixedPointIteration(tol=1e-14)
    heron = idf.FixedPointLayer(lambda x, y: (x + y / x) / 2, inner_solver=inner_solver, linear_solver=OneStep())
    got = jacrev(lambda y: heron(torch.ones(2, dtype=D), y))(y)
    torch.testing.assert_close(got, torch.diag(0.5 / y.sqrt()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", [JacobianFree(), OneStep(0.5)], ids=repr)
def test_the_residual_is_the_true_one_system_by_system(solver: idf.LinearSolver) -> None:
    scale = 1.0 if isinstance(solver, JacobianFree) else 0.5
    A = torch.eye(3, dtype=D) / scale + 0.1 * random(1, 3, 3, 3)
    A[1] = torch.eye(3, dtype=D) / scale  # solved exactly
    b = random(2, 3, 3)
    b[2] = 0
    solution = solver(DenseOperator(A), b)
    torch.testing.assert_close(solution.value, scale * b, rtol=0, atol=0)
    relative = (b - (A @ (scale * b).unsqueeze(-1)).squeeze(-1)).norm(dim=-1) / b.norm(dim=-1)
    torch.testing.assert_close(solution.info.residual_norm[:2], relative[:2], rtol=1e-12, atol=1e-15)
    assert solution.info.converged.tolist() == [False, True, True]
    assert [idf.Status(int(s)).name for s in solution.info.status] == ["MAX_ITERATIONS", "CONVERGED", "CONVERGED"]
    assert solution.info.iterations.tolist() == [1, 1, 0]
    assert solution.info.matvecs == 1
    assert solution.info.method == f"{type(solver).__name__}, inexact by design"


def test_no_warning_unless_asked_for() -> None:
    A, b = DenseOperator(torch.diag(torch.tensor([1.0, 2.0]))), torch.tensor([1.0, 1.0])
    with pytest.warns(idf.ConvergenceWarning, match="OneStep, inexact by design"):
        OneStep(on_failure="warn")(A, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        JacobianFree()(A, b)
    with pytest.raises(idf.ConvergenceError):
        JacobianFree(on_failure="raise")(A, b)


def test_extreme_right_hand_sides() -> None:
    A = DenseOperator(torch.diag(torch.tensor([1.0, 2.0])))
    b = torch.tensor([[1e-30, 1e-30], [1e30, 1e30], [float("nan"), 1.0]])
    info = JacobianFree()(A, b).info
    torch.testing.assert_close(info.residual_norm[:2], torch.full((2,), 0.5**0.5))
    assert int(info.status[2]) == idf.Status.NON_FINITE


@pytest.mark.parametrize("stepsize", [0.0, -1.0, float("nan")])
def test_a_stepsize_is_positive(stepsize: float) -> None:
    with pytest.raises(ValueError, match=f"stepsize is {stepsize}"):
        OneStep(stepsize)
