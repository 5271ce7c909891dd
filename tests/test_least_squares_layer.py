"""Curve fitting as a layer: derivatives of the fit against SciPy's refits, under every transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers.gauss_newton import GaussNewton
from implicitdiff.inner_solvers.levenberg_marquardt import LevenbergMarquardt
from implicitdiff.layers.least_squares import LeastSquaresLayer

from .problems import random

D = torch.float64
T = torch.linspace(0, 2, 9, dtype=D)
START = torch.ones(2, dtype=D)
POOR = 2 * torch.exp(-0.7 * T) + 0.6 * random(5, 9)
"""Data that no exponential is near to: the residual is large."""


def residual(x: Tensor, y: Tensor) -> Tensor:
    return x[0] * torch.exp(-x[1] * T) - y


def refit(y: Tensor, p0: Tensor) -> Tensor:
    """SciPy's fit."""
    t, y = T.numpy(), y.numpy()
    found = scipy.optimize.least_squares(
        lambda x: x[0] * np.exp(-x[1] * t) - y,
        p0.numpy(),
        lambda x: np.stack([np.exp(-x[1] * t), -x[0] * t * np.exp(-x[1] * t)], -1),
        method="lm",
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
    )
    return torch.as_tensor(found.x)


def central_differences(f: Callable[[Tensor], Tensor], y: Tensor, h: float) -> Tensor:
    return torch.stack([(f(y + h * e) - f(y - h * e)) / (2 * h) for e in torch.eye(len(y), dtype=D)], -1)


def fit(**settings: Any) -> LeastSquaresLayer:
    return LeastSquaresLayer(residual, inner_solver=LevenbergMarquardt(tol=1e-12), **settings)


