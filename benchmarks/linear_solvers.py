"""CG beside scipy.sparse.linalg's, linear_operator's and jax.scipy's (jitted): time per iteration and to tolerance.

Single systems of n = 100 … 10⁶ unknowns (a shifted second difference, by products), and batches of 1 … 4096 dense
systems of n = 20 with condition numbers from 1 to 1000. Interleaved, medians, double precision, the true residual
checked here. Run as ``python -m benchmarks.linear_solvers``; needs the extra ``bench``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
import torch
from jax.scipy.sparse.linalg import cg as jax_cg
from linear_operator.utils.linear_cg import linear_cg
from torch import Tensor

import implicitdiff as idf
from implicitdiff.operators import DenseOperator, FunctionOperator
from implicitdiff.testing.systems import random, rotated, spread

jax.config.update("jax_enable_x64", True)
RTOL, SHIFT = 1e-6, 0.05

SETTINGS: dict[str, Any] = {"max_iter": 10_000, "eps": 1e-30, "stop_updating_after": 1e-30}
"""Of linear_operator: with its defaults of 1e-10 it stands still at a residual of 7e-6."""

Run = Callable[[float], Any]
"""From a relative tolerance to the solution, as an array of the library's own."""


def stencil(v: Any, pad: Callable[[Any], Any]) -> Any:
    """(T + shift·I) v for T = tridiag(−1, 2, −1), in any array library."""
    wide = pad(v)
    return (2 + SHIFT) * v - wide[:-2] - wide[2:]


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: dict[str, Callable[[], object]], budget: float = 4.0) -> dict[str, float]:
    """Median seconds of each function, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    start = time.perf_counter()
    while len(next(iter(times.values()))) < 3 or time.perf_counter() - start < budget:
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(t) for name, t in times.items()}


def at_tolerance(run: Run, residual: Callable[[Any], float]) -> float:
    """The loosest of a peer's tolerances 1e-6, 1e-7, … at which its true residual is ours."""
    for exponent in range(6, 14):
        if residual(run(10.0**-exponent)) <= RTOL:
            return 10.0**-exponent
    raise RuntimeError("the tolerance was not reached")


def compare(runs: dict[str, Run], residual: Callable[[Any], float]) -> dict[str, float]:
    tolerances = {name: at_tolerance(run, residual) for name, run in runs.items()}
    return interleaved({name: (lambda run=run, name=name: run(tolerances[name])) for name, run in runs.items()})


def print_row(label: str, times: dict[str, float]) -> None:
    ours = times["implicitdiff"]
    print(f"{label:>22} " + " ".join(f"{1e3 * t:10.2f} ({t / ours:5.2f})" for t in times.values()), flush=True)


def single(n: int) -> None:
    b = random(0, n)
    vector, array = b.numpy(), jnp.asarray(b.numpy())
    A = FunctionOperator(
        lambda v: stencil(v, lambda v: torch.nn.functional.pad(v, (1, 1))),
        n,
        structure="positive_definite",
        dtype=b.dtype,
    )
    scipy_operator = scipy.sparse.linalg.LinearOperator(
        (n, n), matvec=lambda v: stencil(v.ravel(), lambda v: np.pad(v, 1)), dtype=np.float64
    )
    jitted = jax.jit(lambda b, tol: jax_cg(lambda v: stencil(v, lambda v: jnp.pad(v, 1)), b, tol=tol)[0])

    def columns(v: Tensor) -> Tensor:
        return A(v.mT).mT if v.ndim == 2 else A(v)

    def column_stencil(v: Tensor) -> Tensor:
        return stencil(v, lambda v: torch.nn.functional.pad(v, (0, 0, 1, 1)))

    solver = idf.CG(rtol=RTOL)
    runs: dict[str, Run] = {
        "implicitdiff": lambda _: solver(A, b).value,
        "scipy": lambda tol: scipy.sparse.linalg.cg(scipy_operator, vector, rtol=tol)[0],
        "linear_operator": lambda tol: linear_cg(column_stencil, b.unsqueeze(-1), tolerance=tol, **SETTINGS)[:, 0],
        "jax": lambda tol: jitted(array, tol).block_until_ready(),
    }

    def residual(x: Any) -> float:
        x = torch.from_numpy(np.asarray(x).copy())
        return float((b - A(x)).norm() / b.norm())

    print_row(f"n = {n}", compare(runs, residual))
    iterations = int(solver(A, b).info.iterations)
    x, y = torch.randn_like(b), torch.randn_like(b)
    parts = interleaved(
        {"solve": lambda: solver(A, b), "product": lambda: A(x), "pass": lambda: torch.add(x, y, alpha=0.5)}
    )
    beyond = parts["solve"] / iterations - parts["product"]
    print(
        f"{'':22} {iterations} iterations of {1e6 * parts['solve'] / iterations:.0f} µs; beyond the product "
        f"{1e6 * beyond:.0f} µs, {beyond / parts['pass']:.1f} vector passes",
        flush=True,
    )


def batch(size: int) -> None:
    conditions = [10 ** (3 * i / max(size - 1, 1)) for i in range(size)]
    matrices = rotated(torch.stack([spread(c, 20) for c in conditions]), 1)
    b = random(2, size, 20)
    arrays = jnp.asarray(matrices.numpy()), jnp.asarray(b.numpy())
    A = DenseOperator(matrices, "positive_definite")
    solve_one = lambda M, b, tol: jax_cg(lambda v: M @ v, b, tol=tol)[0]  # noqa: E731
    jitted = jax.jit(jax.vmap(solve_one, in_axes=(0, 0, None)))
    cg, auto = idf.CG(rtol=RTOL), idf.Auto(rtol=RTOL)

    def one_by_one(tol: float) -> np.ndarray:
        pairs = zip(matrices.numpy(), b.numpy(), strict=True)
        return np.stack([scipy.sparse.linalg.cg(M, v, rtol=tol)[0] for M, v in pairs])

    runs: dict[str, Run] = {
        "implicitdiff": lambda _: cg(A, b).value,
        "scipy": one_by_one,
        "linear_operator": lambda tol: linear_cg(matrices.matmul, b.unsqueeze(-1), tolerance=tol, **SETTINGS).squeeze(
            -1
        ),
        "jax": lambda tol: jitted(*arrays, tol).block_until_ready(),
        "implicitdiff, Auto": lambda _: auto(A, b).value,
    }

    def residual(x: Any) -> float:
        x = torch.from_numpy(np.asarray(x).copy())
        return float(((b - A(x)).norm(dim=-1) / b.norm(dim=-1)).max())

    print_row(f"{size} systems of n = 20", compare(runs, residual))


def main() -> None:
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; ms to a relative residual of {RTOL:g} (ratio)"
    )
    print(f"{'':22} " + " ".join(f"{name:>18}" for name in ("implicitdiff", "scipy", "linear_operator", "jax", "Auto")))
    for n in (100, 10_000, 1_000_000):
        single(n)
    for size in (1, 16, 256, 4096):
        batch(size)


if __name__ == "__main__":
    main()
