"""123 penalties of a logistic regression on the Adult data, chosen on validation data: hypergradients beside grid and
random search.

Hypergradients come with warm starts and the decreasing tolerances of HOAG (:mod:`implicitdiff.bilevel`), and without.
The grid is over one penalty for all weights, the random search over all 123. Compute is counted in passes over
the training data: an objective with its gradient, or a product with the Hessian. The searches are given the same inner
solver, and warm starts from one candidate to the next.

Run as ``python -m benchmarks.hyperparameters``; it reads ``adult/`` below ``$IMAML_DATA`` and takes some minutes.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_svmlight_file
from torch import Tensor

import implicitdiff as idf
from implicitdiff.bilevel import WarmStart, decreasing
from implicitdiff.inner_solvers import LBFGS

FEATURES, TRAIN = 123, 5000
EXACT = 1e-5
"""‖∇f‖ of the mean loss at which a candidate of a search counts as fitted."""


def read(name: str) -> tuple[Tensor, Tensor]:
    X, y = load_svmlight_file(str(Path(os.environ["IMAML_DATA"]) / "adult" / name), n_features=FEATURES)
    return torch.as_tensor(X.toarray()), torch.as_tensor((y > 0).astype(np.float64))


@dataclass
class Data:
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls) -> Data:
        X, y = read("a8a.gz")
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        first, rest = order[:TRAIN], order[TRAIN:]
        return cls((X[first], y[first]), (X[rest], y[rest]), read("a9a.t.gz"))


def loss(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(X @ w, y)


@dataclass
class Run:
    """What a method has reached after how many passes and seconds."""

    data: Data
    passes: int = 0
    start: float = field(default_factory=time.perf_counter)
    history: list[tuple[int, float, float]] = field(default_factory=list)
    best: float = float("inf")
    best_w: Tensor | None = None

    def objective(self, w: Tensor, log_penalties: Tensor) -> Tensor:
        self.passes += 1
        return loss(w, *self.data.train) + 0.5 * (log_penalties.exp() * w**2).sum()

    def note(self, w: Tensor) -> Tensor:
        """The validation loss at w, entered into the history."""
        value = loss(w, *self.data.valid)
        if value.item() < self.best:
            self.best, self.best_w = value.item(), w.detach()
        self.history.append((self.passes, time.perf_counter() - self.start, self.best))
        return value

    def reached(self, value: float) -> tuple[int, float] | None:
        """Passes and seconds until the validation loss was below a value."""
        return next(((p, s) for p, s, best in self.history if best <= value), None)


def hypergradient(
    data: Data, steps: int, tolerances: Callable[[], Iterator[float]], warm: bool, rate: float = 0.5
) -> Run:
    """Adam on the logarithms of the penalties, from the middle of what the searches look at."""
    run = Run(data)
    layer = idf.ArgminLayer(
        run.objective, inner_solver=LBFGS(max_iterations=2000), linear_solver=idf.CG(max_iterations=1000)
    )
    log_penalties = torch.full((FEATURES,), -5.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_penalties], lr=rate)
    inner = WarmStart(layer)
    for inner.tolerance in itertools.islice(tolerances(), steps):
        if not warm:
            inner, tolerance = WarmStart(layer), inner.tolerance
            inner.tolerance = tolerance
        with idf.record() as history:
            value = run.note(inner(torch.zeros(FEATURES, dtype=torch.float64), log_penalties))
            optimizer.zero_grad()
            value.backward()
        run.passes += sum(solve.matvecs for solve in history if solve.kind == "backward")
        optimizer.step()
    return run


def search(data: Data, candidates: Iterator[Tensor]) -> Run:
    """Fit each candidate to the end, from the last one's weights."""
    run = Run(data)
    inner = WarmStart(idf.ArgminLayer(run.objective, inner_solver=LBFGS(max_iterations=2000)))
    inner.tolerance = EXACT
    with torch.no_grad():
        for log_penalties in candidates:
            run.note(inner(torch.zeros(FEATURES, dtype=torch.float64), log_penalties))
    return run


def grid(points: int = 30) -> Iterator[Tensor]:
    """One penalty for all, from strong to weak."""
    for value in torch.linspace(0, -10, points, dtype=torch.float64):
        yield value.expand(FEATURES)


def random(points: int = 100) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(points):
        yield -10 + 10 * torch.rand(FEATURES, dtype=torch.float64, generator=generator)


def main() -> None:
    data = Data.load()
    hypergradient(data, 2, decreasing, warm=True)  # what torch loads at first use is not timed
    runs = {
        "hypergradient, warm starts, decreasing tolerances": hypergradient(data, 30, decreasing, warm=True),
        "hypergradient, warm starts": hypergradient(data, 30, lambda: itertools.repeat(EXACT), warm=True),
        "hypergradient, from zero each time": hypergradient(data, 30, lambda: itertools.repeat(EXACT), warm=False),
        "grid search, one penalty, 30 points": search(data, grid()),
        "random search, 123 penalties, 100 points": search(data, random()),
    }
    mark = runs["grid search, one penalty, 30 points"].best
    print(f"validation loss of the grid's best: {mark:.6f}")
    print(f"{'':>50} {'passes':>8} {'seconds':>8} {'valid':>9} {'test':>9}  passes and seconds to the grid's best")
    for name, run in runs.items():
        passes, seconds, best = run.history[-1]
        assert run.best_w is not None
        test, reached = float(loss(run.best_w, *data.test)), run.reached(mark)
        told = "never" if reached is None else f"{reached[0]:6d} {reached[1]:7.2f}"
        print(f"{name:>50} {passes:8d} {seconds:8.2f} {best:9.6f} {test:9.6f}  {told}", flush=True)


if __name__ == "__main__":
    main()
