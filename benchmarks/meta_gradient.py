"""The meta-gradient of 16 Omniglot tasks: all of them in one computation beside one by one, and its memory.

16 inner steps, 5 CG steps, the paper's network. Run as ``python -m benchmarks.meta_gradient``.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

import implicitdiff as idf
from imaml import IMAML
from imaml.models import ConvNet
from imaml.reproduce.measure import peak_memory
from imaml.tasks import Task
from implicitdiff.inner_solvers import GradientDescent

TASKS = 16


def tasks(count: int, ways: int, shots: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(ways).repeat(shots).expand(count, -1)
    draw = lambda: torch.rand(*labels.shape, 1, 28, 28, generator=generator)  # noqa: E731
    return Task((draw(), labels), (draw(), labels))


def learner(steps: int = 16, ways: int = 5, task_chunk: int | None = None) -> IMAML:
    torch.manual_seed(0)
    return IMAML(
        ConvNet(ways),
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


def compare_chunks() -> None:
    batch = tasks(TASKS, ways=5, shots=1)
    chunks = (1, 4, None)
    times: dict[int | None, list[float]] = {c: [] for c in chunks}
    for repeat in range(4):
        for chunk in chunks:
            took = seconds(chunk, batch)
            if repeat:  # the first round warms up
                times[chunk].append(took)
    base = statistics.median(times[1])
    for chunk in chunks:
        memory = peak_memory(lambda chunk=chunk: learner(task_chunk=chunk).meta_loss(batch).backward())
        label = "all tasks together" if chunk is None else "one by one" if chunk == 1 else f"task_chunk={chunk}"
        took = statistics.median(times[chunk])
        print(
            f"{label:20} {took:6.2f} s  {took / base:5.2f} of one by one   peak {memory / 2**20:7.1f} MiB", flush=True
        )


def compare_memory(ways: int, shots: int) -> None:
    task = tasks(1, ways, shots)
    model, loss = ConvNet(ways), nn.functional.cross_entropy
    parameters = list(model.parameters())
    inputs, targets = (t[0] for t in task.support)

    def product() -> None:
        gradients = torch.autograd.grad(loss(model(inputs), targets), parameters, create_graph=True)
        torch.autograd.grad(gradients, parameters, gradients, retain_graph=True)

    gradient = peak_memory(lambda: torch.autograd.grad(loss(model(inputs), targets), parameters))
    peaks = {n: peak_memory(lambda n=n: learner(n, ways).meta_loss(task).backward()) for n in (1, 64)}
    print(f"\n{ways}-way {shots}-shot, one task: peak memory over that of one gradient of the inner loss")
    print(f"one Hessian-vector product by hand: {peak_memory(product) / gradient:5.2f}")
    for steps, value in peaks.items():
        print(f"meta-gradient, {steps:3} inner steps:   {value / gradient:5.2f}")
    print(f"64 inner steps over 1: {peaks[64] / peaks[1]:.3f}", flush=True)


def main() -> None:
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; {TASKS} tasks, 16 inner steps, 5 CG steps",
        flush=True,
    )
    compare_chunks()
    compare_memory(ways=20, shots=5)
    compare_memory(ways=5, shots=1)


if __name__ == "__main__":
    main()
