"""FISTA and ISTA: the right solution and report, few gradients, the right derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sklearn.linear_model
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers.proximal_gradient import ProximalGradient

from ..problems import random, rotated

D = torch.float64
X, Y = random(1, 30, 8), random(2, 30) * 3
PENALTIES = torch.tensor([0.5, 4.0, 12.0], dtype=D)


def soft(v: Tensor, threshold: Any) -> Tensor:
    return v.sign() * (v.abs() - threshold).relu()


def squares(w: Tensor, X: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    return 0.5 * ((X @ w - y) ** 2).sum()


def shrink(v: Tensor, stepsize: Tensor, X: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    return soft(v, stepsize * penalty)


def lasso(**given: Any) -> idf.ArgminLayer:
    return idf.ArgminLayer(squares, inner_solver=ProximalGradient(shrink, **{"tol": 1e-11, **given}))


def scikit_learn(X: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    model = sklearn.linear_model.Lasso(float(penalty) / len(y), fit_intercept=False, tol=1e-15, max_iter=100000)
    return torch.as_tensor(model.fit(X.numpy(), y.numpy()).coef_)


def ill_conditioned(spread: float, n: int = 12) -> Tensor:
    return rotated(torch.logspace(0, -spread, n, dtype=D), 5)


def counted(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[int]]:
    """The function, and how often it was called and for how many of these a gradient followed."""
    calls = [0, 0]

    def counting(x: Tensor, *args: Tensor) -> Tensor:
        calls[0] += 1
        calls[1] += torch.is_grad_enabled() and x.requires_grad
        return function(x, *args)

    return counting, calls


@pytest.mark.parametrize(
    "settings", [{}, {"accelerate": False}, {"stepsize": 0.01}, {"stepsize": 0.01, "accelerate": False}], ids=str
)
def test_lasso_is_that_of_scikit_learn(settings: dict[str, Any]) -> None:
    """Each system of a batch has its own penalty; the report is the residual of the layer's condition there."""
    layer = lasso(**settings)
    with idf.record() as history:
        w = vmap(lambda penalty: layer(torch.zeros(8, dtype=D), X, Y, penalty))(PENALTIES)
    info = history[0].info
    assert bool(info.converged.all())
    s = settings.get("stepsize", 1.0)
    for i, penalty in enumerate(PENALTIES):
        torch.testing.assert_close(w[i], scikit_learn(X, Y, penalty), rtol=1e-9, atol=1e-10)
        residual = w[i] - soft(w[i] - s * X.T @ (X @ w[i] - Y), s * penalty)
        torch.testing.assert_close(info.residual_norm[i], residual.norm(), rtol=0.1, atol=1e-12)
        alone = layer.solve(torch.zeros(8, dtype=D), X, Y, penalty).forward
        assert abs(int(alone.iterations) - int(info.iterations[i])) <= 2 + 0.1 * int(alone.iterations)
    assert int((w[2] == 0).sum()) > int((w[0] == 0).sum())


def test_elastic_net_is_that_of_scikit_learn() -> None:
    l1, l2, m = 4.0, 2.0, len(Y)
    solver = ProximalGradient(lambda v, s, X, y: soft(v, s * l1) / (1 + s * l2), tol=1e-11)
    w = idf.ArgminLayer(lambda w, X, y: squares(w, X, y, PENALTIES), inner_solver=solver)(torch.zeros(8, dtype=D), X, Y)
    model = sklearn.linear_model.ElasticNet(
        (l1 + l2) / m, l1_ratio=l1 / (l1 + l2), fit_intercept=False, tol=1e-15, max_iter=100000
    )
    torch.testing.assert_close(w, torch.as_tensor(model.fit(X.numpy(), Y.numpy()).coef_), rtol=1e-9, atol=1e-10)


def test_group_lasso_satisfies_its_own_conditions() -> None:
    """∇f = −λ w/‖w‖ in groups that are not zero, ‖∇f‖ ≤ λ in those that are; x a dict of groups."""
    penalty = 40.0

    def prox(v: dict[str, Tensor], s: Tensor) -> dict[str, Tensor]:
        return {k: g * (1 - s * penalty / g.norm().clamp(min=1e-30)).relu() for k, g in v.items()}

    def objective(w: dict[str, Tensor]) -> Tensor:
        return squares(torch.cat([w["a"], w["b"], w["c"]]), X, Y, PENALTIES)

    init = {"a": torch.zeros(2, dtype=D), "b": torch.zeros(3, dtype=D), "c": torch.zeros(3, dtype=D)}
    w = idf.ArgminLayer(objective, inner_solver=ProximalGradient(prox, tol=1e-11))(init)
    gradient = (X.T @ (X @ torch.cat(list(w.values())) - Y)).split([2, 3, 3])
    zero = [bool((group == 0).all()) for group in w.values()]
    assert any(zero)
    assert not all(zero)
    for group, g in zip(w.values(), gradient, strict=True):
        if bool((group == 0).all()):
            assert float(g.norm()) <= penalty
        else:
            torch.testing.assert_close(g, -penalty * group / group.norm(), rtol=1e-9, atol=1e-9)


