"""Broyden's method: the textbook's iterates, the classic systems, one memory for each system."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers.broyden import Broyden

from ..problems import random, rotated, vector

D = torch.float64


def tridiagonal(x: Tensor) -> Tensor:
    """Moré, Garbow and Hillstrom 1981, problem 30."""
    zero = x.new_zeros(1)
    return (3 - 2 * x) * x - torch.cat([zero, x[:-1]]) - 2 * torch.cat([x[1:], zero]) + 1


def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def helical_valley(x: Tensor) -> Tensor:
    turns = torch.atan2(x[1], x[0]) / (2 * math.pi)
    return torch.stack([10 * (x[2] - 10 * turns), 10 * (torch.hypot(x[0], x[1]) - 1), x[2]])


def badly_scaled(x: Tensor) -> Tensor:
    """Moré, Garbow and Hillstrom 1981, problem 3."""
    return torch.stack([1e4 * x[0] * x[1] - 1, torch.exp(-x[0]) + torch.exp(-x[1]) - 1.0001])


def trigonometric(x: Tensor) -> Tensor:
    """Moré, Garbow and Hillstrom 1981, problem 26."""
    i = torch.arange(1, len(x) + 1, dtype=x.dtype)
    return len(x) - torch.cos(x).sum() + i * (1 - torch.cos(x)) - torch.sin(x)


def equilibrium(x: Tensor) -> Tensor:
    """A fixed point x = tanh(W x + b) with ‖W‖ = 0.9."""
    return x - torch.tanh(0.9 * rotated(torch.linspace(-1, 1, 40, dtype=D), 3) @ x + random(4, 40))


CLASSIC: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "tridiagonal": (tridiagonal, -torch.ones(30, dtype=D)),
    "Rosenbrock": (rosenbrock, vector(-1.2, 1)),
    "helical valley": (helical_valley, vector(-1, 0.1, 0)),
    "badly scaled": (badly_scaled, vector(0, 1)),
    "trigonometric": (trigonometric, torch.full((10,), 0.1, dtype=D)),
    "equilibrium": (equilibrium, torch.zeros(40, dtype=D)),
    "negative": (lambda x: vector(4, 9) - x**2, vector(1, 1)),  # the identity has the wrong sign
    "rotation": (lambda x: torch.stack([x[1], -x[0]]) + 0.1 * x**3 - 1, vector(0, 0)),  # −F is no descent direction
    "huge": (lambda x: 1e6 * tridiagonal(x), -torch.ones(30, dtype=D)),
    "tiny": (lambda x: 1e-6 * tridiagonal(x), -torch.ones(30, dtype=D)),
}


def count_evaluations(F: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    count = [0]

    def counted(x: Tensor) -> Tensor:
        count[0] += 1
        return F(x)

    return counted, count


@pytest.mark.parametrize("name", CLASSIC)
def test_solves_the_classic_systems_as_scipy_does(name: str) -> None:
    """From the standard starts, with no more evaluations than SciPy's method needs (half as many again at most)."""
    F, x0 = CLASSIC[name]
    tol = 1e-9 * {"huge": 1e6, "tiny": 1e-6}.get(name, 1.0)
    counted, count = count_evaluations(F)
    info = idf.RootLayer(counted, inner_solver=Broyden(tol=tol)).solve(x0).forward
    assert bool(info.converged)
    assert float(info.residual_norm) <= tol
    theirs, their_count = count_evaluations(F)
    options = {"fatol": tol, "tol_norm": np.linalg.norm, "maxiter": 200}
    with np.errstate(all="ignore"):  # of −F, as SciPy's first guess of the Jacobian is negative
        found = scipy.optimize.root(
            lambda x: -theirs(torch.as_tensor(x)).numpy(), x0.numpy(), method="broyden1", options=options
        )
    if found.success:
        assert count[0] <= 1.5 * their_count[0] + 2, (count, their_count)


def test_the_iterates_are_those_of_the_dense_formula() -> None:
    """B ← B + (y − B s) sᵀ / sᵀs (Kelley 1995, Eq. 7.3) with a matrix, where every step is a full one."""
    H, c = torch.eye(6, dtype=D) + 0.3 * random(1, 6, 6) / 6**0.5, random(2, 6)
    F: Callable[[Tensor], Tensor] = lambda x: H @ x + 0.05 * x**3 - c  # noqa: E731
    x, met = torch.zeros(6, dtype=D), []
    B, f = torch.eye(6, dtype=D) * max(1.0, float(F(x).norm())), F(x)
    for k in range(8):
        s = -torch.linalg.solve(B, f)
        y = F(x + s) - f
        if k == 0:  # the scale is known after the first step
            B = torch.eye(6, dtype=D) * (y.norm() / s.norm())
        B = B + torch.outer(y - B @ s, s) / (s @ s)
        x, f = x + s, f + y
        met.append(x)
    for k in range(8):
        solver = Broyden(history=8, tol=0.0, max_iterations=k + 1, on_failure="ignore")
        got = idf.RootLayer(F, inner_solver=solver)(torch.zeros(6, dtype=D))
        torch.testing.assert_close(got, met[k], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [2, 5])
def test_a_linear_system_takes_2n_steps(n: int) -> None:
    """Gay 1979: exact after 2 n steps. Not so where a step was shortened or the memory too small."""
    A, b = torch.eye(n, dtype=D) + 0.4 * random(n, n, n), random(2, n)
    solver = Broyden(history=3 * n, tol=1e-10)
    solution = idf.RootLayer(lambda x: A @ x - b, inner_solver=solver).solve(torch.zeros(n, dtype=D))
    torch.testing.assert_close(solution.value, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-9)
    assert int(solution.forward.iterations) <= 2 * n + 2  # the first step only finds the scale


