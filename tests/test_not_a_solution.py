"""A solver of the user's own that returns something else than a solution is found out where that is differentiated."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf

ZERO = torch.zeros(3, dtype=torch.float64)
C = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
SHEAR = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 3.0]], dtype=torch.float64)


def squares(x: Tensor, c: Tensor) -> Tensor:
    return ((x - c) ** 2).sum()


def sheared(x: Tensor, c: Tensor) -> Tensor:  # A is not symmetric
    return SHEAR @ (x - c)


WAYS: dict[str, Callable[[float], Callable[[Tensor], Any]]] = {  # a solution that is off by so much in each entry
    "a callable inner solver": lambda off: (
        lambda c: idf.ArgminLayer(
            squares, inner_solver=lambda problem, x0: problem.aligned_inputs[0].expand_as(x0) + off
        )(ZERO, c)
    ),
    "a wrapped solver": lambda off: lambda c: idf.implicit(idf.Root(sheared))(lambda init, c: c + off)(ZERO, c),
    "attach": lambda off: lambda c: idf.attach(idf.Root(sheared), C + off, c, linear_solver=idf.GMRES()),
}
DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(lambda c: f(c).sum())(C),
    "jacrev": lambda f: torch.func.jacrev(f)(C),
    "jacfwd": lambda f: torch.func.jacfwd(f)(C),
    "hessian": lambda f: torch.func.hessian(lambda c: f(c).sum())(C),
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_derivative_at_no_solution_warns(way: Any, derivative: Any) -> None:
    with pytest.warns(idf.ConvergenceWarning, match="not at a solution.*NOT_A_SOLUTION"):
        derivative(way(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", idf.ConvergenceWarning)
        derivative(way(1e-3))  # a rough solution: its residual is in the report


def test_each_system_has_its_own_verdict() -> None:
    @idf.implicit(idf.Root(sheared), linear_solver=idf.Dense(on_failure="ignore"), batched=True)
    def solve(init: Tensor, c: Tensor) -> Tensor:
        return c + torch.tensor([0.0, 1.0, 0.0], dtype=c.dtype).unsqueeze(-1)

    many = torch.stack([C, C, C])
    with idf.record() as history:
        torch.func.vmap(torch.func.grad(lambda c: solve(ZERO, c).sum()))(many)
    forward, backward = (solve.info for solve in history)
    assert not forward.judged
    assert backward.status.tolist() == [idf.Status.CONVERGED, idf.Status.NOT_A_SOLUTION, idf.Status.CONVERGED]


def test_it_is_relative_to_the_size_of_x() -> None:
    def backward(size: float) -> idf.SolveInfo:
        c = (size * C).requires_grad_()
        layer = idf.ArgminLayer(
            squares,
            inner_solver=lambda problem, x0: problem.inputs[0] + 1.0,
            linear_solver=idf.CG(on_failure="ignore"),
        )
        solution = layer.solve(ZERO, c)
        solution.value.sum().backward()
        assert solution.backward is not None
        return solution.backward

    assert not bool(backward(10.0).converged)
    assert bool(backward(1000.0).converged)


def test_solvers_with_a_tolerance_are_left_to_it() -> None:
    solver = idf.inner_solvers.GradientDescent(0.1, max_iterations=1, tol=0.0, on_failure="ignore")
    c = C.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", idf.ConvergenceWarning)
        idf.ArgminLayer(squares, inner_solver=solver)(ZERO, c).sum().backward()


def test_the_verdict_leaves_a_warm_start_alone() -> None:
    """In forward mode it takes a solve of its own, by the user's solver."""
    solver = idf.GMRES(rtol=1e-10, warm_start=True)
    with idf.record() as history:
        for _ in range(2):
            way = lambda c: idf.attach(idf.Root(sheared), 1.001 * C, c, linear_solver=solver)  # noqa: E731
            torch.func.jvp(way, (C,), (torch.ones_like(C),))
    iterations = [int(solve.iterations) for solve in history if solve.kind == "tangent"]
    assert iterations[0] > 0
    assert iterations[1] == 0
