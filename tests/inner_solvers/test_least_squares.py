"""Gauss–Newton and Levenberg–Marquardt: the classic bank beside SciPy, each system its own way, honest ends."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers import levenberg_marquardt
from implicitdiff.inner_solvers.gauss_newton import GaussNewton
from implicitdiff.inner_solvers.levenberg_marquardt import LevenbergMarquardt

from ..problems import orthogonal, random, vector
from .more_garbow_hillstrom import PROBLEMS, LeastSquaresProblem

D = torch.float64
SOLVERS: dict[str, Callable[..., Any]] = {"GaussNewton": GaussNewton, "LevenbergMarquardt": LevenbergMarquardt}
FLAT = 1e-8
TOLERANCES = {"Gulf research and development": FLAT, "penalty II": FLAT, "Powell badly scaled": FLAT, "Meyer": 1e-3}
"""1e-6 elsewhere: flat valleys need less, and Meyer's gradient is 1e10 at the start and 1e-4 by rounding at the end."""
TOO_FAR_FOR_GAUSS_NEWTON = {
    "Freudenstein and Roth": "stuck where J loses rank",
    "Jennrich and Sampson": "stuck where J loses rank",
    "Biggs EXP6": "stuck where J loses rank",
    "Gulf research and development": "runs off to where the residuals are flat",
    "Brown and Dennis": "reached but slowly: r²-curvature rules at the solution, where the residual is large",
}