@pytest.mark.parametrize("history", [1, 2, 5])
def test_a_short_memory_starts_anew(history: int) -> None:
    solver = Broyden(history, tol=1e-10)
    x = idf.FixedPointLayer(lambda x: x - equilibrium(x), inner_solver=solver)(torch.zeros(40, dtype=D))
    assert float(equilibrium(x).norm()) <= 1e-10


def test_each_system_of_a_batch_goes_its_own_way() -> None:
    """An easy one, a hard one, one that has no root, one that is NaN, one that starts at its root."""

    def F(x: Tensor, kind: Tensor) -> Tensor:
        hard = rosenbrock(x)
        kinds = torch.stack([x - 3, hard, x**2 + 1, x * math.nan, x])
        return kinds[kind]

    starts = torch.tensor([[0.0, 0], [-1.2, 1], [1, 1], [1, 1], [0, 0]], dtype=D)
    layer = idf.RootLayer(F, inner_solver=Broyden(tol=1e-10, on_failure="ignore"))
    with idf.record() as history:
        x = vmap(layer)(starts, torch.arange(5))
    info = history[0].info
    names = [idf.Status(int(s)).name for s in info.status]
    assert names == ["CONVERGED", "CONVERGED", "STAGNATED", "NON_FINITE", "CONVERGED"]
    torch.testing.assert_close(x[:2], torch.tensor([[3.0, 3], [1, 1]], dtype=D), rtol=1e-9, atol=0)
    assert x[2].isfinite().all()
    assert int(info.iterations[4]) == 0
    assert int(info.iterations[2]) < 100  # it does not spin where there is nothing to find
    for kind in (0, 1, 2):
        alone = layer.solve(starts[kind], torch.tensor(kind)).forward
        assert int(alone.iterations) == int(info.iterations[kind])
        assert int(alone.status) == int(info.status[kind])


def test_derivatives_under_every_transform() -> None:
    """√y: first derivative 1/(2√y), second −1/(4 y^1.5)."""
    y, one = vector(4, 9), torch.ones(2, dtype=D)
    layer = idf.RootLayer(lambda x, y: x * x - y, inner_solver=Broyden(tol=1e-13))
    first, second = 0.5 / y.sqrt(), -0.25 / y**1.5
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(lambda y: layer(one, y))(y), torch.diag(first), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hessian(lambda y: layer(one, y).sum())(y), torch.diag(second), rtol=1e-9, atol=1e-11)
    per_system = vmap(grad(lambda y: layer(one[:1], y).sum()))(y.unsqueeze(-1))
    torch.testing.assert_close(per_system.squeeze(-1), first, rtol=1e-10, atol=0)
    leaf = y.clone().requires_grad_()
    (g,) = torch.autograd.grad(layer(one, leaf).sum(), leaf, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(g.sum(), leaf)[0], second, rtol=1e-9, atol=0)


def test_its_steps_can_be_unrolled() -> None:
    """At convergence the derivative of the steps has converged too, if more slowly."""
    H, c = rotated(torch.linspace(1, 3, 4, dtype=D), 1), random(2, 4)
    layer = idf.UnrolledLayer(lambda x, c: 0.5 * x @ (H @ x) - c @ x, Broyden(tol=1e-13))
    got = jacrev(lambda c: layer(torch.zeros(4, dtype=D), c))(c)
    torch.testing.assert_close(got, torch.linalg.inv(H), rtol=1e-5, atol=1e-6)


def test_float32_neither_spins_nor_claims() -> None:
    F: Callable[[Tensor], Tensor] = lambda x: 100 * (x - torch.cos(x))  # noqa: E731
    layer = idf.RootLayer(F, inner_solver=Broyden(tol=1e-12, on_failure="ignore"))
    info = layer.solve(torch.zeros(5)).forward
    assert idf.Status(int(info.status)) in (idf.Status.STAGNATED, idf.Status.CONVERGED)
    assert int(info.iterations) < 100
    assert bool(info.converged) == (float(info.residual_norm) <= 1e-12)
    assert bool(idf.RootLayer(F, inner_solver=Broyden()).solve(torch.zeros(5)).forward.converged)


def test_no_unknowns_and_a_scalar() -> None:
    assert idf.RootLayer(lambda x: x, inner_solver=Broyden())(torch.zeros(0)).shape == (0,)
    x = idf.FixedPointLayer(torch.cos, inner_solver=Broyden(tol=1e-12))(torch.zeros((), dtype=D))
    torch.testing.assert_close(x, torch.tensor(0.7390851332151607, dtype=D), rtol=1e-11, atol=0)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), scale=st.floats(-12, 12), seed=st.integers(0, 1000))
def test_odd_contractions_are_solved_or_reported(n: int, scale: float, seed: int) -> None:
    W, size = 0.8 * rotated(torch.linspace(-1, 1, n, dtype=D), seed), 10**scale
    b = size * random(seed, n)
    layer = idf.FixedPointLayer(lambda x: W @ x + size * torch.sin(x / size) / 10 + b, inner_solver=Broyden())
    solution = layer.solve(torch.zeros(n, dtype=D))
    residual = solution.value - (W @ solution.value + size * torch.sin(solution.value / size) / 10 + b)
    assert bool(solution.forward.converged)
    torch.testing.assert_close(solution.forward.residual_norm, residual.norm(), rtol=1e-6, atol=1e-13 * size)
    assert float(residual.norm()) <= 1.5e-8 * max(1.0, float(b.norm())) * 1.01


@pytest.mark.parametrize("history", [0, 2.5, None])
def test_mistakes_are_named(history: Any) -> None:
    with pytest.raises(ValueError, match=f"{history}, but it must be a whole number|history is None"):
        Broyden(history)
