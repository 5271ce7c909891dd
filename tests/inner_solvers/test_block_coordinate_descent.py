"""Block coordinate descent: blocks with proxes and step lengths of their own, few gradients, the right derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sklearn.linear_model
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers.block_coordinate_descent import BlockCoordinateDescent
from implicitdiff.inner_solvers.proximal_gradient import ProximalGradient

from ..problems import random

D = torch.float64
X, Y = random(1, 20, 6), random(2, 20) * 3
PENALTIES = torch.tensor([0.5, 3.0, 9.0], dtype=D)
Blocks = dict[str, Any]


def shrink(v: Tensor, stepsize: Tensor, penalty: Tensor) -> Tensor:
    return v.sign() * (v.abs() - stepsize * penalty).relu()


def nonnegative(v: Tensor, stepsize: Tensor, penalty: Tensor) -> Tensor:
    return v.clamp(min=0)


def free(v: Any, stepsize: Tensor, penalty: Tensor) -> Any:
    return v


def joined(w: Blocks) -> Tensor:
    return torch.cat([w["sparse"], w["free"][0], w["free"][1].reshape(-1), w["positive"]])


def squares(w: Blocks, penalty: Tensor) -> Tensor:
    return 0.5 * ((X @ joined(w) - Y) ** 2).sum()


INIT = {
    "sparse": torch.zeros(2, dtype=D),
    "free": (torch.zeros(1, dtype=D), torch.zeros((), dtype=D)),
    "positive": torch.zeros(2, dtype=D),
}
PROXES = {"sparse": shrink, "free": free, "positive": nonnegative}


def mixed(**given: Any) -> idf.ArgminLayer:
    return idf.ArgminLayer(squares, inner_solver=BlockCoordinateDescent(PROXES, **{"tol": 1e-10, **given}))


def residual_at(w: Tensor, penalty: Tensor, steps: Tensor) -> Tensor:
    v = w - steps * (X.T @ (X @ w - Y))
    sparse = v[:2].sign() * (v[:2].abs() - steps[:2] * penalty).relu()
    return w - torch.cat([sparse, v[2:4], v[4:].clamp(min=0)])


@pytest.mark.parametrize("stepsizes", [None, {"sparse": 0.03, "free": 0.02, "positive": 0.03}], ids=str)
def test_blocks_have_their_own_proxes(stepsizes: Any) -> None:
    """Each system of a batch by itself; the optimality conditions, written down, hold to the tolerance."""
    layer = mixed(stepsizes=stepsizes)
    with idf.record() as history:
        w = vmap(lambda p: joined(layer(INIT, p)))(PENALTIES)
    info = history[0].info
    assert bool(info.converged.all())
    sizes = [1.0, 1.0, 1.0] if stepsizes is None else list(stepsizes.values())
    steps = torch.tensor(sizes, dtype=D).repeat_interleave(2)
    for i, penalty in enumerate(PENALTIES):
        residual = residual_at(w[i], penalty, steps)
        assert float(residual.norm()) <= 1.01e-10
        torch.testing.assert_close(info.residual_norm[i], residual.norm(), rtol=0.1, atol=1e-12)
        alone = layer.solve(INIT, penalty).forward
        assert abs(int(alone.iterations) - int(info.iterations[i])) <= 2 + 0.1 * int(alone.iterations)


def test_coordinates_of_a_lasso_are_those_of_scikit_learn() -> None:
    """A block per coefficient: coordinate descent, as there."""
    solver = BlockCoordinateDescent([shrink] * 6, tol=1e-10)
    layer = idf.ArgminLayer(lambda w, p: 0.5 * ((X @ torch.stack(w) - Y) ** 2).sum(), inner_solver=solver)
    w = torch.stack(layer([torch.zeros((), dtype=D)] * 6, PENALTIES[2]))
    model = sklearn.linear_model.Lasso(9.0 / len(Y), fit_intercept=False, tol=1e-15, max_iter=100000)
    torch.testing.assert_close(w, torch.as_tensor(model.fit(X.numpy(), Y.numpy()).coef_), rtol=1e-8, atol=1e-10)
    assert bool((w == 0).any())


def test_blocks_of_different_scales_take_steps_of_their_own() -> None:
    """Curvatures 1 and 10⁶: one step length for both would need thousands of steps."""
    scales = torch.tensor([1.0, 1e3], dtype=D)
    objective = lambda x, p: 0.5 * ((scales[0] * x[0] - 1) ** 2 + (scales[1] * x[1] - x[0] - 2) ** 2).sum()  # noqa: E731
    init = [torch.zeros((), dtype=D)] * 2
    info = (
        idf.ArgminLayer(objective, inner_solver=BlockCoordinateDescent([free, free], tol=1e-6))
        .solve(init, PENALTIES[0])
        .forward
    )
    assert bool(info.converged)
    assert int(info.iterations) < 60


def test_blocks_that_stay_are_passed_over() -> None:
    """Thirty groups, three of them at work: a sweep costs a gradient for each of those, not for each of all."""
    groups = 30
    A, calls = random(7, 100, groups * 2), [0]
    y = A[:, :6] @ torch.ones(6, dtype=D) * 5 + random(8, 100)

    def objective(w: list[Tensor]) -> Tensor:
        calls[0] += 1
        return 0.5 * ((A @ torch.cat(w) - y) ** 2).sum()

    def prox(v: Tensor, s: Tensor) -> Tensor:
        return v * (1 - s * 90 / v.norm().clamp(min=1e-30)).relu()

    layer = idf.ArgminLayer(objective, inner_solver=BlockCoordinateDescent([prox] * groups, tol=1e-8))
    calls[0] = 0
    solution = layer.solve([torch.zeros(2, dtype=D)] * groups)
    sweeps = int(solution.forward.iterations)
    assert bool(solution.forward.converged)
    moving = sum(bool((group != 0).any()) for group in solution.value)
    assert 3 <= moving <= 6
    assert calls[0] <= 3 * groups + 2 * moving * sweeps
    together = ProximalGradient(lambda v, s: [prox(group, s) for group in v], tol=1e-9)
    want = idf.ArgminLayer(objective, inner_solver=together)([torch.zeros(2, dtype=D)] * groups)
    torch.testing.assert_close(torch.cat(solution.value), torch.cat(want), rtol=1e-7, atol=1e-8)


def test_a_nan_stays_in_its_system() -> None:
    layer = mixed(on_failure="ignore")
    penalties = PENALTIES * torch.tensor([1.0, float("nan"), 1.0], dtype=D)
    with idf.record() as history:
        w = vmap(lambda p: joined(layer(INIT, p)))(penalties)
    assert [idf.Status(int(s)).name for s in history[0].status] == ["CONVERGED", "NON_FINITE", "CONVERGED"]
    for i in (0, 2):
        assert float(residual_at(w[i], PENALTIES[i], torch.ones(6, dtype=D)).norm()) <= 1.01e-10


def test_where_rounding_stops_progress_it_says_stagnated() -> None:
    solver = BlockCoordinateDescent([shrink] * 2, tol=1e-13, max_iterations=3000, on_failure="ignore")
    layer = idf.ArgminLayer(
        lambda w, p: 0.5 * ((X.float() @ torch.cat(w) - 100 * Y.float()) ** 2).sum(), inner_solver=solver
    )
    info = layer.solve([torch.zeros(3), torch.zeros(3)], torch.tensor(1.0)).forward
    assert int(info.status) == idf.Status.STAGNATED
    assert int(info.iterations) < 500


# ------------------------------------------------------------------ derivatives


def support_derivative(w: Tensor) -> Tensor:
    """∂w/∂λ = −G_S⁻¹ (sign w for the sparse block, 0 for the others) on the support."""
    S, G = w != 0, X.T @ X
    signs, out = torch.cat([w[:2].sign(), torch.zeros(4, dtype=D)]), torch.zeros(6, dtype=D)
    out[S] = -torch.linalg.inv(G[S][:, S]) @ signs[S]
    return out


def test_derivatives_are_those_of_the_support() -> None:
    layer = mixed()
    solution = lambda p: joined(layer(INIT, p))  # noqa: E731
    loss = lambda p: 0.5 * (solution(p) ** 2).sum()  # noqa: E731
    w = torch.stack([solution(p) for p in PENALTIES])
    want = torch.stack([support_derivative(row) for row in w])
    torch.testing.assert_close(jacrev(solution)(PENALTIES[1]), want[1], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(jacfwd(solution)(PENALTIES[1]), want[1], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(vmap(grad(loss))(PENALTIES), (want * w).sum(-1), rtol=1e-7, atol=1e-9)
    p = PENALTIES[1].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(p), p, create_graph=True)
    (second,) = torch.autograd.grad(first, p)
    torch.testing.assert_close(second, want[1].square().sum(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("stepsizes", [None, {"sparse": 0.03, "free": 0.02, "positive": 0.03}], ids=str)
def test_unrolled_makes_the_same_steps(stepsizes: Any) -> None:
    solver = BlockCoordinateDescent(PROXES, stepsizes, tol=1e-10)
    implicit, unrolled = idf.ArgminLayer(squares, inner_solver=solver), idf.UnrolledLayer(squares, solver)
    there, here = implicit.solve(INIT, PENALTIES[1]), unrolled.solve(INIT, PENALTIES[1])
    torch.testing.assert_close(joined(here.value).detach(), joined(there.value), rtol=1e-12, atol=1e-14)
    got = jacrev(lambda p: joined(unrolled(INIT, p)))(PENALTIES[1])
    torch.testing.assert_close(got, support_derivative(joined(there.value)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: BlockCoordinateDescent([free, free], [0.1]), ValueError, "one of each per block"),
        (lambda: BlockCoordinateDescent([free, "lasso"]), TypeError, "'lasso'"),
        (lambda: BlockCoordinateDescent([free], [0.0]), ValueError, "stepsize is 0.0"),
        (
            lambda: idf.ArgminLayer(lambda x, p: x[0].sum(), inner_solver=BlockCoordinateDescent([free]))(
                [torch.ones(1), torch.ones(1)], 1.0
            ),
            ValueError,
            "container of blocks",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
