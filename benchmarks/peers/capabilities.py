"""What each library's derivative of a solution can do, tried on a ridge problem with closed forms, in float64.

x*(t) minimises ½xᵀHx − bᵀx + ½eᵗ‖x‖², H of condition number 1e4; what is differentiated is ‖x*(t)‖². A derivative
is right where it is within 1e-4 of the closed form. Last of all the linear solver is cut off after two iterations: does
the library say so? Run as ``python -m benchmarks.peers.capabilities``; the table goes into docs/tables/capabilities.md.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf

from .__main__ import TABLES
from .timing import importable

N = 20
AGREEMENT = 1e-4
CUT_OFF = 2
ENOUGH = 1000

torch.set_default_dtype(torch.float64)
_generator = torch.Generator().manual_seed(0)
_basis = torch.linalg.qr(torch.randn(N, N, generator=_generator))[0]
H = _basis @ torch.diag(torch.logspace(-4, 0, N)) @ _basis.T
B = torch.randn(N, generator=_generator)
T = torch.tensor(-6.0)
EYE = torch.eye(N)


def objective(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x @ H @ x - B @ x + 0.5 * t.exp() * (x * x).sum()


def closed_form(t: Tensor) -> Tensor:
    return (torch.linalg.inv(H + t.exp() * EYE) @ B).square().sum()


# ‖x*‖² as a function of t, by a library and so many iterations of its linear solver.
Size = Callable[[Tensor], Any]


def by_implicitdiff(iterations: int) -> Size:
    solver = idf.inner_solvers.NewtonCG(tol=1e-10, on_failure="ignore")
    layer = idf.ArgminLayer(objective, inner_solver=solver, linear_solver=idf.CG(rtol=1e-8, max_iterations=iterations))
    return lambda t: layer(torch.zeros(N), t).square().sum()


def by_torchopt(iterations: int) -> Size:
    import torchopt

    linear_solver = torchopt.linear_solve.solve_cg(rtol=1e-8, maxiter=iterations)

    @torchopt.diff.implicit.custom_root(torch.func.grad(objective), argnums=1, solve=linear_solver)
    def solve(x: Tensor, t: Tensor) -> Tensor:
        return torch.linalg.inv(H + t.exp() * EYE) @ B

    return lambda t: solve(torch.zeros(N), t).square().sum()


def by_torchdeq(iterations: int) -> Size:
    from torchdeq import get_deq

    limits = {"f_max_iter": 20_000, "b_max_iter": 20_000 if iterations == ENOUGH else iterations}
    deq = get_deq(
        f_solver="fixed_point_iter", b_solver="fixed_point_iter", ift=True, f_tol=1e-12, b_tol=1e-12, **limits
    )

    def size(t: Tensor) -> Tensor:
        update = lambda x: x - (x @ H - B + t.exp() * x)  # noqa: E731
        return deq(update, torch.zeros(1, N))[0][-1].square().sum()

    return size


def by_qpth(iterations: int) -> Size:
    from qpth.qp import QPFunction

    nothing = torch.empty(0)

    def size(t: Tensor) -> Tensor:  # it wants an inequality: 0 ≤ 1
        x = QPFunction(verbose=-1)(
            (H + t.exp() * EYE)[None], -B[None], torch.zeros(1, N), torch.ones(1), nothing, nothing
        )
        return x.square().sum()

    return size


def by_cvxpylayers(iterations: int) -> Size:
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    x, root = cp.Variable(N), cp.Parameter(nonneg=True)
    factor = torch.linalg.cholesky(H).T.numpy()
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(factor @ x) - B.numpy() @ x + 0.5 * cp.sum_squares(root * x)))
    layer = CvxpyLayer(problem, parameters=[root], variables=[x])
    return lambda t: layer((t / 2).exp(), solver_args={"eps": 1e-10})[0].square().sum()


def by_higher(iterations: int) -> Size:
    import higher

    class Point(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = torch.nn.Parameter(torch.zeros(N))

    def size(t: Tensor) -> Tensor:
        point = Point()
        with higher.innerloop_ctx(point, torch.optim.SGD(point.parameters(), lr=1.0)) as (fast, optimizer):
            for _ in range(10_000):
                optimizer.step(objective(fast.x, t))
            return fast.x.square().sum()

    return size


WAYS: dict[str, tuple[str, Callable[[int], Size], bool]] = {  # the package, the way, whether it solves by iterations
    "**implicitdiff**": ("implicitdiff", by_implicitdiff, True),
    "torchopt, `custom_root`": ("torchopt", by_torchopt, True),
    "torchdeq, `ift=True`": ("torchdeq", by_torchdeq, True),
    "qpth": ("qpth", by_qpth, False),
    "cvxpylayers": ("cvxpylayers", by_cvxpylayers, False),
    "higher, 10,000 steps unrolled": ("higher", by_higher, False),
}


def backward(size: Size) -> Tensor:
    t = T.clone().requires_grad_()
    return torch.autograd.grad(size(t), t)[0]


def backward_twice(size: Size) -> Tensor:
    t = T.clone().requires_grad_()
    (first,) = torch.autograd.grad(size(t), t, create_graph=True)
    return torch.autograd.grad(first, t)[0]


TRIALS: dict[str, Callable[[Size], Tensor]] = {
    "`backward`": backward,
    "twice": backward_twice,
    "`func.grad`": lambda size: torch.func.grad(size)(T),
    "`hessian`": lambda size: torch.func.hessian(size)(T),
    "`jvp`": lambda size: torch.func.jvp(size, (T,), (torch.ones_like(T),))[1],
    "`vmap(grad)`": lambda size: torch.func.vmap(torch.func.grad(size))(torch.stack([T, T + 1])),
}


def jax_trials(iterations: int) -> dict[str, Callable[[], Tensor]]:
    """The same derivatives by JAX, of jaxopt's ``custom_root``, as tensors."""
    import jax
    from jaxopt.implicit_diff import custom_root
    from jaxopt.linear_solve import solve_cg

    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy
    A, b, t = jnp.asarray(H.numpy()), jnp.asarray(B.numpy()), jnp.asarray(T.numpy())

    @custom_root(
        lambda x, t: A @ x - b + jnp.exp(t) * x, solve=lambda f, b: solve_cg(f, b, tol=1e-8, maxiter=iterations)
    )
    def solve(x: Any, t: Any) -> Any:
        return jnp.linalg.inv(A + jnp.exp(t) * jnp.eye(N)) @ b

    def size(t: Any) -> Any:
        return (solve(jnp.zeros(N), t) ** 2).sum()

    def twice() -> Any:
        return jax.grad(jax.grad(size))(t)

    ways: dict[str, Callable[[], Any]] = {
        "`backward`": lambda: jax.grad(size)(t),
        "twice": twice,
        "`func.grad`": lambda: jax.grad(size)(t),
        "`hessian`": lambda: jax.hessian(size)(t),
        "`jvp`": lambda: jax.jvp(size, (t,), (jnp.ones_like(t),))[1],
        "`vmap(grad)`": lambda: jax.vmap(jax.grad(size))(jnp.stack([t, t + 1])),
    }
    return {name: lambda way=way: torch.tensor(way().tolist()) for name, way in ways.items()}  # type: ignore[misc]


