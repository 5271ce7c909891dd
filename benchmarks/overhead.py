"""The cost of a gradient beside the products it consists of.

For each workload: the time of the backward pass through an implicit layer over the time of the same number of bare
Hessian-vector products on a kept graph, interleaved, medians. Run as ``python -m benchmarks.overhead``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree

import implicitdiff as idf

from .problems import Workload, workloads


def _bare_products(work: Workload, count: int) -> Callable[[], None]:
    """``count`` products with the Hessian, as written by hand: the graph of the gradient is kept."""
    leaves, spec = pytree.tree_flatten(work.x)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = work.objective(pytree.tree_unflatten(leaves, spec), *(a.detach() for a in work.args))
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    v = [torch.randn_like(leaf) for leaf in leaves]

    def run() -> None:
        for _ in range(count):
            torch.autograd.grad(gradients, leaves, v, retain_graph=True)

    return run


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(work: Workload, linear_solver: idf.LinearSolver, seconds: float = 8.0) -> tuple[float, float, int]:
    """Median seconds of the backward pass, of the bare products, and their number."""
    condition = idf.Stationary(work.objective)

    def backward(x: object) -> Callable[[], object]:
        leaves = pytree.tree_leaves(x)
        cotangent = [torch.ones_like(leaf) for leaf in leaves]
        return lambda: torch.autograd.grad(leaves, work.args[0], cotangent)

    def attached() -> object:
        return idf.attach(condition, work.x, *work.args, linear_solver=linear_solver)

    with idf.record() as history:
        backward(attached())()
    (info,) = [solve.info for solve in history if solve.kind == "backward"]
    # The point is none where the objective is stationary, which the report says and the time does not depend on.
    assert bool(info.residual_norm <= linear_solver.rtol), info.summary()
    bare = _bare_products(work, info.matvecs)
    bare()
    ours, floor = [], []
    start = time.perf_counter()
    while len(ours) < 3 or (len(ours) < 50 and time.perf_counter() - start < seconds):
        ours.append(_seconds(backward(attached())))
        floor.append(_seconds(bare))
    return statistics.median(ours), statistics.median(floor), info.matvecs


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CG to a relative residual of 1e-6")
    print(f"{'workload':26} {'products':>8} {'backward':>10} {'bare':>10} {'ratio':>6}")
    for work in workloads():
        ours, floor, products = measure(work, idf.CG(rtol=1e-6, max_iterations=1000, on_failure="ignore"))
        print(f"{work.name:26} {products:8d} {1e3 * ours:8.2f}ms {1e3 * floor:8.2f}ms {ours / floor:6.2f}")


if __name__ == "__main__":
    main()
