"""Line searches: the strong Wolfe conditions system by system, the gradient used again, rounding, and who gives up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers._line_search import SUFFICIENT_DECREASE, advance, first_iterate
from implicitdiff.inner_solvers._strong_wolfe import advance_wolfe
from implicitdiff.inner_solvers.lbfgs import LBFGS
from implicitdiff.inner_solvers.newton_cg import NewtonCG
from implicitdiff.inner_solvers.nonlinear_cg import NonlinearCG

from ..problems import random, rotated, second_difference
from .more_garbow_hillstrom import PROBLEMS

D = torch.float64


class Line:
    """Functions of one variable, a different one for each system; counts its evaluations."""

    def __init__(self, *functions: Callable[[Tensor], Tensor]) -> None:
        self.functions, self.evaluations = functions, 0

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += 1
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = torch.stack([f(x[i, 0]) for i, f in enumerate(self.functions)])
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient


def yanai(b1: float, b2: float) -> Callable[[Tensor], Tensor]:
    gamma = [(1 + b**2) ** 0.5 - b for b in (b1, b2)]
    return lambda a: gamma[0] * ((1 - a) ** 2 + b2**2).sqrt() + gamma[1] * (a**2 + b1**2).sqrt()


def wavy(a: Tensor, beta: float = 0.01, waves: float = 39.0) -> Tensor:
    kink = torch.where((a - 1).abs() <= beta, (a - 1) ** 2 / (2 * beta) + beta / 2, (a - 1).abs())
    return kink + 2 * (1 - beta) / (waves * torch.pi) * torch.sin(waves * torch.pi / 2 * a)


MORE_THUENTE = [
    lambda a: -a / (a**2 + 2),
    lambda a: (a + 0.004) ** 5 - 2 * (a + 0.004) ** 4,
    wavy,
    yanai(0.001, 0.001),
    yanai(0.01, 0.001),
    yanai(0.001, 0.01),
]
"""The six functions of Moré and Thuente (1994, section 5)."""


@pytest.mark.parametrize("first", [1e-3, 1e-1, 1e1, 1e3])
@pytest.mark.parametrize("curvature", [0.9, 0.1])
def test_the_strong_wolfe_conditions_hold_for_each_system(first: float, curvature: float) -> None:
    """From steps that are far too short and far too long."""
    problem: Any = Line(*MORE_THUENTE)
    here = first_iterate(problem, torch.zeros(6, 1, dtype=D))
    there = advance_wolfe(problem, here, torch.ones(6, 1, dtype=D), torch.full((6,), first, dtype=D), curvature)
    slope = here.gradient.squeeze(-1)
    assert bool((slope < 0).all() & (there.step > 0).all())
    value, gradient = problem.value_and_gradient(here.x + there.step.unsqueeze(-1))
    torch.testing.assert_close((there.value, there.gradient), (value, gradient), rtol=0, atol=0)
    assert bool((value <= here.value + SUFFICIENT_DECREASE * there.step * slope).all())
    assert bool((gradient.squeeze(-1).abs() <= curvature * slope.abs()).all())
    assert problem.evaluations <= 2 + 16  # those of the slowest; Moré and Thuente's own need up to 12


def test_a_system_of_a_batch_is_searched_as_alone() -> None:
    for search in (lambda *a: advance_wolfe(*a, 0.1), advance):
        problem: Any = Line(*MORE_THUENTE)
        here = first_iterate(problem, torch.zeros(6, 1, dtype=D))
        together = search(problem, here, torch.ones(6, 1, dtype=D), torch.full((6,), 10.0, dtype=D))
        for i, function in enumerate(MORE_THUENTE):
            single: Any = Line(function)
            here = first_iterate(single, torch.zeros(1, 1, dtype=D))
            alone = search(single, here, torch.ones(1, 1, dtype=D), torch.full((1,), 10.0, dtype=D))
            torch.testing.assert_close(together.step[i], alone.step[0], rtol=1e-12, atol=0)


def test_a_search_comes_back_from_where_f_is_not_a_number() -> None:
    """Over a wall of NaN, of infinity, and along a line where f falls without end in the finite numbers."""
    functions = [lambda a: a - (1 + a - 3 * a**2).log(), lambda a: torch.exp(1e3 * a) - 2e3 * a, lambda a: -a]
    for search in (lambda *a: advance_wolfe(*a, 0.9), advance):
        problem: Any = Line(*functions)
        here = first_iterate(problem, torch.full((3, 1), -0.2, dtype=D))
        there = search(problem, here, -here.gradient, torch.full((3,), 100.0, dtype=D))
        assert bool(there.value.isfinite().all() & (there.value < here.value).all())


def test_the_gradient_at_the_accepted_point_is_used_again() -> None:
    """Where the first trial is always accepted, one evaluation is made in a step."""
    evaluations = 0

    def objective(x: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return 0.5 * (x**2).sum() + 0.01 * (x**4).sum()

    solution = idf.ArgminLayer(objective, inner_solver=LBFGS(tol=1e-9)).solve(torch.full((3,), 0.3, dtype=D))
    assert evaluations == 1 + 1 + int(solution.forward.iterations)  # captured tensors are looked for; the start
    evaluations = 0
    solution = idf.ArgminLayer(objective, inner_solver=NewtonCG(tol=1e-9)).solve(torch.full((3,), 0.3, dtype=D))
    assert evaluations == 1 + 1 + 2 * int(solution.forward.iterations)  # and the Hessian's graph


def test_every_pair_of_lbfgs_has_positive_curvature() -> None:
    """That is what the curvature condition is for: no pair has to be skipped, on non-convex problems either."""
    for name in ("Rosenbrock", "Wood", "Biggs EXP6", "Osborne 2"):
        left: list[Any] = []

        class Watched(LBFGS):
            def step(self, problem: Any, state: Any, left: list[Any] = left) -> Any:
                left.append(super().step(problem, state))
                return left[-1]

        idf.ArgminLayer(PROBLEMS[name].objective, inner_solver=Watched(tol=1e-5)).solve(PROBLEMS[name].start)
        assert len(left) > 20
        assert all(float(state.memory.pairs[-1].weight) > 0 for state in left)


@pytest.mark.parametrize("solver", [LBFGS(), NonlinearCG()], ids=str)
def test_ill_conditioned_quadratics_are_solved_to_the_default_tolerance(solver: Any) -> None:
    """Where values show nothing any more at ‖∇f‖ = 1e-4: the slopes lead on, over plateaus of the gradient's norm."""
    solver.max_iterations = 5000
    n = 100
    T = second_difference(n)
    layer = idf.ArgminLayer(lambda x: 0.5 * x @ (T @ x) - x.sum(), inner_solver=solver)
    solution = layer.solve(torch.zeros(n, dtype=D))
    i = torch.arange(1, n + 1, dtype=D)
    assert bool(solution.forward.converged)
    torch.testing.assert_close(solution.value, i * (n + 1 - i) / 2, rtol=1e-6, atol=0)


