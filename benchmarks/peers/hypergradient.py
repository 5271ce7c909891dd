"""The hypergradient of logistic regression in one penalty for each weight: backward alone, and with the forward pass.

Backward alone: at a given point, by conjugate gradients to a relative residual of 1e-6; 1.0 is plain torch, on a kept
graph of the gradient. Together: from zero to ‖∇f‖₂ ≤ 1e-8 and back; 1.0 has the LBFGS of torch before the same.
Betty's conjugate gradients build the next direction on the old residual, and do not converge.
Run as ``python -m benchmarks.peers.hypergradient``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.inner_solvers import LBFGS

from ..problems import Workload, logistic
from .timing import Row, Way, compare, importable, jax_arrays, one_thread, ready

RTOL = 1e-6
TOL = 1e-8
AGREEMENT = 1e-5
HISTORY = 10


def cg(product: Callable[[Tensor], Tensor], b: Tensor, rtol: float = RTOL, max_iterations: int = 10_000) -> Tensor:
    """Conjugate gradients as one writes them."""
    x, r, d = torch.zeros_like(b), b.clone(), b.clone()
    rho = r.dot(r)
    limit = rtol**2 * rho
    for _ in range(max_iterations):
        if rho <= limit:
            break
        Ad = product(d)
        alpha = rho / d.dot(Ad)
        x += alpha * d
        r -= alpha * Ad
        rho, old = r.dot(r), rho
        d = r + rho / old * d
    return x


def by_hand(work: Workload, x: Tensor, g: Tensor, rtol: float = RTOL) -> tuple[Tensor, ...]:
    """The gradient in the penalties, by a kept graph of the gradient in x."""
    x, penalties = x.detach().requires_grad_(), work.args[0]
    (gradient,) = torch.autograd.grad(work.objective(x, *work.args), x, create_graph=True)
    u = cg(lambda v: torch.autograd.grad(gradient, x, v, retain_graph=True)[0], g, rtol)
    return torch.autograd.grad(gradient, penalties, -u)


def products(work: Workload, g: Tensor) -> int:
    """How many products the hypergradient takes by hand."""
    count = 0
    x = work.x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(work.objective(x, *work.args), x, create_graph=True)

    def product(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return torch.autograd.grad(gradient, x, v, retain_graph=True)[0]

    cg(product, g)
    return count


def bare_products(work: Workload, count: int, v: Tensor) -> Way:
    """So many products and nothing else."""
    x = work.x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(work.objective(x, *work.args), x, create_graph=True)

    def run() -> None:
        for _ in range(count):
            torch.autograd.grad(gradient, x, v, retain_graph=True)

    return ready(run)


def ours_backward(work: Workload, g: Tensor, linear_solver: idf.LinearSolver) -> Way:
    condition = idf.Stationary(work.objective)

    def prepare() -> Callable[[], Any]:
        x = idf.attach(condition, work.x, *work.args, linear_solver=linear_solver)
        return lambda: torch.autograd.grad(x, work.args[0], g)

    return prepare


def lbfgs_of_torch(work: Workload, x0: Tensor) -> Tensor:
    x = x0.clone().requires_grad_()
    args = [a.detach() for a in work.args]
    # Its tolerance is on the largest entry of the gradient.
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=10_000,
        max_eval=100_000,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=TOL / len(x) ** 0.5,
        tolerance_change=0.0,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = work.objective(x, *args)
        value.backward()
        return value

    optimizer.step(closure)
    return x.detach()


def torchopt_solver(work: Workload, solver: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """A solver with TorchOpt's implicit derivative, by its conjugate gradients."""
    import torchopt

    @torchopt.diff.implicit.custom_root(
        torch.func.grad(work.objective), argnums=1, solve=torchopt.linear_solve.solve_cg(rtol=RTOL)
    )
    def solve(x0: Tensor, penalties: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return solver(x0)

    return lambda: solve(torch.zeros_like(work.x), *work.args)


def betty_backward(work: Workload, iterations: int) -> Callable[[Tensor, Tensor], Any]:
    """Betty's conjugate gradients, which take a number of steps and no tolerance, between two of its problems."""
    from betty.configs import Config
    from betty.hypergradient.cg import cg as betty_cg

    class Level:
        """What that function asks of Betty's problems, which come with loaders, optimizers and an engine."""

        paths = ()
        config = Config(type="cg", cg_iterations=iterations, cg_alpha=1.0)
        cur_batch = None

        def __init__(self, parameter: Tensor) -> None:
            self.parameter = parameter

        def parameters(self) -> list[Tensor]:
            return [self.parameter]

        trainable_parameters = parameters

        def training_step_exec(self, batch: None) -> Tensor:
            return work.objective(self.parameter, *work.args)

    def run(x: Tensor, g: Tensor) -> Any:
        return betty_cg([g], Level(x.detach().requires_grad_()), Level(work.args[0]))

    return run


def jax_objective(w: Any, log_penalties: Any, X: Any, y: Any) -> Any:
    from jax import numpy as jnp

    z = X @ w
    return (jnp.logaddexp(0.0, z) - y * z).mean() + 0.5 * (jnp.exp(log_penalties) * w * w).sum()


def jax_backward(work: Workload, g: Tensor) -> dict[str, Way]:
    import jax
    from jaxopt.implicit_diff import root_vjp
    from jaxopt.linear_solve import solve_cg

    w, penalties, X, y, cotangent = jax_arrays(work.x, *work.args, g)
    optimality = jax.grad(jax_objective)
    iterations = 10 * len(w)

    def lineax_cg(matvec: Callable[[Any], Any], b: Any) -> Any:
        import lineax

        operator = lineax.FunctionLinearOperator(matvec, jax.eval_shape(lambda: b), lineax.positive_semidefinite_tag)
        return lineax.linear_solve(operator, b, lineax.CG(rtol=RTOL, atol=0.0, max_steps=iterations)).value

    def way(solve: Callable[..., Any]) -> Way:
        @jax.jit
        def run(w: Any, penalties: Any, X: Any, y: Any, g: Any) -> Any:
            only = lambda w, penalties: optimality(w, penalties, X, y)  # noqa: E731
            return root_vjp(only, w, (penalties,), g, solve=solve)

        return ready(lambda: jax.block_until_ready(run(w, penalties, X, y, cotangent)))

    ways = {"jaxopt, solve_cg, jitted": way(functools.partial(solve_cg, tol=RTOL, maxiter=iterations))}
    if importable("lineax"):
        ways["jaxopt with lineax's CG, jitted"] = way(lineax_cg)
    return ways


def backward(m: int, n: int) -> list[Row]:
    work = logistic(m, n)
    g = torch.randn(n, dtype=work.x.dtype, generator=torch.Generator().manual_seed(1))
    reference = by_hand(work, work.x, g, rtol=1e-12)
    count = products(work, g)
    ways = {
        "by hand": ready(lambda: by_hand(work, work.x, g)),
        "bare products": bare_products(work, count, g),
        # At a point that is no minimum, of which nobody need be warned.
        "implicitdiff, CG": ours_backward(work, g, idf.CG(rtol=RTOL, on_failure="ignore")),
        "implicitdiff, default (Auto)": ours_backward(work, g, idf.Auto(rtol=RTOL, on_failure="ignore")),
        "implicitdiff, CG, compiled": ours_backward(work, g, idf.CG(rtol=RTOL, compile=True, on_failure="ignore")),
    }
    if importable("torchopt"):
        solve = torchopt_solver(work, lambda x0: work.x.clone())

        def prepare() -> Callable[[], Any]:
            x = solve()
            return lambda: torch.autograd.grad(x, work.args[0], g)

        ways["torchopt, solve_cg"] = prepare
    if importable("betty"):
        run = betty_backward(work, count)
        ways[f"betty, cg, {count} iterations"] = ready(lambda: run(work.x, g))
    if importable("jaxopt"):
        ways |= jax_backward(work, g)
    return compare(f"backward ({m}, {n})", ways, reference, AGREEMENT, seconds=20.0)


def jax_both(work: Workload, g: Tensor) -> dict[str, Way]:
    import jax

    w, penalties, X, y, cotangent = jax_arrays(torch.zeros_like(work.x), *work.args, g)
    iterations = 10 * len(w)

    def way(solve: Callable[..., Any]) -> Way:
        gradient = jax.jit(jax.grad(lambda penalties, w, X, y, g: g @ solve(w, penalties, X, y)))
        return ready(lambda: [jax.block_until_ready(gradient(penalties, w, X, y, cotangent))])

    def by_jaxopt(w: Any, penalties: Any, X: Any, y: Any) -> Any:
        import jaxopt

        solve = functools.partial(jaxopt.linear_solve.solve_cg, tol=RTOL, maxiter=iterations)
        settings = {"tol": TOL, "maxiter": 10_000, "history_size": HISTORY, "implicit_diff_solve": solve}
        return jaxopt.LBFGS(jax_objective, **settings).run(w, penalties, X, y).params

    def by_optimistix(w: Any, penalties: Any, X: Any, y: Any) -> Any:
        import lineax
        import optimistix

        # It stops by the changes of x and f; these tolerances bring it to the same accuracy.
        solver = optimistix.LBFGS(rtol=1e-9, atol=1e-9, history_length=HISTORY)
        adjoint = optimistix.ImplicitAdjoint(lineax.CG(rtol=RTOL, atol=0.0, max_steps=iterations))
        return optimistix.minimise(
            lambda w, args: jax_objective(w, *args),
            solver,
            w,
            (penalties, X, y),
            adjoint=adjoint,
            max_steps=10_000,
            tags=frozenset({lineax.positive_semidefinite_tag}),
        ).value

    ways = {"jaxopt, LBFGS, jitted": way(by_jaxopt)} if importable("jaxopt") else {}
    if importable("optimistix"):
        ways["optimistix, LBFGS, jitted"] = way(by_optimistix)
    return ways


def both(m: int, n: int) -> list[Row]:
    work = logistic(m, n)
    g = torch.randn(n, dtype=work.x.dtype, generator=torch.Generator().manual_seed(1))
    zero, penalties = torch.zeros_like(work.x), work.args[0]
    newton = idf.ArgminLayer(work.objective, inner_solver=idf.inner_solvers.NewtonCG(tol=1e-12))
    reference = by_hand(work, newton(zero, *work.args), g, rtol=1e-12)

    def ours(**settings: Any) -> Way:
        layer = idf.ArgminLayer(work.objective, **settings)
        return ready(lambda: torch.autograd.grad(layer(zero, *work.args), penalties, g))

    ways = {
        "by hand, LBFGS of torch": ready(lambda: by_hand(work, lbfgs_of_torch(work, zero), g)),
        "implicitdiff, default (LBFGS, Auto)": ours(inner_solver=LBFGS(history=HISTORY, tol=TOL)),
        "implicitdiff, NewtonCG": ours(inner_solver=idf.inner_solvers.NewtonCG(tol=TOL)),
        "implicitdiff, LBFGS, CG compiled": ours(
            inner_solver=LBFGS(history=HISTORY, tol=TOL), linear_solver=idf.CG(rtol=RTOL, compile=True)
        ),
    }
    if importable("torchopt"):
        solve = torchopt_solver(work, lambda x0: lbfgs_of_torch(work, x0))
        ways["torchopt, LBFGS of torch"] = ready(lambda: torch.autograd.grad(solve(), penalties, g))
    if importable("betty"):
        run = betty_backward(work, products(work, g))
        ways["betty, LBFGS of torch"] = ready(lambda: run(lbfgs_of_torch(work, zero), g))
    if importable("jax"):
        ways |= jax_both(work, g)
    return compare(f"forward and backward ({m}, {n})", ways, reference, AGREEMENT, seconds=30.0)


def main() -> list[Row]:
    one_thread()
    rows = [row for size in ((500, 50), (5000, 1000), (20000, 5000)) for row in backward(*size)]
    return rows + [row for size in ((500, 50), (5000, 1000)) for row in both(*size)]


if __name__ == "__main__":
    main()