@pytest.fixture(params=["QR", "products"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Levenberg–Marquardt as for few and as for many unknowns."""
    if request.param == "products":
        monkeypatch.setattr(levenberg_marquardt, "DENSE_UP_TO", 0)
    return str(request.param)


def layer(residual: Callable[..., Any], inner_solver: Any) -> idf.ArgminLayer:
    return idf.ArgminLayer(idf.LeastSquares(residual), inner_solver=inner_solver)


def statuses(info: Any) -> list[str]:
    return [idf.Status(int(s)).name for s in info.status.reshape(-1)]


# ---------------------------------------------------------------------------------------------- the classic bank


@dataclass(frozen=True)
class Run:
    value: float
    evaluations: int
    info: Any


@functools.cache
def ours(solver: str, name: str) -> Run:
    problem, count = PROBLEMS[name], 0

    def counted(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return problem.residuals(x)

    budget = 100 if solver == "GaussNewton" and name in TOO_FAR_FOR_GAUSS_NEWTON else 600
    inner_solver = SOLVERS[solver](tol=TOLERANCES.get(name, 1e-6), max_iterations=budget, on_failure="ignore")
    solution = layer(counted, inner_solver).solve(problem.start)
    # One evaluation looks for captured tensors, one for an unrolling.
    return Run(float(problem.objective(solution.value)), count - 1, solution.forward)


def is_an_optimum(problem: LeastSquaresProblem, value: float) -> bool:
    """To the six digits that the paper gives, or 1e-9 where it is 0: ‖∇f‖ ≤ 1e-6 at singular Hessians gives no more."""
    return any(abs(value - optimum) <= 1e-5 * optimum + 1e-9 for optimum in problem.optima)


@pytest.mark.parametrize("name", PROBLEMS)
def test_levenberg_marquardt_reaches_the_optimum_from_the_standard_start(name: str) -> None:
    run = ours("LevenbergMarquardt", name)
    assert bool(run.info.converged)
    assert is_an_optimum(PROBLEMS[name], run.value)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in TOO_FAR_FOR_GAUSS_NEWTON])
def test_gauss_newton_reaches_the_optimum_from_the_standard_start(name: str) -> None:
    run = ours("GaussNewton", name)
    assert bool(run.info.converged)
    assert is_an_optimum(PROBLEMS[name], run.value)


@pytest.mark.parametrize("name", TOO_FAR_FOR_GAUSS_NEWTON)
def test_gauss_newton_says_so_where_it_does_not(name: str) -> None:
    run = ours("GaussNewton", name)
    assert statuses(run.info)[0] in ("STAGNATED", "MAX_ITERATIONS"), TOO_FAR_FOR_GAUSS_NEWTON[name]


def test_levenberg_marquardt_needs_no_more_evaluations_than_minpack() -> None:
    """In the median; one problem, that of the worst scaling, takes several times as many."""
    ratios = {}
    for name, problem in PROBLEMS.items():
        with np.errstate(all="ignore"):
            found = scipy.optimize.least_squares(
                lambda x, p=problem: p.residuals(torch.as_tensor(x)).numpy(),
                problem.start.numpy(),
                lambda x, p=problem: jacrev(p.residuals)(torch.as_tensor(x)).numpy(),
                method="lm",
                xtol=1e-10,
                ftol=1e-10,
                gtol=1e-10,
            )
        if is_an_optimum(problem, 2 * found.cost):
            ratios[name] = ours("LevenbergMarquardt", name).evaluations / found.nfev
    assert len(ratios) >= 30
    assert median(ratios.values()) <= 1.1, ratios
    assert max(ratios.values()) <= 5, ratios


# --------------------------------------------------------------------------------------------- steps and numbers


@pytest.mark.parametrize(("m", "n", "rank"), [(6, 3, 3), (6, 3, 2), (3, 6, 3), (4, 4, 2)])
@pytest.mark.parametrize("linear_solver", [None, idf.Dense(), idf.LSMR(rtol=1e-12), idf.Auto(rtol=1e-12)], ids=str)
def test_gauss_newton_solves_linear_problems_by_the_shortest_step(
    linear_solver: Any, m: int, n: int, rank: int
) -> None:
    """x₀ + A⁺ (b − A x₀) in one step, whatever the rank."""
    A = random(1, m, rank) @ random(2, rank, n)
    b, x0 = random(3, m), random(4, n)
    solution = layer(lambda x: A @ x - b, GaussNewton(linear_solver, tol=1e-9)).solve(x0)
    torch.testing.assert_close(solution.value, x0 + torch.linalg.pinv(A) @ (b - A @ x0), rtol=1e-8, atol=1e-9)
    assert int(solution.forward.iterations) <= (2 if m == n and "Auto" in repr(linear_solver) else 1)


def test_levenberg_marquardt_steps_by_the_damped_normal_equations() -> None:
    """(JᵀJ + μ D²) d = −Jᵀr, μ and D by hand, on Rosenbrock's valley, with rejected steps too."""
    F: Callable[[Tensor], Tensor] = lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])  # noqa: E731
    x, met, growth = vector(-1.2, 1), [], 2.0
    J, mu = jacrev(F)(x), 1e-3
    scale = J.norm(dim=0)
    for _ in range(8):
        J, r = jacrev(F)(x), F(x)
        scale = torch.maximum(scale, J.norm(dim=0))
        d = -torch.linalg.solve(J.T @ J + mu * torch.diag(scale**2), J.T @ r)
        new = F(x + d)
        ratio = float((r @ r - new @ new) / (r @ r - (r + J @ d) @ (r + J @ d)))
        if ratio > 0:
            x, mu, growth = x + d, mu * max(1 / 3, 1 - (2 * ratio - 1) ** 3), 2.0
        else:
            mu, growth = mu * growth, 2 * growth
        met.append((x, ratio > 0))
    assert {taken for _, taken in met} == {True, False}
    for k, (expected, _) in enumerate(met):
        solver = LevenbergMarquardt(tol=0.0, max_iterations=k + 1, on_failure="ignore")
        torch.testing.assert_close(layer(F, solver)(vector(-1.2, 1)), expected, rtol=1e-8, atol=1e-10)


