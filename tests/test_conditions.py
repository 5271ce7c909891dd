"""Every condition of Blondel et al. 2022, Table 1, under every transform, against closed forms on a fixed active set.

That the closed form is the solution is checked by the condition's own residual and by independent solvers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import sklearn.linear_model
import torch
from torch import Tensor
from torch.func import jacrev, vmap

import implicitdiff as idf
from implicitdiff import conditions, inner_solvers, projections, prox
from implicitdiff.conditions import KKT, KKTPoint

from .problems import random, rotated, vector
from .test_transforms import DERIVATIVES, NESTINGS, Case, by_inverse, close

D = torch.float64
I = torch.eye(3, dtype=D)


@dataclass(frozen=True)
class OnActiveSet(Case):
    """A condition whose closed form holds near the args, with the layer made from it."""

    condition: Any = None

    def batch(self, *sizes: int, which: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
        """The args with leading dimensions, near enough for the active set to stay."""
        count = torch.Size(sizes).numel()
        spread = torch.linspace(1, 1.06, count, dtype=D)
        return tuple(
            spread.reshape(*sizes, *(1 for _ in arg.shape)) * arg if which is None or i in which else arg
            for i, arg in enumerate(self.args)
        )


def case(name: str, condition: Any, closed: Callable[..., Any], *args: Tensor) -> OnActiveSet:
    """``closed`` is also what the wrapped solver computes, on plain tensors."""
    wrapped = idf.implicit(condition, linear_solver=idf.Dense())(lambda init, *args: closed(*args))
    primal = lambda x: x.primal if isinstance(x, KKTPoint) else torch.cat(x) if isinstance(x, list) else x  # noqa: E731
    return OnActiveSet(
        name, lambda init, *a: primal(wrapped(None, *a)), lambda *a: primal(closed(*a)), args, condition
    )


X, Y = random(31, 9, 3), random(32, 9)
GRAM = X.mT @ X


def least_squares(w: Tensor, penalty: Tensor, y: Tensor) -> Tensor:
    return 0.5 * ((X @ w - y) ** 2).sum()


def on(support: Tensor, matrix: Tensor, rhs: Tensor) -> Tensor:
    """The solution of the rows and columns on the support, 0 elsewhere."""
    mask = support.to(D)
    return by_inverse(torch.diag(mask) @ matrix @ torch.diag(mask) + torch.diag(1 - mask), mask * rhs)


def lasso() -> OnActiveSet:
    signs = vector(1, 0, -1)

    def closed(penalty: Tensor, y: Tensor) -> Tensor:
        return on(signs != 0, GRAM, X.mT @ y - penalty * signs)

    condition = conditions.ProximalGradient(least_squares, lambda v, s, penalty, y: prox.lasso(v, s, penalty), 0.1)
    # The data are made for a solution: y with Xᵀ(y − Xw) = penalty · (signs on the support, less off it).
    w, dual = vector(1, 0, -0.5), vector(1, 0.2, -1)
    return case("lasso", condition, closed, vector(0.7)[0], X @ w + X @ torch.linalg.inv(GRAM) @ (0.7 * dual))


def elastic_net() -> OnActiveSet:
    """Its prox has a diagonal derivative that is no 0/1 mask."""
    signs, ridge = vector(1, 0, -1), 0.5

    def closed(penalty: Tensor, y: Tensor) -> Tensor:
        return on(signs != 0, GRAM + ridge * I, X.mT @ y - penalty * signs)

    def soft(v: Tensor, s: Tensor, penalty: Tensor, y: Tensor) -> Tensor:
        return torch.sign(v) * torch.relu(v.abs() - s * penalty) / (1 + s * ridge)

    w, dual = vector(1, 0, -0.5), vector(1, 0.2, -1)
    y = X @ w + X @ torch.linalg.inv(GRAM) @ (0.7 * dual + ridge * w)
    return case("elastic net", conditions.ProximalGradient(least_squares, soft, 0.3), closed, vector(0.7)[0], y)


def group_lasso() -> OnActiveSet:
    """One group: a derivative of the prox that is not diagonal."""

    def closed(penalty: Tensor, v: Tensor) -> Tensor:
        return (1 - penalty / v.norm()) * v

    condition = conditions.ProximalGradient(
        lambda x, penalty, v: 0.5 * ((x - v) ** 2).sum(), lambda v, s, penalty, _: prox.group_lasso(v, s, penalty), 0.4
    )
    return case("group lasso", condition, closed, vector(0.7)[0], vector(1, -2, 0.5))


def non_negative_least_squares() -> OnActiveSet:
    def closed(scale: Tensor, y: Tensor) -> Tensor:
        return on(vector(1, 0, 1) != 0, GRAM, scale * X.mT @ y)

    y = X @ vector(1, 0, 2) - X @ torch.linalg.inv(GRAM) @ vector(0, 1.5, 0)
    return case(
        "non-negative least squares",
        conditions.ProjectedGradient(
            lambda w, scale, y: 0.5 * ((X @ w) ** 2).sum() - scale * (X @ w) @ y,
            lambda v, scale, y: projections.non_negative(v),
        ),
        closed,
        vector(1)[0],
        y,
    )


def box() -> OnActiveSet:
    """The bound is an argument: entries off the support move with it, and the others with them."""
    Q, active = rotated(vector(1, 2, 4), 41), vector(0, 1, 0)

    def closed(bound: Tensor, c: Tensor) -> Tensor:
        return bound * active + on(active == 0, Q, c - Q @ (bound * active))

    condition = conditions.ProjectedGradient(
        lambda x, bound, c: 0.5 * x @ Q @ x - c @ x, lambda v, bound, c: projections.box(v, -9.0, bound), 0.4
    )
    # c for x = (−.5, 1, .2) with the multiplier 2 of the bound.
    return case("box", condition, closed, vector(1)[0], Q @ vector(-0.5, 1, 0.2) + 2 * active)


def simplex() -> OnActiveSet:
    """A projection by its own condition: the Jacobian is diag(s) − ssᵀ/‖s‖₀ on the support s."""
    support = vector(1, 1, 0)

    def closed(total: Tensor, v: Tensor) -> Tensor:
        return support * (v - ((support * v).sum() - total) / support.sum())

    condition = conditions.ProjectedGradient(
        lambda x, total, v: 0.5 * ((x - v) ** 2).sum(), lambda v, total, _: projections.simplex(v, total), 0.5
    )
    return case("simplex", condition, closed, vector(1)[0], vector(1.2, 0.9, -0.3))


def mirror_descent() -> OnActiveSet:
    """Linear cost plus entropy over the simplex, by the mirror map of the entropy."""

    def closed(scale: Tensor, cost: Tensor) -> Tensor:
        return torch.softmax(-scale * cost, -1)

    condition = conditions.MirrorDescent(
        lambda x, scale, cost: scale * cost @ x + (x * x.log()).sum(),
        lambda y, scale, cost: projections.kl_simplex(y),
        torch.log,
        0.3,
    )
    return case("mirror descent", condition, closed, vector(1)[0], random(33, 3))


def blocks() -> OnActiveSet:
    """½ zᵀQz − cᵀz + penalty · ‖a‖₁ with b ≥ 0, z = (a, b); Q couples the blocks."""
    Q, signs = rotated(vector(1, 2, 4), 34), vector(-1, 0, 0)
    support = vector(1, 1, 0) != 0

    def closed(penalty: Tensor, c: Tensor) -> list[Tensor]:
        return list(on(support, Q, c - penalty * signs).split([1, 2]))

    def objective(z: list[Tensor], penalty: Tensor, c: Tensor) -> Tensor:
        z = torch.cat(z)
        return 0.5 * z @ Q @ z - c @ z

    proxes = [
        lambda v, s, penalty, c: prox.lasso(v, s, penalty),
        lambda v, s, penalty, c: projections.non_negative(v),
    ]
    # c = Qz + penalty · subgradient − multiplier for a chosen solution.
    c = Q @ vector(-1, 0.5, 0) + 0.3 * signs - vector(0, 0, 0.4)
    return case(
        "blocks", conditions.BlockProximalGradient(objective, proxes, [0.2, 0.5]), closed, vector(0.3)[0], c
    )


def newton() -> OnActiveSet:
    M = random(35, 3, 3) * 0.3 + I

    def closed(scale: Tensor, t: Tensor) -> Tensor:
        return by_inverse(scale * M, t.asinh())

    return case(
        "Newton", conditions.Newton(lambda x, s, t: torch.sinh(s * M @ x) - t), closed, vector(1.2)[0], random(36, 3)
    )


def equality() -> OnActiveSet:
    Q, a = rotated(vector(1, 2, 4), 37), random(38, 3)

    def closed(b: Tensor, c: Tensor) -> KKTPoint:
        K = torch.cat([torch.cat([Q, a.unsqueeze(-1)], -1), torch.cat([a, vector(0)]).unsqueeze(0)])
        z = by_inverse(K, torch.cat([-c, b.reshape(1)]))
        return KKTPoint(z[:3], z[3])

    condition = KKT(lambda x, b, c: 0.5 * x @ Q @ x + c @ x, equality=lambda x, b, c: a @ x - b)
    return case("KKT, equality", condition, closed, vector(1)[0], random(39, 3))


def inequality() -> OnActiveSet:
    """Three variables, an equality, and three inequalities of which one is active."""
    Q, active = rotated(vector(1, 2, 4), 40), vector(1, 0, 0)

    def closed(b: Tensor, c: Tensor) -> KKTPoint:
        zero = torch.zeros(3, 1, dtype=D)
        rows = [
            torch.cat([Q, torch.ones(3, 1, dtype=D), -I], -1),
            torch.cat([torch.ones(1, 3, dtype=D), torch.zeros(1, 4, dtype=D)], -1),
            torch.cat([torch.diag(active), zero, torch.diag(1 - active)], -1),
        ]
        z = by_inverse(torch.cat(rows), torch.cat([-c, b.reshape(1), torch.zeros(3, dtype=D)]))
        return KKTPoint(z[:3], z[3:4], z[4:])

    condition = KKT(
        lambda x, b, c: 0.5 * x @ Q @ x + c @ x,
        equality=lambda x, b, c: x.sum().reshape(1) - b,
        inequality=lambda x, b, c: -x,
    )
    # c for x = (0, .4, .6), ν = −1, μ = (.8, 0, 0).
    c = -(Q @ vector(0, 0.4, 0.6)) + 1 + vector(0.8, 0, 0)
    return case("KKT, inequalities", condition, closed, vector(1)[0], c)


CASES = {
    c.name: c
    for c in (
        lasso(), elastic_net(), group_lasso(), non_negative_least_squares(), box(), simplex(), mirror_descent(),
        blocks(), newton(), equality(), inequality(),
    )
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_satisfies_the_condition(name: str) -> None:
    case = CASES[name]
    for args in (case.args, *zip(*case.batch(3), strict=True)):
        with idf.record() as history:
            case.implicit(*args)
        assert float(history[-1].residual_norm) < 1e-14 * 100


@pytest.mark.parametrize("transform", [*DERIVATIVES, *NESTINGS])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_closed_form_under_every_transform(name: str, transform: str) -> None:
    function, rtol = (DERIVATIVES | NESTINGS)[transform]
    case = CASES[name]
    implicit, closed = case.scalars
    with warnings.catch_warnings():
        warnings.simplefilter("error", idf.ConvergenceWarning)  # no kink is near, no system is singular
        # Some derivatives are exactly zero: rounding is measured against numbers of order 1.
        close(function(case.implicit, implicit, case), function(case.closed, closed, case), rtol, least=1.0)


# ------------------------------------------------------------------ against independent solvers


def central(function: Callable[[np.ndarray], np.ndarray], at: Tensor, step: float = 1e-4) -> Tensor:
    """The Jacobian by central differences, one column per entry of ``at``."""
    columns = []
    for i in range(at.numel()):
        e = np.zeros(at.numel())
        e[i] = step
        e = e.reshape(at.shape)
        columns.append((function(at.numpy() + e) - function(at.numpy() - e)) / (2 * step))
    return torch.as_tensor(np.stack(columns, -1))


def test_scikit_learns_logistic_regression() -> None:
    """Stationary: the derivative in the penalty, by differences of its Newton-Cholesky solver."""
    X, w = random(1, 60, 4), random(2, 4)
    y = (X @ w + random(3, 60) > 0).to(D)

    def fit(penalty: np.ndarray) -> np.ndarray:
        model = sklearn.linear_model.LogisticRegression(
            C=float(1 / penalty[0]), fit_intercept=False, tol=1e-12, solver="newton-cholesky", max_iter=1000
        )
        return model.fit(X.numpy(), y.numpy()).coef_[0]

    def objective(w: Tensor, penalty: Tensor) -> Tensor:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(X @ w, y, reduction="sum")
        return loss + 0.5 * penalty[0] * (w**2).sum()

    solve = idf.implicit(idf.Stationary(objective))(lambda init, penalty: torch.as_tensor(fit(penalty.numpy())))
    penalty = vector(2)
    # Differences with a step of 1e-3 err by about 1e-7.
    close(jacrev(lambda p: solve(None, p))(penalty), central(fit, penalty, 1e-3), 1e-6)


@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_scikit_learns_lasso_and_elastic_net(ratio: float) -> None:
    X, y = random(4, 40, 12), random(5, 40)

    def fit(alpha: np.ndarray) -> np.ndarray:
        model = sklearn.linear_model.ElasticNet(
            alpha=float(alpha[0]), l1_ratio=ratio, fit_intercept=False, tol=1e-14, max_iter=100_000
        )
        return model.fit(X.numpy(), y.numpy()).coef_

    def smooth(w: Tensor, alpha: Tensor) -> Tensor:
        return ((X @ w - y) ** 2).sum() / (2 * len(y)) + 0.5 * alpha[0] * (1 - ratio) * (w**2).sum()

    condition = conditions.ProximalGradient(smooth, lambda v, s, alpha: prox.lasso(v, s, ratio * alpha[0]))
    solve = idf.implicit(condition)(lambda init, alpha: torch.as_tensor(fit(alpha.numpy())))
    alpha = vector(0.08)
    with idf.record() as history:
        jacobian = jacrev(lambda a: solve(None, a))(alpha)
    support = int((torch.as_tensor(fit(alpha.numpy())) != 0).sum())
    assert 2 <= support <= 10
    assert f"on the support: {support} of 12" in history[-1].method
    close(jacobian, central(fit, alpha), 1e-5)  # coordinate descent stops at a duality gap of 1e-14 ‖y‖²


def test_scipys_nnls_in_the_data() -> None:
    X, y = random(6, 30, 8), random(7, 30)
    fit = lambda y: scipy.optimize.nnls(X.numpy(), y)[0]  # noqa: E731
    condition = conditions.ProjectedGradient(
        lambda w, y: 0.5 * ((X @ w - y) ** 2).sum(), lambda v, y: projections.non_negative(v)
    )
    solve = idf.implicit(condition)(lambda init, y: torch.as_tensor(fit(y.numpy())))
    assert 0 < int((solve(None, y) == 0).sum()) < 8
    close(jacrev(lambda y: solve(None, y))(y), central(fit, y), 1e-9)  # piecewise linear in y


def test_scipys_slsqp_with_curved_constraints() -> None:
    """KKT: a quartic objective on a sphere, in a half-space that cuts it; multipliers from the stationarity."""
    c0 = vector(1, -0.5, 0.3)
    objective = lambda x, c: (x**4).sum() / 4 - c @ x  # noqa: E731
    equality = lambda x, c: (x**2).sum() - 1 - 0.1 * c[0]  # noqa: E731
    inequality = lambda x, c: x[:1] + x[1:2] - 0.2 * c[2] + 0.1  # noqa: E731

    def primal(c: np.ndarray) -> np.ndarray:
        t = lambda f: lambda x: f(torch.as_tensor(x), torch.as_tensor(c)).numpy()  # noqa: E731
        found = scipy.optimize.minimize(
            t(objective),
            [0.8, -0.5, 0.4],
            jac=lambda x: torch.func.grad(objective)(torch.as_tensor(x), torch.as_tensor(c)).numpy(),
            constraints=[{"type": "eq", "fun": t(equality)}, {"type": "ineq", "fun": lambda x: -t(inequality)(x)}],
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        return found.x

    x = torch.as_tensor(primal(c0.numpy()))
    rows = torch.stack([2 * x, vector(1, 1, 0)])
    duals = torch.linalg.lstsq(rows.T, -torch.func.grad(objective)(x, c0).unsqueeze(-1)).solution.squeeze(-1)
    point = KKTPoint(x, duals[0], duals[1:])
    condition = KKT(objective, equality, inequality)
    assert float(duals[1]) > 0.1
    assert max(float(r.abs().max()) for r in condition.residual(point, c0)) < 1e-6
    jacobian = jacrev(lambda c: idf.attach(condition, point, c).primal)(c0)
    close(jacobian, central(primal, c0, 1e-4), 1e-4)  # SLSQP's x is good to about 1e-8: 1e-8 / 1e-4


# ------------------------------------------------------------------ systems on the support


def lasso_layer(n: int, **settings: Any) -> tuple[Callable[..., Tensor], Tensor]:
    """A lasso with a penalty per call, solved by scikit-learn, and data."""
    X, y = random(8, 2 * n, n), random(9, 2 * n) * 3

    def fit(init: None, penalty: Tensor) -> Tensor:
        if float(penalty) == 0:
            return torch.linalg.lstsq(X, y.unsqueeze(-1)).solution.squeeze(-1)
        model = sklearn.linear_model.Lasso(
            alpha=float(penalty) / len(y), fit_intercept=False, tol=1e-14, max_iter=100_000
        )
        return torch.as_tensor(model.fit(X.numpy(), y.numpy()).coef_)

    condition = conditions.ProximalGradient(
        lambda w, penalty: 0.5 * ((X @ w - y) ** 2).sum(), lambda v, s, penalty: prox.lasso(v, s, penalty), 0.01
    )
    solve = idf.implicit(condition, **settings)(fit)
    return lambda penalty: solve(None, penalty), X


@pytest.mark.parametrize("solver", [idf.CG, idf.MINRES, idf.GMRES, idf.LSMR, idf.Dense, idf.Auto])
def test_a_batch_of_unequal_supports(solver: Any) -> None:
    """From the full support to the empty one in one batch, each with its own."""
    solve, X = lasso_layer(6, linear_solver=solver(rtol=1e-12))
    penalties = vector(0.0, 2.0, 8.0, 20.0, 1000.0)
    with idf.record() as history:
        jacobian = vmap(jacrev(solve))(penalties)
    supports = [(solve(p) != 0) for p in penalties]
    sizes = [int(s.sum()) for s in supports]
    assert sizes[0] == 6
    assert 0 < sizes[2] < sizes[1] <= 6
    assert sizes[-1] == 0
    assert "on the support: 6 of 6" in history[-1].method
    assert "singular" not in history[-1].method  # the padding of smaller supports is regular
    for i, (penalty, S) in enumerate(zip(penalties, supports, strict=True)):
        want = torch.zeros(6, dtype=D)
        want[S] = -torch.linalg.inv((X.mT @ X)[S][:, S]) @ solve(penalty)[S].sign() if S.any() else want[S]
        if float(penalty) == 0:  # |v| against 0: a kink, where the soft threshold is the identity to first order
            continue
        close(jacobian[i], want, 1e-8)


def test_the_support_saves_products() -> None:
    """On 5 of 60 the system is dense at once; the whole one would take GMRES."""
    solve, _ = lasso_layer(60)
    penalty = vector(40)[0]
    with idf.record() as history:
        jacrev(solve)(penalty)
    support = int((solve(penalty) != 0).sum())
    assert 0 < support < 20
    assert f"on the support: {support} of 60" in history[-1].method


def test_a_small_support_of_a_large_problem_is_not_made_dense() -> None:
    """Each product costs what one of the whole problem does."""
    solve, X = lasso_layer(100)
    penalty = vector(60)[0]
    with idf.record() as history:
        jacobian = jacrev(solve)(penalty)
    w = solve(penalty)
    S = w != 0
    assert 0 < int(S.sum()) < 30
    assert history[1].method.startswith("Auto: CG")
    want = torch.zeros_like(w)
    want[S] = -torch.linalg.inv((X.mT @ X)[S][:, S]) @ w[S].sign()
    close(jacobian, want, 1e-5)  # the linear solver's tolerance is 1e-6


@pytest.mark.parametrize("linear_solver", [idf.Neumann(4000), lambda A, b: torch.linalg.solve(A.to_dense(), b)])
def test_solvers_that_want_the_whole_system_get_it(linear_solver: Any) -> None:
    """Neumann's series is that of A, and a user's callable may know the size of A."""
    solve, _ = lasso_layer(6, linear_solver=linear_solver)
    by_default, _ = lasso_layer(6)
    with idf.record() as history:
        got = torch.autograd.functional.jacobian(solve, vector(8)[0])
    assert "support" not in history[-1].method
    close(got, torch.autograd.functional.jacobian(by_default, vector(8)[0]), 1e-6)


# ------------------------------------------------------------------ where it is singular, or not smooth


def soft(v: Tensor, s: Tensor, y: Tensor) -> Tensor:
    return torch.sign(v) * torch.relu(v.abs() - s)


KINKS: dict[str, tuple[Any, Any, Tensor]] = {
    "lasso, |y| = threshold": (
        conditions.ProximalGradient(lambda x, y: 0.5 * ((x - y) ** 2).sum(), soft),
        vector(0, 1),
        vector(1, 2),
    ),
    "box, the minimum on its face": (
        conditions.ProjectedGradient(lambda x, y: ((x - y) ** 2).sum(), lambda v, y: v.clamp(min=0)),
        vector(0, 1),
        vector(0, 1),
    ),
    "KKT, an active constraint with multiplier 0": (
        KKT(lambda x, y: ((x - y) ** 2).sum(), inequality=lambda x, y: -x),
        KKTPoint(vector(0, 1), None, vector(0, 0)),
        vector(0, 1),
    ),
}


@pytest.mark.parametrize("name", KINKS)
def test_a_kink_is_reported_by_the_policy_of_the_linear_solver(name: str) -> None:
    """An active set that is about to change: one-sided with a warning, or an error, or silent but on record."""
    condition, x, y = KINKS[name]

    def derivative(**settings: Any) -> Tensor:
        leaf = y.clone().requires_grad_()
        out = idf.attach(condition, x, leaf, linear_solver=idf.Auto(**settings))
        (out.primal if isinstance(out, KKTPoint) else out).sum().backward()
        return leaf.grad

    with pytest.warns(idf.ConvergenceWarning, match="kink"):
        one_sided = derivative()
    assert 0 <= float(one_sided[0]) <= 1
    close(one_sided[1], vector(1)[0], 1e-12)
    with pytest.raises(idf.ConvergenceError, match="NOT_SMOOTH"):
        derivative(on_failure="raise")
    with warnings.catch_warnings(), idf.record() as history:
        warnings.simplefilter("error", idf.ConvergenceWarning)
        derivative(on_failure="ignore")
    assert int(history[-1].status) == idf.Status.NOT_SMOOTH


def test_a_kink_is_that_of_its_system_only() -> None:
    condition, _, _ = KINKS["lasso, |y| = threshold"]
    solve = idf.implicit(condition, linear_solver=idf.Auto(on_failure="ignore"))(
        lambda init, y: soft(y, vector(1)[0], y)
    )
    y = torch.tensor([[1.0, 2.0], [0.5, 2.0], [3.0, -2.0]], dtype=D)
    with idf.record() as history:
        jacobian = vmap(jacrev(lambda y: solve(None, y)))(y)
    assert history[-1].status[..., 0].flatten().tolist()[:1] == [idf.Status.NOT_SMOOTH]
    flags = (history[-1].status == idf.Status.NOT_SMOOTH).reshape(3, -1).any(-1)
    assert flags.tolist() == [True, False, False]
    close(jacobian[1:], torch.stack([torch.diag(vector(0, 1)), torch.eye(2, dtype=D)]), 1e-12)


def test_a_condition_of_ones_own_may_say_that_it_has_kinks() -> None:
    class Absolute:
        structure, smooth = "general", False

        def residual(self, x: Tensor, t: Tensor) -> Tensor:
            return x + 0.5 * x.abs() - t

    for t, kinked in ((0.0, True), (1.0, False)):
        leaf = torch.tensor([t], dtype=D, requires_grad=True)
        with idf.record() as history, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            idf.attach(Absolute(), leaf.detach() / 1.5, leaf).sum().backward()
        assert (int(history[-1].status) == idf.Status.NOT_SMOOTH) == kinked


def test_a_flat_minimum_gives_the_answer_of_minimum_norm_and_says_so() -> None:
    """min (x₁ + x₂ − t)²: what depends on x₁ + x₂ has a derivative; x₁ alone has none."""
    layer = idf.ArgminLayer(lambda x, t: (x.sum() - t) ** 2)

    def slope(weights: Tensor, **settings: Any) -> Tensor:
        layer.linear_solver = idf.Auto(**settings)
        t = torch.ones((), dtype=D, requires_grad=True)
        (weights @ layer(torch.zeros(2, dtype=D), t)).backward()
        return t.grad

    with idf.record() as history, warnings.catch_warnings():
        warnings.simplefilter("error", idf.ConvergenceWarning)
        close(slope(vector(1, 1)), vector(1)[0], 1e-9)
    assert "minimum norm, as A is singular" in history[-1].method
    with pytest.warns(idf.ConvergenceWarning, match=r"minimum norm.*BREAKDOWN.*flat minimum"):
        close(slope(vector(1, 0)), vector(0.5)[0], 1e-9)  # dx/dt of minimum norm is (½, ½)
    with pytest.raises(idf.ConvergenceError, match="BREAKDOWN"):
        slope(vector(1, 0), on_failure="raise")


def test_a_saddle_is_differentiated() -> None:
    """x² − y² + coupling: Newton finds the saddle, the indefinite system is solved."""
    layer = idf.ArgminLayer(
        lambda z, t: z[0] ** 2 - z[1] ** 2 + t * z[0] * z[1] - t * z[1], inner_solver=idf.inner_solvers.Newton()
    )
    t = torch.tensor(0.5, dtype=D)
    hessian = lambda t: torch.stack([torch.stack([2 + 0 * t, t]), torch.stack([t, -2 + 0 * t])])  # noqa: E731
    closed = lambda t: by_inverse(hessian(t), torch.stack([0 * t, t]))  # noqa: E731
    for linear_solver in (idf.Auto(), idf.MINRES(rtol=1e-12)):
        layer.linear_solver = linear_solver
        close(jacrev(lambda t: layer(torch.zeros(2, dtype=D), t))(t), jacrev(closed)(t), 1e-9)


def test_a_double_root_has_no_derivative() -> None:
    """x² = t at t = 0: dx/dt is infinite."""
    root = idf.Root(lambda x, t: x**2 - t)
    t = torch.zeros(1, dtype=D, requires_grad=True)
    with pytest.warns(idf.ConvergenceWarning, match="BREAKDOWN.*double root"):
        idf.attach(root, torch.zeros(1, dtype=D), t).sum().backward()
    with pytest.raises(idf.ConvergenceError):
        idf.attach(root, torch.zeros(1, dtype=D), t, linear_solver=idf.Auto(on_failure="raise")).sum().backward()


# ------------------------------------------------------------------ chunks of the data


def mean_loss(w: Tensor, data: tuple[Tensor, Tensor], penalty: Tensor) -> Tensor:
    return ((data[0] @ w - data[1]) ** 4).mean() + penalty * (w**2).sum()


def sum_loss(w: Tensor, data: tuple[Tensor, Tensor], penalty: Tensor) -> Tensor:
    return ((data[0] @ w - data[1]) ** 4).sum() + penalty * (w**2).sum()


@pytest.mark.parametrize("objective", [mean_loss, sum_loss])
@pytest.mark.parametrize("k", [1, 4, 7, 30])
def test_chunks_change_no_number(objective: Callable[..., Tensor], k: int) -> None:
    """30 rows in slices of unequal sizes; a sum with a penalty that the data do not enter; gradients in the data."""
    data, penalty = (random(10, 30, 4), random(11, 30)), torch.tensor(0.3, dtype=D)

    def gradients(chunks: Any, linear_solver: Any) -> Any:
        layer = idf.ArgminLayer(
            objective,
            inner_solver=idf.inner_solvers.NewtonCG(tol=1e-10),
            linear_solver=linear_solver,
            condition=idf.Stationary(objective, chunks=chunks),
        )
        leaves = [t.clone().requires_grad_() for t in (*data, penalty)]
        w = layer(torch.zeros(4, dtype=D), tuple(leaves[:2]), leaves[2])
        return torch.autograd.grad((w**3).sum(), leaves)

    for linear_solver in (idf.CG(rtol=1e-13), idf.Dense()):
        close(gradients((0, 0, k), linear_solver), gradients(None, linear_solver), 1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_chunks_of_a_perfect_fit(scale: float) -> None:
    """At the solution all values are 0, or far below 1: they must still tell a sum from a mean."""
    X, w = random(15, 12, 3), random(16, 3)
    objective = lambda w, data: scale * ((data[0] @ w - data[1]) ** 2).sum()  # noqa: E731

    def gradient(chunks: Any) -> Tensor:
        y = (X @ w).requires_grad_()
        condition = idf.Stationary(objective, chunks=chunks)
        x = idf.attach(condition, w, (X, y), linear_solver=idf.Dense())
        return torch.autograd.grad(x.sum(), y)[0]

    close(gradient((0, 0, 5)), gradient(None), 1e-10)  # unequal slices, which a mean would weigh unequally
    close(gradient(None), torch.linalg.pinv(X).sum(0), 1e-10)


def test_chunks_under_vmap_and_by_keyword() -> None:
    layer = idf.ArgminLayer(
        lambda w, *, X, y: ((X @ w - y) ** 2).mean() + (w**2).sum(),
        condition=idf.Stationary(lambda w, *, X, y: ((X @ w - y) ** 2).mean() + (w**2).sum(), chunks=("X", 0, 1)),
    )
    X, y = random(12, 3, 10, 2), random(13, 3, 10)
    got = vmap(jacrev(lambda y, X: layer(torch.zeros(2, dtype=D), X=X, y=y)))(y, X)
    want = vmap(lambda X: torch.linalg.inv(X.T @ X / 10 + torch.eye(2, dtype=D)) @ X.T / 10)(X)
    close(got, want, 1e-7)


def test_chunks_are_refused_where_the_objective_is_no_sum() -> None:
    root = lambda w, data: ((data @ w - 1) ** 2).sum().sqrt() + (w**2).sum()  # noqa: E731
    layer = idf.ArgminLayer(root, condition=idf.Stationary(root, chunks=(0, 0, 3)))
    data = random(14, 9, 2).requires_grad_()
    with pytest.raises(idf.ImplicitDiffError, match="neither a mean nor a sum"):
        layer(torch.zeros(2, dtype=D), data).sum().backward()


# ------------------------------------------------------------------ the layer's condition, and mistakes


def test_a_given_condition_is_what_the_report_tells_of() -> None:
    """The unconstrained minimum does not satisfy the projected condition: the forward report says so."""
    objective = lambda x, t: ((x - t) ** 2).sum()  # noqa: E731
    condition = conditions.ProjectedGradient(objective, lambda v, t: projections.non_negative(v))
    layer = idf.ArgminLayer(objective, condition=condition)
    assert bool(layer.solve(torch.zeros(2, dtype=D), vector(1, 2)).forward.converged)
    with pytest.warns(idf.ConvergenceWarning, match="STAGNATED"):
        solution = layer.solve(torch.zeros(2, dtype=D), vector(1, -2))
    close(solution.forward.residual_norm, vector(2)[0], 1e-7)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: conditions.ProximalGradient(lambda x: x.sum(), prox.lasso, 0.0), ValueError, "stepsize is 0.0"),
        (lambda: conditions.ProximalGradient(lambda x: x.sum(), None), TypeError, "prox is None"),
        (
            lambda: conditions.BlockProximalGradient(lambda x: x[0].sum(), [prox.none], [1.0, 2.0]),
            ValueError,
            "one of each per block",
        ),
        (
            lambda: idf.attach(
                conditions.BlockProximalGradient(lambda x: x[0].sum(), [prox.none], [1.0]), (torch.zeros(1),)
            ),
            ValueError,
            "container of blocks",
        ),
        (
            lambda: idf.attach(KKT(lambda x: x.sum(), lambda x: x.sum()), KKTPoint(torch.zeros(2))),
            idf.ImplicitDiffError,
            "no dual_equality",
        ),
        (
            lambda: idf.attach(KKT(lambda x: x.sum()), torch.zeros(2)),
            idf.ImplicitDiffError,
            "must be a KKTPoint",
        ),
        (
            lambda: idf.attach(
                KKT(lambda x: x.sum(), lambda x: x), KKTPoint(torch.zeros(2), dual_equality=torch.zeros(1))
            ),
            idf.ImplicitDiffError,
            r"shapes \[\(2,\)\], but it has \[\(1,\)\]",
        ),
        (
            lambda: idf.ArgminLayer(
                lambda x, t: (x - t).square().sum(), inner_solver=inner_solvers.ProximalGradient(lambda v, s: v)
            )(torch.zeros(2), torch.ones(2)),
            TypeError,
            r"<lambda> takes \(v, s\), but it was called with 3 arguments",
        ),
        (lambda: idf.Stationary(lambda x: x.sum(), chunks=(0, 4)), ValueError, r"chunks is \(0, 4\)"),
        (lambda: idf.ArgminLayer(lambda x: x.sum(), condition=idf.Stationary), TypeError, "condition is"),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
