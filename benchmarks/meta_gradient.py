"""The meta-gradient of 16 Omniglot tasks: all of them in one computation beside one by one, and its memory.

5-way 1-shot, 16 inner steps, 5 CG steps, the paper's network. Run as ``python -m benchmarks.meta_gradient``.
"""

from __future__ import annotations

import statistics
import time
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import implicitdiff as idf
from imaml import IMAML
from imaml.models import ConvNet
from imaml.tasks import Task
from implicitdiff.inner_solvers import GradientDescent

TASKS = 16


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensor storage that operations inside the block had alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def tasks() -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).expand(TASKS, 5)
    draw = lambda n: torch.rand(TASKS, 5 * n, 1, 28, 28, generator=generator)  # noqa: E731
    return Task((draw(1), labels), (draw(1), labels))


def learner(steps: int = 16, task_chunk: int | None = None) -> IMAML:
    torch.manual_seed(0)
    return IMAML(
        ConvNet(ways=5),
        nn.functional.cross_entropy,
        inner_solver=GradientDescent(0.01, max_iterations=steps, tol=0.0, on_failure="ignore"),
        linear_solver=idf.CG(rtol=1e-6, max_iterations=5, on_failure="ignore"),
        regularization=2.0,
        task_chunk=task_chunk,
    )


def seconds(chunk: int | None, batch: Task) -> float:
    meta = learner(task_chunk=chunk)
    start = time.perf_counter()
    meta.meta_loss(batch).backward()
    return time.perf_counter() - start


def peak(function: Any) -> int:
    with PeakMemory() as memory:
        function()
    return memory.peak


def main() -> None:
    batch = tasks()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; {TASKS} tasks, 16 inner steps, 5 CG steps",
        flush=True,
    )
    chunks = (1, 4, None)
    times: dict[int | None, list[float]] = {c: [] for c in chunks}
    for repeat in range(3):
        for chunk in chunks:
            took = seconds(chunk, batch)
            if repeat:  # the first round warms up
                times[chunk].append(took)
    base = statistics.median(times[1])
    for chunk in chunks:
        memory = peak(lambda chunk=chunk: learner(task_chunk=chunk).meta_loss(batch).backward())
        label = "all tasks together" if chunk is None else "one by one" if chunk == 1 else f"task_chunk={chunk}"
        took = statistics.median(times[chunk])
        print(
            f"{label:20} {took:6.2f} s  {took / base:5.2f} of one by one   peak {memory / 2**20:7.1f} MiB", flush=True
        )

    one = Task(*(tuple(t[:1] for t in part) for part in batch))
    model, loss = ConvNet(ways=5), nn.functional.cross_entropy
    parameters = list(model.parameters())
    inputs, targets = (t[0] for t in one.support)
    gradient = peak(lambda: torch.autograd.grad(loss(model(inputs), targets), parameters))
    peaks = {steps: peak(lambda steps=steps: learner(steps).meta_loss(one).backward()) for steps in (1, 64)}
    print("\nmemory of the meta-gradient of one task, over that of one gradient of the inner loss:")
    for steps, value in peaks.items():
        print(f"{steps:3} inner steps: {value / gradient:5.2f}")
    print(f"64 steps over 1 step: {peaks[64] / peaks[1]:.3f}")


if __name__ == "__main__":
    main()
