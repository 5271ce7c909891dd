"""Nelder-Mead: SciPy's steps from the same simplex, one simplex per system, and no claim that is not so."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers.nelder_mead import FIRST_EDGE, NelderMead

from ..problems import random, rotated, vector
from .more_garbow_hillstrom import PROBLEMS

D = torch.float64
SMALL = ["Rosenbrock", "Freudenstein and Roth", "Beale", "Bard", "Gaussian", "Wood", "Kowalik and Osborne"]


@pytest.mark.parametrize("name", SMALL)
def test_makes_the_steps_of_scipy(name: str) -> None:
    """Up to the end, which SciPy finds by an absolute tolerance: the same numbers of iterations and evaluations."""
    problem, count = PROBLEMS[name], -1  # one evaluation looks for captured tensors

    def counted(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return problem.objective(x)

    solution = idf.ArgminLayer(counted, inner_solver=NelderMead()).solve(problem.start)
    x0 = problem.start
    simplex = torch.stack([x0, *(x0 + FIRST_EDGE * torch.diag(torch.where(x0 == 0, x0.abs().max(), x0)))])
    found = scipy.optimize.minimize(
        lambda x: problem.objective(torch.as_tensor(x)).item(),
        x0.numpy(),
        method="Nelder-Mead",
        options={"adaptive": True, "xatol": 1e-7, "fatol": 1.0, "initial_simplex": simplex.numpy(), "maxfev": 9000},
    )
    assert bool(solution.forward.converged)
    torch.testing.assert_close(solution.value, torch.as_tensor(found.x), rtol=1e-5, atol=1e-5)
    assert abs(int(solution.forward.iterations) - found.nit) <= 0.1 * found.nit + 5
    assert abs(count - 2 - found.nfev) <= 0.1 * found.nfev + 10  # two are for ‖F‖ at the ends
    assert any(abs(float(problem.objective(solution.value)) - f) <= 1e-5 * f + 1e-12 for f in problem.optima)


def test_a_collapsed_simplex_is_not_called_a_minimum() -> None:
    """Brown's badly scaled problem: the simplex is tiny beside x₁ = 1e6 while ‖∇f‖ is 1e4."""
    problem = PROBLEMS["Brown badly scaled"]
    info = idf.ArgminLayer(problem.objective, inner_solver=NelderMead(on_failure="ignore")).solve(problem.start).forward
    assert idf.Status(int(info.status)) == idf.Status.STAGNATED
    assert not bool(info.converged)
    assert float(info.residual_norm) > 1e3


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-6), (torch.float32, 2e-2)], ids=str)
def test_each_system_has_its_own_simplex(dtype: torch.dtype, accuracy: float) -> None:
    """Three dimensions, conditions and scales of x; the report's residual is the gradient's norm."""
    H = rotated(torch.stack([torch.linspace(1, top, 3, dtype=D) for top in (1.0, 5.0, 20.0)]), 1).to(dtype)
    c = random(2, 3, 3).to(dtype)
    layer = idf.ArgminLayer(lambda x, H, c: 0.5 * x @ (H @ x) - c @ x, inner_solver=NelderMead())
    with idf.record() as history:
        x = vmap(lambda H, c: layer(torch.zeros(3, dtype=dtype), H, c))(H, c)
    assert bool(history[0].converged.all())
    gradient = (H @ x.unsqueeze(-1)).squeeze(-1) - c
    # By another formula than autograd's it is rounded otherwise, by some eps of numbers of order 1.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(history[0].residual_norm, gradient.norm(dim=-1), rtol=0, atol=100 * eps)
    torch.testing.assert_close(x, torch.linalg.solve(H, c), rtol=0, atol=accuracy)
    if dtype is torch.float64:
        assert len(set(history[0].iterations.tolist())) == 3
        for i in range(3):
            alone = layer.solve(torch.zeros(3, dtype=dtype), H[i], c[i])
            torch.testing.assert_close(x[i], alone.value, rtol=0, atol=1e-6)
            # Where values differ by rounding only, sums that round otherwise choose other vertices.
            assert abs(int(alone.forward.iterations) - int(history[0].iterations[i])) <= 12


