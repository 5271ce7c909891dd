"""A fixed point z = tanh(W z + U x + b), forward and backward to the gradients in W, U, b and x.

A batch of 64 in 512 dimensions, W of spectral norm 0.9, single precision. Everybody computes c = U x + b once, iterates
to ‖z − update(z)‖ of 1e-5 ‖z‖ and solves for the derivative to as much; 1.0 is plain torch, the iteration and that of
the adjoint. Run as ``python -m benchmarks.peers.fixed_point``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.inner_solvers import Anderson, Broyden, FixedPointIteration

from .timing import Row, Way, compare, importable, jax_arrays, one_thread, ready

BATCH, DIMENSION = 64, 512
RTOL = 1e-5
AGREEMENT = 1e-4
LIMIT = 100
"""Iterations."""


def update(z: Tensor, W: Tensor, c: Tensor) -> Tensor:
    return torch.tanh(z @ W.mT + c)


def injection(x: Tensor, U: Tensor, b: Tensor) -> Tensor:
    return x @ U.mT + b


def problem() -> tuple[list[Tensor], Tensor]:
    """W, x, U and b, and a cotangent of z."""
    generator = torch.Generator().manual_seed(0)
    random = functools.partial(torch.randn, generator=generator)
    W = 0.9 * torch.linalg.qr(random(DIMENSION, DIMENSION)).Q
    U = random(DIMENSION, DIMENSION) / DIMENSION**0.5
    args = [W, random(BATCH, DIMENSION), U, random(DIMENSION)]
    return [a.requires_grad_() for a in args], random(BATCH, DIMENSION)


def iterated(function: Callable[[Tensor], Tensor], z: Tensor, rtol: float) -> Tensor:
    """The plain iteration."""
    for _ in range(LIMIT):
        new = function(z)
        if (new - z).norm() <= rtol * new.norm():
            return new
        z = new
    return z


def by_hand(args: list[Tensor], g: Tensor, rtol: float = RTOL) -> tuple[Tensor, ...]:
    W, *others = args
    c = injection(*others)
    with torch.no_grad():
        z = iterated(lambda z: update(z, W, c), torch.zeros_like(c), rtol)
    z.requires_grad_()
    at_z = update(z, W, c)
    u = iterated(lambda u: torch.autograd.grad(at_z, z, u, retain_graph=True)[0] + g, torch.zeros_like(g), rtol)
    return torch.autograd.grad(at_z, args, u)


def absolute_tolerance(args: list[Tensor]) -> float:
    W, *others = args
    with torch.no_grad():
        c = injection(*others)
        return RTOL * float(iterated(lambda z: update(z, W, c), torch.zeros_like(c), RTOL).norm())


def ours(args: list[Tensor], g: Tensor) -> dict[str, Way]:
    W, *others = args
    zero, tol = torch.zeros_like(g), absolute_tolerance(args)

    def layer(inner_solver: Any, linear_solver: Any) -> Way:
        layer = idf.FixedPointLayer(update, inner_solver=inner_solver, linear_solver=linear_solver)
        return ready(lambda: torch.autograd.grad(layer(zero, W, injection(*others)), args, g))

    def deq(inner_solver: Any, linear_solver: Any) -> Way:
        layer = idf.DEQ(lambda z, c: update(z, W, c), inner_solver=inner_solver, linear_solver=linear_solver)
        return ready(lambda: torch.autograd.grad(layer(zero, injection(*others)), args, g))

    gmres, per_sample = idf.GMRES(rtol=RTOL), tol / BATCH**0.5
    return {
        "implicitdiff, iteration, Neumann": layer(FixedPointIteration(tol=tol), idf.Neumann(terms=30, rtol=1e-4)),
        "implicitdiff, iteration, GMRES": layer(FixedPointIteration(tol=tol), gmres),
        "implicitdiff, iteration, BiCGStab": layer(FixedPointIteration(tol=tol), idf.BiCGStab(rtol=RTOL)),
        "implicitdiff, default (Anderson, Auto)": layer(Anderson(tol=tol), idf.Auto(rtol=RTOL)),
        "implicitdiff, Anderson, BiCGStab": layer(Anderson(tol=tol), idf.BiCGStab(rtol=RTOL)),
        "implicitdiff, DEQ, iteration, GMRES": deq(FixedPointIteration(tol=per_sample), gmres),
        "implicitdiff, DEQ, default (Anderson, Auto)": deq(Anderson(tol=per_sample), idf.Auto(rtol=RTOL)),
        "implicitdiff, DEQ, Broyden, GMRES": deq(Broyden(tol=per_sample), gmres),
        "implicitdiff, iteration, BiCGStab, compiled": layer(
            FixedPointIteration(tol=tol, compile=True), idf.BiCGStab(rtol=RTOL, compile=True)
        ),
    }


def torchdeq_ways(args: list[Tensor], g: Tensor) -> dict[str, Way]:
    from torchdeq import get_deq

    W, *others = args

    def way(solver: str) -> Way:
        settings = {"f_tol": RTOL, "b_tol": RTOL, "f_max_iter": LIMIT, "b_max_iter": LIMIT}
        deq = get_deq(f_solver=solver, b_solver=solver, ift=True, f_stop_mode="rel", b_stop_mode="rel", **settings)

        def run() -> tuple[Tensor, ...]:
            c = injection(*others)
            z = deq(lambda z: update(z, W, c), torch.zeros_like(c))[0][-1]
            return torch.autograd.grad(z, args, g)

        return ready(run)

    return {f"torchdeq, {solver}": way(solver) for solver in ("fixed_point_iter", "anderson", "broyden")}


def jaxopt_ways(args: list[Tensor], g: Tensor) -> dict[str, Way]:
    import jax
    import jaxopt
    from jax import numpy as jnp

    *arrays, cotangent = jax_arrays(*args, g)

    def jax_update(z: Any, W: Any, c: Any) -> Any:
        return jnp.tanh(z @ W.T + c)

    def iterated_adjoint(matvec: Callable[[Any], Any], b: Any) -> Any:
        """The adjoint's own iteration, of jaxopt's A = ∂update/∂z − I."""
        iteration = jaxopt.FixedPointIteration(lambda u: u + matvec(u) - b, tol=tol, maxiter=LIMIT, implicit_diff=False)
        return iteration.run(jnp.zeros_like(b)).params

    tol = absolute_tolerance(args)
    gmres = functools.partial(jaxopt.linear_solve.solve_gmres, tol=RTOL)
    bicgstab = functools.partial(jaxopt.linear_solve.solve_bicgstab, tol=RTOL)

    def way(method: Any, solve: Any, **settings: Any) -> Way:
        solver = method(jax_update, tol=tol, maxiter=LIMIT, implicit_diff=True, implicit_diff_solve=solve, **settings)

        def value(g: Any, W: Any, x: Any, U: Any, b: Any) -> Any:
            return (solver.run(jnp.zeros_like(g), W, x @ U.T + b).params * g).sum()

        gradient = jax.jit(jax.grad(value, argnums=(1, 2, 3, 4)))
        return ready(lambda: jax.block_until_ready(gradient(cotangent, *arrays)))

    return {
        "jaxopt, iteration, its adjoint's, jitted": way(jaxopt.FixedPointIteration, iterated_adjoint),
        "jaxopt, iteration, GMRES, jitted": way(jaxopt.FixedPointIteration, gmres),
        "jaxopt, iteration, BiCGStab, jitted": way(jaxopt.FixedPointIteration, bicgstab),
        "jaxopt, Anderson, BiCGStab, jitted": way(jaxopt.AndersonAcceleration, bicgstab),
    }


def main() -> list[Row]:
    one_thread()
    args, g = problem()
    double = [a.detach().double().requires_grad_() for a in args]
    reference = by_hand(double, g.double(), rtol=1e-12)
    ways = {"by hand": ready(lambda: by_hand(args, g)), **ours(args, g)}
    if importable("torchdeq"):
        ways |= torchdeq_ways(args, g)
    if importable("jaxopt"):
        ways |= jaxopt_ways(args, g)
    return compare(f"fixed point ({BATCH}, {DIMENSION})", ways, reference, AGREEMENT, seconds=30.0)


if __name__ == "__main__":
    main()
