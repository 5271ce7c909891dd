"""Every derivative in every nesting, against closed forms (DESIGN: all derivatives agree with the closed form).

The closed forms multiply by ``torch.linalg.inv``: torch's own ``linalg.solve`` is wrong under vmap(jacfwd).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import implicitdiff as idf
from implicitdiff.inner_solvers import Anderson, Newton, NewtonCG

N = 3
TIGHT = {"tol": 1e-12, "max_iterations": 200}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_inverse(M: Tensor, b: Tensor) -> Tensor:
    return (torch.linalg.inv(M) @ b.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Case:
    """A layer and the closed form of what it solves, as functions of the same args."""

    name: str
    layer: Any
    closed: Callable[..., Tensor]
    args: tuple[Tensor, ...]

    def implicit(self, *args: Tensor) -> Tensor:
        return self.layer(torch.zeros(N, dtype=torch.float64), *args)

    def batch(self, *sizes: int, which: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
        """The args with leading dimensions, scaled by 1 to 30, so that the systems are conditioned unequally."""
        out = []
        for i, arg in enumerate(self.args):
            if which is not None and i not in which:
                out.append(arg)
                continue
            count = torch.Size(sizes).numel()
            spread = (30.0 if i == 0 else 1.4) ** torch.linspace(0, 1, count, dtype=torch.float64)
            out.append(spread.reshape(*sizes, *(1 for _ in arg.shape)) * arg)
        return tuple(out)

    @cached_property
    def scalars(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """A scalar of the solution with curvature of its own, by the layer and by the closed form."""
        weights = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
        scalar = lambda f: lambda *a: (torch.sin(f(*a)) * weights).sum() + (f(*a) ** 2).sum()  # noqa: E731
        return scalar(self.implicit), scalar(self.closed)


RIDGE = Case(
    "argmin",
    idf.ArgminLayer(
        lambda w, lam, X, y: 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * lam * (w**2).sum(),
        inner_solver=NewtonCG(**TIGHT),
        linear_solver=idf.CG(rtol=1e-12),
    ),
    lambda lam, X, y: by_inverse(X.T @ X + lam * torch.eye(N, dtype=torch.float64), X.T @ y),
    (torch.tensor(0.7, dtype=torch.float64), random(1, 4, N), random(2, 4)),
)
SINH_ROOT = Case(
    "root",
    idf.RootLayer(
        lambda x, t, M: torch.sinh(M @ x) - t, inner_solver=Newton(**TIGHT), linear_solver=idf.GMRES(rtol=1e-12)
    ),
    lambda t, M: by_inverse(M, torch.asinh(t)),
    (random(3, N), 0.4 * random(4, N, N) + 1.3 * torch.eye(N, dtype=torch.float64)),
)
AFFINE = Case(
    "fixed point",
    idf.FixedPointLayer(lambda x, b, W: W @ x + b, inner_solver=Anderson(**TIGHT), linear_solver=idf.Dense()),
    lambda b, W: by_inverse(torch.eye(N, dtype=torch.float64) - W, b),
    (random(5, N), 0.15 * random(6, N, N)),
)
CASES = [RIDGE, SINH_ROOT, AFFINE]


def close(got: Any, want: Any, rtol: float, least: float = 1e-12) -> None:
    """Within rtol of the norm, or of ``least`` where that is larger."""
    got, want = pytree.tree_leaves(got), pytree.tree_leaves(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert float((g - w).norm()) <= rtol * float(w.norm().clamp(min=least)), f"{g} is not {w}"


FIRST, SECOND, THIRD = 1e-9, 1e-8, 1e-7
"""Relative tolerances by order: each order solves one more system to 1e-12, on a solution good to 1e-12."""


def all_args(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.args)))


def tangents(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(random(90 + i, *a.shape) for i, a in enumerate(args))


def backward(f: Callable[..., Tensor], s: Callable[..., Tensor], case: Case, order: int) -> Any:
    leaves = tuple(a.clone().requires_grad_() for a in case.args)
    value = s(*leaves)
    for _ in range(order - 1):
        value = sum(g.pow(2).sum() for g in torch.autograd.grad(value, leaves, create_graph=True))
    return torch.autograd.grad(value, leaves)


def dual_numbers(f: Callable[..., Tensor], s: Callable[..., Tensor], case: Case) -> Any:
    with forward_ad.dual_level():
        out = f(*map(forward_ad.make_dual, case.args, tangents(case.args)))
        return tuple(forward_ad.unpack_dual(out))


def batched_grads(f: Callable[..., Tensor], s: Callable[..., Tensor], case: Case) -> Any:
    leaves = tuple(a.clone().requires_grad_() for a in case.args)
    return torch.autograd.grad(f(*leaves), leaves, torch.eye(N, dtype=torch.float64), is_grads_batched=True)


def vectorized(strategy: str) -> Callable[..., Any]:
    return lambda f, s, case: torch.autograd.functional.jacobian(f, case.args, vectorize=True, strategy=strategy)


def in_dims(case: Case, *which: int) -> tuple[int | None, ...]:
    return tuple(0 if i in which else None for i in all_args(case))


# name -> (the transform of (f, its scalar, case), tolerance)
DERIVATIVES: dict[str, tuple[Callable[..., Any], float]] = {
    "forward": (lambda f, s, c: f(*c.args), FIRST),
    "backward": (lambda f, s, c: backward(f, s, c, 1), FIRST),
    "double backward": (lambda f, s, c: backward(f, s, c, 2), SECOND),
    "triple backward": (lambda f, s, c: backward(f, s, c, 3), THIRD),
    "grad": (lambda f, s, c: grad(s, all_args(c))(*c.args), FIRST),
    "vjp": (lambda f, s, c: vjp(f, *c.args)[1](random(8, N)), FIRST),
    "jvp": (lambda f, s, c: jvp(f, c.args, tangents(c.args)), FIRST),
    "jacrev": (lambda f, s, c: jacrev(f, all_args(c))(*c.args), FIRST),
    "jacfwd": (lambda f, s, c: jacfwd(f, all_args(c))(*c.args), FIRST),
    "hessian": (lambda f, s, c: hessian(s, all_args(c))(*c.args), SECOND),
    "jacrev of jacrev": (lambda f, s, c: jacrev(jacrev(f))(*c.args), SECOND),
    "jacfwd of jacfwd": (lambda f, s, c: jacfwd(jacfwd(f))(*c.args), SECOND),
    "jacrev of jacfwd": (lambda f, s, c: jacrev(jacfwd(f))(*c.args), SECOND),
    "jvp of grad": (lambda f, s, c: jvp(grad(s, all_args(c)), c.args, tangents(c.args)), SECOND),
    "dual numbers": (dual_numbers, FIRST),
    "is_grads_batched": (batched_grads, FIRST),
    "jacobian(vectorize)": (vectorized("reverse-mode"), FIRST),
    "jacobian(vectorize, forward)": (vectorized("forward-mode"), FIRST),
}
NESTINGS: dict[str, tuple[Callable[..., Any], float]] = {
    "vmap": (lambda f, s, c: vmap(f)(*c.batch(4)), FIRST),
    "vmap, in_dims None": (lambda f, s, c: vmap(f, in_dims(c, 0))(*c.batch(4, which=(0,))), FIRST),
    "vmap of the last arg": (
        lambda f, s, c: vmap(f, in_dims(c, len(c.args) - 1))(*c.batch(4, which=(len(c.args) - 1,))),
        FIRST,
    ),
    "vmap twice": (lambda f, s, c: vmap(vmap(f))(*c.batch(2, 3)), FIRST),
    "vmap twice, an arg each": (
        lambda f, s, c: vmap(vmap(f, in_dims(c, len(c.args) - 1)), in_dims(c, 0))(
            c.batch(2, which=(0,))[0], *c.args[1:-1], c.batch(3, which=(len(c.args) - 1,))[-1]
        ),
        FIRST,
    ),
    "vmap(grad)": (lambda f, s, c: vmap(grad(s, all_args(c)))(*c.batch(4)), FIRST),
    "vmap(grad), in_dims None": (
        lambda f, s, c: vmap(grad(s, all_args(c)), in_dims(c, 0))(*c.batch(4, which=(0,))),
        FIRST,
    ),
    "grad(vmap)": (lambda f, s, c: grad(lambda *a: vmap(s)(*a).sum(), all_args(c))(*c.batch(4)), FIRST),
    "grad(vmap) of a shared arg": (
        lambda f, s, c: grad(lambda *a: vmap(s, in_dims(c, 0))(*a).sum(), len(c.args) - 1)(*c.batch(4, which=(0,))),
        FIRST,
    ),
    "vmap(vmap(grad))": (lambda f, s, c: vmap(vmap(grad(s, all_args(c))))(*c.batch(2, 3)), FIRST),
    "vmap(vjp)": (lambda f, s, c: vmap(lambda *a: vjp(f, *a)[1](torch.ones_like(f(*a))))(*c.batch(4)), FIRST),
    "vmap(jvp)": (lambda f, s, c: vmap(lambda a, t: jvp(f, a, t))(c.batch(4), tangents(c.batch(4))), FIRST),
    "jvp(vmap)": (lambda f, s, c: jvp(vmap(f), c.batch(4), tangents(c.batch(4))), FIRST),
    "vmap(jacrev)": (lambda f, s, c: vmap(jacrev(f, all_args(c)))(*c.batch(4)), FIRST),
    "vmap(jacfwd)": (lambda f, s, c: vmap(jacfwd(f))(*c.batch(4)), FIRST),
    "jacrev(vmap)": (lambda f, s, c: jacrev(vmap(f))(*c.batch(4)), FIRST),
    "jacfwd(vmap)": (lambda f, s, c: jacfwd(vmap(f))(*c.batch(4)), FIRST),
    "vmap(hessian)": (lambda f, s, c: vmap(hessian(s, all_args(c)))(*c.batch(4)), SECOND),
    "hessian(vmap)": (lambda f, s, c: hessian(lambda *a: vmap(s)(*a).sum())(*c.batch(4)), SECOND),
    "vmap(grad(vmap))": (lambda f, s, c: vmap(grad(lambda *a: vmap(s)(*a).sum()))(*c.batch(2, 3)), FIRST),
}


@pytest.mark.parametrize("name", [*DERIVATIVES, *NESTINGS])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_equals_the_closed_form(case: Case, name: str) -> None:
    transform, rtol = (DERIVATIVES | NESTINGS)[name]
    implicit, closed = case.scalars
    close(transform(case.implicit, implicit, case), transform(case.closed, closed, case), rtol)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_backward_and_double_backward_over_vmap(case: Case) -> None:
    def both(s: Callable[..., Tensor]) -> Any:
        leaves = tuple(a.clone().requires_grad_() for a in case.batch(4))
        first = torch.autograd.grad(vmap(s)(*leaves).sum(), leaves, create_graph=True)
        return first, torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    implicit, closed = case.scalars
    close(both(implicit), both(closed), SECOND)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradcheck_in_both_modes_with_batched_gradients(case: Case) -> None:
    leaves = tuple(a.clone().requires_grad_() for a in case.args)
    assert torch.autograd.gradcheck(
        case.implicit,
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_undefined_grad=True,
        nondet_tol=1e-9,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradgradcheck_with_forward_over_reverse(case: Case) -> None:
    leaves = tuple(a.clone().requires_grad_() for a in case.args)
    assert torch.autograd.gradgradcheck(
        case.implicit, leaves, check_fwd_over_rev=True, check_batched_grad=True, nondet_tol=1e-8
    )


def test_systems_of_unequal_conditioning_share_a_batch() -> None:
    """Condition numbers from 1 to 1e6: a batch stopped by its mean residual leaves the hard ones unsolved."""
    n, count = 8, 6
    Q = torch.linalg.qr(random(20, count, n, n))[0]
    spectra = torch.stack([torch.logspace(0, -k, n, dtype=torch.float64) for k in torch.linspace(0, 6, count)])
    H, c = Q @ torch.diag_embed(spectra) @ Q.mT, random(21, count, n)
    for linear_solver in (
        idf.CG(rtol=1e-10, max_iterations=500),
        idf.MINRES(rtol=1e-10, max_iterations=500),
        idf.Dense(),
    ):
        layer = idf.ArgminLayer(
            lambda x, H, c: 0.5 * x @ (H @ x) - c @ x,
            inner_solver=NewtonCG(tol=1e-10, max_iterations=200),
            linear_solver=linear_solver,
        )
        solve = lambda H, c, layer=layer: layer(torch.zeros(n, dtype=torch.float64), H, c)  # noqa: E731
        inverse = torch.linalg.inv(H)
        # An error of 1e-10 in the residual is one of 1e-4 in the solution at condition number 1e6.
        close(vmap(solve)(H, c), by_inverse(H, c), 1e-4)
        per_system = vmap(grad(lambda c, H, solve=solve: solve(H, c).sum()))(c, H)
        for i in range(count):
            close(per_system[i], inverse[i].sum(0), 1e-4)


def test_many_cotangents_share_one_operator() -> None:
    """jacrev solves with one graph: the operator is built once for all rows, not once for each."""
    calls = []

    def residual(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return x**3 - t

    layer = idf.RootLayer(residual, linear_solver=idf.GMRES(rtol=1e-12), inner_solver=lambda p, x0: x0)
    x, counts = {}, {}
    for n in (4, 40):
        x[n] = torch.linspace(1, 2, n, dtype=torch.float64)
        calls.clear()
        jacobian = jacrev(lambda t, n=n: layer(x[n], t))(x[n] ** 3)
        counts[n] = len(calls)
        close(jacobian, torch.diag(1 / (3 * x[n] ** 2)), 1e-9)
    assert counts[4] == counts[40]


def test_a_wrapped_solver_runs_once_for_a_problem() -> None:
    """With init None its first call tells the shape: of a single problem that is the solution already."""
    calls = []

    @idf.implicit(idf.Root(lambda x, y: x * x - y), has_aux=True)
    def square_root(init: None, y: Tensor) -> tuple[Tensor, int]:
        calls.append(y)
        return y.sqrt(), len(calls)

    y = torch.tensor([4.0, 9.0], dtype=torch.float64)
    x, aux = square_root(None, y)
    assert (len(calls), aux) == (1, 1)
    close(x, y.sqrt(), 0)
    calls.clear()
    close(grad(lambda y: square_root(None, y)[0].sum())(y), 0.5 / y.sqrt(), 1e-12)
    assert len(calls) == 1
    calls.clear()
    x = vmap(lambda y: square_root(None, y)[0])(torch.stack([y, 2 * y, 3 * y]))
    close(x, torch.stack([y, 2 * y, 3 * y]).sqrt(), 0)
    assert len(calls) == 4  # the shape, then each sample
