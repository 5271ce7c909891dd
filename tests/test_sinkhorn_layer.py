"""Entropic transport: NumPy's Sinkhorn, closed forms, linear programs, every derivative, small epsilon, zero sums."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers import Anderson, FixedPointIteration
from implicitdiff.layers.sinkhorn import SemidualNewton, SinkhornLayer

from .problems import random, vector

D = torch.float64
TIGHT = {"inner_solver": SemidualNewton(tol=1e-12), "linear_solver": idf.Dense()}


def marginals(seed: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    r, c = random(seed, m).abs() + 0.05, random(seed + 1, n).abs() + 0.05
    return r, c * (r.sum() / c.sum())


def by_numpy(cost: Tensor, r: Tensor, c: Tensor, epsilon: float, steps: int = 3000) -> np.ndarray:
    """Sinkhorn and Knopp's own iteration on the scalings."""
    K, r, c = np.exp(-cost.numpy() / epsilon), r.numpy(), c.numpy()
    v = np.ones(len(c))
    for _ in range(steps):
        u = r / (K @ v)
        v = c / (K.T @ u)
    return u[:, None] * K * v


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    epsilon=st.sampled_from([0.1, 1.0, 100.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    zeros=st.booleans(),
)
def test_agrees_with_sinkhorns_own_iteration(
    seed: int, m: int, n: int, epsilon: float, scale: float, zeros: bool
) -> None:
    cost, (r, c) = random(seed, m, n).sigmoid(), marginals(seed + 1, m, n)
    if zeros and min(m, n) > 1:
        r[0] = c[-1] = 0
        c = c * (r.sum() / c.sum())
    solution = SinkhornLayer(epsilon, **TIGHT).solve(cost, scale * r, scale * c)
    assert bool(solution.forward.converged)
    expected = torch.from_numpy(by_numpy(cost, r, c, epsilon))
    torch.testing.assert_close(solution.value / scale, expected, rtol=1e-9, atol=1e-14)
    assert bool((solution.value[r == 0] == 0).all())
    assert bool((solution.value[:, c == 0] == 0).all())


def test_two_by_two_plans() -> None:
    """With sums of ½ the diagonal is ½ σ(δ / 2ε), δ the cost of the other diagonal less that of this one."""
    cost = vector(0.3, 1.0, 0.7, 0.2).reshape(2, 2)
    for epsilon in (0.01, 0.3, 5.0):
        plan = SinkhornLayer(epsilon, **TIGHT)(cost, vector(0.5, 0.5), vector(0.5, 0.5))
        a = 0.5 * torch.sigmoid((cost[0, 1] + cost[1, 0] - cost[0, 0] - cost[1, 1]) / (2 * epsilon))
        torch.testing.assert_close(plan, torch.stack([a, 0.5 - a, 0.5 - a, a]).reshape(2, 2), rtol=1e-10, atol=1e-20)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-4])
@pytest.mark.parametrize("size", [(5, 5), (30, 20)])
def test_small_epsilon_comes_to_the_linear_program(epsilon: float, size: tuple[int, int]) -> None:
    """Converged in few steps, and within ε times the largest entropy of the best cost."""
    m, n = size
    cost = torch.stack([random(s, m, n).abs() for s in (1, 2, 3)])
    cost, (r, c) = cost / cost.amax((-2, -1), keepdim=True), marginals(4, m, n)
    r, c = r / r.sum(), c / c.sum()
    solution = SinkhornLayer(epsilon).solve(cost, r, c)
    assert bool(solution.forward.converged.all())
    assert int(solution.forward.iterations.max()) <= 40
    constraints = np.vstack([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])[:-1]
    for C, plan in zip(cost, solution.value, strict=True):
        best = scipy.optimize.linprog(C.numpy().ravel(), A_eq=constraints, b_eq=torch.cat([r, c]).numpy()[:-1]).fun
        assert best - 1e-7 <= float((C * plan).sum()) <= best + epsilon * np.log(m * n)
        torch.testing.assert_close(plan.sum(-2), c, rtol=1e-6, atol=0)
        torch.testing.assert_close(plan.sum(-1), r, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [(2, 3), (3, 2), (1, 3), (3, 1)])
