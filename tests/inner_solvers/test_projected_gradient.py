"""Spectral projected gradient: against SciPy and scikit-learn, few steps, the right derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers.projected_gradient import ProjectedGradient
from implicitdiff.inner_solvers.proximal_gradient import ProximalGradient

from ..problems import random, rotated

D = torch.float64
X, YS = random(1, 20, 6), random(2, 3, 20)


def squares(w: Tensor, y: Tensor) -> Tensor:
    return 0.5 * ((X @ w - y) ** 2).sum()


def nonnegative(v: Tensor, *args: Any) -> Tensor:
    return v.clamp(min=0)


def simplex(v: Tensor, *args: Any) -> Tensor:
    """By sorting (Held, Wolfe and Crowder 1974)."""
    u = v.sort(descending=True).values
    tops = (u.cumsum(-1) - 1) / torch.arange(1, v.shape[-1] + 1, dtype=v.dtype)
    return (v - tops.gather(-1, ((u > tops).sum(-1, keepdim=True) - 1))).relu()


def quadratic(x: Tensor, H: Tensor, c: Tensor) -> Tensor:
    return 0.5 * x @ (H @ x) - c @ x


def nnls(**given: Any) -> idf.ArgminLayer:
    return idf.ArgminLayer(squares, inner_solver=ProjectedGradient(nonnegative, **{"tol": 1e-11, **given}))


def scipy_nnls(y: Tensor) -> Tensor:
    return torch.as_tensor(scipy.optimize.nnls(X.numpy(), y.numpy())[0])


def test_nonnegative_least_squares_are_those_of_scipy() -> None:
    """Each system with its own data and its own number of steps; the report is the residual there."""
    ys = torch.stack([YS[0], 100 * YS[1], 0 * YS[2]])
    layer = nnls(tol=1e-9)
    with idf.record() as history:
        w = vmap(lambda y: layer(torch.zeros(6, dtype=D), y))(ys)
    info = history[0].info
    assert bool(info.converged.all())
    assert int(info.iterations[2]) == 0
    for i, y in enumerate(ys):
        torch.testing.assert_close(w[i], scipy_nnls(y), rtol=1e-9, atol=1e-9)
        residual = w[i] - (w[i] - X.T @ (X @ w[i] - y)).clamp(min=0)
        torch.testing.assert_close(info.residual_norm[i], residual.norm(), rtol=0.1, atol=1e-11)
        alone = layer.solve(torch.zeros(6, dtype=D), y).forward
        assert abs(int(alone.iterations) - int(info.iterations[i])) <= 3
    assert bool((w[0] == 0).any())


def test_box_constrained_least_squares_are_those_of_scipy() -> None:
    low, high = -0.1, 0.2
    solver = ProjectedGradient(lambda v, y: v.clamp(low, high), tol=1e-11)
    w = idf.ArgminLayer(squares, inner_solver=solver)(torch.full((6,), 9.0, dtype=D), YS[0])
    want = scipy.optimize.lsq_linear(X.numpy(), YS[0].numpy(), (low, high), method="bvls", tol=1e-14).x
    torch.testing.assert_close(w, torch.as_tensor(want), rtol=1e-9, atol=1e-9)
    assert bool((w == high).any() | (w == low).any())


def test_box_constrained_logistic_regression_is_that_of_scipy() -> None:
    """Logistic loss with a little ridge, |w| ≤ ½; SciPy's own tolerance is about 1e-7 here."""
    labels = YS[1].sign()
    loss = lambda w: torch.nn.functional.softplus(-labels * (X @ w)).sum() + 0.05 * (w**2).sum()  # noqa: E731
    w = idf.ArgminLayer(loss, inner_solver=ProjectedGradient(lambda v: v.clamp(-0.5, 0.5), tol=1e-10))(
        torch.zeros(6, dtype=D)
    )
    found = scipy.optimize.minimize(
        lambda w: float(loss(torch.as_tensor(w))),
        torch.zeros(6),
        jac=lambda w: grad(loss)(torch.as_tensor(w)).numpy(),
        bounds=[(-0.5, 0.5)] * 6,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    torch.testing.assert_close(w, torch.as_tensor(found.x), rtol=0, atol=1e-6)
    assert bool((w.abs() == 0.5).any())


def test_quadratic_over_the_simplex_is_that_of_slsqp() -> None:
    H, c = rotated(torch.logspace(0, 2, 6, dtype=D), 3), random(4, 6) * 10
    x = idf.ArgminLayer(quadratic, inner_solver=ProjectedGradient(simplex, tol=1e-10))(torch.zeros(6, dtype=D), H, c)
    found = scipy.optimize.minimize(
        lambda x: float(quadratic(torch.as_tensor(x), H, c)),
        torch.full((6,), 1 / 6),
        jac=lambda x: (H @ torch.as_tensor(x) - c).numpy(),
        bounds=[(0, None)] * 6,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    torch.testing.assert_close(x, torch.as_tensor(found.x), rtol=0, atol=1e-7)  # SLSQP's own accuracy
    assert bool((x == 0).any())


def svm_dual(alpha: Tensor, K: Tensor, labels: Tensor, penalty: Tensor) -> Tensor:
    """The dual of the multiclass SVM of Crammer and Singer, rows in the simplex (Blondel et al. 2022, §4.1)."""
    dual = labels - alpha
    return 0.5 / penalty * (dual * (K @ dual)).sum() + (alpha * labels).sum()


def test_the_multiclass_svm_and_its_hypergradient() -> None:
    """The solution satisfies the variational inequality; the hypergradient is that of differences."""
    Z, labels = random(5, 12, 3), torch.eye(3, dtype=D)[torch.arange(12) % 3]
    K = Z @ Z.T + 0.5 * torch.eye(12, dtype=D)
    solver = ProjectedGradient(simplex, tol=1e-11)
    layer = idf.ArgminLayer(svm_dual, inner_solver=solver)
    init, p = torch.full((12, 3), 1 / 3, dtype=D), torch.tensor(2.0, dtype=D)
    alpha = layer(init, K, labels, p)
    gradient = grad(svm_dual)(alpha, K, labels, p)
    gap = (gradient * alpha).sum(-1) - gradient.amin(-1)  # of each simplex: no vertex is better
    assert float(gap.abs().max()) < 1e-9
    target = random(6, 12, 3)
    outer = lambda p: (target * layer(init, K, labels, p)).sum()  # noqa: E731
    h = 1e-5
    difference = (outer(p + h) - outer(p - h)) / (2 * h)
    torch.testing.assert_close(grad(outer)(p), difference, rtol=1e-6, atol=1e-9)


def test_spectral_steps_beat_fixed_ones() -> None:
    """Condition number 1000: far fewer steps than the projected gradient with step 1/L."""
    H, c = rotated(torch.logspace(0, 3, 12, dtype=D), 3), random(4, 12)
    counts = []
    for solver in (
        ProjectedGradient(nonnegative, tol=1e-6),
        ProximalGradient(lambda v, s, *args: v.clamp(min=0), False, stepsize=1e-3, tol=1e-9, max_iterations=5000),
    ):
        solver.on_failure = "ignore"
        solution = idf.ArgminLayer(quadratic, inner_solver=solver).solve(torch.zeros(12, dtype=D), H, c)
        counts.append(int(solution.forward.iterations))
    assert counts[0] < 0.2 * counts[1]
    assert counts[0] < 300


def test_where_rounding_stops_progress_it_says_stagnated() -> None:
    solver = ProjectedGradient(nonnegative, tol=1e-12, max_iterations=5000, on_failure="ignore")
    info = idf.ArgminLayer(lambda w: squares(w.double(), 100 * YS[0]).float(), inner_solver=solver)
    with torch.no_grad():
        report = info.solve(torch.zeros(6)).forward
    assert int(report.status) == idf.Status.STAGNATED
    assert int(report.iterations) < 1500
    assert float(report.residual_norm) < 1e-1  # ‖∇f‖ at the start is 2e3


def test_a_nan_stays_in_its_system() -> None:
    ys = torch.stack([YS[0], YS[1] * float("nan"), YS[2]])
    layer = nnls(on_failure="ignore")
    with idf.record() as history:
        w = vmap(lambda y: layer(torch.zeros(6, dtype=D), y))(ys)
    assert [idf.Status(int(s)).name for s in history[0].status] == ["CONVERGED", "NON_FINITE", "CONVERGED"]
    for i in (0, 2):
        torch.testing.assert_close(w[i], scipy_nnls(ys[i]), rtol=1e-9, atol=1e-9)


def test_the_objective_is_evaluated_inside_the_set_only() -> None:
    """√x has no value outside."""
    solver = ProjectedGradient(lambda v: v.clamp(min=1e-3, max=2.0), tol=1e-10)
    layer = idf.ArgminLayer(lambda x: (x - 3 * x.sqrt()).sum() + x[0], inner_solver=solver)
    solution = layer.solve(torch.tensor([-5.0, 50.0], dtype=D))
    torch.testing.assert_close(solution.value, torch.tensor([9 / 16, 2.0], dtype=D), rtol=1e-9, atol=0)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 5), scale=st.floats(-6, 6), seed=st.integers(0, 100))