def test_the_search_asks_for_values_only() -> None:
    class Problem:
        gradients = 0

        def objective(self, x: Tensor) -> Tensor:
            return ((x - 1) ** 2).sum(-1)

        def residual(self, x: Tensor) -> Tensor:
            self.gradients += 1
            return 2 * (x - 1)

    problem: Any = Problem()
    x, info = NelderMead().solve(problem, torch.zeros(2, 2, dtype=D))
    assert problem.gradients == 2  # at the start and at the end
    assert bool(info.converged.all())
    torch.testing.assert_close(x, torch.ones(2, 2, dtype=D), rtol=0, atol=1e-6)


def test_the_derivative_is_that_of_the_minimum() -> None:
    layer = idf.ArgminLayer(lambda x, y: ((x**2 - y) ** 2).sum(), inner_solver=NelderMead(tol=1e-8))
    y = vector(4, 9)
    got = grad(lambda y: layer(torch.ones(2, dtype=D), y).sum())(y)
    torch.testing.assert_close(got, vector(1 / 4, 1 / 6), rtol=1e-6, atol=0)


def test_odd_cases() -> None:
    """No unknowns, one, scalars, a tiny start, a wall of NaN, a NaN everywhere in one system of two."""
    solver = NelderMead(on_failure="raise")
    assert idf.ArgminLayer(lambda x: (x**2).sum(), inner_solver=solver)(torch.zeros(0)).shape == (0,)
    for start in (0.0, 1e-9, 5.0):
        x = idf.ArgminLayer(lambda x: (x - 2) ** 2, inner_solver=solver)(torch.tensor(start, dtype=D))
        torch.testing.assert_close(x, torch.tensor(2.0, dtype=D), rtol=0, atol=1e-6)
    x = idf.ArgminLayer(lambda x: (x - x.log()).sum(), inner_solver=solver)(vector(0.01, 20))
    torch.testing.assert_close(x, vector(1, 1), rtol=0, atol=1e-6)
    layer = idf.ArgminLayer(lambda x, t: ((x - t) ** 2).sum(), inner_solver=NelderMead(on_failure="ignore"))
    with idf.record() as history:
        x = vmap(lambda t: layer(torch.zeros(2, dtype=D), t))(vector(1, torch.nan))
    assert history[0].status.tolist() == [idf.Status.CONVERGED, idf.Status.NON_FINITE]
    torch.testing.assert_close(x[0], torch.ones(2, dtype=D), rtol=0, atol=1e-6)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"tol is 0\.1, but it must be below 0\.05"):
        NelderMead(tol=0.1)
    layer = idf.UnrolledLayer(lambda x, t: ((x - t) ** 2).sum(), NelderMead())
    with pytest.raises(idf.ImplicitDiffError, match="NelderMead cannot be unrolled"):
        layer(torch.zeros(2), torch.ones(2, requires_grad=True))
    with pytest.raises(idf.ImplicitDiffError, match="NelderMead cannot be unrolled"):
        grad(lambda t: layer(torch.zeros(2), t).sum())(torch.ones(2))


def test_a_system_that_shrinks_leaves_the_others_alone() -> None:
    """On the terraces of the second and third no vertex improves, and the simplex shrinks."""

    def objective(x: Tensor, height: Tensor) -> Tensor:
        terraces = torch.floor(3 * x.detach()) / 3
        return ((torch.where(height > 0, terraces, x) - 0.5) ** 2 * (1 + height)).sum()

    layer = idf.ArgminLayer(objective, inner_solver=NelderMead(on_failure="ignore"))
    start, heights = vector(3, 1, -2), vector(0, 1, 2)
    with idf.record() as history:
        x = vmap(lambda height: layer(start, height))(heights)
    for i in range(3):
        alone = layer.solve(start, heights[i])
        torch.testing.assert_close(x[i], alone.value, rtol=0, atol=1e-7)
        assert int(history[0].iterations[i]) == int(alone.forward.iterations)
