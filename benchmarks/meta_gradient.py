"""The meta-gradient of 16 Omniglot tasks: in chunks of tasks beside one by one, its memory, and its linear solve.

16 inner steps, 5 CG steps, the paper's network. Run as ``python -m benchmarks.meta_gradient``; the peers are in
``benchmarks.peers.meta_gradient``.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

import implicitdiff as idf
from imaml import IMAML
from imaml.models import ConvNet
from imaml.reproduce.measure import peak_memory
from imaml.tasks import Task
from implicitdiff.inner_solvers import LBFGS, GradientDescent
from implicitdiff.preconditioners import InverseLBFGS, Jacobi, Nystrom

TASKS = 16
STEPS = (1, 4, 16, 64, 256)
STRENGTH = 5.0


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
    start = time.process_time()
    meta.meta_loss(batch).backward()
    return time.process_time() - start


def compare_chunks() -> None:
    batch = tasks(TASKS, ways=5, shots=1)
    chunks = (1, 2, 4, 8, None)
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
    model, loss = ConvNet(ways).requires_grad_(), nn.functional.cross_entropy
    parameters = list(model.parameters())
    inputs, targets = (t[0] for t in task.support)

    def product() -> None:
        gradients = torch.autograd.grad(loss(model(inputs), targets), parameters, create_graph=True)
        torch.autograd.grad(gradients, parameters, gradients, retain_graph=True)

    gradient = peak_memory(lambda: torch.autograd.grad(loss(model(inputs), targets), parameters))
    peaks = {n: peak_memory(lambda n=n: learner(n, ways).meta_loss(task).backward()) for n in STEPS}
    print(f"\n{ways}-way {shots}-shot, one task: peak memory over that of one gradient of the inner loss")
    print(f"one Hessian-vector product by hand: {peak_memory(product) / gradient:5.2f}")
    for steps, value in peaks.items():
        print(f"meta-gradient, {steps:3} inner steps:   {value / gradient:5.2f}")
    print(f"{STEPS[-1]} inner steps over 1: {peaks[STEPS[-1]] / peaks[1]:.3f}", flush=True)


def compare_slices(ways: int, shots: int) -> None:
    """Products summed over slices of the support set, with group norm, as batch norm ties the examples together."""
    (inputs, targets), (queries, answers) = ((t[0] for t in part) for part in tasks(1, ways, shots))
    model, loss = ConvNet(ways).requires_grad_(), nn.functional.cross_entropy
    for place, layer in enumerate(model.features):
        if isinstance(layer, nn.BatchNorm2d):
            model.features[place] = nn.GroupNorm(8, layer.num_features)
    theta = dict(model.named_parameters())

    def objective(phi: dict[str, Tensor], theta: dict[str, Tensor], examples: tuple[Tensor, Tensor]) -> Tensor:
        pull = sum(((phi[name] - theta[name]) ** 2).sum() for name in phi)
        return loss(functional_call(model, phi, (examples[0],)), examples[1]) + pull

    def meta_gradient(slices: int) -> None:
        layer = idf.ArgminLayer(
            objective,
            inner_solver=GradientDescent(0.01, max_iterations=4, tol=0.0, on_failure="ignore"),
            linear_solver=idf.CG(rtol=1e-6, max_iterations=5, on_failure="ignore"),
            condition=idf.Stationary(objective, chunks=(1, 0, slices) if slices > 1 else None),
        )
        phi = layer(theta, theta, (inputs, targets))
        loss(functional_call(model, phi, (queries,)), answers).backward()

    gradient = peak_memory(lambda: torch.autograd.grad(loss(model(inputs), targets), list(theta.values())))
    print(f"\n{ways}-way {shots}-shot, one task, group norm: peak memory over that of one gradient of the inner loss")
    for slices in (1, 2, 4, 8):
        print(f"products over {slices} slices: {peak_memory(lambda s=slices: meta_gradient(s)) / gradient:5.2f}")


def compare_linear_solves(count: int = 4, rtol: float = 1e-4) -> None:
    """The linear solve at solutions by L-BFGS, after an outer step on the same tasks: the way from there to rtol."""
    solvers: dict[str, Callable[[], idf.CG]] = {
        "CG from zero": lambda: idf.CG(rtol=rtol),
        "CG from the last solution": lambda: idf.CG(rtol=rtol, warm_start=True),
        "CG, InverseLBFGS": lambda: idf.CG(rtol=rtol, preconditioner=InverseLBFGS()),
        "CG, Nystrom(5)": lambda: idf.CG(rtol=rtol, preconditioner=Nystrom(5)),
        "CG, Jacobi(4)": lambda: idf.CG(rtol=rtol, preconditioner=Jacobi(4)),
    }
    batch = tasks(count, ways=5, shots=1)
    torch.manual_seed(0)
    start = ConvNet(5)
    later = copy.deepcopy(start)
    meta_gradient(later, batch, idf.CG(rtol=1e-6, max_iterations=500))
    torch.optim.Adam(p for p in later.parameters() if p.requires_grad).step()
    reference, _, _ = meta_gradient(later, batch, idf.CG(rtol=1e-6, max_iterations=500))
    print(
        f"\nlinear solves to rtol={rtol:g}, {count} tasks together: products, time of backward(), error of the gradient"
    )
    for name, make in solvers.items():
        times, solver = [], make()
        for _ in range(3):
            model = copy.deepcopy(start)
            meta_gradient(model, batch, solver)
            model.load_state_dict(later.state_dict())
            found, products, took = meta_gradient(model, batch, solver)
            times.append(took)
        error = torch.linalg.vector_norm(found - reference) / torch.linalg.vector_norm(reference)
        print(f"{name:28} {products:4}  {statistics.median(times):6.2f} s  {error:.0e}", flush=True)


def meta_gradient(model: nn.Module, batch: Task, solver: idf.LinearSolver) -> tuple[Tensor, int, float]:
    """The meta-gradient, the products that it took, and the seconds of its backward pass."""
    inner_solver = LBFGS(history=20, tol=1e-3, max_iterations=100, on_failure="ignore")
    learner = IMAML(
        model, nn.functional.cross_entropy, inner_solver=inner_solver, linear_solver=solver, regularization=STRENGTH
    )
    learner.zero_grad()
    loss = learner.meta_loss(batch)
    start = time.process_time()
    with idf.record() as history:
        loss.backward()
    took = time.process_time() - start
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    return gradient, sum(entry.info.matvecs for entry in history), took


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; {TASKS} tasks, 16 inner steps, 5 CG steps", flush=True)
    compare_chunks()
    compare_memory(ways=20, shots=5)
    compare_memory(ways=5, shots=1)
    compare_slices(ways=20, shots=5)
    compare_linear_solves()


if __name__ == "__main__":
    main()
