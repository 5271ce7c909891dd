"""Bisection: brackets halve until F is small, component by component, and no pole is called a root."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers.bisection import Bisection

from ..problems import vector

D = torch.float64


def solve(F: Callable[..., Tensor], x0: Tensor, *args: Any, **settings: Any) -> idf.Solution:
    lower, upper = settings.pop("lower", 0.0), settings.pop("upper", 10.0)
    solver = Bisection(lower, upper, on_failure="ignore", **settings)
    return idf.RootLayer(F, inner_solver=solver).solve(x0, *args)


def status(solution: idf.Solution) -> str:
    return idf.Status(int(solution.forward.status)).name


def test_many_unknowns_side_by_side_agree_with_scipy() -> None:
    """Rising and falling functions in one vector, with brackets of their own."""
    F: Callable[[Tensor], Tensor] = lambda x: torch.stack([torch.cos(x[0]) - x[0], 2 - x[1] ** 3, x[2].exp() - 5])  # noqa: E731
    lower, upper = vector(0, -1, 1), vector(2, 3, 2)
    solution = solve(F, torch.zeros(3, dtype=D), lower=lower, upper=upper, tol=1e-13)
    assert bool(solution.forward.converged)
    for i in range(3):

        def component(t: float, i: int = i) -> float:
            return float(F(torch.full((3,), t, dtype=D))[i])

        want = scipy.optimize.brentq(component, float(lower[i]), float(upper[i]), xtol=1e-14)
        torch.testing.assert_close(solution.value[i], torch.tensor(want, dtype=D), rtol=1e-12, atol=0)


def test_the_bracket_halves() -> None:
    """After k steps x is the middle of a bracket of length 10 / 2ᵏ; the answer is known."""
    for k in (1, 5, 20):
        solution = solve(lambda x: x - math.pi, torch.zeros((), dtype=D), tol=0.0, max_iterations=k)
        assert int(solution.forward.iterations) == k
        width = 10 / 2**k
        torch.testing.assert_close(
            solution.value, torch.tensor((math.floor(math.pi / width) + 0.5) * width, dtype=D), rtol=1e-12, atol=0
        )


def test_each_system_of_a_batch_ends_its_own_way() -> None:
    """A root, no change of sign, a pole, NaN inside the bracket, NaN at an end, a root at an end."""

    def F(x: Tensor, kind: Tensor) -> Tensor:
        nan = torch.where((x > 0.2) & (x < 0.9), math.nan, x - 0.1)
        at_end = torch.where(x >= 1, math.nan, x - 0.3)
        return torch.stack([x**3 - 0.2, x**2 + 1, 1 / (x - 1 / 3), nan, at_end, x - 1])[kind]

    solver = Bisection(0.0, 1.0, tol=1e-12, on_failure="ignore")
    layer = idf.RootLayer(F, inner_solver=solver)
    with idf.record() as history:
        x = vmap(lambda k: layer(torch.zeros((), dtype=D), k))(torch.arange(6))
    info = history[0].info
    names = [idf.Status(int(s)).name for s in info.status]
    assert names == ["CONVERGED", "BREAKDOWN", "STAGNATED", "NON_FINITE", "NON_FINITE", "CONVERGED"]
    torch.testing.assert_close(x[0], torch.tensor(0.2 ** (1 / 3), dtype=D), rtol=1e-11, atol=0)
    torch.testing.assert_close(x[2], torch.tensor(1 / 3, dtype=D), rtol=1e-15, atol=0)
    assert float(x[5]) == 1
    assert info.iterations.tolist()[5] == 0
    for kind in range(6):
        alone = layer.solve(torch.zeros((), dtype=D), torch.tensor(kind)).forward
        assert int(alone.iterations) == int(info.iterations[kind])
        assert int(alone.status) == int(info.status[kind])


def test_one_component_without_a_change_of_sign_breaks_its_system_down() -> None:
    solution = solve(lambda x: torch.stack([x[0] - 1, x[1] + 1]), torch.zeros(2, dtype=D))
    assert status(solution) == "BREAKDOWN"
    with pytest.warns(idf.ConvergenceWarning, match="Bisection did not solve the inner problem: BREAKDOWN"):
        idf.RootLayer(lambda x: x**2 + 1, inner_solver=Bisection(0.0, 1.0))(torch.zeros(1))


def test_a_jump_is_no_root() -> None:
    solution = solve(lambda x: torch.where(x > 0.3, 1.0, -1.0) + 0 * x, torch.zeros(2, dtype=D))
    assert status(solution) == "STAGNATED"
    torch.testing.assert_close(solution.value, torch.full((2,), 0.3, dtype=D), rtol=1e-15, atol=0)


def test_an_infinite_value_has_a_sign() -> None:
    """log at zero; and exp beyond the range of float32 at an end and at the first middle."""
    solution = solve(torch.log, torch.zeros(2, dtype=D), tol=1e-12)
    assert status(solution) == "CONVERGED"
    torch.testing.assert_close(solution.value, torch.ones(2, dtype=D), rtol=1e-11, atol=0)
    solution = solve(lambda x: torch.exp(100 * x) - 2, torch.zeros(1))
    assert status(solution) == "CONVERGED"
    # In float32: ‖F‖ ≤ 3.5e-4 and F′ = 200 at the root, which is 7e-3.
    torch.testing.assert_close(solution.value, torch.tensor([math.log(2) / 100]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_default_tolerance_is_reached(dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = idf.RootLayer(lambda x: 1e3 * (x**3 - 2), inner_solver=Bisection(-3.0, 10.0))(torch.zeros(4, dtype=dtype))
    # ‖F‖ is 8e4 at the first middle, 3.5: a component is within √ε · 8e4 / 2 of 0, and F′ is 4.8e3 at the root.
    allowed = torch.finfo(dtype).eps ** 0.5 * 8.2e4 / 2 / 4.7e3
    torch.testing.assert_close(x, torch.full((4,), 2 ** (1 / 3), dtype=dtype), rtol=0, atol=allowed)


def test_derivatives_under_every_transform() -> None:
    """∛y: first derivative 1/(3 y^⅔), second −2/(9 y^(5/3))."""
    y, zero = vector(8, 27), torch.zeros(2, dtype=D)
    layer = idf.RootLayer(lambda x, y: x**3 - y, inner_solver=Bisection(0.0, 10.0, tol=1e-13))
    first, second = y ** (-2 / 3) / 3, -2 / 9 * y ** (-5 / 3)
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(lambda y: layer(zero, y))(y), torch.diag(first), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hessian(lambda y: layer(zero, y).sum())(y), torch.diag(second), rtol=1e-9, atol=1e-11)
    per_system = vmap(grad(lambda y: layer(zero[0], y)))(y)
    torch.testing.assert_close(per_system, first, rtol=1e-10, atol=0)
    leaf = y.clone().requires_grad_()
    (g,) = torch.autograd.grad(layer(zero, leaf).sum(), leaf, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(g.sum(), leaf)[0], second, rtol=1e-9, atol=0)


def test_no_unknowns() -> None:
    solution = solve(lambda x: x, torch.zeros(0, dtype=D))
    assert solution.value.shape == (0,)
    assert bool(solution.forward.converged)


@settings(max_examples=40, deadline=None)
@given(
    root=st.floats(-1e3, 1e3),
    below=st.floats(1e-3, 1e6),
    above=st.floats(1e-3, 1e6),
    slope=st.floats(-1e3, 1e3).filter(lambda s: abs(s) > 1e-3),
)
def test_a_line_is_solved_to_rounding(root: float, below: float, above: float, slope: float) -> None:
    lower, upper = root - below, root + above
    solution = solve(lambda x: slope * (x - root), torch.zeros((), dtype=D), lower=lower, upper=upper, tol=0.0)
    assert abs(float(solution.value) - root) <= 4e-16 * abs(root) + (upper - lower) / 2**200
    assert bool(solution.forward.converged) == (float(solution.forward.residual_norm) == 0)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Bisection(1.0, 0.0), ValueError, "lower is 1.0 and upper is 0.0"),
        (lambda: Bisection(0.0, math.inf), ValueError, "upper is inf"),
        (lambda: Bisection(torch.tensor([0.0, math.nan]), 1.0), ValueError, "must be finite"),
        (lambda: Bisection(0.0, 1.0, tol=-1.0), ValueError, "tol is -1.0"),
        (
            lambda: idf.RootLayer(lambda x: x, inner_solver=Bisection(torch.zeros(3), 1.0))(torch.zeros(2)),
            idf.ImplicitDiffError,
            r"lower has the shape \(3,\), but it must broadcast to x as a vector, \(2,\)",
        ),
        (
            lambda: vmap(lambda low: idf.RootLayer(lambda x: x, inner_solver=Bisection(low, 1.0))(low))(-torch.ones(2)),
            idf.ImplicitDiffError,
            "brackets are settings",
        ),
        (
            lambda: idf.UnrolledLayer(lambda x, t: ((x - t) ** 2).sum(), Bisection(-1.0, 1.0))(
                torch.zeros(1), torch.zeros(1, requires_grad=True)
            ),
            idf.ImplicitDiffError,
            "Bisection cannot be unrolled",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