def outcome(expected: Tensor, attempt: Callable[[], Tensor]) -> str:
    """Right, wrong by how much, or the error."""
    try:
        found = attempt()
    except Exception as error:  # whatever it is: that is the outcome
        return type(error).__name__
    deviation = ((found - expected).abs() / expected.abs()).max().item()
    return "✓" if deviation < AGREEMENT else f"off by {deviation:.0%}"


def cut_off(attempt: Callable[[], Any]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            attempt()
        except Exception as error:
            return type(error).__name__
    return "✓, it warns" if caught else "silent"


def main() -> None:
    rows = ["| | " + " | ".join(TRIALS) + " | unconverged |", "|---" * (len(TRIALS) + 2) + "|"]
    expected = {trial: of(closed_form) for trial, of in TRIALS.items()}

    def trials(way: Callable[[int], Size], iterations: int) -> dict[str, Callable[[], Tensor]]:
        size = way(iterations)
        return {trial: functools.partial(of, size) for trial, of in TRIALS.items()}

    def row(name: str, attempts: Callable[[int], dict[str, Callable[[], Tensor]]], iterates: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cells = [outcome(expected[trial], attempt) for trial, attempt in attempts(ENOUGH).items()]
        cells.append(cut_off(attempts(CUT_OFF)["`backward`"]) if iterates else "direct")
        rows.append(" | ".join(["| " + name, *cells]) + " |")
        print(rows[-1], flush=True)

    for name, (package, way, iterates) in WAYS.items():
        if importable(package):
            row(name, functools.partial(trials, way), iterates)
    if importable("jaxopt"):
        row("jaxopt, `custom_root` (in JAX)", jax_trials, True)
    (TABLES / "capabilities.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