def test_derivatives_in_costs_sums_and_epsilon(size: tuple[int, int]) -> None:
    """First and second derivatives by central differences; the sums along directions that keep the totals equal."""
    m, n = size
    r, c = marginals(2, m, n)
    dr, dc = random(3, m), random(4, n)
    dc = dc + (dr.sum() - dc.sum()) / n

    def plan(cost: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        return SinkhornLayer(epsilon, **TIGHT)(cost, r + 0.01 * t * dr, c + 0.01 * t * dc)

    args = tuple(t.requires_grad_() for t in (random(1, m, n), vector(0)[0], vector(0.4)[0]))
    assert gradcheck(plan, args, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(plan, args)


def test_the_derivative_is_that_of_sinkhorns_unrolled_steps() -> None:
    cost, (r, c) = random(1, 4, 3), marginals(2, 4, 3)
    weights = random(3, 4, 3)

    def unrolled(cost: Tensor, r: Tensor, c: Tensor) -> Tensor:
        K, v = torch.exp(-cost / 0.5), torch.ones_like(c)
        for _ in range(300):
            v = c / (K.mT @ (r / (K @ v)))
        return (weights * (r / (K @ v)).unsqueeze(-1) * K * v).sum()

    layer = SinkhornLayer(0.5, **TIGHT)
    found = grad(lambda *args: (weights * layer(*args)).sum(), (0, 1, 2))(cost, r, c)
    expected = grad(unrolled, (0, 1, 2))(cost, r, c)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        hessian(lambda cost: (weights * layer(cost, r, c)).sum())(cost),
        hessian(unrolled)(cost, r, c),
        rtol=1e-7,
        atol=1e-9,
    )


def test_the_derivative_of_the_least_cost_in_the_costs_is_the_plan() -> None:
    """The envelope theorem on min ⟨C, T⟩ − ε H(T); in the marginals it is the pair of potentials."""
    cost, (r, c) = random(1, 70, 80).abs(), marginals(2, 70, 80)  # beyond the size that is solved densely
    layer = SinkhornLayer(0.05, inner_solver=SemidualNewton(tol=1e-11), linear_solver=idf.GMRES(rtol=1e-10))

    def least(cost: Tensor) -> Tensor:
        T = layer(cost, r, c)
        return (cost * T).sum() + 0.05 * (torch.special.xlogy(T, T) - T).sum()

    torch.testing.assert_close(grad(least)(cost), layer(cost, r, c), rtol=1e-6, atol=1e-9)


def test_sums_of_zero_have_finite_derivatives_to_every_order() -> None:
    """Mass may come to where there is none: the one-sided derivative, against differences from within."""
    cost = random(1, 3, 4)
    r, c = vector(0, 1, 2), vector(1, 0, 0.5, 1.5)
    layer = SinkhornLayer(0.5, **TIGHT)
    f = lambda r, c: (layer(cost, r, c) ** 2 * random(5, 3, 4)).sum()  # noqa: E731
    dr, dc = vector(1, 0.5, -0.5), vector(-0.5, 2, 0, -0.5)
    along = lambda t: f(r + t * dr, c + t * dc)  # noqa: E731
    zero, h = vector(0)[0], 1e-4
    first = float((-3 * along(zero) + 4 * along(zero + h) - along(zero + 2 * h)) / (2 * h))
    assert float(grad(along)(zero)) == pytest.approx(first, rel=1e-5)
    second = float((2 * along(zero) - 5 * along(zero + h) + 4 * along(zero + 2 * h) - along(zero + 3 * h)) / h**2)
    assert float(grad(grad(along))(zero)) == pytest.approx(second, rel=1e-3)


def test_infinite_costs_forbid() -> None:
    cost, (r, c) = random(1, 3, 3), marginals(2, 3, 3)
    cost[0, 1] = cost[2, 2] = torch.inf
    cost.requires_grad_()
    plan = SinkhornLayer(0.1, **TIGHT)(cost, r, c)
    assert plan[0, 1] == 0 == plan[2, 2]
    large = torch.where(cost.isinf(), 1e3, cost).detach().requires_grad_()
    torch.testing.assert_close(plan, SinkhornLayer(0.1, **TIGHT)(large, r, c))
    torch.testing.assert_close(
        torch.autograd.grad((plan**2).sum(), cost)[0],
        torch.autograd.grad((SinkhornLayer(0.1, **TIGHT)(large, r, c) ** 2).sum(), large)[0],
    )


def test_batch_dimensions_broadcast() -> None:
    cost, (r, c) = random(1, 2, 1, 3, 4), marginals(2, 3, 4)
    r, c = torch.stack([r, r.flip(0), r]), c.unsqueeze(0)
    epsilon = vector(0.2, 0.5).reshape(2, 1)
    layer = SinkhornLayer(epsilon, **TIGHT)
    leaf = cost.clone().requires_grad_()
    solution = layer.solve(leaf, r, c)
    assert solution.value.shape == (2, 3, 3, 4)
    assert solution.forward.iterations.shape == (2, 3)
    (solution.value**2).sum().backward()
    assert solution.backward is not None
    expected = torch.zeros_like(cost)
    for i in range(2):
        one = SinkhornLayer(float(epsilon[i]), **TIGHT)
        for j in range(3):
            torch.testing.assert_close(solution.value[i, j], one(cost[i, 0], r[j], c[0]))
            expected[i, 0] += grad(lambda C, one=one, j=j: (one(C, r[j], c[0]) ** 2).sum())(cost[i, 0])
    torch.testing.assert_close(leaf.grad, expected)
    torch.testing.assert_close(SinkhornLayer(1.0)(cost[:1, 0], r[0], c[0]).shape, torch.Size([1, 3, 4]))


def test_transforms_in_any_nesting() -> None:
    cost, (r, c) = random(1, 2, 3, 3, 4), marginals(2, 3, 4)
    r = torch.stack([r, r.flip(0), r])
    layer = SinkhornLayer(0.5, **TIGHT)
    # K has both batch dimensions of the two vmaps, r only the inner one, c none.
    nested = vmap(vmap(layer, in_dims=(0, 0, None)), in_dims=(0, None, None))(cost, r, c)
    torch.testing.assert_close(nested, layer(cost, r, c))
    # The costs have the inner one only, the sums the outer one.
    crossed = vmap(vmap(layer, in_dims=(0, None, None)), in_dims=(None, 0, None))(cost[0, :2], r, c)
    torch.testing.assert_close(crossed, layer(cost[0, :2], r.unsqueeze(1), c))
    f = lambda C, r, c: (layer(C, r, c) ** 3).sum()  # noqa: E731
    for transform in (grad, hessian, lambda f: jacfwd(jacrev(f)), lambda f: jacrev(jacfwd(f))):
        many = vmap(transform(f), in_dims=(0, 0, None))(cost[1], r, c)
        torch.testing.assert_close(many[1], transform(f)(cost[1, 1], r[1], c), rtol=1e-8, atol=1e-10)


def test_epsilon_can_be_learned() -> None:
    layer = SinkhornLayer(nn.Parameter(torch.tensor(0.3, dtype=D)), **TIGHT)
    assert [name for name, _ in layer.named_parameters()] == ["epsilon"]
    cost, (r, c) = random(1, 3, 3), marginals(2, 3, 3)
    (layer(cost, r, c) ** 2).sum().backward()
    value = lambda e: float((SinkhornLayer(e, **TIGHT)(cost, r, c) ** 2).sum())  # noqa: E731
    assert float(layer.epsilon.grad) == pytest.approx((value(0.3 + 1e-5) - value(0.3 - 1e-5)) / 2e-5, rel=1e-6)
    with torch.no_grad():
        layer.epsilon.fill_(-0.1)
    with pytest.raises(ValueError, match="epsilon is"):
        layer(cost, r, c)


@pytest.mark.parametrize("solver", [Anderson(tol=1e-10), FixedPointIteration(tol=1e-10)])
def test_other_inner_solvers(solver: idf.inner_solvers.InnerSolver) -> None:
    cost, (r, c) = random(1, 8, 6).sigmoid(), marginals(2, 8, 6)
    plan = SinkhornLayer(0.2, inner_solver=solver)(cost, r, c)
    torch.testing.assert_close(plan, SinkhornLayer(0.2, **TIGHT)(cost, r, c), rtol=1e-8, atol=0)


@pytest.mark.parametrize("epsilon", [1.0, 1e-2, 1e-3])
def test_float32(epsilon: float) -> None:
    cost, (r, c) = random(1, 20, 15).sigmoid(), marginals(2, 20, 15)
    solution = SinkhornLayer(epsilon).solve(cost.float(), r.float(), c.float())
    assert bool(solution.forward.converged)
    assert solution.value.dtype is torch.float32
    torch.testing.assert_close(solution.value.sum(-2).double(), c, rtol=1e-3, atol=0)


def test_failures_are_reported_by_system() -> None:
    cost, (r, c) = random(1, 3, 4, 4), marginals(2, 4, 4)
    expected = SinkhornLayer(0.1, **TIGHT)(cost, r, c)
    cost[1, 0, 0] = torch.nan
    with pytest.warns(idf.ConvergenceWarning, match="NON_FINITE"):
        solution = SinkhornLayer(0.1, **TIGHT).solve(cost, r, c)
    assert solution.forward.converged.tolist() == [True, False, True]
    torch.testing.assert_close(solution.value[[0, 2]], expected[[0, 2]])
    few = SemidualNewton(max_iterations=2, on_failure="raise")
    with pytest.raises(idf.ConvergenceError, match=r"SemidualNewton.*MAX_ITERATIONS after at most 2"):
        SinkhornLayer(1e-3, inner_solver=few)(cost[0], r, c)


def test_what_is_not_possible() -> None:
    cost = torch.zeros(2, 3)
    with pytest.raises(idf.ImplicitDiffError, match="row_sums adds up to 2 and column_sums to 3"):
        SinkhornLayer(1.0)(cost, torch.ones(2), torch.ones(3))
    with pytest.raises(idf.ImplicitDiffError, match="row_sums adds up to 4 and column_sums to 3"):
        vmap(SinkhornLayer(1.0), in_dims=(None, 0, 0))(cost, torch.tensor([[1.0, 2.0], [2.0, 2.0]]), torch.ones(2, 3))
    with pytest.raises(idf.ImplicitDiffError, match=r"column_sums has the shape \(2,\)"):
        SinkhornLayer(1.0)(cost, torch.ones(2), torch.ones(2))
    for epsilon in (0.0, -1.0, float("nan"), torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="must be positive"):
            SinkhornLayer(epsilon)