def test_acceleration_pays_on_an_ill_conditioned_lasso() -> None:
    """Condition number 300 of the Hessian: about its root in place of it."""
    A = ill_conditioned(1.25)
    iterations = []
    for accelerate in (True, False):
        layer = lasso(accelerate=accelerate, tol=1e-5, max_iterations=20000)
        info = layer.solve(torch.zeros(12, dtype=D), A, random(3, 12), torch.tensor(1e-3, dtype=D)).forward
        assert bool(info.converged)
        iterations.append(int(info.iterations))
    assert iterations[0] < 0.3 * iterations[1]
    assert iterations[0] < 300


def test_a_step_costs_one_gradient() -> None:
    """And about one evaluation of the objective, where the step length is searched for; a fixed one needs none."""
    for stepsize in (None, 0.5):
        objective, calls = counted(squares)
        solver = ProximalGradient(shrink, stepsize=stepsize, tol=1e-7)
        layer = idf.ArgminLayer(objective, inner_solver=solver)
        init, A, y = torch.zeros(12, dtype=D), ill_conditioned(1), random(3, 12)
        calls[:] = [0, 0]
        info = layer.solve(init, A, y, torch.tensor(1e-3, dtype=D)).forward
        iterations = int(info.iterations)
        assert iterations > 40
        assert calls[1] <= iterations + 5
        assert calls[0] <= (2.3 if stepsize is None else 1) * iterations + 5


def test_the_report_is_true_wherever_it_stops() -> None:
    """After a few steps too what is returned is a point of the prox, not one extrapolated beyond it."""
    nonnegative = ProximalGradient(lambda v, s: v.clamp(min=0), max_iterations=1, tol=0.0, on_failure="ignore")
    for steps in range(1, 12):
        nonnegative.max_iterations = steps
        layer = idf.ArgminLayer(lambda w: squares(w, X, Y, PENALTIES), inner_solver=nonnegative)
        solution = layer.solve(torch.ones(8, dtype=D))
        w = solution.value
        assert float(w.min()) >= 0
        assert int(solution.forward.iterations) == steps
        residual = w - (w - X.T @ (X @ w - Y)).clamp(min=0)
        torch.testing.assert_close(solution.forward.residual_norm, residual.norm(), rtol=1e-9, atol=1e-12)


def test_steps_grow_again_where_the_curvature_falls() -> None:
    """From far out on a quartic, whose curvature falls from 10⁴ to 1."""
    c = random(7, 5)
    solver = ProximalGradient(lambda v, s: soft(v, s * 0.1), tol=1e-9)
    layer = idf.ArgminLayer(lambda x: (x**4).sum() + 0.5 * (x**2).sum() - c @ x, inner_solver=solver)
    solution = layer.solve(torch.full((5,), 30.0, dtype=D))
    assert bool(solution.forward.converged)
    assert int(solution.forward.iterations) < 200


def test_where_rounding_stops_progress_it_says_stagnated() -> None:
    A, y = ill_conditioned(0.5).float(), 100 * random(3, 12).float()
    for accelerate in (True, False):
        solver = ProximalGradient(shrink, accelerate, tol=1e-12, max_iterations=20000, on_failure="ignore")
        info = idf.ArgminLayer(squares, inner_solver=solver).solve(torch.zeros(12), A, y, torch.tensor(0.1)).forward
        assert int(info.status) == idf.Status.STAGNATED
        assert int(info.iterations) < 1500
        assert float(info.residual_norm) < 1e-3


def test_a_nan_stays_in_its_system() -> None:
    penalties = torch.stack([PENALTIES[0], PENALTIES[0] * float("nan"), PENALTIES[2]])
    layer = lasso(on_failure="ignore")
    with idf.record() as history:
        w = vmap(lambda p: layer(torch.zeros(8, dtype=D), X, Y, p))(penalties)
    assert [idf.Status(int(s)).name for s in history[0].status] == ["CONVERGED", "NON_FINITE", "CONVERGED"]
    for i in (0, 2):
        torch.testing.assert_close(w[i], scikit_learn(X, Y, penalties[i]), rtol=1e-9, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 5), scale=st.floats(-8, 8), seed=st.integers(0, 100), accelerate=st.booleans())
def test_tiny_and_huge_objectives(n: int, scale: float, seed: int, accelerate: bool) -> None:
    """The solution does not depend on the scale of the whole objective, and no unknowns are no trouble."""
    A, y, size = random(seed, 12, n), random(seed + 1, 12), 10**scale
    # The residual of a step of length 1 is in units of the gradient on the support, of x itself off it.
    tol = 1e-6 * min(size, 1.0)
    solver = ProximalGradient(lambda v, s: soft(v, s * size), accelerate, tol=tol, on_failure="ignore")
    layer = idf.ArgminLayer(lambda w: size * squares(w, A, y, PENALTIES), inner_solver=solver)
    solution = layer.solve(torch.zeros(n, dtype=D))
    gradient = A.T @ (A @ solution.value - y)
    residual = solution.value - soft(solution.value - gradient, 1.0)
    # A prox of step 1 is no multiple of that of another scale; near a solution both are small together.
    assert float(residual.norm()) <= 1e-4
    assert bool(solution.forward.converged)


