"""Bilevel loops: warm starts save work and change no solution; tolerances decrease and reach both solvers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.bilevel import WarmStart, decreasing
from implicitdiff.inner_solvers import LBFGS

from .problems import random

D = torch.float64
X, Y = random(1, 200, 80), random(2, 200)


def objective(w: Tensor, log_penalties: Tensor) -> Tensor:
    return 0.5 * ((X @ w - Y) ** 2).mean() + 0.5 * (log_penalties.exp() * w**2).sum()


def closed(log_penalties: Tensor) -> Tensor:
    return torch.linalg.inv(X.T @ X / 200 + torch.diag(log_penalties.exp())) @ X.T @ Y / 200


def layer(**settings: Any) -> idf.ArgminLayer:
    return idf.ArgminLayer(objective, inner_solver=LBFGS(), linear_solver=idf.CG(), **settings)


def work(inner: Any, steps: int) -> tuple[int, int, Tensor]:
    """Inner and linear iterations of a loop of small outer steps, and where it ends."""
    log_penalties = torch.full((80,), -2.0, dtype=D, requires_grad=True)
    with idf.record() as history:
        for k in range(steps):
            value = (inner(torch.zeros(80, dtype=D), log_penalties) ** 2).sum()
            (gradient,) = torch.autograd.grad(value, log_penalties)
            log_penalties = (log_penalties - 0.1 / (k + 1) * gradient).detach().requires_grad_()
    counts = {kind: sum(int(s.iterations) for s in history if s.kind == kind) for kind in ("forward", "backward")}
    return counts["forward"], counts["backward"], log_penalties.detach()


@pytest.mark.parametrize("polish", [False, True])
def test_warm_starts_save_work_and_change_no_solution(polish: bool) -> None:
    cold, warm = work(layer(polish=polish), 10), work(WarmStart(layer(polish=polish)), 10)
    assert warm[0] < 0.7 * cold[0]
    assert warm[1] < 0.9 * cold[1]
    torch.testing.assert_close(warm[2], cold[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("linear_solver", [idf.CG(), idf.Auto()])
def test_a_tolerance_reaches_both_solvers_and_not_the_layer(linear_solver: Any) -> None:
    original = idf.ArgminLayer(objective, inner_solver=LBFGS(tol=1e-3), linear_solver=linear_solver)
    inner = WarmStart(original)
    iterations = []
    for inner.tolerance in (1e-1, 1e-8):
        log_penalties = torch.full((80,), -2.0, dtype=D, requires_grad=True)
        solution = inner.solve(torch.zeros(80, dtype=D), log_penalties)
        (solution.value**2).sum().backward()
        assert float(solution.forward.residual_norm) <= inner.tolerance
        assert solution.backward is not None
        assert float(solution.backward.residual_norm) <= inner.tolerance
        iterations.append(int(solution.backward.iterations))
    assert iterations[0] < iterations[1]
    assert (original.inner_solver.tol, original.linear_solver.rtol) == (1e-3, 1e-6)


def test_calls_under_transforms_leave_nothing_of_them_behind() -> None:
    """After grad the next call starts at the solution; after vmap, which has many, at init."""
    inner, p = WarmStart(layer()), torch.full((80,), -2.0, dtype=D)
    for _ in range(2):
        gradient = torch.func.grad(lambda p: (inner(torch.zeros(80, dtype=D), p) ** 2).sum())(p)
    want = torch.func.grad(lambda p: (closed(p) ** 2).sum())(p)
    torch.testing.assert_close(gradient, want, rtol=0, atol=1e-6)
    assert int(inner.solve(torch.zeros(80, dtype=D), p).forward.iterations) == 0
    batch = torch.func.vmap(lambda p: inner(torch.zeros(80, dtype=D), p))(torch.stack([p, p + 1]))
    torch.testing.assert_close(batch[1], closed(p + 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(inner(torch.zeros(80, dtype=D), p), closed(p), rtol=0, atol=1e-6)


def test_decreasing_tolerances_bring_the_loop_to_the_exact_optimum() -> None:
    """Against the same descent on the closed form."""

    def outer(w: Tensor) -> Tensor:
        return ((w - 0.05) ** 2).sum()

    exact = torch.full((80,), -1.0, dtype=D)
    inner, rough = WarmStart(layer()), exact.clone()
    for inner.tolerance in itertools.islice(decreasing(0.1), 150):
        leaf = rough.requires_grad_()
        rough = (leaf - torch.autograd.grad(outer(inner(torch.zeros(80, dtype=D), leaf)), leaf)[0]).detach()
        exact = exact - torch.func.grad(lambda p: outer(closed(p)))(exact)
    assert float(outer(closed(rough))) <= float(outer(closed(exact))) * (1 + 1e-3)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: WarmStart(objective), TypeError, "must be an ArgminLayer"),
        (lambda: setattr(WarmStart(layer()), "tolerance", 0.0), ValueError, "tolerance is 0.0"),
        (lambda: decreasing(0.0), ValueError, "first is 0.0"),
        (lambda: decreasing(0.1, 1.0), ValueError, "power 1.0"),
    ],
)
def test_mistakes_are_named(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
