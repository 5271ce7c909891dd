"""The solvers of torch.optim and SciPy as inner solvers: their steps, our tolerance and reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers.scipy_minimize import SciPyMinimize
from implicitdiff.inner_solvers.scipy_root import SciPyRoot
from implicitdiff.inner_solvers.torch_optimizer import TorchOptimizer

from ..problems import random, rotated, vector

D = torch.float64
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.08, "momentum": 0.5},
    "Adam": {"lr": 0.05},
    "LBFGS": {"tolerance_grad": 0.0, "tolerance_change": 0.0},
}
HESSIANS = rotated(torch.stack([torch.linspace(1, top, 4, dtype=D) for top in (1.0, 3.0, 8.0)]), 1)
TARGETS = random(2, 3, 4)


def quartic(x: Tensor, H: Tensor, c: Tensor) -> Tensor:
    return 0.5 * x @ (H @ x) + 0.1 * (x**4).sum() - c @ x


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2).sum() + ((1 - x[:-1]) ** 2).sum()


def check_batch(solver: Any, tol: float, dtype: torch.dtype = D) -> idf.SolveInfo:
    """Three systems under vmap: each at its own minimum, by its own count, and the report is true."""
    H, c = HESSIANS.to(dtype), TARGETS.to(dtype)
    layer = idf.ArgminLayer(quartic, inner_solver=solver)
    with idf.record() as history:
        x = vmap(lambda H, c: layer(torch.zeros(4, dtype=dtype), H, c))(H, c)
    info = history[0].info
    assert bool(info.converged.all()), info
    gradient = (H @ x.unsqueeze(-1)).squeeze(-1) + 0.4 * x**3 - c
    # The test's formula rounds otherwise than autograd's, by some eps · ‖c‖: a tenth of the tolerance.
    torch.testing.assert_close(info.residual_norm, gradient.norm(dim=-1), rtol=1e-3, atol=tol / 10)
    assert float(info.residual_norm.max()) <= tol
    return info


# ------------------------------------------------------------------ torch.optim


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_optimizers_minimise_each_system(name: str, dtype: torch.dtype) -> None:
    tol = 1e-6 if dtype is D else 3e-4
    solver = TorchOptimizer(getattr(torch.optim, name), tol=tol, max_iterations=3000, **OPTIMIZERS[name])
    info = check_batch(solver, tol, dtype)
    if name == "LBFGS":
        return
    for i in range(3):
        alone = idf.ArgminLayer(quartic, inner_solver=solver).solve(
            torch.zeros(4, dtype=dtype), HESSIANS[i].to(dtype), TARGETS[i].to(dtype)
        )
        assert abs(int(alone.forward.iterations) - int(info.iterations[i])) <= (2 if dtype is D else 30)
    assert len(set(info.iterations.tolist())) > 1


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adafactor"])
def test_a_system_of_a_batch_steps_as_if_it_were_alone(name: str) -> None:
    """Adafactor measures each parameter as a whole: the systems must not be one."""
    solver = TorchOptimizer(getattr(torch.optim, name), lr=0.05, tol=0.0, max_iterations=20, on_failure="ignore")
    layer = idf.ArgminLayer(quartic, inner_solver=solver)
    x0 = torch.ones(4, dtype=D)
    together = vmap(lambda H, c: layer(x0, H, c))(HESSIANS, TARGETS)
    for i in range(3):
        x = x0.clone().requires_grad_()
        optimizer = getattr(torch.optim, name)([x], lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            quartic(x, HESSIANS[i], TARGETS[i]).backward()
            optimizer.step()
        torch.testing.assert_close(together[i], x.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["Adam", "LBFGS"])
def test_who_has_converged_or_failed_stays_out_of_it(name: str) -> None:
    """One starts at its minimum, one is NaN, one has to go: only the last one moves."""

    def objective(x: Tensor, weight: Tensor) -> Tensor:
        return weight * (vector(1, 30) * (x - 1) ** 2).sum()

    starts = torch.tensor([[1.0, 1], [3, 3], [5, -5]], dtype=D)
    own = {"tolerance_change": 0.0, "line_search_fn": "strong_wolfe"} if name == "LBFGS" else {}
    solver = TorchOptimizer(
        getattr(torch.optim, name), lr=0.1, tol=1e-5, max_iterations=2000, on_failure="ignore", **own
    )
    with idf.record() as history:
        x = vmap(idf.ArgminLayer(objective, inner_solver=solver))(starts, vector(1, math.nan, 1))
    names = [idf.Status(int(s)).name for s in history[0].info.status]
    assert names == ["CONVERGED", "NON_FINITE", "CONVERGED"]
    assert torch.equal(x[:2], starts[:2])
    assert history[0].iterations.tolist()[:2] == [0, 0]
    torch.testing.assert_close(x[2], torch.ones(2, dtype=D), rtol=0, atol=1e-5)


def test_torch_optimizers_report_how_they_failed() -> None:
    def status(solver: Any, objective: Callable[[Tensor], Tensor] = rosenbrock) -> str:
        solver.on_failure = "ignore"
        info = idf.ArgminLayer(objective, inner_solver=solver).solve(vector(-1.2, 1)).forward
        assert not bool(info.converged)
        return idf.Status(int(info.status)).name

    assert status(TorchOptimizer(torch.optim.Adam, lr=0.01, max_iterations=5)) == "MAX_ITERATIONS"
    assert status(TorchOptimizer(torch.optim.SGD, lr=100.0)) == "NON_FINITE"
    assert status(TorchOptimizer(torch.optim.SGD, lr=1e-30)) == "STAGNATED"
    # It ends by its own tolerance, above ours.
    assert status(TorchOptimizer(torch.optim.LBFGS, tolerance_grad=1e-2, line_search_fn="strong_wolfe")) == "STAGNATED"


def test_derivatives_do_not_see_the_optimizer() -> None:
    """argmin (x² − y)²: √y, under every transform."""
    y, one = vector(4, 9), torch.ones(2, dtype=D)
    lbfgs = TorchOptimizer(torch.optim.LBFGS, tol=1e-11, tolerance_grad=0.0, tolerance_change=0.0)
    for solver in (lbfgs, SciPyMinimize("BFGS", tol=1e-11)):
        layer = idf.ArgminLayer(lambda x, y: ((x**2 - y) ** 2).sum(), inner_solver=solver)
        first, second = 0.5 / y.sqrt(), -0.25 / y**1.5
        for jacobian in (jacrev, jacfwd):
            got = jacobian(lambda y: layer(one, y))(y)  # noqa: B023
            torch.testing.assert_close(got, torch.diag(first), rtol=1e-9, atol=1e-11)
        got = hessian(lambda y: layer(one, y).sum())(y)  # noqa: B023
        torch.testing.assert_close(got, torch.diag(second), rtol=1e-8, atol=1e-10)
        per_system = vmap(grad(lambda y: layer(one[:1], y).sum()))(y.unsqueeze(-1))  # noqa: B023
        torch.testing.assert_close(per_system.squeeze(-1), first, rtol=1e-9, atol=0)
        leaf = y.clone().requires_grad_()
        (g,) = torch.autograd.grad(layer(one, leaf).sum(), leaf, create_graph=True)
        torch.testing.assert_close(torch.autograd.grad(g.sum(), leaf)[0], second, rtol=1e-8, atol=0)


def unroll(solver: Any) -> Any:
    return idf.UnrolledLayer(lambda x, t: ((x - t) ** 2).sum(), solver)


T = torch.ones(1, requires_grad=True)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: TorchOptimizer(torch.optim.Adam, learning_rate=0.1), TypeError, "learning_rate"),
        (lambda: TorchOptimizer(torch.optim.Adam, lr=-1.0), ValueError, "learning rate"),
        (lambda: TorchOptimizer("Adam", lr=0.1), TypeError, "optimizer_class is 'Adam'"),
        (lambda: TorchOptimizer(torch.optim.SGD([torch.ones(1)], lr=0.1)), TypeError, "must be a class"),
        (lambda: TorchOptimizer(torch.optim.Adam, tol=-1.0), ValueError, "tol is -1.0"),
        (lambda: unroll(TorchOptimizer(torch.optim.Adam))(torch.zeros(1), T), idf.ImplicitDiffError, "be unrolled"),
        (lambda: unroll(SciPyMinimize("BFGS"))(torch.zeros(1), T), idf.ImplicitDiffError, "be unrolled"),
        (
            lambda: grad(lambda t: unroll(TorchOptimizer(torch.optim.Adam))(torch.zeros(1), t).sum())(T.detach()),
            idf.ImplicitDiffError,
            "TorchOptimizer cannot be unrolled",
        ),
        (
            lambda: idf.RootLayer(lambda x: x - 1, inner_solver=TorchOptimizer(torch.optim.Adam))(torch.zeros(1)),
            idf.ImplicitDiffError,
            "has no objective",
        ),
        (
            lambda: idf.RootLayer(lambda x: x - 1, inner_solver=SciPyMinimize("BFGS"))(torch.zeros(1)),
            idf.ImplicitDiffError,
            "has no objective",
        ),
        (lambda: SciPyMinimize("bfgs"), ValueError, "method is 'bfgs', but it must be one of BFGS, CG"),
        (lambda: SciPyMinimize("SLSQP"), ValueError, "method is 'SLSQP'"),
        (lambda: SciPyRoot("newton"), ValueError, "method is 'newton', but it must be one of hybr, lm"),
        (lambda: SciPyRoot("hybr", max_iterations=0), ValueError, "max_iterations is 0"),
        (
            lambda: idf.RootLayer(lambda x: x - 1j, inner_solver=SciPyRoot("hybr"))(torch.zeros(1) + 0j),
            idf.ImplicitDiffError,
            "real unknowns",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_no_unknowns() -> None:
    for solver in (TorchOptimizer(torch.optim.Adam), SciPyMinimize("BFGS")):
        assert idf.ArgminLayer(lambda x: (x**2).sum(), inner_solver=solver)(torch.zeros(0)).shape == (0,)


def test_its_settings_can_be_read() -> None:
    assert repr(TorchOptimizer(torch.optim.Adam, lr=0.1)) == (
        "TorchOptimizer(torch.optim.adam.Adam, tol=None, max_iterations=1000, on_failure='warn', lr=0.1)"
    )
    assert "method='hybr'" in repr(SciPyRoot("hybr"))


# ------------------------------------------------------------------ SciPy


@pytest.mark.parametrize("method", SciPyMinimize.methods)
def test_scipy_minimises_each_system(method: str) -> None:
    # What a line search can see of the objective is √ε at best; without a gradient it is less.
    tol = 1e-5 if method in ("Nelder-Mead", "Powell") else 1e-7
    info = check_batch(SciPyMinimize(method, tol=tol), tol)
    assert info.method == f"SciPyMinimize: {method}"
    assert info.iterations.shape == (3,)


@pytest.mark.parametrize("method", ["BFGS", "Newton-CG", "trust-exact"])
def test_scipy_in_float32(method: str) -> None:
    check_batch(SciPyMinimize(method, tol=1e-4), 1e-4, torch.float32)


@pytest.mark.parametrize("method", ["BFGS", "CG", "L-BFGS-B", "Newton-CG", "trust-ncg", "dogleg"])
def test_the_iterations_are_scipys(method: str) -> None:
    """Stopped after k iterations, x is SciPy's own after k iterations."""
    x0 = vector(-1.2, 1)
    derivatives: dict[str, Any] = {"jac": lambda x: grad(rosenbrock)(torch.as_tensor(x)).numpy()}
    if method in ("Newton-CG", "trust-ncg", "dogleg"):
        derivatives["hess"] = lambda x: hessian(rosenbrock)(torch.as_tensor(x)).numpy()
    for k in (1, 4):
        solver = SciPyMinimize(method, tol=0.0, max_iterations=k, on_failure="ignore")
        solution = idf.ArgminLayer(rosenbrock, inner_solver=solver).solve(x0)
        theirs = scipy.optimize.minimize(
            lambda x: float(rosenbrock(torch.as_tensor(x))),
            x0.numpy(),
            method=method,
            tol=0.0,
            options={"maxiter": k},
            **derivatives,
        )
        torch.testing.assert_close(solution.value, torch.as_tensor(theirs.x), rtol=1e-9, atol=0)
        assert int(solution.forward.iterations) == k == theirs.nit
        assert int(solution.forward.status) == idf.Status.MAX_ITERATIONS