def test_lbfgs_passes_a_plateau_of_the_gradient() -> None:
    """Its norm does not fall for more than thirty steps at condition number 1e5, long before rounding ends progress."""
    H, c = rotated(torch.logspace(0, -5, 20, dtype=D), 1), random(2, 20)
    layer = idf.ArgminLayer(lambda x: 0.5 * x @ (H @ x) - c @ x, inner_solver=LBFGS(max_iterations=4000))
    solution = layer.solve(torch.zeros(20, dtype=D))
    assert bool(solution.forward.converged)
    # The tolerance, 1e-7, over the smallest eigenvalue, 1e-5.
    torch.testing.assert_close(solution.value, torch.linalg.solve(H, c), rtol=0, atol=1e-2)


@pytest.mark.parametrize("solver", [LBFGS, NonlinearCG, NewtonCG])
def test_a_constant_beside_the_objective_hides_its_decrease_but_not_its_gradient(solver: Any) -> None:
    H, c = rotated(torch.linspace(1, 50, 6, dtype=D), 1), random(2, 6)
    layer = idf.ArgminLayer(lambda x: 1e8 + 0.5 * x @ (H @ x) - c @ x, inner_solver=solver(tol=1e-9))
    solution = layer.solve(torch.zeros(6, dtype=D))
    assert bool(solution.forward.converged)
    torch.testing.assert_close(solution.value, torch.linalg.solve(H, c), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", [LBFGS, NonlinearCG])
def test_who_cannot_go_on_says_so_soon(solver: Any) -> None:
    """float32 cannot reach ‖∇f‖ ≤ 1e-12."""
    H, c = rotated(torch.linspace(1, 50, 6, dtype=D), 1).float(), 100 * random(2, 6).float()
    layer = idf.ArgminLayer(
        lambda x: 0.5 * x @ (H @ x) - c @ x, inner_solver=solver(tol=1e-12, max_iterations=5000, on_failure="ignore")
    )
    info = layer.solve(torch.zeros(6)).forward
    assert int(info.status) == idf.Status.STAGNATED
    assert int(info.iterations) < 500
    assert float(info.residual_norm) < 1e-2


def smooth(x: Tensor, c: Tensor) -> Tensor:
    return torch.cosh(x - c).sum() + 0.5 * (x.sum() - 1) ** 2 + 0.1 * (x**4).sum()


@pytest.mark.parametrize("solver", [LBFGS(tol=1e-11), NonlinearCG(tol=1e-11)], ids=str)
def test_steps_can_be_unrolled(solver: Any) -> None:
    """The same numbers as without a graph, and the derivative of the solution that they converge to."""
    c = random(3, 4)
    implicit, unrolled = idf.ArgminLayer(smooth, inner_solver=solver), idf.UnrolledLayer(smooth, solver)
    zero = torch.zeros(4, dtype=D)
    a, b = implicit.solve(zero, c), unrolled.solve(zero, c)
    torch.testing.assert_close(a.value, b.value, rtol=1e-12, atol=1e-14)
    assert int(a.forward.iterations) == int(b.forward.iterations)
    want = jacrev(lambda c: implicit(zero, c))(c)
    torch.testing.assert_close(jacrev(lambda c: unrolled(zero, c))(c), want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(lambda c: unrolled(zero, c), c), want, rtol=1e-6, atol=1e-7
    )
    cs = torch.stack([c, 2 * c, 0.1 * c])  # they end at different steps: who is done gets no NaN
    got = vmap(grad(lambda c: (unrolled(zero, c) ** 2).sum()))(cs)
    want = vmap(grad(lambda c: (implicit(zero, c) ** 2).sum()))(cs)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_nonlinear_cg_solves_each_system_of_a_batch() -> None:
    c = torch.stack([random(4, 4), 5 * random(5, 4), torch.full((4,), torch.nan, dtype=D), torch.zeros(4, dtype=D)])
    layer = idf.ArgminLayer(smooth, inner_solver=NonlinearCG(tol=1e-7, on_failure="ignore"))
    with idf.record() as history:
        x = vmap(lambda c: layer(torch.zeros(4, dtype=D), c))(c)
    assert history[0].status.tolist() == [0, 0, idf.Status.NON_FINITE, 0]
    for i in (0, 1, 3):
        residual = grad(smooth)(x[i], c[i]).norm()
        torch.testing.assert_close(history[0].residual_norm[i], residual, rtol=0, atol=1e-13)
        alone = layer.solve(torch.zeros(4, dtype=D), c[i])
        torch.testing.assert_close(x[i], alone.value, rtol=0, atol=1e-7)
        assert int(alone.forward.iterations) == int(history[0].iterations[i])
    assert idf.ArgminLayer(lambda x: (x**2).sum(), inner_solver=NonlinearCG())(torch.zeros(0)).shape == (0,)


def test_nonlinear_cg_is_cg_on_quadratics() -> None:
    """A small multiple of CG's iterations: they grow by the square root of the condition number 1e3, not by it."""
    H, c = rotated(torch.logspace(0, 3, 60, dtype=D), 7), random(8, 60)
    info = idf.ArgminLayer(lambda x: 0.5 * x @ (H @ x) - c @ x, inner_solver=NonlinearCG(tol=1e-7)).solve(
        torch.zeros(60, dtype=D)
    )
    linear = idf.CG(rtol=1e-7 / float(c.norm()))(idf.operators.DenseOperator(H, "positive_definite"), c).info
    assert bool(info.forward.converged)
    assert int(info.forward.iterations) <= 4 * int(linear.iterations)