def test_odd_quadratics(n: int, scale: float, seed: int) -> None:
    """No unknowns, tiny and huge objectives."""
    H = 10**scale * rotated(torch.logspace(0, 1, n, dtype=D), seed) if n else torch.zeros(0, 0, dtype=D)
    c = 10**scale * random(seed, n)
    solver = ProjectedGradient(nonnegative, tol=1e-8 * 10**scale, on_failure="ignore")
    solution = idf.ArgminLayer(quadratic, inner_solver=solver).solve(torch.zeros(n, dtype=D), H, c)
    assert bool(solution.forward.converged)
    assert bool((solution.value >= 0).all())


# ------------------------------------------------------------------ derivatives


def free_inverse(y: Tensor) -> Tensor:
    """∂w/∂y = G_S⁻¹ X_Sᵀ on the free variables."""
    S = scipy_nnls(y) > 0
    out = torch.zeros(6, 20, dtype=D)
    out[S] = torch.linalg.inv(X.T[S] @ X[:, S]) @ X.T[S]
    return out


def test_derivatives_are_those_of_the_free_variables() -> None:
    layer, y = nnls(), YS[0]
    solution = lambda y: layer(torch.zeros(6, dtype=D), y)  # noqa: E731
    loss = lambda y: 0.5 * (solution(y) ** 2).sum()  # noqa: E731
    want = torch.stack([free_inverse(y) for y in YS])
    torch.testing.assert_close(jacrev(solution)(y), want[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(jacfwd(solution)(y), want[0], rtol=1e-7, atol=1e-9)
    w = torch.stack([scipy_nnls(y) for y in YS])
    torch.testing.assert_close(vmap(grad(loss))(YS), torch.einsum("bij,bi->bj", want, w), rtol=1e-7, atol=1e-9)
    y = y.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(y), y, create_graph=True)
    (second,) = torch.autograd.grad(first[0], y)
    torch.testing.assert_close(second, want[0].T[0] @ want[0], rtol=1e-7, atol=1e-9)


def test_unrolled_makes_the_same_steps() -> None:
    solver = ProjectedGradient(nonnegative, tol=1e-11)
    implicit, unrolled = idf.ArgminLayer(squares, inner_solver=solver), idf.UnrolledLayer(squares, solver)
    init = torch.full((6,), -1.0, dtype=D)
    there, here = implicit.solve(init, YS[0]), unrolled.solve(init, YS[0])
    torch.testing.assert_close(here.value.detach(), there.value, rtol=1e-12, atol=1e-14)
    assert abs(int(here.forward.iterations) - int(there.forward.iterations)) <= 1
    got = jacrev(lambda y: unrolled(init, y))(YS[0])
    torch.testing.assert_close(got, free_inverse(YS[0]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ProjectedGradient("simplex"), TypeError, "projection is 'simplex'"),
        (lambda: ProjectedGradient(simplex, max_iterations=0), ValueError, "max_iterations is 0"),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
