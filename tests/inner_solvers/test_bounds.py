"""L-BFGS between bounds: SciPy's minima, the active set, derivatives of the variables that are free, odd bounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers.lbfgs import LBFGS

from ..problems import random, rotated, vector
from .more_garbow_hillstrom import PROBLEMS

D = torch.float64


def quadratic(x: Tensor, H: Tensor, c: Tensor) -> Tensor:
    return 0.5 * x @ (H @ x) - c @ x


def counted(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[int]]:
    count = [-1]  # one evaluation looks for captured tensors

    def run(*args: Any) -> Tensor:
        count[0] += 1
        return function(*args)

    return run, count


def by_scipy(objective: Callable[[Tensor], Tensor], start: Tensor, lower: Any, upper: Any, tol: float) -> Any:
    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.tensor(x, requires_grad=True)
        value = objective(x)
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    bounds = scipy.optimize.Bounds(*(np.broadcast_to(np.asarray(b), start.shape) for b in (lower, upper)))
    options = {"gtol": tol / len(start) ** 0.5, "ftol": 0, "maxiter": 2000}
    return scipy.optimize.minimize(
        value_and_gradient, start.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )


@pytest.mark.parametrize(("n", "decades"), [(20, 1), (50, 3), (100, 4)])
def test_finds_the_active_set_of_a_quadratic(n: int, decades: int) -> None:
    """SciPy's minimum with its active set, for no more evaluations; two thirds of the variables end on a bound."""
    H = rotated(torch.logspace(0, decades, n, dtype=D), n)
    c = 10 ** (decades / 2) * random(n + 1, n)
    objective, count = counted(lambda x: quadratic(x, H, c))
    layer = idf.ArgminLayer(objective, inner_solver=LBFGS(lower=-0.3, upper=0.2, tol=1e-7))
    solution = layer.solve(torch.zeros(n, dtype=D))
    found = by_scipy(lambda x: quadratic(x, H, c), torch.zeros(n, dtype=D), -0.3, 0.2, 1e-7)
    x = torch.as_tensor(found.x)
    torch.testing.assert_close(solution.value, x, rtol=0, atol=1e-6)
    for bound in (-0.3, 0.2):
        assert torch.equal(solution.value == bound, x == bound)
    assert bool((x == -0.3).any() & (x == 0.2).any() & ((x > -0.3) & (x < 0.2)).any())
    residual = solution.value - (solution.value - (H @ solution.value - c)).clamp(-0.3, 0.2)
    # By another formula than autograd's it is rounded otherwise, by some eps · ‖H x‖: up to 1e-11.
    torch.testing.assert_close(solution.forward.residual_norm, residual.norm(), rtol=0, atol=1e-10)
    assert bool(solution.forward.converged)
    assert float(residual.norm()) <= 1e-7
    assert count[0] <= 1.3 * found.nfev


@pytest.mark.parametrize("name", ["Rosenbrock", "Freudenstein and Roth", "Powell singular", "Osborne 2", "Chebyquad"])
def test_finds_the_minima_of_hard_problems_in_a_box(name: str) -> None:
    """A box around the standard start that the minimum without bounds is outside of (but for Chebyquad's)."""
    problem = PROBLEMS[name]
    size = problem.start.abs().clamp(min=0.2)
    lower, upper = problem.start - 0.5 * size, problem.start + 0.3 * size
    solver = LBFGS(lower=lower, upper=upper, tol=1e-6)
    solution = idf.ArgminLayer(problem.objective, inner_solver=solver).solve(problem.start)
    found = by_scipy(problem.objective, problem.start, lower, upper, 1e-6)
    assert bool(solution.forward.converged)
    value = float(problem.objective(solution.value))
    np.testing.assert_allclose(value, found.fun, rtol=1e-8, atol=1e-10)


H = rotated(torch.linspace(1, 6, 6, dtype=D), 3)
C = 4 * random(5, 6)
LOWER, UPPER = vector(-1, -0.5, -0.2, -1, -0.3, -0.4), vector(0.5, 0.6, 0.3, 1, 0.4, 0.8)
DATA = (H, C, LOWER, UPPER)


def solution(H: Tensor, c: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    solver = LBFGS(lower=lower, upper=upper, tol=1e-11)
    layer = idf.ArgminLayer(quadratic, inner_solver=solver, linear_solver=idf.Dense())
    return layer(torch.zeros(6, dtype=D), 0.5 * (H + H.mT), c)


def closed_form(H: Tensor, c: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """At the active set of the data above: the free variables solve what the others leave of the system."""
    x = solution(*DATA)
    below, above = x == LOWER, x == UPPER
    assert bool(below.any() & above.any() & ~(below | above).all())
    P = torch.diag((~(below | above)).to(D))
    fixed = torch.where(below, lower, torch.where(above, upper, 0))
    H = 0.5 * (H + H.mT)
    return fixed + torch.linalg.inv(P @ H @ P + torch.eye(6, dtype=D) - P) @ (P @ (c - H @ fixed))


def test_the_closed_form_is_one() -> None:
    torch.testing.assert_close(solution(*DATA), closed_form(*DATA), rtol=0, atol=1e-10)


@pytest.mark.parametrize("argument", range(4), ids=["H", "c", "lower", "upper"])
@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_derivatives_are_those_of_the_free_variables(jacobian: Any, argument: int) -> None:
    got, want = (jacobian(f, argnums=argument)(*DATA) for f in (solution, closed_form))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_second_derivatives_and_transforms() -> None:
    def loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *data: (f(*data) ** 3).sum()

    data = [torch.stack([d, 1.01 * d, 0.99 * d]) for d in DATA]
    for argument in (1, 2):
        got, want = (vmap(grad(loss(f), argnums=argument))(*data) for f in (solution, closed_form))
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
        got, want = (jacrev(grad(loss(f), argnums=argument), argnums=1)(*DATA) for f in (solution, closed_form))
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)
    leaves = [d.clone().requires_grad_() for d in DATA]
    loss(solution)(*leaves).backward()
    want = grad(loss(closed_form), argnums=(0, 1, 2, 3))(*DATA)
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), want, rtol=1e-8, atol=1e-9)


