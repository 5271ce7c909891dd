"""The gradient of an outer loss through an inner problem of 10 and 100 million parameters: memory, and where time goes.

An MLP is pulled towards meta-parameters as in iMAML: five gradient steps inside, then at most eight steps of CG on the
Hessian of the inner objective. Each size runs in a process of its own, whose peak memory is printed in units of one
vector of parameters too. Time is CPU time: in the products with the Hessian, in the rest of the linear solve ("vector
work"), and in the same number of products written by hand. Run as
``python -m benchmarks.large [--millions 10 100] [--rows 512]``.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import implicitdiff as idf
from imaml.models import MLP

from .problems import Workload, _network

WIDTHS = {1: [512] * 5, 10: [1024] * 11, 100: [4096] * 7}
"""Of the layers, by millions of parameters."""
STEPS, PRODUCTS, STRENGTH = 5, 8, 0.1
GIB = 2**30


def peak() -> float:
    """Bytes that this process held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def network(millions: int, rows: int) -> Workload:
    """Its targets are what it gives itself, and noise, so that the Hessian is definite."""
    torch.manual_seed(0)
    widths = WIDTHS[millions]
    model, inputs = MLP([*widths, 1]), torch.randn(rows, widths[0])
    with torch.no_grad():
        fit = model(inputs)
    targets = fit + 0.1 * fit.std() * torch.randn_like(fit)
    return _network(f"{millions} million", model, inputs, targets, nn.functional.mse_loss, STRENGTH)


class Timed(idf.LinearOperator):
    """An operator that adds up the CPU seconds of its products."""

    def __init__(self, A: idf.LinearOperator) -> None:
        super().__init__(A.shape, structure=A.structure, batch_shape=A.batch_shape, dtype=A.dtype, device=A.device)
        self.A, self.origin, self.seconds = A, A.origin, 0.0

    def matvec(self, v: Tensor) -> Tensor:
        return self._timed(self.A.matvec, v)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self._timed(self.A.rmatvec, v)

    def _timed(self, product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        start = time.process_time()
        out = product(v)
        self.seconds += time.process_time() - start
        return out


class TimedCG(idf.CG):
    """CG that notes how long it took, and how long its products did."""

    def solve(self, A: idf.LinearOperator, b: Tensor, x0: Tensor | None = None) -> idf.LinearSolution:
        start, timed = time.process_time(), Timed(A)
        solution = super().solve(timed, b, x0)
        self.total, self.products, self.info = time.process_time() - start, timed.seconds, solution.info
        return solution


def by_hand(work: Workload, count: int) -> float:
    """CPU seconds of Hessian-vector products on a kept graph of the parameters, none of the library's code around."""
    x = {k: v.detach().clone().requires_grad_() for k, v in work.x.items()}
    leaves = list(x.values())
    value = work.objective(x, *(a.detach() for a in work.args))
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    v = [torch.randn_like(leaf) for leaf in leaves]
    start = time.process_time()
    for _ in range(count):
        torch.autograd.grad(gradients, leaves, v, retain_graph=True)
    return time.process_time() - start


def run(millions: int, rows: int) -> None:
    work = network(millions, rows)
    meta, inputs, targets = work.args
    n, before = meta.numel(), peak()
    inner_solver = idf.inner_solvers.GradientDescent(0.1, max_iterations=STEPS, tol=0.0, on_failure="ignore")
    cg = TimedCG(max_iterations=PRODUCTS, on_failure="ignore")
    layer = idf.ArgminLayer(work.objective, inner_solver=inner_solver, linear_solver=cg)
    for _ in range(2):  # the first round finds cold caches and memory that is not mapped yet
        times = [time.process_time()]
        adapted = layer(work.x, meta, inputs, targets)
        times.append(time.process_time())
        outer = work.objective(adapted, meta.detach(), inputs.flip(1), targets)  # other data
        (gradient,) = torch.autograd.grad(outer, meta)
        times.append(time.process_time())
        assert bool(gradient.isfinite().all())
        del adapted, outer, gradient
    vector, held = 4 * n, peak()
    inside, backward = times[1] - times[0], times[2] - times[1]
    products = cg.info.matvecs
    hand = by_hand(work, products)
    print(
        f"{n / 1e6:6.1f} million parameters, {rows} rows, {torch.get_num_threads()} threads\n"
        f"    memory: {before / GIB:.2f} GiB before, peak {held / GIB:.2f} GiB = {held / vector:.1f} vectors\n"
        f"    time: {STEPS} inner steps {inside:.2f} s; outer loss and backward {backward:.2f} s, of which the solve "
        f"{cg.total:.2f} s: {products} products {cg.products:.2f} s, vector work {cg.total - cg.products:.2f} s = "
        f"{(cg.total - cg.products) / cg.products:.1%} of the products; residual {float(cg.info.residual_norm):.0e}\n"
        f"    by hand: {products} products {hand:.2f} s; ours / by hand {cg.products / hand:.3f}, "
        f"the whole solve / by hand {cg.total / hand:.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", nargs="+", type=int, default=[10, 100], choices=list(WIDTHS))
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--here", action="store_true", help="in this process, as the command does for each size")
    given = parser.parse_args()
    for millions in given.millions:
        if given.here:
            run(millions, given.rows)
        else:
            command = [sys.executable, "-m", "benchmarks.large", "--here", "--millions", str(millions)]
            subprocess.run([*command, "--rows", str(given.rows)], check=True)


if __name__ == "__main__":
    main()
