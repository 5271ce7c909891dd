"""Many small ridge problems in one call, forward and backward.

    min over w of ½ ‖X w − y‖² + ½ Σ exp(log_penalties) w²,   X of shape (40, 20), 256 and 4096 of them

The gradients are those in the penalties alone, and in the penalties, X and y, as where a network makes X. 1.0 is plain
torch: a batched Cholesky factor that the backward pass uses again. Run as ``python -m benchmarks.peers.ridge``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.inner_solvers import Newton
from implicitdiff.operators import DenseOperator

from .timing import Row, Way, compare, importable, jax_arrays, one_thread, ready

SAMPLES, N = 40, 20
AGREEMENT = 1e-6


def objective(w: Tensor, log_penalties: Tensor, X: Tensor, y: Tensor) -> Tensor:
    return 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * (log_penalties.exp() * w * w).sum()


def stationarity(w: Tensor, log_penalties: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """The gradient of the objectives, all problems at once."""
    return times(X.mT, times(X, w) - y) + log_penalties.exp() * w


def times(A: Tensor, v: Tensor) -> Tensor:
    return (A @ v.unsqueeze(-1)).squeeze(-1)


def normal_equations(log_penalties: Tensor, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return X.mT @ X + torch.diag_embed(log_penalties.exp()), times(X.mT, y)


def by_hand(args: list[Tensor], learned: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        H, b = normal_equations(*args)
        factor = torch.linalg.cholesky(H)
        w, u = torch.cholesky_solve(torch.stack([b, g], dim=-1), factor).unbind(-1)
    return torch.autograd.grad(stationarity(w, *args), learned, -u)


def solved(H: Tensor, b: Tensor) -> Tensor:
    return torch.cholesky_solve(b.unsqueeze(-1), torch.linalg.cholesky(H)).squeeze(-1)


def ours(init: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Ours, from the one that asks least of the user to the one that knows most."""
    default = idf.ArgminLayer(objective)

    def by_newton(*args: Tensor) -> Tensor:
        dense = idf.Dense(warm_start=True)  # its factor in Newton's step serves the backward pass, and no other call
        layer = idf.ArgminLayer(objective, inner_solver=Newton(dense), linear_solver=dense)
        return torch.func.vmap(layer)(init, *args)

    @idf.implicit(idf.Stationary(objective), batched=True)
    def wrapped(init: Tensor, *args: Tensor) -> Tensor:
        return solved(*normal_equations(*args))

    def direct(*args: Tensor) -> Tensor:
        H, b = normal_equations(*args)
        return idf.Dense()(DenseOperator(H, structure="positive_definite"), b).value

    return {
        "ArgminLayer under vmap": lambda *args: torch.func.vmap(default)(init, *args),
        "ArgminLayer, Newton, Dense": by_newton,
        "implicit around a batched solver": lambda *args: torch.func.vmap(wrapped)(init, *args),
        "Dense on the matrices": direct,
    }


def torch_peers() -> dict[str, Callable[..., Tensor]]:
    ways: dict[str, Callable[..., Tensor]] = {
        "torch, autograd through Cholesky": lambda *args: solved(*normal_equations(*args)),
    }
    if importable("linear_operator"):
        from linear_operator import settings, solve
        from linear_operator.operators import DenseLinearOperator

        def by_linear_operator(*args: Tensor) -> Tensor:
            H, b = normal_equations(*args)
            with settings.fast_computations(solves=False):  # Cholesky, which it takes by default at this size
                return solve(DenseLinearOperator(H), b.unsqueeze(-1)).squeeze(-1)

        ways["linear_operator"] = by_linear_operator
    if importable("qpth"):
        from qpth.qp import QPFunction

        def by_qpth(*args: Tensor) -> Tensor:
            H, b = normal_equations(*args)
            G, h, none = H.new_zeros(1, N), H.new_ones(1), H.new_empty(0)  # it asks for an inequality: 0 ≤ 1
            return QPFunction(verbose=-1, check_Q_spd=False)(H, -b, G, h, none, none)

        ways["qpth"] = by_qpth
    return ways


def torchopt_loop() -> Callable[..., Tensor]:
    import torchopt

    @torchopt.diff.implicit.custom_root(
        torch.func.grad(objective), argnums=(1, 2, 3), solve=torchopt.linear_solve.solve_cg(rtol=1e-10)
    )
    def one(w0: Tensor, *args: Tensor) -> Tensor:
        return solved(*normal_equations(*args))

    def all_of_them(log_penalties: Tensor, X: Tensor, y: Tensor) -> Tensor:
        zero = log_penalties.new_zeros(N)
        return torch.stack([one(zero, *args) for args in zip(log_penalties, X, y, strict=True)])

    return all_of_them


def jaxopt_way(args: list[Tensor], learned: list[Tensor], g: Tensor) -> Way:
    import jax
    from jax import numpy as jnp
    from jaxopt.implicit_diff import custom_root
    from jaxopt.linear_solve import solve_cholesky

    *arrays, cotangent = jax_arrays(*args, g)

    def jax_objective(w: Any, log_penalties: Any, X: Any, y: Any) -> Any:
        return 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * (jnp.exp(log_penalties) * w * w).sum()

    @custom_root(jax.grad(jax_objective), solve=solve_cholesky)
    def one(w0: Any, log_penalties: Any, X: Any, y: Any) -> Any:
        return solve_cholesky(lambda v: X.T @ (X @ v) + jnp.exp(log_penalties) * v, X.T @ y)

    def value(log_penalties: Any, X: Any, y: Any, g: Any) -> Any:
        return (jax.vmap(one, in_axes=(None, 0, 0, 0))(jnp.zeros(N), log_penalties, X, y) * g).sum()

    gradient = jax.jit(jax.grad(value, argnums=tuple(range(len(learned)))))
    return ready(lambda: jax.block_until_ready(gradient(*arrays, cotangent)))


def problems(batch: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(batch, *shape, dtype=torch.float64, generator=generator)  # noqa: E731
    args = [random(N) - 1, random(SAMPLES, N), random(SAMPLES)]
    return args, random(N)


def measure(batch: int, gradients: int) -> list[Row]:
    """With the gradients in so many of the args."""
    args, g = problems(batch)
    learned = [a.requires_grad_() for a in args[:gradients]]

    def way(function: Callable[..., Tensor]) -> Way:
        return ready(lambda: torch.autograd.grad(function(*args), learned, g))

    ways = {"by hand": ready(lambda: by_hand(args, learned, g))}
    ways |= {f"implicitdiff, {name}": way(f) for name, f in ours(g.new_zeros(batch, N)).items()}
    ways |= {name: way(f) for name, f in torch_peers().items()}
    if batch <= 256 and importable("torchopt"):
        ways["torchopt, solve_cg, in a loop"] = way(torchopt_loop())
    if importable("jaxopt"):
        ways["jaxopt, Cholesky, vmapped, jitted"] = jaxopt_way(args, learned, g)
    reference = torch.autograd.grad(solved(*normal_equations(*args)), learned, g)
    what = "the penalties" if gradients == 1 else "all args"
    return compare(f"{batch} ridge problems, {what}", ways, reference, AGREEMENT)


def main() -> list[Row]:
    one_thread()
    return [row for batch in (256, 4096) for gradients in (1, 3) for row in measure(batch, gradients)]


if __name__ == "__main__":
    main()
