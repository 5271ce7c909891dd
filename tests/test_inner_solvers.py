"""Inner solvers: they find the solution, each system by itself, say how it went, and never claim what is not so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

import implicitdiff as idf
from implicitdiff.inner_solvers import LBFGS, Anderson, FixedPointIteration, GradientDescent, Newton, NewtonCG
from implicitdiff.linear_solvers import System

from .problems import random, rotated

D = torch.float64
MINIMISERS: dict[str, Callable[..., Any]] = {
    "GradientDescent": GradientDescent,
    "GradientDescent(0.05)": lambda **s: GradientDescent(0.05, **s),
    "momentum": lambda **s: GradientDescent(0.03, momentum=0.7, **s),
    "Nesterov": lambda **s: GradientDescent(0.03, momentum=0.7, nesterov=True, **s),
    "LBFGS": LBFGS,
    "NewtonCG": NewtonCG,
    "Newton": Newton,
}
ROOT_FINDERS: dict[str, Callable[..., Any]] = {
    "Newton": Newton,
    "Anderson": Anderson,
    "FixedPointIteration": FixedPointIteration,
}


def strongly_convex(x: Tensor, H: Tensor, c: Tensor) -> Tensor:
    return 0.5 * x @ (H @ x) + 0.1 * (x**4).sum() - c @ x


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2).sum() + ((1 - x[:-1]) ** 2).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MINIMISERS)
def test_minimises_each_system_of_a_batch(name: str, dtype: torch.dtype) -> None:
    """Against SciPy's minimum; the report's residual is the true one, and each system has its own count."""
    H = rotated(torch.stack([torch.linspace(1, top, 4, dtype=D) for top in (1.0, 5.0, 20.0)]), 1).to(dtype)
    c = random(2, 3, 4).to(dtype)
    tol = 1e-9 if dtype is torch.float64 else 1e-4
    layer = idf.ArgminLayer(strongly_convex, inner_solver=MINIMISERS[name](tol=tol, max_iterations=3000))
    with idf.record() as history:
        x = vmap(lambda H, c: layer(torch.zeros(4, dtype=dtype), H, c))(H, c)
    info = history[0].info
    assert bool(info.converged.all()), info
    gradient = (H @ x.unsqueeze(-1)).squeeze(-1) + 0.4 * x**3 - c
    # The test's formula rounds otherwise than autograd's, by some eps · ‖c‖: a tenth of the tolerance.
    torch.testing.assert_close(info.residual_norm, gradient.norm(dim=-1), rtol=1e-3, atol=tol / 10)
    assert float(gradient.norm(dim=-1).max()) <= 1.1 * tol
    for i in range(3):
        found = scipy.optimize.minimize(
            lambda x, i=i: float(strongly_convex(torch.as_tensor(x), H[i].double(), c[i].double())),
            [0.0] * 4,
            tol=1e-10,
        )
        torch.testing.assert_close(
            x[i].double(), torch.as_tensor(found.x), rtol=1e-4, atol=max(1e-5, 2 * tol)
        )  # SciPy's own accuracy
        alone = layer.solve(torch.zeros(4, dtype=dtype), H[i], c[i]).forward
        # Sums round differently alone and in a batch, and a line search follows the rounding.
        assert abs(int(alone.iterations) - int(info.iterations[i])) <= 2 + 0.2 * int(alone.iterations)


@pytest.mark.parametrize("name", ["LBFGS", "NewtonCG", "GradientDescent"])
def test_line_searches_master_rosenbrock(name: str) -> None:
    """A narrow curved valley with negative curvature on the way."""
    budget = {"LBFGS": 200, "NewtonCG": 100, "GradientDescent": 40000}[name]
    solver = MINIMISERS[name](tol=1e-6, max_iterations=budget)
    solution = idf.ArgminLayer(rosenbrock, inner_solver=solver).solve(torch.tensor([-1.2, 1.0], dtype=D))
    assert bool(solution.forward.converged)
    torch.testing.assert_close(solution.value, torch.ones(2, dtype=D), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ROOT_FINDERS)
def test_finds_the_fixed_point_of_a_contraction(name: str) -> None:
    """x = cos x + θ, whose solution is known to ten digits; rates from 0 to 0.97 in one batch."""
    layer = idf.FixedPointLayer(lambda x, t: torch.cos(x) + t, inner_solver=ROOT_FINDERS[name](tol=1e-12))
    t = torch.zeros((), dtype=D, requires_grad=True)
    x = layer(torch.zeros((), dtype=D), t)
    x.backward()
    torch.testing.assert_close(x.detach(), torch.tensor(0.7390851332, dtype=D), rtol=1e-9, atol=0)
    torch.testing.assert_close(t.grad, torch.tensor(0.5975100457, dtype=D), rtol=1e-9, atol=0)
    rates = torch.tensor([0.0, 0.5, 0.97], dtype=D)
    linear = idf.FixedPointLayer(
        lambda x, r: r * x + 1, inner_solver=ROOT_FINDERS[name](tol=1e-10, max_iterations=3000)
    )
    with idf.record() as history:
        found = vmap(lambda r: linear(torch.zeros(2, dtype=D), r))(rates)
    torch.testing.assert_close(found, (1 / (1 - rates)).unsqueeze(-1).expand(3, 2), rtol=1e-7, atol=0)
    if name == "FixedPointIteration":
        assert history[0].iterations.tolist()[0] < 3 < history[0].iterations.tolist()[2]


def test_anderson_needs_fewer_evaluations_than_the_plain_iteration() -> None:
    W, b = 0.9 * rotated(torch.linspace(-1, 1, 20, dtype=D), 3), random(4, 20)
    counts = {}
    for name in ("Anderson", "FixedPointIteration"):
        layer = idf.FixedPointLayer(lambda x: W @ torch.tanh(x) + b, inner_solver=ROOT_FINDERS[name](tol=1e-10))
        counts[name] = int(layer.solve(torch.zeros(20, dtype=D)).forward.iterations)
    assert counts["Anderson"] < 0.6 * counts["FixedPointIteration"]


def test_newton_reaches_the_root_next_to_each_start() -> None:
    layer = idf.RootLayer(lambda x, t: x**2 - t, inner_solver=Newton(tol=1e-12))
    starts = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-2.0, -30.0]], dtype=D)
    roots = vmap(lambda s: layer(s, torch.tensor([4.0, 9.0], dtype=D)))(starts)
    torch.testing.assert_close(roots, torch.tensor([[2.0, 3.0], [-2.0, 3.0], [-2.0, -3.0]], dtype=D))


@pytest.mark.parametrize(
    ("solver", "function", "start", "status"),
    [
        (GradientDescent(10.0, max_iterations=500), lambda x: (x**4).sum(), 1.0, "NON_FINITE"),
        (GradientDescent(1e-6, max_iterations=5), lambda x: (x**2).sum(), 1.0, "MAX_ITERATIONS"),
        (NewtonCG(max_iterations=200), lambda x: (x**2).sum() + float("nan") * x.sum(), 1.0, "NON_FINITE"),
        # The objective is NaN at the start, and its gradient is not.
        (LBFGS(), lambda x: x.log().square().sum(), -1.0, "NON_FINITE"),
        (GradientDescent(), lambda x: x.log().sum(), -1.0, "NON_FINITE"),
        (NewtonCG(), lambda x: x.log().square().sum(), -1.0, "NON_FINITE"),
        (Newton(), lambda x: (x**2 + 1).sum() + (x**3 / 3).sum() * 0 + x.sum() * 0, 1.0, "CONVERGED"),
    ],
)
def test_failures_are_reported(solver: Any, function: Callable[[Tensor], Tensor], start: float, status: str) -> None:
    solver.on_failure = "ignore"
    info = idf.ArgminLayer(function, inner_solver=solver).solve(torch.full((2,), start, dtype=D)).forward
    assert idf.Status(int(info.status)).name == status
    assert bool(info.converged) == (status == "CONVERGED")


def test_newton_without_a_root_stagnates() -> None:
    with pytest.warns(idf.ConvergenceWarning, match="Newton did not solve the inner problem: STAGNATED"):
        idf.RootLayer(lambda x: x**2 + 1)(torch.ones(1, dtype=D))


class Weak(idf.LinearSolver):
    """Gives up after a share of the way to the solution, system by system."""

    def __init__(self, *shares: float) -> None:
        super().__init__()
        self.shares = torch.tensor(shares, dtype=D)

    def solve(self, A: idf.LinearOperator, b: Tensor, x0: Tensor | None = None) -> idf.LinearSolution:
        x = self.shares.unsqueeze(-1) * idf.Dense().solve(A, b).value
        steps = torch.zeros(b.shape[:-1], dtype=torch.int64)
        return idf.LinearSolution(x, self._info(System(A, b), b, x, steps, steps + idf.Status.MAX_ITERATIONS))


def test_newton_does_not_go_on_with_systems_that_are_not_solved() -> None:
    """A step that lowers ‖F‖ by 1/500 costs as much as one that halves it, with which the other system goes on."""
    layer = idf.RootLayer(lambda x, t: x + 0.1 * x**3 - t, inner_solver=Newton(Weak(0.002, 0.5)))
    with idf.record() as history, pytest.warns(idf.ConvergenceWarning) as caught:
        vmap(layer)(torch.zeros(2, 3, dtype=D), random(1, 2, 3))
    info = history[0].info
    assert info.statuses == [idf.Status.BREAKDOWN, idf.Status.CONVERGED]
    assert int(info.iterations[0]) == 1
    assert int(info.iterations[1]) > 10
    assert "linear systems that are not solved): start elsewhere, take another linear_solver" in str(caught[0].message)


@pytest.mark.parametrize("name", ["LBFGS", "NewtonCG", "GradientDescent"])
def test_where_rounding_stops_progress_it_says_stagnated(name: str) -> None:
    """float32 cannot reach ‖∇f‖ ≤ 1e-12: the solver must not spin to its last iteration, nor claim."""
    H, c = rotated(torch.linspace(1, 50, 6, dtype=D), 1).float(), 100 * random(2, 6).float()
    solver = MINIMISERS[name](tol=1e-12, max_iterations=5000, on_failure="ignore")
    info = idf.ArgminLayer(lambda x: 0.5 * x @ (H @ x) - c @ x, inner_solver=solver).solve(torch.zeros(6)).forward
    assert int(info.status) == idf.Status.STAGNATED
    assert int(info.iterations) < 2000
    assert float(info.residual_norm) < 1e-2


def test_the_default_tolerance_suits_float32() -> None:
    """Neither a warning on an ordinary problem, nor a claim that is not so."""
    import warnings

    X, y = random(1, 200, 5).float(), random(2, 200).float()
    layer = idf.ArgminLayer(lambda w: ((X @ w - y) ** 2).sum() + (w**2).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w = layer(torch.zeros(5))
    exact = torch.linalg.solve(X.T @ X + torch.eye(5), X.T @ y)
    torch.testing.assert_close(w, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: GradientDescent(stepsize=0.0), ValueError, "stepsize is 0.0"),
        (lambda: GradientDescent(momentum=0.9), ValueError, "momentum needs a fixed stepsize"),
        (lambda: GradientDescent(0.1, momentum=1.5), ValueError, "momentum is 1.5"),
        (lambda: GradientDescent(0.1, nesterov=True), ValueError, "nesterov=True needs a momentum"),
        (lambda: LBFGS(max_iterations=0), ValueError, "max_iterations is 0"),
        (lambda: LBFGS(tol=-1.0), ValueError, "tol is -1.0"),
        (lambda: LBFGS(tolerance=1.0), TypeError, "tolerance"),
        (lambda: idf.ArgminLayer(rosenbrock, inner_solver=LBFGS), TypeError, r"did you mean LBFGS\(\)"),
        (lambda: idf.ArgminLayer(rosenbrock, inner_solver="lbfgs"), TypeError, "inner_solver is 'lbfgs'"),
        (lambda: idf.RootLayer(lambda x: x, inner_solver=LBFGS())(torch.ones(1)), idf.ImplicitDiffError, "ArgminLayer"),
        (
            lambda: idf.ArgminLayer(rosenbrock, inner_solver=lambda p, x: x[:1])(torch.ones(2)),
            idf.ImplicitDiffError,
            r"shape of x0, \(2,\)",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 5),
    scale=st.floats(-6, 6),
    spread=st.floats(0, 3),
    seed=st.integers(0, 100),
    name=st.sampled_from(["LBFGS", "NewtonCG", "Newton"]),
)
def test_odd_quadratics(n: int, scale: float, spread: float, seed: int, name: str) -> None:
    """No unknowns, tiny and huge objectives, condition numbers up to a thousand, at the default tolerance."""
    H = 10**scale * rotated(torch.logspace(0, spread, n, dtype=D), seed) if n else torch.zeros(0, 0, dtype=D)
    c = 10**scale * random(seed, n)
    layer = idf.ArgminLayer(lambda x: 0.5 * x @ (H @ x) - c @ x, inner_solver=MINIMISERS[name](on_failure="ignore"))
    solution = layer.solve(torch.zeros(n, dtype=D))
    gradient = float((H @ solution.value - c).norm())
    assert gradient <= 1.5e-8 * max(1.0, float(c.norm())) * 1.01 or not bool(solution.forward.converged)
    # Where it stopped short of the default tolerance, rounding is the reason.
    assert gradient <= 1e-6 * max(1.0, float(c.norm()))


# ------------------------------------------------------------------ unrolling


def test_unrolled_gives_the_same_numbers_forward() -> None:
    H, c = rotated(torch.linspace(1, 5, 4, dtype=D), 1), random(2, 4)
    for solver in (GradientDescent(0.1, max_iterations=20, tol=0.0, on_failure="ignore"), LBFGS(tol=1e-9)):
        implicit = idf.ArgminLayer(strongly_convex, inner_solver=solver).solve(torch.zeros(4, dtype=D), H, c)
        unrolled = idf.UnrolledLayer(strongly_convex, solver).solve(torch.zeros(4, dtype=D), H, c)
        torch.testing.assert_close(unrolled.value, implicit.value, rtol=1e-12, atol=1e-14)
        assert int(unrolled.forward.iterations) == int(implicit.forward.iterations)


def test_unrolling_a_second_order_method_is_refused() -> None:
    """The products with the Hessian are not followed: the derivative would be wrong without a word."""
    with pytest.raises(idf.ImplicitDiffError, match="cannot be unrolled"):
        idf.UnrolledLayer(rosenbrock, NewtonCG())(torch.zeros(2, dtype=D))


def test_unrolled_derivative_of_gradient_descent_is_exact() -> None:
    """For a quadratic, k steps of length s give x = (I − (I − sH)ᵏ) H⁻¹ c."""
    H, c = rotated(torch.linspace(1, 5, 4, dtype=D), 1), random(2, 4)
    I = torch.eye(4, dtype=D)
    for truncate, k in ((None, 7), (7, 7), (3, 3), (0, 0)):
        solver = GradientDescent(0.1, max_iterations=7, tol=0.0, on_failure="ignore")
        layer = idf.UnrolledLayer(lambda x, c: 0.5 * x @ (H @ x) - c @ x, solver, truncate=truncate)
        run = lambda c, layer=layer: layer(torch.zeros(4, dtype=D), c)  # noqa: E731
        want = (I - torch.linalg.matrix_power(I - 0.1 * H, k)) @ torch.linalg.inv(H)
        torch.testing.assert_close(torch.func.jacrev(run)(c), want, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(torch.autograd.functional.jacobian(run, c), want, rtol=1e-10, atol=1e-13)
        batched = vmap(torch.func.jacrev(run))(torch.stack([c, 2 * c]))
        torch.testing.assert_close(batched, want.expand(2, 4, 4), rtol=1e-10, atol=1e-13)


def test_unrolled_converges_to_the_implicit_derivative() -> None:
    H, c = rotated(torch.linspace(1, 5, 4, dtype=D), 1), random(2, 4)
    solver = GradientDescent(0.15, max_iterations=400, tol=1e-12)
    jacobians = [
        torch.func.jacrev(lambda c, layer=layer: layer(torch.zeros(4, dtype=D), H, c))(c)
        for layer in (idf.UnrolledLayer(strongly_convex, solver), idf.ArgminLayer(strongly_convex, inner_solver=solver))
    ]
    torch.testing.assert_close(*jacobians, rtol=1e-8, atol=1e-10)


def test_unrolled_truncates_system_by_system_where_they_stop_at_their_own() -> None:
    """Each system is cut before its own last steps, not before the batch's."""
    rates = torch.tensor([1.0, 4.0], dtype=D)
    solver = GradientDescent(0.2, max_iterations=300, tol=1e-8)
    layer = idf.UnrolledLayer(lambda x, r, c: (0.5 * r * x**2 - c * x).sum(), solver, truncate=2)
    run = lambda r, c: layer(torch.zeros((), dtype=D), r, c)  # noqa: E731
    got = vmap(torch.func.grad(run, argnums=1))(rates, torch.ones(2, dtype=D))
    torch.testing.assert_close(got, (1 - (1 - 0.2 * rates) ** 2) / rates, rtol=1e-9, atol=0)