def test_units_of_the_unknowns_do_not_matter() -> None:
    """The same iterates in other units, as D is in them too."""
    t, units = torch.linspace(0, 2, 12, dtype=D), vector(1e6, 1e-5)
    y = 3 * torch.exp(-1.3 * t) + 0.1 * random(1, 12)
    model: Callable[[Tensor], Tensor] = lambda x: x[0] * torch.exp(-x[1] * t) - y  # noqa: E731
    for k in (1, 2, 4):
        solver = LevenbergMarquardt(tol=0.0, max_iterations=k, on_failure="ignore")
        plain = layer(model, solver)(torch.ones(2, dtype=D))
        scaled = layer(lambda z: model(z / units), solver)(units)
        torch.testing.assert_close(scaled / units, plain, rtol=1e-9, atol=0)


@pytest.mark.parametrize("cond", [10.0, 1e3])
def test_both_ways_of_levenberg_marquardt_agree(way: str, cond: float) -> None:
    W = orthogonal(1, 40, 20) * torch.logspace(0, -math.log10(cond), 20, dtype=D) @ orthogonal(4, 20, 20)
    y = torch.tanh(W @ random(2, 20)) + 0.1 * random(3, 40)
    solution = layer(lambda x: torch.tanh(W @ x) - y, LevenbergMarquardt(tol=1e-9)).solve(torch.zeros(20, dtype=D))
    assert bool(solution.forward.converged)
    found = scipy.optimize.least_squares(
        lambda x: np.tanh(W.numpy() @ x) - y.numpy(), np.zeros(20), xtol=1e-15, ftol=1e-15, gtol=1e-12
    )
    # SciPy stops where the values show nothing any more, at √ε · cond.
    torch.testing.assert_close(solution.value, torch.as_tensor(found.x), rtol=1e-5, atol=1e-7 * cond)


