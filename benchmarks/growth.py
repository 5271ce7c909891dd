"""How time and memory grow with n, the batch, the inner steps and the condition number, next to what is expected.

Time is that of the backward pass, memory the peak of one gradient, forward and backward, above what was there before.
On log axes a power law is a line: its slope is fitted through the larger half of the sizes. Run as
``python -m benchmarks.growth [--cpu-time]``; writes docs/images/growth.png.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.utils import _pytree as pytree

import implicitdiff as idf
from imaml.reproduce.fits import power
from imaml.reproduce.measure import peak_memory
from implicitdiff.inner_solvers import GradientDescent

from .peers.timing import clock, one_thread
from .problems import logistic, mlp

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "growth.png"
OURS, UNROLLED, EXPECTED = "#1f5fa8", "#c8553d", "#9a9a9a"

Forward = Callable[[], tuple[Any, Sequence[Tensor]]]
"""The solution, a tree, and the tensors that its derivative is taken in."""


@dataclass
class Curve:
    """The measurements of one way to the gradient, against one size."""

    name: str
    at: Callable[[int], Forward]
    sizes: Sequence[int]
    expected: dict[str, float]
    """The slope of each quantity."""
    colour: str = OURS
    values: dict[str, list[float]] = field(default_factory=dict)

    def measure(self) -> None:
        points = [_measured(self.at(size)) for size in self.sizes]
        self.values = {quantity: [point[quantity] for point in points] for quantity in points[0]}

    def slope(self, quantity: str) -> float:
        half = len(self.sizes) // 2
        return power(self.sizes[half:], self.values[quantity][half:]).slope


def _measured(forward: Forward) -> dict[str, float]:
    """Seconds of the backward pass, peak bytes of a gradient, and the products of the backward pass, where counted."""

    def backward(x: Any, inputs: Sequence[Tensor]) -> float:
        leaves = pytree.tree_leaves(x)
        cotangents = [torch.ones_like(leaf) for leaf in leaves]
        start = clock()
        torch.autograd.grad(leaves, inputs, cotangents)
        return clock() - start

    with idf.record() as history:
        backward(*forward())
    products = sum(solve.info.matvecs for solve in history if solve.kind == "backward")
    repeats = [backward(*forward()) for _ in range(5)]
    memory = peak_memory(lambda: backward(*forward()))
    return {"time": statistics.median(repeats), "memory": memory, "products": products}


def against_n(n: int) -> Forward:
    """Dense data, twice as many rows as columns, and 20 products."""
    work = logistic(2 * n, n)
    solver = idf.CG(max_iterations=20, rtol=0.0, on_failure="ignore")
    condition = idf.Stationary(work.objective)
    return lambda: (idf.attach(condition, work.x, *work.args, linear_solver=solver), work.args[:1])


def against_batch(batch: int) -> Forward:
    """Ridge problems of n = 20, together."""
    generator = torch.Generator().manual_seed(0)
    X, y = (torch.randn(batch, *s, dtype=torch.float64, generator=generator) for s in ((40, 20), (40,)))
    penalties = torch.ones(batch, 20, dtype=torch.float64, requires_grad=True)
    init = torch.zeros(batch, 20, dtype=torch.float64)

    def objective(w: Tensor, penalties: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * (penalties * w * w).sum()

    layer = idf.ArgminLayer(objective, inner_solver=idf.inner_solvers.Newton())
    return lambda: (torch.func.vmap(layer)(init, penalties, X, y), [penalties])


def against_steps(layer: Callable[[Any, GradientDescent], Any]) -> Callable[[int], Forward]:
    """A network of 27 thousand parameters on 512 points, and so many inner steps."""
    work = mlp()

    def at(steps: int) -> Forward:
        inner = GradientDescent(0.01, max_iterations=steps, tol=0.0, on_failure="ignore")
        solve = layer(work.objective, inner)
        return lambda: (solve(work.x, *work.args), work.args[:1])

    return at


def implicit(objective: Any, inner: GradientDescent) -> Any:
    solver = idf.CG(max_iterations=5, on_failure="ignore")
    return idf.ArgminLayer(objective, inner_solver=inner, linear_solver=solver)


def against_condition(kappa: int) -> Forward:
    """A quadratic whose eigenvalues lie between 1 and κ like the nodes of Chebyshev, where CG is slowest."""
    n = 20_000
    nodes = torch.cos(torch.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    d = (kappa + 1) / 2 + (kappa - 1) / 2 * nodes
    shift = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    condition = idf.Stationary(lambda x, shift: 0.5 * (d * x * x).sum() - (shift * x).sum())
    solver = idf.CG(rtol=1e-8, max_iterations=100_000)
    return lambda: (idf.attach(condition, (shift / d).detach(), shift, linear_solver=solver), [shift])


def powers(base: int, first: int, last: int) -> list[int]:
    return [base**k for k in range(first, last + 1)]


def panels() -> dict[str, list[Curve]]:
    steps = powers(2, 0, 7)
    flat, linear = {"time": 0.0, "memory": 0.0}, {"time": 1.0, "memory": 1.0}
    return {
        "n, with dense data of 2n rows": [Curve("implicit", against_n, powers(2, 6, 12), {"time": 2.0, "memory": 1.0})],
        "the batch, systems of n = 20": [Curve("implicit", against_batch, powers(4, 1, 7), linear)],
        "inner steps, 27k parameters": [
            Curve("implicit", against_steps(implicit), steps, flat),
            Curve("unrolled", against_steps(idf.UnrolledLayer), steps, linear, UNROLLED),
        ],
        "the condition number κ": [
            Curve("implicit", against_condition, powers(4, 1, 6), {"time": 0.5, "products": 0.5, "memory": 0.0})
        ],
    }


def draw(axes: Axes, curves: Sequence[Curve], quantity: str, unit: float) -> None:
    """Points, and a broad line of the expected slope through the last of them."""
    texts = []
    for curve in curves:
        values = [v * unit for v in curve.values[quantity]]
        sizes = curve.sizes[len(curve.sizes) // 2 - 1 :]
        guide = [values[-1] * (size / sizes[-1]) ** curve.expected[quantity] for size in sizes]
        axes.loglog(sizes, guide, color=EXPECTED, linewidth=7, alpha=0.45, solid_capstyle="round")
        axes.loglog(curve.sizes, values, "o-", color=curve.colour, markersize=5, linewidth=1.4)
        prefix = f"{curve.name}: " if len(curves) > 1 else ""
        texts.append((f"{prefix}slope {_against_expected(curve, quantity)}", curve.colour))
        if quantity == "time" and "products" in curve.expected:
            texts.append((f"products: slope {_against_expected(curve, 'products')}", curve.colour))
    for row, (text, colour) in enumerate(texts):
        axes.text(0.04, 0.93 - 0.08 * row, text, transform=axes.transAxes, color=colour, fontsize=10)
    low, high = (math.log10(limit) for limit in axes.get_ylim())
    span = max(high - low, 2.0)  # so that what is flat looks flat
    axes.set_ylim(10 ** (high - span), 10 ** (high + 0.3 * span))  # with room for the text
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)


def _against_expected(curve: Curve, quantity: str) -> str:
    return f"{round(curve.slope(quantity), 2) + 0.0:.2f}, expected {curve.expected[quantity]:g}"


def plot(curves_of: dict[str, list[Curve]]) -> None:
    figure, grid = plt.subplots(2, len(curves_of), figsize=(3.9 * len(curves_of), 6.8), sharex="col")
    for (title, curves), (above, below) in zip(curves_of.items(), grid.T, strict=True):
        draw(above, curves, "time", 1e3)
        draw(below, curves, "memory", 2**-20)
        above.set_title(f"against {title}", fontsize=11)
    grid[0, 0].set_ylabel("backward pass, ms")
    grid[1, 0].set_ylabel("peak memory of a gradient, MiB")
    for axes, label in zip(grid[1], ("n", "systems", "steps", "κ"), strict=True):
        axes.set_xlabel(label)
    figure.tight_layout()
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, dpi=110)


def main() -> None:
    one_thread()
    curves_of = panels()
    for title, curves in curves_of.items():
        for curve in curves:
            curve.measure()
            for quantity, expected in curve.expected.items():
                slope = curve.slope(quantity)
                print(f"{title:36} {curve.name:10} {quantity:9} slope {slope:5.2f}, expected {expected:g}", flush=True)
    plot(curves_of)


if __name__ == "__main__":
    main()