def test_unrolled_reaches_the_same_derivative() -> None:
    def unrolled(c: Tensor, lower: Tensor) -> Tensor:
        layer = idf.UnrolledLayer(quadratic, LBFGS(lower=lower, upper=UPPER, tol=1e-11))
        return layer(torch.zeros(6, dtype=D), H, c)

    for argument in (0, 1):
        got = jacrev(unrolled, argnums=argument)(C, LOWER)
        want = jacrev(lambda c, lower: closed_form(H, c, lower, UPPER), argnums=argument)(C, LOWER)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # the steps' derivative converges behind them


def test_each_system_has_its_own_active_set_and_report() -> None:
    c = torch.stack([C, -C, 0 * C, 1e-6 * C])
    layer = idf.ArgminLayer(quadratic, inner_solver=LBFGS(lower=LOWER, upper=UPPER, tol=1e-9))
    with idf.record() as history:
        x = vmap(lambda c: layer(torch.zeros(6, dtype=D), H, c))(c)
    assert bool(history[0].converged.all())
    assert history[0].iterations[2] == 0
    for i in range(4):
        alone = layer.solve(torch.zeros(6, dtype=D), H, c[i])
        torch.testing.assert_close(x[i], alone.value, rtol=0, atol=1e-8)
        assert abs(int(alone.forward.iterations) - int(history[0].iterations[i])) <= 2  # sums round otherwise


def test_bounds_are_numbers_or_trees_like_x() -> None:
    def objective(x: dict[str, Tensor]) -> Tensor:
        return ((x["a"] - 3) ** 2).sum() + ((x["b"] + 3) ** 2).sum()

    init = {"a": torch.zeros(2, dtype=D), "b": torch.zeros((), dtype=D)}
    lower = {"a": vector(-1, 5), "b": torch.tensor(-2.0, dtype=D)}
    x = idf.ArgminLayer(objective, inner_solver=LBFGS(lower=lower, upper=6.0))(init)
    torch.testing.assert_close(x, {"a": vector(3, 5), "b": torch.tensor(-2.0, dtype=D)})
    with pytest.raises(idf.ImplicitDiffError, match=r"lower=tensor.*shapes of x, which here are \[\(2,\), \(\)\]"):
        idf.ArgminLayer(objective, inner_solver=LBFGS(lower=vector(0, 0)))(init)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_odd_bounds(dtype: torch.dtype) -> None:
    """A start outside, variables that cannot move, no variables, one side only, bounds that do not matter."""
    target = torch.tensor([-1.0, 2.0, 0.5], dtype=dtype)

    def find(lower: Any, upper: Any, start: float = 0.0) -> Tensor:
        layer = idf.ArgminLayer(
            lambda x: ((x - target) ** 2).sum(), inner_solver=LBFGS(lower=lower, upper=upper, on_failure="raise")
        )
        return layer(torch.full((3,), start, dtype=dtype))

    close = torch.testing.assert_close
    close(find(0.0, 1.0, start=50.0), target.clamp(0, 1))
    close(find(None, 1.0), target.clamp(max=1))
    close(find(0, None), target.clamp(min=0))
    # The default tolerance, √ε · ‖∇f(x₀)‖ with a gradient of 4.6, by the Hessian of 2.
    close(find(-100.0, 100.0), target, rtol=0, atol=torch.finfo(dtype).eps ** 0.5 * 4.6 / 2)
    same = torch.tensor([0.0, 0.25, -1.0], dtype=dtype)
    close(find(same, same), same)
    empty = idf.ArgminLayer(lambda x: (x**2).sum(), inner_solver=LBFGS(lower=0.0))
    assert empty(torch.zeros(0, dtype=dtype)).shape == (0,)


def test_the_start_may_be_the_minimum() -> None:
    """With the gradient pointing out of the box at a corner: converged in no step."""
    layer = idf.ArgminLayer(lambda x: (x**3 + x).sum(), inner_solver=LBFGS(lower=0.0))
    solution = layer.solve(torch.zeros(3, dtype=D))
    assert bool(solution.forward.converged)
    assert int(solution.forward.iterations) == 0


def test_a_nan_in_one_system_stays_there() -> None:
    layer = idf.ArgminLayer(quadratic, inner_solver=LBFGS(lower=LOWER, upper=UPPER, on_failure="ignore"))
    c = torch.stack([C, torch.full_like(C, torch.nan)])
    with idf.record() as history:
        x = vmap(lambda c: layer(torch.zeros(6, dtype=D), H, c))(c)
    assert history[0].status.tolist() == [idf.Status.CONVERGED, idf.Status.NON_FINITE]
    torch.testing.assert_close(x[0], closed_form(*DATA), rtol=0, atol=1e-7)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"lower is 1\.0 and upper 0\.0"):
        LBFGS(lower=1.0, upper=0.0)
    layer = idf.ArgminLayer(quadratic, inner_solver=LBFGS(lower=UPPER, upper=LOWER))
    with pytest.raises(idf.ImplicitDiffError, match="a lower one above the upper one"):
        layer(torch.zeros(6, dtype=D), H, C)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither bound: the plain method
        assert isinstance(idf.ArgminLayer(quadratic, inner_solver=LBFGS()).condition, idf.conditions.Stationary)