def test_more_unknowns_than_a_matrix_is_made_for() -> None:
    n = 600
    target = random(1, n)
    solution = layer(lambda x, y: torch.sinh(x) + x.roll(1) / 4 - y, LevenbergMarquardt()).solve(
        torch.zeros(n, dtype=D), torch.sinh(target) + target.roll(1) / 4
    )
    assert bool(solution.forward.converged)
    torch.testing.assert_close(solution.value, target, rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------- each system its own


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_each_system_of_a_batch_goes_its_own_way(name: str, dtype: torch.dtype, way: str) -> None:
    """Fits of x₀ exp(−x₁ t): one from its solution, easy, hard, rank-deficient (data 0 leave x₁ free), NaN, far off."""
    t = torch.linspace(0, 2, 10, dtype=dtype)
    curves = torch.stack(
        [
            torch.exp(-t),
            1.2 * torch.exp(-0.8 * t) + 0.05 * torch.sin(9 * t),
            50 * torch.exp(-6 * t),
            0 * t,
            t * math.nan,
            -torch.exp(t),
        ]
    )
    tol = 1e-9 if dtype is torch.float64 else 1e-4
    fit = layer(
        lambda x, y: x[0] * torch.exp(-x[1] * t) - y, SOLVERS[name](tol=tol, max_iterations=300, on_failure="ignore")
    )
    start = torch.ones(2, dtype=dtype)
    with idf.record() as history:
        x = vmap(fit, in_dims=(None, 0))(start, curves)
    info = history[0].info
    expected = ["CONVERGED"] * 4 + ["NON_FINITE", "CONVERGED"]
    assert statuses(info) == expected
    assert int(info.iterations[0]) == 0
    assert int(info.iterations[1]) < int(info.iterations[2])
    torch.testing.assert_close(x[0], start, rtol=0, atol=0)
    torch.testing.assert_close(x[4], start, rtol=0, atol=0)
    for i in (1, 2, 5):
        found = scipy.optimize.least_squares(
            lambda x, i=i: (x[0] * torch.exp(-x[1] * t.double()) - curves[i].double()).numpy(), x[i], xtol=1e-14
        )
        # SciPy's own accuracy, and in float32 ‖∇f‖ ≤ 1e-4 of a flat minimum.
        rtol = 1e-6 if dtype is torch.float64 else 3e-3
        torch.testing.assert_close(x[i], torch.as_tensor(found.x, dtype=dtype), rtol=rtol, atol=0)
    for i in range(6):
        alone = fit.solve(start, curves[i]).forward
        assert statuses(alone) == [expected[i]]
        # Sums round differently alone and in a batch.
        assert abs(int(alone.iterations) - int(info.iterations[i])) <= 1 + 0.1 * int(alone.iterations)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_report_is_of_the_gradient(name: str) -> None:
    t, y = torch.linspace(0, 1, 8, dtype=D), random(1, 8)
    solution = layer(lambda x: torch.cos(x[0] * t) * x[1] - y, SOLVERS[name](tol=1e-6)).solve(vector(1, 1))
    x = solution.value.detach().requires_grad_()
    (g,) = torch.autograd.grad(0.5 * (torch.cos(x[0] * t) * x[1] - y).square().sum(), x)
    torch.testing.assert_close(solution.forward.residual_norm, g.norm(), rtol=1e-6, atol=1e-14)
    assert float(g.norm()) <= 1e-6


# ------------------------------------------------------------------------------------------------------ odd cases


@pytest.mark.parametrize("name", SOLVERS)
def test_few_and_no_equations(name: str, way: str) -> None:
    under = layer(lambda x: x.sum().reshape(1) ** 3 - 8, SOLVERS[name](tol=1e-10))
    x = under(torch.full((4,), 0.25, dtype=D))
    torch.testing.assert_close(x, torch.full((4,), 0.5, dtype=D), rtol=1e-9, atol=0)  # the shortest way there
    none = layer(lambda x: x[:0], SOLVERS[name]()).solve(torch.ones(3, dtype=D))
    assert bool(none.forward.converged)
    assert none.value.tolist() == [1, 1, 1]
    constant = layer(lambda x: torch.ones(2, dtype=D), SOLVERS[name]()).solve(torch.ones(3, dtype=D))
    assert bool(constant.forward.converged)
    assert layer(lambda x: x, SOLVERS[name]())(torch.zeros(0, dtype=D)).shape == (0,)
    scalar = layer(lambda x: torch.exp(x) - 2, SOLVERS[name](tol=1e-12))(torch.zeros((), dtype=D))
    torch.testing.assert_close(scalar, torch.tensor(math.log(2), dtype=D), rtol=1e-11, atol=0)
    at_once = layer(lambda x: x**3, SOLVERS[name]()).solve(torch.zeros(2, dtype=D)).forward
    assert int(at_once.iterations) == 0
    batch = vmap(layer(lambda x, y: (x * y)[:0], SOLVERS[name]()), in_dims=(None, 0))
    assert batch(torch.ones(2, dtype=D), torch.ones(3, 1, dtype=D)).shape == (3, 2)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rounding_ends_it_and_it_does_not_claim(name: str, dtype: torch.dtype, way: str) -> None:
    t = torch.linspace(0, 2, 30, dtype=dtype)
    y = 100 * torch.exp(-t) + 30 * torch.sin(20 * t)
    fit = layer(lambda x: x[0] * torch.exp(-x[1] * t) - y, SOLVERS[name](tol=1e-30, on_failure="ignore"))
    info = fit.solve(torch.ones(2, dtype=dtype)).forward
    assert statuses(info) == ["STAGNATED"]
    assert int(info.iterations) < 150
    # It gets as far as rounding lets it: terms of 100, thirty of them, times ∂/∂x₁ of 100.
    assert float(info.residual_norm) <= 300 * 100 * 100 * torch.finfo(dtype).eps


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 8), n=st.integers(1, 5), size=st.floats(-8, 8), unit=st.floats(-6, 6), seed=st.integers(0, 1000)
)
def test_odd_problems_are_solved_or_reported(m: int, n: int, size: float, unit: float, seed: int) -> None:
    A, b = random(seed, m, n), random(seed + 1, m)
    a, u = 10**size, 10**unit

    def residual(x: Tensor) -> Tensor:
        return a * (A @ torch.sinh(u * x) - b)

    for solver in (LevenbergMarquardt(on_failure="ignore"), GaussNewton(on_failure="ignore")):
        solution = layer(residual, solver).solve(torch.zeros(n, dtype=D))
        x = solution.value.detach().requires_grad_()
        (g,) = torch.autograd.grad(0.5 * residual(x).square().sum(), x)
        tol = 1.5e-8 * max(1.0, float((a * u * A.T @ (a * b)).norm()))
        assert bool(solution.forward.converged) == (float(solution.forward.residual_norm) <= 1.01 * tol)
        if bool(solution.forward.converged):
            assert float(g.norm()) <= 1.1 * tol
        else:
            assert statuses(solution.forward)[0] in ("STAGNATED", "MAX_ITERATIONS")
        assert float(residual(x.detach()).norm()) <= float((a * b).norm()) * (1 + 1e-12)