@pytest.mark.parametrize("method", SciPyRoot.methods)
def test_scipy_finds_the_root_of_each_system(method: str) -> None:
    W = torch.stack([0.1 * rotated(torch.linspace(-1, 1, 3, dtype=D), i) for i in range(2)])
    F: Callable[..., Tensor] = lambda x, W, b: x - torch.tanh(W @ x) - b  # noqa: E731
    b, tol = random(4, 2, 3), 1e-9
    layer = idf.RootLayer(F, inner_solver=SciPyRoot(method, tol=tol))
    with idf.record() as history:
        x = vmap(lambda W, b: layer(torch.zeros(3, dtype=D), W, b))(W, b)
    info = history[0].info
    assert bool(info.converged.all())
    residual = vmap(F)(x, W, b).norm(dim=-1)
    # A difference of numbers of order 1, in a batch here and alone there.
    torch.testing.assert_close(info.residual_norm, residual, rtol=0, atol=1e-14)
    assert float(residual.max()) <= tol
    assert info.method == f"SciPyRoot: {method}"


def test_the_jacobian_is_the_systems_own() -> None:
    """With it hybr needs few evaluations, and none of them for differences."""
    A = torch.eye(30, dtype=D) + 0.5 * random(1, 30, 30) / 30**0.5
    for method, most in (("hybr", 20), ("lm", 8)):
        counts: list[int] = []

        def F(x: Tensor, counts: list[int] = counts) -> Tensor:
            counts.append(1)
            return A @ x + 0.1 * x**3 - 1

        info = idf.RootLayer(F, inner_solver=SciPyRoot(method)).solve(torch.zeros(30, dtype=D)).forward
        assert bool(info.converged)
        assert int(info.iterations) <= most
        assert len(counts) <= 3 * most


