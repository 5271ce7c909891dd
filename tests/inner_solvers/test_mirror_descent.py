"""Mirror descent on the simplex and the positive orthant: the right solution, report and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers.mirror_descent import MirrorDescent
from implicitdiff.inner_solvers.projected_gradient import ProjectedGradient

from ..problems import random, rotated

D = torch.float64
CENTRE = torch.full((5,), 0.2, dtype=D)
COSTS = random(1, 3, 5)


def softmax(y: Tensor, *args: Any) -> Tensor:
    return torch.softmax(y, -1)


def exponential(y: Tensor, *args: Any) -> Tensor:
    return torch.exp(y)


def entropic(x: Tensor, c: Tensor) -> Tensor:
    """Minimal over the simplex at softmax(−c)."""
    return c @ x + (x * x.log()).sum()


def layer_of(**given: Any) -> idf.ArgminLayer:
    return idf.ArgminLayer(entropic, inner_solver=MirrorDescent(softmax, torch.log, **{"tol": 1e-11, **given}))


def simplex(v: Tensor, *args: Any) -> Tensor:
    u = v.sort(descending=True).values
    tops = (u.cumsum(-1) - 1) / torch.arange(1, v.shape[-1] + 1, dtype=v.dtype)
    return (v - tops.gather(-1, ((u > tops).sum(-1, keepdim=True) - 1))).relu()


@pytest.mark.parametrize("stepsize", [None, 0.5])
def test_entropic_problems_have_their_closed_form(stepsize: float | None) -> None:
    """Costs of different sizes in one batch; the report is the residual of the layer's condition there."""
    costs = COSTS * torch.tensor([[0.0], [1.0], [6.0]], dtype=D)
    layer = layer_of(stepsize=stepsize)
    with idf.record() as history:
        x = vmap(lambda c: layer(CENTRE, c))(costs)
    info = history[0].info
    assert bool(info.converged.all())
    assert int(info.iterations[0]) == 0 < int(info.iterations[2])
    torch.testing.assert_close(x, torch.softmax(-costs, -1), rtol=1e-9, atol=1e-10)
    for i, c in enumerate(costs):
        gradient = c + x[i].log() + 1
        residual = x[i] - torch.softmax(x[i].log() - (stepsize or 1.0) * gradient, -1)
        torch.testing.assert_close(info.residual_norm[i], residual.norm(), rtol=0.1, atol=1e-14)


def test_a_quadratic_over_the_simplex_is_that_of_projected_gradient() -> None:
    """A solution on the boundary, which the entropy reaches in the limit only."""
    H, c = rotated(torch.logspace(0, 1, 5, dtype=D), 3), random(4, 5) * 5
    quadratic = lambda x: 0.5 * x @ (H @ x) - c @ x  # noqa: E731
    solution = idf.ArgminLayer(quadratic, inner_solver=MirrorDescent(softmax, torch.log, tol=1e-9)).solve(CENTRE)
    want = idf.ArgminLayer(quadratic, inner_solver=ProjectedGradient(simplex, tol=1e-11))(CENTRE)
    assert bool(solution.forward.converged)
    assert bool((want == 0).any())
    torch.testing.assert_close(solution.value, want, rtol=0, atol=1e-7)  # from a linear rate of convergence


def test_the_positive_orthant() -> None:
    """Poisson regression with an identity design: x = y."""
    y = random(5, 6).exp()
    solver = MirrorDescent(exponential, torch.log, tol=1e-10)
    layer = idf.ArgminLayer(lambda x, y: (x - y * x.log()).sum(), inner_solver=solver)
    torch.testing.assert_close(layer(torch.ones(6, dtype=D), y), y, rtol=1e-8, atol=0)
    jacobian = jacrev(lambda y: layer(torch.ones(6, dtype=D), y))(y)
    torch.testing.assert_close(jacobian, torch.eye(6, dtype=D), rtol=1e-7, atol=1e-7)


def test_derivatives_are_those_of_softmax() -> None:
    layer, c = layer_of(), COSTS[0]
    solution = lambda c: layer(CENTRE, c)  # noqa: E731
    p = torch.softmax(-c, -1)
    want = -(torch.diag(p) - torch.outer(p, p))
    torch.testing.assert_close(jacrev(solution)(c), want, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(jacfwd(solution)(c), want, rtol=1e-7, atol=1e-9)
    loss = lambda run: lambda c: (run(c) ** 3).sum()  # noqa: E731
    closed = lambda c: torch.softmax(-c, -1)  # noqa: E731
    torch.testing.assert_close(vmap(grad(loss(solution)))(COSTS), vmap(grad(loss(closed)))(COSTS), rtol=1e-7, atol=1e-9)
    c = c.clone().requires_grad_()
    seconds = []
    for run in (solution, closed):
        (first,) = torch.autograd.grad(loss(run)(c), c, create_graph=True)
        seconds.append(torch.autograd.grad(first[0], c)[0])
    torch.testing.assert_close(*seconds, rtol=1e-6, atol=1e-8)


def test_unrolled_makes_the_same_steps() -> None:
    for stepsize in (None, 0.5):
        solver = MirrorDescent(softmax, torch.log, stepsize, tol=1e-10)
        unrolled = idf.UnrolledLayer(entropic, solver)
        there = idf.ArgminLayer(entropic, inner_solver=solver).solve(CENTRE, COSTS[0])
        here = unrolled.solve(CENTRE, COSTS[0])
        torch.testing.assert_close(here.value.detach(), there.value, rtol=1e-12, atol=1e-14)
        p = torch.softmax(-COSTS[0], -1)
        got = jacrev(lambda c, unrolled=unrolled: unrolled(CENTRE, c))(COSTS[0])
        torch.testing.assert_close(got, torch.outer(p, p) - torch.diag(p), rtol=1e-6, atol=1e-8)


def test_a_nan_stays_in_its_system() -> None:
    layer = layer_of(on_failure="ignore")
    with idf.record() as history:
        x = vmap(lambda c: layer(CENTRE, c))(COSTS * torch.tensor([[1.0], [float("nan")], [1.0]], dtype=D))
    assert [idf.Status(int(s)).name for s in history[0].status] == ["CONVERGED", "NON_FINITE", "CONVERGED"]
    torch.testing.assert_close(x[::2], torch.softmax(-COSTS[::2], -1), rtol=1e-9, atol=1e-10)


def test_a_step_that_is_too_long_is_not_called_a_solution() -> None:
    solver = MirrorDescent(softmax, torch.log, 4.0, max_iterations=300, on_failure="ignore")
    info = idf.ArgminLayer(entropic, inner_solver=solver).solve(CENTRE, COSTS[0]).forward
    assert not bool(info.converged)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: MirrorDescent(softmax, torch.log, -1.0), ValueError, "stepsize is -1.0"),
        (lambda: MirrorDescent(softmax, None), TypeError, "mirror_map is None"),
        (lambda: MirrorDescent(0.5, torch.log), TypeError, "projection is 0.5"),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