# ------------------------------------------------------------------ derivatives


def support_derivative(penalty: Tensor, w: Tensor) -> Tensor:
    """∂w/∂λ = −G_S⁻¹ sign(w_S) on the support."""
    S, G = w != 0, X.T @ X
    out = torch.zeros_like(w)
    out[S] = -torch.linalg.inv(G[S][:, S]) @ w[S].sign()
    return out


def test_hypergradients_are_those_of_the_support() -> None:
    layer, init = lasso(), torch.zeros(8, dtype=D)
    solution = lambda p: layer(init, X, Y, p)  # noqa: E731
    loss = lambda p: 0.5 * (solution(p) ** 2).sum()  # noqa: E731
    want = torch.stack([support_derivative(p, scikit_learn(X, Y, p)) for p in PENALTIES])
    w = torch.stack([scikit_learn(X, Y, p) for p in PENALTIES])
    for i, p in enumerate(PENALTIES):
        torch.testing.assert_close(jacfwd(solution)(p), want[i], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(jacrev(solution)(p), want[i], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(vmap(grad(loss))(PENALTIES), (want * w).sum(-1), rtol=1e-7, atol=1e-9)
    p = PENALTIES[1].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(p), p, create_graph=True)
    (second,) = torch.autograd.grad(first, p)
    torch.testing.assert_close(second, want[1].square().sum(), rtol=1e-7, atol=1e-9)  # w is linear in λ


def test_the_gradient_in_the_data_agrees_with_scikit_learn_moved() -> None:
    layer, p, a = lasso(), PENALTIES[1], random(9, 8)
    X_ = X.clone().requires_grad_()
    (a @ layer(torch.zeros(8, dtype=D), X_, Y, p)).backward()
    direction, h = random(10, 30, 8), 1e-5
    moved = [a @ scikit_learn(X + t * direction, Y, p) for t in (h, -h)]
    torch.testing.assert_close((X_.grad * direction).sum(), (moved[0] - moved[1]) / (2 * h), rtol=1e-6, atol=0)


# ------------------------------------------------------------------ unrolling


@pytest.mark.parametrize("settings", [{}, {"accelerate": False}, {"stepsize": 0.01}], ids=str)
def test_unrolled_makes_the_same_steps(settings: dict[str, Any]) -> None:
    solver = ProximalGradient(shrink, tol=1e-11, **settings)
    init = torch.zeros(8, dtype=D)
    implicit = idf.ArgminLayer(squares, inner_solver=solver)
    unrolled = idf.UnrolledLayer(squares, solver)
    for p in PENALTIES[1:]:
        there, here = implicit.solve(init, X, Y, p), unrolled.solve(init, X, Y, p)
        torch.testing.assert_close(here.value.detach(), there.value, rtol=1e-12, atol=1e-14)
        assert abs(int(here.forward.iterations) - int(there.forward.iterations)) <= 1
    run = lambda p: unrolled(init, X, Y, p)  # noqa: E731
    want = torch.stack([support_derivative(p, scikit_learn(X, Y, p)) for p in PENALTIES])
    torch.testing.assert_close(vmap(jacrev(run))(PENALTIES), want, rtol=1e-6, atol=1e-8)
    p = PENALTIES[1].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(run(p).sum(), p)[0], want[1].sum(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("truncate", [None, 3])
def test_unrolled_derivative_of_few_steps_is_theirs(truncate: int | None) -> None:
    """ISTA and FISTA written down, 7 steps of a fixed length, all or the last 3 of them followed."""
    s, count, init = 0.01, 7, torch.ones(8, dtype=D)

    def by_hand(p: Tensor, accelerate: bool) -> Tensor:
        x = y = init
        t = 1.0
        for k in range(count):
            if truncate is not None and k == count - truncate:
                x, y = x.detach(), y.detach()
            new = soft(y - s * X.T @ (X @ y - Y), s * p)
            t_new = (1 + (1 + 4 * t**2) ** 0.5) / 2
            assert float(((y - new) @ (new - x)).detach()) <= 0  # no restart: these are the plain formulas
            y = new + (t - 1) / t_new * (new - x) if accelerate else new
            x, t = new, t_new
        return x

    for accelerate in (True, False):
        solver = ProximalGradient(shrink, accelerate, stepsize=s, max_iterations=count, tol=0.0, on_failure="ignore")
        layer = idf.UnrolledLayer(squares, solver, truncate=truncate)
        results = []
        for run in (lambda p, layer=layer: layer(init, X, Y, p), lambda p, a=accelerate: by_hand(p, a)):
            p = PENALTIES[0].clone().requires_grad_()
            x = run(p)
            results.append((x.detach(), torch.autograd.grad(x.square().sum(), p)[0]))
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ProximalGradient(shrink, stepsize=0.0), ValueError, "stepsize is 0.0"),
        (lambda: ProximalGradient("lasso"), TypeError, "prox is 'lasso'"),
        (lambda: ProximalGradient(shrink, tol=-1.0), ValueError, "tol is -1.0"),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