def test_a_step_into_nan_is_not_taken() -> None:
    """√x − 0.1 from 4: the full step leads to x < 0."""
    x = layer(lambda x: torch.sqrt(x) - 0.1, LevenbergMarquardt(tol=1e-10))(torch.full((1,), 4.0, dtype=D))
    torch.testing.assert_close(x, torch.full((1,), 0.01, dtype=D), rtol=1e-8, atol=0)


def test_a_point_without_a_gradient_is_not_taken() -> None:
    """Below 1 the value is finite and the gradient is not: it goes up to there and says that it cannot go on."""
    fit = layer(
        lambda x: x - 0.5 + 0 * torch.where(x > 1, torch.sqrt(x - 1), 0), LevenbergMarquardt(on_failure="ignore")
    )
    solution = fit.solve(torch.full((1,), 4.0, dtype=D))
    assert statuses(solution.forward) == ["STAGNATED"]
    assert 1 <= float(solution.value) < 1.1


def test_an_overflown_direction_is_not_taken() -> None:
    class Overflowing(idf.LinearSolver):
        takes_rectangular = True

        def solve(self, A: Any, b: Tensor, x0: Tensor | None = None) -> Any:
            solution = idf.Dense().solve(A, b)
            return idf.LinearSolution(torch.full_like(solution.value, -torch.inf), solution.info)

    solution = layer(lambda x: x - 3, GaussNewton(Overflowing())).solve(torch.zeros(2, dtype=D))
    assert bool(solution.forward.converged)
    torch.testing.assert_close(solution.value, torch.full((2,), 3.0, dtype=D))


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("name", SOLVERS)
def test_another_objective_is_refused(name: str) -> None:
    with pytest.raises(idf.ImplicitDiffError, match=r"give ArgminLayer\(implicitdiff.LeastSquares\(residual\)"):
        idf.ArgminLayer(lambda x: (x**2).sum(), inner_solver=SOLVERS[name]())(torch.ones(2))
    with pytest.raises(idf.ImplicitDiffError, match=r"no objective|least-squares"):
        idf.RootLayer(lambda x: x**2, inner_solver=SOLVERS[name]())(torch.ones(2))


@pytest.mark.parametrize("name", SOLVERS)
def test_it_cannot_be_unrolled(name: str) -> None:
    unrolled = idf.UnrolledLayer(idf.LeastSquares(lambda x, y: x**2 - y), SOLVERS[name]())
    y = torch.tensor([4.0, 9.0], requires_grad=True)
    with pytest.raises(idf.ImplicitDiffError, match="cannot be unrolled"):
        unrolled(torch.ones(2), y)
    with pytest.raises(idf.ImplicitDiffError, match="cannot be unrolled"):
        torch.func.jacfwd(lambda y: unrolled(torch.ones(2), y))(y.detach())


def test_a_linear_solver_for_square_systems_is_refused() -> None:
    for solver in (idf.CG(), lambda A, b: b):
        with pytest.raises(ValueError, match=r"systems of Gauss-Newton are rectangular: use Dense\(\)"):
            GaussNewton(solver)
