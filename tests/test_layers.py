"""Layers, attach and implicit as users meet them: trees, scalars, dtypes, wrapped solvers, reports and messages."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers import Anderson, GradientDescent, Newton, NewtonCG

from .problems import random, rotated

D = torch.float64
TIGHT = {"inner_solver": NewtonCG(tol=1e-12), "linear_solver": idf.CG(rtol=1e-12)}


class Point(NamedTuple):
    a: Tensor
    b: list[Tensor]


def sum_of_squares(x: Any, c: Any) -> Tensor:
    return ((x.a - c["a"]) ** 2).sum() + sum(((u - v) ** 2).sum() for u, v in zip(x.b, c["b"], strict=True))


def test_trees_in_and_out() -> None:
    """Namedtuple, list, dict, a scalar leaf and an empty one; the solution is the args themselves."""
    c = {"a": random(1, 2, 1), "b": [random(2), random(3, 0), random(4, 3)]}
    layer = idf.ArgminLayer(sum_of_squares, **TIGHT)
    init = Point(
        torch.zeros(2, 1, dtype=D), [torch.zeros((), dtype=D), torch.zeros(0, dtype=D), torch.zeros(3, dtype=D)]
    )
    x = layer(init, c)
    assert isinstance(x, Point)
    torch.testing.assert_close([x.a, *x.b], [c["a"], *c["b"]])
    jacobian = jacrev(lambda c: layer(init, c).b[2])(c)
    torch.testing.assert_close(jacobian["b"][2], torch.eye(3, dtype=D))
    torch.testing.assert_close(jacobian["a"], torch.zeros(3, 2, 1, dtype=D))


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=2).map(tuple), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 100),
)
def test_any_tree_of_shapes(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
    targets = [random(seed + i, *shape, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]
    zero = lambda x: sum(((u - t) ** 2).sum() for u, t in zip(x, targets, strict=True)) + torch.zeros((), dtype=dtype)  # noqa: E731
    out = idf.ArgminLayer(zero)([torch.zeros(shape, dtype=dtype) for shape in shapes])
    assert [o.shape for o in out] == [torch.Size(s) for s in shapes]
    assert all(o.dtype == dtype for o in out)
    if any(o.numel() for o in out):
        grads = torch.autograd.grad(sum(o.sum() for o in out), targets, allow_unused=True, materialize_grads=True)
        for g in grads:
            torch.testing.assert_close(g, torch.ones_like(g), rtol=1e-4, atol=1e-4)


def test_leaves_of_two_dtypes_are_solved_in_the_wider_one() -> None:
    layer = idf.RootLayer(lambda x, t: {"s": x["s"] - t, "d": x["d"] - 2 * t.double()})
    t = torch.tensor(3.0, requires_grad=True)
    x = layer({"s": torch.zeros(()), "d": torch.zeros((), dtype=D)}, t)
    assert (x["s"].dtype, x["d"].dtype) == (torch.float32, torch.float64)
    (x["s"] + x["d"]).backward()
    torch.testing.assert_close(t.grad, torch.tensor(3.0))


def test_integers_strings_and_none_pass_through() -> None:
    def residual(x: Tensor, t: Tensor, power: int, index: Tensor, label: str, extra: None = None) -> Tensor:
        assert label == "cube"
        assert extra is None
        return x**power - t[index]

    layer = idf.RootLayer(residual, inner_solver=Newton(tol=1e-12), linear_solver=idf.Dense())
    t, index = torch.tensor([8.0, 27.0, 64.0], dtype=D, requires_grad=True), torch.tensor([1, 0])
    x = layer(torch.ones(2, dtype=D), t, 3, index, label="cube")
    x.sum().backward()
    torch.testing.assert_close(x.detach(), torch.tensor([3.0, 2.0], dtype=D))
    torch.testing.assert_close(t.grad, torch.tensor([1 / 12, 1 / 27, 0.0], dtype=D))
    batch = torch.stack([index, index + 1])
    by_index = vmap(lambda i: layer(torch.ones(2, dtype=D), t.detach(), 3, i, label="cube"))(batch)
    torch.testing.assert_close(by_index, torch.tensor([[3.0, 2.0], [4.0, 3.0]], dtype=D))


def test_complex_roots() -> None:
    """z² = w: dz/dw = 1/(2z), holomorphic, so backward gives its conjugate."""
    w = torch.tensor([3 + 4j], dtype=torch.complex128, requires_grad=True)
    layer = idf.RootLayer(lambda z, w: z * z - w, inner_solver=Newton(tol=1e-12), linear_solver=idf.Dense())
    z = layer(torch.tensor([1 + 1j], dtype=torch.complex128), w)
    torch.testing.assert_close(z.detach(), torch.tensor([2 + 1j], dtype=torch.complex128))
    z.real.sum().backward()
    torch.testing.assert_close(w.grad, (1 / (2 * z.detach())).conj())


@pytest.mark.parametrize("way", ["no_grad", "inference_mode", "nothing requires grad"])
def test_a_plain_tensor_where_no_derivative_is_asked_for(way: str) -> None:
    layer = idf.ArgminLayer(lambda x, t: ((x - t) ** 2).sum())
    t = torch.ones(2, requires_grad=way == "no_grad")
    context = {"no_grad": torch.no_grad(), "inference_mode": torch.inference_mode()}.get(way)
    if context is None:
        x = layer(torch.zeros(2), t)
    else:
        with context:
            x = layer(torch.zeros(2), t)
    assert not x.requires_grad
    torch.testing.assert_close(x, torch.ones(2))


def test_init_gets_no_gradient_and_is_left_alone() -> None:
    init = torch.zeros(2, requires_grad=True)
    t = torch.ones(2, requires_grad=True)
    x = idf.ArgminLayer(lambda x, t: ((x - t) ** 2).sum())(init, t)
    x.sum().backward()
    assert init.grad is None
    assert torch.equal(init, torch.zeros(2))
    start = torch.tensor([2.0])
    x = idf.RootLayer(lambda x, t: x - t, inner_solver=lambda problem, x0: x0)(start, torch.tensor([2.0]))
    assert x.data_ptr() != start.data_ptr()


def test_retained_graphs_and_two_backward_passes() -> None:
    t = torch.ones(2, dtype=D, requires_grad=True)
    x = idf.RootLayer(lambda x, t: x**3 - t)(torch.ones(2, dtype=D), t).sum()
    first = torch.autograd.grad(x, t, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(x, t)[0], first)


def test_an_argument_changed_in_place_before_backward_raises() -> None:
    t = torch.ones(2, dtype=D, requires_grad=True)
    u = t * 1
    x = idf.RootLayer(lambda x, u: x**3 - u)(torch.ones(2, dtype=D), u)
    u.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


# ------------------------------------------------------------------ attach and implicit


def test_attach_equals_the_layer_to_second_order() -> None:
    y = torch.tensor([4.0, 9.0], dtype=D, requires_grad=True)
    x = idf.attach(idf.Root(lambda x, y: x**2 - y), torch.tensor([2.0, 3.0], dtype=D), y, linear_solver=idf.Dense())
    (first,) = torch.autograd.grad(x.sum(), y, create_graph=True)
    torch.testing.assert_close(first.detach(), torch.tensor([1 / 4, 1 / 6], dtype=D))
    second = torch.autograd.grad(first.sum(), y)[0]
    torch.testing.assert_close(second, torch.tensor([-1 / 32, -1 / 108], dtype=D))


def test_the_residual_of_a_given_solution_is_in_the_report() -> None:
    with idf.record() as history:
        idf.attach(idf.Root(lambda x, y: x - y), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(history[0].residual_norm, torch.tensor(3.0))


class Ridge:
    """A wrapped SciPy solver, which counts its calls."""

    def __init__(self, **settings: Any) -> None:
        self.shapes: list[tuple[int, ...]] = []

        @idf.implicit(idf.Stationary(self.objective), linear_solver=idf.CG(rtol=1e-12), **settings)
        def solve(init: Tensor | None, lam: Tensor, X: Tensor, y: Tensor) -> Any:
            self.shapes.append(tuple(lam.shape))
            assert not lam.requires_grad
            gram = X.mT @ X + lam[..., None, None] * torch.eye(X.shape[-1], dtype=D)
            w = np.linalg.solve(gram.numpy(), (X.mT @ y.unsqueeze(-1)).numpy())[..., 0]
            return (
                (torch.from_numpy(w), {"norm": float(np.linalg.norm(w))})
                if settings.get("has_aux")
                else torch.from_numpy(w)
            )

        self.solve = solve

    @staticmethod
    def objective(w: Tensor, lam: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * lam * (w**2).sum()

    @staticmethod
    def closed(lam: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.inv(X.T @ X + lam * torch.eye(X.shape[-1], dtype=D)) @ X.T @ y


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("with_init", [False, True])
def test_a_numpy_solver_under_transforms(batched: bool, with_init: bool) -> None:
    ridge, lam, X, y = Ridge(batched=batched), torch.tensor([0.5, 1.0, 2.0], dtype=D), random(1, 6, 3), random(2, 6)
    init = torch.zeros(3, dtype=D) if with_init else None
    solve = lambda lam, y: ridge.solve(init, lam, X, y)  # noqa: E731
    want = torch.stack([Ridge.closed(v, X, y) for v in lam])
    torch.testing.assert_close(vmap(solve, in_dims=(0, None))(lam, y), want)
    assert ((3,) in ridge.shapes) == batched
    second = vmap(grad(grad(lambda v: solve(v, y).sum())))(lam)
    torch.testing.assert_close(second, vmap(grad(grad(lambda v: Ridge.closed(v, X, y).sum())))(lam), rtol=1e-7, atol=0)
    torch.testing.assert_close(jacrev(solve)(lam[0], y), jacrev(Ridge.closed)(lam[0], X, y), rtol=1e-8, atol=0)


def test_aux_comes_along() -> None:
    ridge, X, y = Ridge(has_aux=True), random(1, 6, 3), random(2, 6)
    w, aux = ridge.solve(None, torch.tensor(1.0, dtype=D), X, y)
    assert aux == {"norm": pytest.approx(float(w.norm()))}
    with pytest.raises(idf.ImplicitDiffError, match=r"must return \(x, aux\)"):
        idf.implicit(idf.Root(lambda x: x), has_aux=True)(lambda init: init)(torch.ones(1))


def test_a_scipy_root_finder_with_captures() -> None:
    """The condition closes over a tensor that the wrapped solver reads by itself."""
    a = torch.tensor(0.3, dtype=D, requires_grad=True)

    @idf.implicit(idf.Root(lambda x, t: x - a * torch.sin(x) - t))
    def kepler(init: None, t: Tensor) -> Tensor:
        value = float(a.detach())
        return torch.tensor(
            scipy.optimize.brentq(lambda x: x - value * np.sin(x) - float(t), -10, 10, xtol=1e-14), dtype=D
        )

    t = torch.tensor(1.0, dtype=D, requires_grad=True)
    x = kepler(None, t)
    x.backward()
    slope = 1 - 0.3 * torch.cos(x.detach())
    torch.testing.assert_close(t.grad, 1 / slope)
    torch.testing.assert_close(a.grad, torch.sin(x.detach()) / slope)


# ------------------------------------------------------------------ never silently wrong


def saddle(**settings: Any) -> tuple[Tensor, Tensor]:
    """A saddle point, where CG meets negative curvature in the backward pass."""
    t = torch.ones(2, dtype=D, requires_grad=True)
    layer = idf.ArgminLayer(
        lambda x, t: x[0] ** 2 - x[1] ** 2 + x @ t, inner_solver=Newton(), linear_solver=idf.CG(**settings)
    )
    return layer(torch.zeros(2, dtype=D), t), t


def test_a_failure_in_backward_warns_raises_or_is_recorded() -> None:
    x, _ = saddle()
    with pytest.warns(idf.ConvergenceWarning, match="CG did not solve the backward linear system: INDEFINITE"):
        x[1].backward()
    x, _ = saddle(on_failure="raise")
    with pytest.raises(idf.ConvergenceError, match=r"use MINRES, Dense\(\) or Auto\(\)"):
        x[1].backward()
    x, _ = saddle(on_failure="ignore")
    with warnings.catch_warnings(), idf.record() as history:
        warnings.simplefilter("error")
        x[1].backward()
    assert [int(solve.status) for solve in history] == [idf.Status.INDEFINITE]
    # In forward mode and under vmap too.
    layer = idf.ArgminLayer(lambda x, t: -(x**2).sum() + x @ t, inner_solver=Newton(), linear_solver=idf.CG())
    with pytest.warns(idf.ConvergenceWarning, match="CG did not solve the tangent linear system for 3 of 3 systems"):
        vmap(lambda t: torch.func.jvp(lambda t: layer(torch.zeros(2, dtype=D), t), (t,), (torch.ones_like(t),))[1])(
            random(1, 3, 2)
        )


def test_a_failure_in_forward_counts_the_systems() -> None:
    layer = idf.ArgminLayer(
        lambda x, r: (r * x**2 - x).sum(), inner_solver=GradientDescent(0.1, max_iterations=30, tol=1e-6)
    )
    with pytest.warns(
        idf.ConvergenceWarning, match="GradientDescent did not solve the inner problem for 1 of 2 systems"
    ):
        vmap(lambda r: layer(torch.zeros(1, dtype=D), r))(torch.tensor([5.0, 0.01], dtype=D))


def test_solve_fills_in_both_reports() -> None:
    t = torch.ones(3, dtype=D, requires_grad=True)
    solution = idf.ArgminLayer(lambda x, t: ((x - t) ** 4 + x**2).sum(), **TIGHT).solve(torch.zeros(3, dtype=D), t)
    assert solution.backward is None
    solution.value.sum().backward()
    assert bool(solution.forward.converged)
    assert float(solution.forward.residual_norm) <= 1e-12
    assert solution.backward is not None
    assert solution.backward.method == "CG"
    assert float(solution.backward.residual_norm) <= 1e-12


def test_record_keeps_order_and_nests() -> None:
    t = torch.ones(3, dtype=D, requires_grad=True)
    layer = idf.ArgminLayer(lambda x, t: ((x - t) ** 2).sum())
    with idf.record() as outer:
        x = layer(torch.zeros(3, dtype=D), t)
        with idf.record() as inner:
            x.sum().backward()
    assert [solve.kind for solve in outer] == ["forward", "backward"]
    assert [solve.kind for solve in inner] == ["backward"]


def test_the_memory_of_a_gradient_does_not_grow_with_the_inner_steps() -> None:
    """No tensor of the inner iterations survives the forward pass."""
    import gc

    def alive(steps: int) -> int:
        t = torch.ones(3, dtype=D, requires_grad=True)
        solver = GradientDescent(0.01, max_iterations=steps, tol=0.0, on_failure="ignore")
        x = idf.ArgminLayer(lambda x, t: ((x - t) ** 2).sum(), inner_solver=solver)(torch.zeros(3, dtype=D), t)
        gc.collect()
        count = sum(isinstance(o, Tensor) for o in gc.get_objects())
        del x
        return count

    alive(2)
    assert alive(64) <= alive(2) + 10  # other tests' garbage may go in between; 64 steps would leave hundreds


@pytest.mark.parametrize("how", ["solve", "vmap", "attach"])
def test_a_graph_is_freed_with_its_output(how: str) -> None:
    """A cycle through the Function's context, which Python's collector cannot see, would leak every graph."""
    import gc

    layer = idf.ArgminLayer(lambda x, t: ((x - t) ** 2).sum())
    t = torch.ones(2, 3, dtype=D, requires_grad=True)

    def once() -> None:
        if how == "solve":
            layer.solve(torch.zeros(2, 3, dtype=D), t)
        elif how == "vmap":
            vmap(lambda t: layer(torch.zeros(3, dtype=D), t))(t)
        else:
            idf.attach(layer.condition, t.detach(), t)

    def alive() -> int:
        gc.collect()
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    once()
    before = alive()
    for _ in range(20):
        once()
    assert alive() <= before + 2


# ------------------------------------------------------------------ check


class WronglySymmetric:
    structure = "symmetric"

    def residual(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=D) @ x - t


class WronglyDefinite(WronglySymmetric):
    structure = "positive_definite"

    def residual(self, x: Tensor, t: Tensor) -> Tensor:
        return -x - t


def wrapped(condition: Any, solution: Callable[[Tensor], Tensor]) -> Any:
    return idf.implicit(condition, linear_solver=idf.Dense(on_failure="ignore"))(lambda init, t: solution(t))


def test_check_finds_what_is_wrong_and_nothing_else() -> None:
    t, zero = random(1, 2), torch.zeros(2, dtype=D)
    right = idf.ArgminLayer(lambda x, t: torch.cosh(x - t).sum(), inner_solver=NewtonCG(tol=1e-10))
    assert idf.check(right, zero, t).ok, idf.check(right, zero, t)

    M = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=D)
    report = idf.check(wrapped(WronglySymmetric(), lambda t: torch.linalg.solve(M, t)), zero, t)
    assert not report.ok
    assert not report.structure
    assert "not symmetric" in str(report)

    report = idf.check(wrapped(WronglyDefinite(), lambda t: -t), zero, t)
    assert not report.structure
    assert "declare it 'symmetric'" in str(report)

    report = idf.check(wrapped(idf.Root(lambda x, t: x - 2 * t), lambda t: 2.1 * t), zero, t)
    assert report.distance == pytest.approx(float((0.1 * t).norm() / max(1.0, float((2.1 * t).norm()))))
    assert "away from where the condition holds" in str(report)

    report = idf.check(wrapped(idf.Root(lambda x, t: x - t.detach()), lambda t: 1.0 * t), zero, t)
    assert "central differences" in str(report)
    assert report.gradient_error == pytest.approx(1.0)

    dropout = nn.Dropout(0.5)
    layer = idf.FixedPointLayer(
        lambda x, t: 0.5 * dropout(x) + t,
        inner_solver=Anderson(max_iterations=20, on_failure="ignore"),
        linear_solver=idf.Dense(),
    )
    report = idf.check(layer, torch.ones(6, dtype=D), torch.ones(6, dtype=D))
    assert not report.deterministic
    assert "dropout" in str(report)


def test_check_names_solves_that_failed_unless_that_is_wanted() -> None:
    t, zero = random(1, 2), torch.zeros(2, dtype=D)
    cosh = lambda x, t: torch.cosh(x - t).sum()  # noqa: E731
    for policy, words in (("warn", "the inner solve failed"), ("ignore", "ok")):
        steps = idf.inner_solvers.GradientDescent(0.5, max_iterations=60, tol=0.0, on_failure=policy)
        layer = idf.ArgminLayer(cosh, inner_solver=steps, polish=True)  # as good as solved
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", idf.ConvergenceWarning)
            assert words in str(idf.check(layer, zero, t))
    nowhere = wrapped(idf.Root(lambda x, t: x - t), lambda t: t / 0)
    with pytest.warns(idf.ConvergenceWarning, match="NON_FINITE"):
        assert "not finite" in str(idf.check(nowhere, zero, 0 * t))


def test_check_takes_layers_and_wrapped_solvers_only() -> None:
    with pytest.raises(TypeError, match="RootLayer, FixedPointLayer or a function wrapped by implicit"):
        idf.check(lambda init: init, torch.zeros(1))
    with pytest.raises(TypeError, match=r"given QPLayer\. Of a DEQ, check its \.layer with one sample"):
        idf.check(idf.QPLayer(), torch.eye(1), torch.zeros(1))
    deq = idf.DEQ(lambda z, u: 0.5 * torch.tanh(z) + u)
    assert idf.check(deq.layer, torch.zeros(3, dtype=D), random(9, 3)).ok


def of_eigenvalues(eigenvalues: Tensor) -> idf.CheckReport:
    """What check says of x ↦ Q Λ Qᵀ x − t, declared positive definite."""

    class Linear(WronglyDefinite):
        def residual(self, x: Tensor, t: Tensor) -> Tensor:
            return M @ x - t

    Linear.structure = "positive_definite"
    M = rotated(eigenvalues, 3)
    return idf.check(wrapped(Linear(), lambda t: torch.linalg.solve(M, t)), 0 * eigenvalues, random(1, len(M)))


@pytest.mark.parametrize("n", [4, 150], ids=["all eigenvalues", "Ritz values"])
def test_check_finds_a_single_negative_eigenvalue(n: int) -> None:
    """Fails where one random vector decides: it sees mostly the others."""
    eigenvalues = torch.linspace(3, 5, n, dtype=D)
    assert of_eigenvalues(eigenvalues).ok
    assert of_eigenvalues(torch.cat([eigenvalues[:-1], torch.tensor([1e-9], dtype=D)])).structure
    report = of_eigenvalues(torch.cat([eigenvalues[:-1], torch.tensor([-0.25], dtype=D)]))
    assert not report.structure
    assert "∂F/∂x has the eigenvalue -0.25: declare it 'symmetric'" in str(report)


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: idf.ArgminLayer(lambda x: x)(torch.ones(3)),
            idf.ImplicitDiffError,
            r"shape \(3,\).*must return a scalar",
        ),
        (lambda: idf.RootLayer(lambda x: x[:1])(torch.ones(3)), idf.ImplicitDiffError, r"the shapes of init, \(3,\)"),
        (lambda: idf.RootLayer(lambda x: {"a": x})(torch.ones(3)), idf.ImplicitDiffError, "a tree like init"),
        (lambda: idf.RootLayer(lambda x: x)(3.0), idf.ImplicitDiffError, "3.0 of type float.*Pass a tensor"),
        (lambda: idf.RootLayer(lambda x: x)(torch.ones(2, dtype=torch.long)), idf.ImplicitDiffError, "int64 tensor"),
        (lambda: idf.RootLayer(lambda x: x)(None), idf.ImplicitDiffError, "None of type NoneType"),
        (lambda: idf.RootLayer(3), TypeError, "residual is 3"),
        (lambda: idf.ArgminLayer(nn.Linear), TypeError, "objective is"),
        (lambda: idf.RootLayer(lambda x: x, linear_solver=idf.CG), TypeError, r"did you mean CG\(\)"),
        (lambda: idf.RootLayer(lambda x: x, solver=idf.CG()), TypeError, "solver"),
        (
            lambda: idf.RootLayer(lambda x, y: x)(torch.ones(1)),
            TypeError,
            "missing 1 required positional argument: 'y'",
        ),
        (lambda: idf.attach(lambda x: x, torch.ones(1)), TypeError, "Root"),
        (lambda: idf.attach(idf.Root, torch.ones(1)), TypeError, "residual"),
        (lambda: idf.implicit(idf.Root(lambda x: x))(3), TypeError, "decorates a callable"),
        (lambda: idf.UnrolledLayer(lambda x: x.sum(), lambda p, x: x), TypeError, "InnerSolver"),
        (lambda: idf.UnrolledLayer(lambda x: x.sum(), GradientDescent(0.1), truncate=-1), ValueError, "truncate is -1"),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_wrong_structure_of_a_condition_is_named() -> None:
    class Condition:
        structure = "spd"

        def residual(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="structure is 'spd'"):
        idf.attach(Condition(), torch.ones(1))  # type: ignore[arg-type]


def test_linearize_says_what_to_use_instead() -> None:
    layer = idf.RootLayer(lambda x, t: x - t)
    with pytest.raises(idf.ImplicitDiffError, match=r"torch\.func\.linearize.*torch\.func\.jvp"):
        torch.func.linearize(lambda t: layer(torch.zeros(2), t), torch.ones(2))


def test_the_structure_decides_the_default_solver_of_a_large_problem() -> None:
    H = rotated(torch.linspace(1, 2, 80, dtype=D))
    t = random(1, 80).requires_grad_()
    solution = idf.ArgminLayer(lambda x, t: 0.5 * x @ (H @ x) - t @ x).solve(torch.zeros(80, dtype=D), t)
    solution.value.sum().backward()
    assert solution.backward is not None
    assert solution.backward.method == "Auto: CG, as A is symmetric"
    torch.testing.assert_close(t.grad, torch.linalg.solve(H, torch.ones(80, dtype=D)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_a_warning_names_the_line_of_the_user(stage: str) -> None:
    limited = idf.inner_solvers.GradientDescent(0.1, max_iterations=1)
    exact = idf.inner_solvers.Newton(on_failure="ignore")
    layer = idf.ArgminLayer(
        lambda x, t: ((x - t) ** 2).sum() + (x**4).sum(),
        inner_solver=limited if stage == "forward" else exact,
        linear_solver=idf.CG(max_iterations=1),
    )
    t = torch.tensor([1.0, 5.0], requires_grad=True)
    with pytest.warns(idf.ConvergenceWarning) as caught:
        layer(torch.zeros(2), t).sum().backward()
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("kind", ["argmin", "root", "fixed point"])
def test_polish_squares_the_error_and_estimates_the_distance(kind: str) -> None:
    """Fails for a step with Aᵀ, or by the gradient in the place of F; of a batch under vmap too."""
    M = torch.tensor([[3.0, 0.5], [0.5, 2.0]], dtype=D)
    cubic = lambda x, t: M @ x + 0.1 * x**3 - t  # noqa: E731
    settings = {"max_iterations": 12, "on_failure": "ignore"}
    inner = idf.inner_solvers.FixedPointIteration(**settings) if kind == "fixed point" else None
    if kind == "argmin":
        make, function = idf.ArgminLayer, lambda x, t: 0.5 * x @ M @ x + 0.025 * (x**4).sum() - x @ t
        inner = idf.inner_solvers.GradientDescent(0.25, **settings)
    elif kind == "root":
        make, function = idf.RootLayer, cubic
        inner = lambda problem, x0: x0 + 0.005  # noqa: E731
    else:
        make, function = idf.FixedPointLayer, lambda x, t: x - 0.25 * cubic(x, t)
    exact = idf.RootLayer(cubic, inner_solver=Newton(tol=1e-14))
    t = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=D)
    start = vmap(lambda t: exact(torch.zeros(2, dtype=D), t))(t) if kind == "root" else torch.zeros(2, 2, dtype=D)

    def derivative(layer: Any) -> Any:
        return vmap(torch.func.jacrev(lambda x0, t: layer(x0, t), 1))(start, t)

    wanted = derivative(exact)
    rough, polished = (derivative(make(function, inner_solver=inner, polish=p)) for p in (False, True))
    before, after = (float((d - wanted).abs().max()) for d in (rough, polished))
    assert 1e-8 < before < 1e-1
    assert after <= 10 * before**2
    x = make(function, inner_solver=inner)(start[0], t[0])
    info = make(function, inner_solver=inner, polish=True).solve(start[0], t[0]).forward
    distance = float((x - exact(start[0], t[0])).norm())
    assert info.distance is not None
    assert float(info.distance) == pytest.approx(distance, rel=0.05)


@pytest.mark.parametrize("steps", [4, 8, 20, 50])
def test_polish_estimates_the_error_of_the_gradient(steps: int) -> None:
    """Within a factor of ten, from 1e-1 to 1e-9: a logistic regression in its penalties."""
    X = random(50, 80, 6)
    y = (X @ random(51, 6) > 0).to(D)

    def objective(w: Tensor, log_penalties: Tensor) -> Tensor:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(X @ w, y)
        return loss + 0.5 * (log_penalties.exp() * w**2).sum()

    def gradient(**settings: Any) -> tuple[Tensor, Any]:
        layer = idf.ArgminLayer(objective, linear_solver=idf.Dense(), **settings)
        log_penalties = torch.full((6,), -3.0, dtype=D, requires_grad=True)
        solution = layer.solve(torch.zeros(6, dtype=D), log_penalties)
        return torch.autograd.grad((solution.value**2).sum(), log_penalties)[0], solution.forward

    rough = GradientDescent(1.5, max_iterations=steps, tol=0.0, on_failure="ignore")
    exact, _ = gradient(inner_solver=NewtonCG(tol=1e-13))
    got, info = gradient(inner_solver=rough, polish=True)
    error = float((got - exact).norm() / exact.norm())
    assert info.gradient_error is not None
    assert error / 10 < float(info.gradient_error) < 10 * error


@pytest.mark.parametrize("way", ["implicit", "attach"])
def test_polish_squares_the_error_of_a_solution_that_somebody_else_found(way: str) -> None:
    """In the value and in the derivative 1 / (2 √t), under vmap too; without it neither changes."""

    def solve(t: Tensor, polish: bool) -> Tensor:
        condition, rough = idf.Root(lambda x, t: x**2 - t), t.detach().sqrt() + 1e-3
        if way == "attach":
            return idf.attach(condition, rough, t, polish=polish)
        return idf.implicit(condition, polish=polish)(lambda init, t: t.sqrt() + 1e-3)(None, t)

    t = torch.tensor([[4.0, 9.0], [1.0, 25.0]], dtype=D)
    for polish, off in ((False, 1e-3), (True, 1e-6)):
        x = vmap(lambda t: solve(t, polish))(t)  # noqa: B023
        slope = vmap(torch.func.grad(lambda t: solve(t, polish).sum()))(t)  # noqa: B023
        assert off / 100 < float((x - t.sqrt()).abs().max()) < 1.01 * off
        assert off / 100 < float((slope - 0.5 / t.sqrt()).abs().max()) < 1.01 * off
    with idf.record() as history:
        solve(t[0], True)
    assert float(history[-1].distance) == pytest.approx(1e-3 * 2**0.5, rel=1e-2)


def test_polish_keeps_a_solution_that_it_cannot_improve() -> None:
    layer = idf.RootLayer(
        lambda x, t: torch.sign(x - t) * (x - t).abs().sqrt(), inner_solver=lambda p, x0: x0, polish=True
    )
    t = torch.zeros(1, dtype=D)  # Newton's step goes as far beyond the root: no better
    assert abs(float(layer.solve(torch.full((1,), 0.25, dtype=D), t).value)) == 0.25