def test_scipy_reports_how_it_failed_per_system() -> None:
    """A root, none, NaN at the start, one that starts at its root; out of evaluations."""

    def F(x: Tensor, kind: Tensor) -> Tensor:
        return torch.stack([x**2 - 4, x**2 + 1, x + math.nan, x - 1])[kind]

    layer = idf.RootLayer(F, inner_solver=SciPyRoot("hybr", on_failure="ignore"))
    with idf.record() as history:
        x = vmap(lambda k: layer(torch.ones(1, dtype=D), k))(torch.arange(4))
    info = history[0].info
    names = [idf.Status(int(s)).name for s in info.status]
    assert names == ["CONVERGED", "STAGNATED", "NON_FINITE", "CONVERGED"]
    assert info.iterations.tolist()[2:] == [0, 0]
    assert x[1].isfinite().all()
    few = SciPyRoot("hybr", max_iterations=3, on_failure="ignore")
    ended = idf.RootLayer(F, inner_solver=few).solve(torch.ones(1, dtype=D), torch.tensor(1)).forward
    assert idf.Status(int(ended.status)).name == "MAX_ITERATIONS"
    assert int(ended.iterations) == 3


def test_what_scipy_raises_is_a_breakdown_and_what_the_user_raises_is_raised() -> None:
    # Where the Hessian is not positive definite, dogleg has no step.
    saddle = lambda x: x[0] ** 2 - x[1] ** 2 + x.sum()  # noqa: E731
    solver = SciPyMinimize("dogleg", on_failure="ignore")
    info = idf.ArgminLayer(saddle, inner_solver=solver).solve(vector(1, 1)).forward
    assert idf.Status(int(info.status)).name == "BREAKDOWN"

    def mine(x: Tensor) -> Tensor:
        raise ValueError("mine")

    for method in ("hybr", "broyden1"):
        with pytest.raises(ValueError, match="mine"):
            idf.RootLayer(mine, inner_solver=SciPyRoot(method))(torch.ones(1))

    def later(x: Tensor) -> Tensor:
        if float(x.detach()[0]) != 1:
            raise ValueError("mine")
        return x

    with pytest.raises(ValueError, match="mine"):
        idf.RootLayer(later, inner_solver=SciPyRoot("hybr"))(torch.ones(1))


def test_captured_tensors_and_two_batch_dimensions() -> None:
    """One system of a nested batch is taken out with its own arguments, batched in one, both or none."""
    a, b, c = vector(1, 2), vector(3, 4, 5), torch.tensor(2.0, dtype=D, requires_grad=True)
    layer = idf.RootLayer(lambda x, a, b: c * x - a * b, inner_solver=SciPyRoot("hybr", tol=1e-12))
    run = lambda a, b: layer(torch.zeros((), dtype=D), a, b)  # noqa: E731
    x = vmap(vmap(run, in_dims=(None, 0)), in_dims=(0, None))(a, b)
    torch.testing.assert_close(x, torch.outer(a, b) / 2, rtol=1e-11, atol=0)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), c)[0], -torch.outer(a, b).sum() / 4, rtol=1e-10, atol=0)
