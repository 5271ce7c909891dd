"""iMAML with every inner and every linear solver against the closed form of linear regression, for a batch of tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import implicitdiff as idf
from imaml import IMAML
from imaml.tasks import LinearRegression, Task
from implicitdiff.inner_solvers import LBFGS, GradientDescent, NewtonCG, TorchOptimizer

D = torch.float64
LAM = 1.3


def model_and_tasks() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    tasks = LinearRegression(dimension=4, shots=6).sample(3, "train", 0, 0)
    return nn.Linear(4, 1, dtype=D), Task(*(tuple(t.double() for t in part) for part in tasks))


def closed_form(model: nn.Module, tasks: Task) -> Tensor:
    """λ A⁻¹ v, averaged, with A = 2SᵀS/n + λI and φ* = A⁻¹ (2Sᵀy/n + λθ)."""
    theta = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    total = torch.zeros(5, dtype=D)
    for xs, ys, xq, yq in zip(*tasks.support, *tasks.query, strict=True):
        S, Q = (torch.cat([x, torch.ones(len(x), 1, dtype=D)], 1) for x in (xs, xq))
        A = 2 * S.T @ S / len(S) + LAM * torch.eye(5, dtype=D)
        phi = torch.linalg.solve(A, 2 * S.T @ ys.flatten() / len(S) + LAM * theta)
        total += LAM * torch.linalg.solve(A, 2 * Q.T @ (Q @ phi - yq.flatten()) / len(Q)) / 3
    return total


def check(tolerance: float, **solvers: Any) -> None:
    model, tasks = model_and_tasks()
    learner = IMAML(model, nn.functional.mse_loss, regularization=LAM, **solvers)
    with idf.record() as history:
        learner.meta_loss(tasks).backward()
    assert all(bool(solve.converged.all()) for solve in history)
    got = torch.cat([model.weight.grad.flatten(), model.bias.grad])
    torch.testing.assert_close(got, closed_form(model, tasks), rtol=tolerance, atol=tolerance)


INNER = {
    "gradient descent, fixed step": GradientDescent(0.1, tol=1e-11),
    "gradient descent, line search": GradientDescent(tol=1e-10),
    "nesterov": GradientDescent(0.05, momentum=0.8, nesterov=True, tol=1e-11),
    "lbfgs": LBFGS(tol=1e-11),
    "hessian-free": NewtonCG(tol=1e-11),
    "hessian-free, truncated": NewtonCG(2, tol=1e-11),
}


@pytest.mark.parametrize("name", INNER)
def test_inner_solvers(name: str) -> None:
    check(1e-9, inner_solver=INNER[name], linear_solver=idf.CG(rtol=1e-12))


def test_adam() -> None:
    """Its steps have about the length lr until the very end: 1e-6 is where it may be asked to stop."""
    adam = TorchOptimizer(torch.optim.Adam, lr=0.02, tol=1e-6, max_iterations=5000)
    check(1e-5, inner_solver=adam, linear_solver=idf.CG(rtol=1e-12))


def by_lu(A: idf.LinearOperator, b: Tensor) -> Tensor:
    return torch.linalg.solve(A.to_dense(), b)


LINEAR = {
    "cg": idf.CG(rtol=1e-12),
    "minres": idf.MINRES(rtol=1e-12),
    "gmres": idf.GMRES(rtol=1e-12),
    "bicgstab": idf.BiCGStab(rtol=1e-12),
    "normal_cg": idf.NormalCG(rtol=1e-12),
    "lsmr": idf.LSMR(rtol=1e-12),
    "neumann": idf.Neumann(terms=400, rtol=1e-11),
    "dense": idf.Dense(rtol=1e-12),
    "auto": idf.Auto(rtol=1e-12),
    "scipy": idf.SciPy("minres", rtol=1e-12),
    "a callable": by_lu,
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_solvers(name: str) -> None:
    check(1e-9, inner_solver=NewtonCG(tol=1e-12), linear_solver=LINEAR[name])


@pytest.mark.parametrize("name", LINEAR)
def test_linear_solvers_under_a_threshold(name: str) -> None:
    """δ′ is asked of each of them, in the place of its own tolerance."""
    solver = LINEAR[name]
    model, tasks = model_and_tasks()
    learner = IMAML(
        model,
        nn.functional.mse_loss,
        inner_solver=NewtonCG(),
        linear_solver=solver,
        regularization=LAM,
        delta=1e-9,
        delta_prime=1e-5,
    )
    learner.meta_loss(tasks).backward()
    report = learner.report()
    got = torch.cat([model.weight.grad.flatten(), model.bias.grad])
    assert report["delta_prime_missed"] == 0
    # Beside it, v at φ differs from v at φ*, by about ‖∇²L‖δ.
    assert float((got - closed_form(model, tasks)).norm()) <= report["delta_prime"] + 1e-7
    assert report["delta_prime"] <= 1e-5