def test_the_derivative_is_that_of_scipys_refit_where_gauss_newtons_is_wrong() -> None:
    """With a large residual: −(JᵀJ + Σ rᵢ∇²rᵢ)⁻¹ ∂, not (JᵀJ)⁻¹ Jᵀ."""
    x = fit()(START, POOR)
    torch.testing.assert_close(x, refit(POOR, START), rtol=1e-7, atol=0)
    expected = central_differences(lambda y: refit(y, x), POOR, 1e-2)
    J = jacrev(residual)(x, POOR)
    approximate = torch.linalg.pinv(J)
    assert float((approximate - expected).norm() / expected.norm()) > 0.05
    for jacobian in (jacrev, jacfwd):
        got = jacobian(lambda y: fit()(START, y))(POOR)
        # SciPy's fits are good to √ε, where the values show nothing any more; the differences to 1e-6.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=5e-6)
    # The closed form, to rounding.
    H = hessian(lambda x: 0.5 * residual(x, POOR).square().sum())(x)
    exact = torch.linalg.solve(H, J.T)
    torch.testing.assert_close(jacrev(lambda y: fit()(START, y))(POOR), exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("inner_solver", [None, GaussNewton(tol=1e-12)], ids=["default", "GaussNewton"])
def test_whatever_finds_it_the_derivative_is_the_same(inner_solver: Any) -> None:
    layer = LeastSquaresLayer(residual, inner_solver=inner_solver)
    expected = jacrev(lambda y: fit()(START, y))(POOR)
    # The default tolerance of 1.5e-8 on ‖∇f‖.
    torch.testing.assert_close(jacrev(lambda y: layer(START, y))(POOR), expected, rtol=1e-6, atol=1e-7)


def test_second_derivatives() -> None:
    layer = fit()
    first = jacrev(lambda y: layer(START, y)[1])
    expected = central_differences(first, POOR, 1e-5)
    for twice in (jacrev(first), jacfwd(first), jacfwd(jacfwd(lambda y: layer(START, y)[1]))):
        torch.testing.assert_close(twice(POOR), expected, rtol=1e-6, atol=1e-7)
    y = POOR.clone().requires_grad_()
    (g,) = torch.autograd.grad(layer(START, y)[1], y, create_graph=True)
    (double,) = torch.autograd.grad(g.square().sum(), y)
    torch.testing.assert_close(double, 2 * expected @ first(POOR), rtol=1e-6, atol=1e-7)


def test_batches_of_fits_under_vmap() -> None:
    """Fits of unequal difficulty, each with its own stopping; their gradients, alone and together."""
    layer = fit()
    curves = torch.stack([torch.exp(-T), POOR, 30 * torch.exp(-4 * T) + 0.1, -0.5 * torch.exp(0.3 * T)])
    with idf.record() as history:
        x = vmap(layer, in_dims=(None, 0))(START, curves)
    assert bool(history[0].info.converged.all())
    assert len(set(history[0].info.iterations.tolist())) >= 3
    alone = torch.stack([layer(START, y) for y in curves])
    torch.testing.assert_close(x, alone, rtol=1e-9, atol=1e-10)
    rate: Callable[[Tensor], Tensor] = lambda y: layer(START, y)[1]  # noqa: E731
    together = vmap(grad(rate))(curves)
    torch.testing.assert_close(together, torch.stack([grad(rate)(y) for y in curves]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(together, jacrev(vmap(rate))(curves).diagonal(dim1=0, dim2=1).T, rtol=1e-8, atol=1e-10)
    curvature = vmap(hessian(rate))(curves)[1]
    torch.testing.assert_close(curvature, hessian(rate)(POOR), rtol=1e-8, atol=1e-10)


def test_trees_modules_and_captured_tensors() -> None:
    """The residual a tree, the unknowns a dict; parameters of a module and tensors closed over get gradients."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.times = nn.Parameter(T.clone())

        def forward(self, x: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
            misfit = x["a"] * torch.exp(-x["b"] * self.times) - y
            return {"misfit": misfit.reshape(3, 3), "prior": weight * (x["b"] - 1)}

    weight = torch.tensor(0.5, dtype=D, requires_grad=True)
    model = Model()
    layer = LeastSquaresLayer(model, inner_solver=LevenbergMarquardt(tol=1e-12))
    assert dict(layer.named_parameters()).keys() == {"function.times"}
    init = {"a": torch.ones((), dtype=D), "b": torch.ones((), dtype=D)}
    layer(init, POOR)["b"].backward()

    def flat(times: Tensor, weight: Tensor) -> Tensor:
        solver = LevenbergMarquardt(tol=1e-12)
        return LeastSquaresLayer(
            lambda x, times, weight: torch.cat(
                [x[0] * torch.exp(-x[1] * times) - POOR, (weight * (x[1] - 1)).reshape(1)]
            ),
            inner_solver=solver,
        )(START, times, weight)[1]

    by_times, by_weight = T.clone(), weight.detach()
    expected = central_differences(lambda t: flat(t, by_weight).reshape(1), by_times, 1e-5)[0]
    torch.testing.assert_close(model.times.grad, expected, rtol=1e-6, atol=1e-8)
    h = 1e-5
    slope = (flat(by_times, by_weight + h) - flat(by_times, by_weight - h)) / (2 * h)
    torch.testing.assert_close(weight.grad, slope, rtol=1e-6, atol=1e-9)


def test_the_errors_of_the_parameters_are_those_of_curve_fit() -> None:
    """σ ∂x/∂y gives the covariance, to first order in a small residual, as SciPy's has it."""
    sigma = 1e-3
    y = 2 * torch.exp(-0.7 * T) + sigma * random(2, 9)
    sensitivity = jacrev(lambda y: fit()(START, y))(y)
    _, covariance = scipy.optimize.curve_fit(
        lambda t, a, b: a * np.exp(-b * t), T.numpy(), y.numpy(), p0=[1, 1], sigma=[sigma] * 9, absolute_sigma=True
    )
    torch.testing.assert_close(sigma**2 * sensitivity @ sensitivity.T, torch.as_tensor(covariance), rtol=1e-2, atol=0)


def test_settings_go_through_and_failures_are_reported() -> None:
    layer = LeastSquaresLayer(residual, linear_solver=idf.CG(rtol=1e-10), polish=True)
    assert "CG(rtol=1e-10" in repr(layer)
    assert "LevenbergMarquardt" in repr(layer)
    solution = layer.solve(START, POOR)
    assert float(solution.forward.distance) < 1e-6
    with pytest.warns(idf.ConvergenceWarning, match="LevenbergMarquardt did not solve the inner problem"):
        LeastSquaresLayer(residual, inner_solver=LevenbergMarquardt(max_iterations=1))(START, POOR)
    with pytest.raises(TypeError, match="residual"):
        LeastSquaresLayer(3)  # type: ignore[arg-type]


def test_float32_fits_to_its_own_tolerance() -> None:
    layer = LeastSquaresLayer(lambda x, y: x[0] * torch.exp(-x[1] * T.float()) - y)
    solution = layer.solve(START.float(), POOR.float())
    assert bool(solution.forward.converged)
    torch.testing.assert_close(solution.value, fit()(START, POOR).float(), rtol=1e-3, atol=1e-3)


def test_idf_check_finds_nothing_wrong() -> None:
    assert idf.check(fit(), START, POOR).ok
