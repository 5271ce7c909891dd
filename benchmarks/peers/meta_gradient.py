"""The iMAML meta-gradient of 16 Omniglot tasks, 5-way 1-shot: the paper's network, 16 inner steps, 5 CG steps.

Every way makes the same steps on the same objective, the loss plus ½ λ ‖φ − θ‖², and applies the same number of steps
of conjugate gradients to Lemma 1's system, so that all come to the same gradient, which is checked. Unrolled
differentiation is another gradient, so that only its cost is compared. Times and peaks of memory. Run as
``python -m benchmarks.peers.meta_gradient``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import implicitdiff as idf
from imaml import IMAML
from imaml.models import ConvNet
from imaml.reproduce.measure import peak_memory
from imaml.tasks import Task
from implicitdiff.inner_solvers import GradientDescent

from ..meta_gradient import tasks
from .hypergradient import cg
from .timing import Way, compare, importable, ready

TASKS, WAYS, SHOTS = 16, 5, 1
STEPS, STEPSIZE, CG_STEPS, STRENGTH = 16, 0.01, 5, 2.0
AGREEMENT = 1e-3  # in float32

Examples = tuple[Tensor, Tensor]


class PlainConvNet(nn.Module):
    """The paper's network of torch's own layers, as the peers' users write it."""

    def __init__(self, ways: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for channels in (1, 64, 64, 64):
            blocks += [
                nn.Conv2d(channels, 64, 3, stride=2, padding=1),
                nn.BatchNorm2d(64, track_running_stats=False),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(64, ways)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.features(inputs))


def network(kind: Callable[[int], nn.Module] = PlainConvNet) -> nn.Module:
    """The network at one and the same θ."""
    torch.manual_seed(0)
    state = ConvNet(WAYS).state_dict()
    state["head.weight"] = 0.1 * torch.randn_like(state["head.weight"])
    model = kind(WAYS)
    model.load_state_dict(state)
    return model.requires_grad_()


def each_task(batch: Task) -> list[Any]:
    """(support, query) of each task."""
    return [tuple(tuple(t[i] for t in part) for part in batch) for i in range(len(batch.query[0]))]


def loss_of(model: nn.Module, examples: Examples) -> Tensor:
    inputs, targets = examples
    return nn.functional.cross_entropy(model(inputs), targets)


def regularized(model: nn.Module, theta: list[Tensor], examples: Examples) -> Tensor:
    pull = sum(((p - t) ** 2).sum() for p, t in zip(model.parameters(), theta, strict=True))
    return loss_of(model, examples) + 0.5 * STRENGTH * pull


def in_the_published_way(batch: Task) -> Way:
    """Task by task on a copy of the network: SGD, then CG whose every product builds the gradient's graph anew."""
    model, fast = network(), network()
    theta = [p.detach() for p in model.parameters()]

    def run() -> list[Tensor]:
        total = torch.zeros(sum(p.numel() for p in theta))
        for support, query in each_task(batch):
            fast.load_state_dict(model.state_dict())
            parameters = list(fast.parameters())
            optimizer = torch.optim.SGD(parameters, lr=STEPSIZE)
            for _ in range(STEPS):
                optimizer.zero_grad()
                regularized(fast, theta, support).backward()
                optimizer.step()
            v = flat(torch.autograd.grad(loss_of(fast, query), parameters))

            def product(u: Tensor) -> Tensor:
                gradient = flat(torch.autograd.grad(loss_of(fast, support), parameters, create_graph=True))  # noqa: B023
                return u + flat(torch.autograd.grad(gradient @ u, parameters)) / STRENGTH  # noqa: B023

            total += cg(product, v, rtol=0.0, max_iterations=CG_STEPS) / TASKS
        return [total]

    return ready(run)


def by_hand(batch: Task) -> Way:
    """The same with the gradient's graph built once for each task."""
    model = network()
    theta = [p.detach() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def run() -> list[Tensor]:
        total = torch.zeros(sum(p.numel() for p in theta))
        for support, query in each_task(batch):
            phi = [t.clone().requires_grad_() for t in theta]
            loss = lambda examples, phi=phi: nn.functional.cross_entropy(  # noqa: E731
                functional_call(model, dict(zip(names, phi, strict=True)), (examples[0],)), examples[1]
            )
            for _ in range(STEPS):
                gradients = torch.autograd.grad(loss(support), phi)
                with torch.no_grad():
                    for p, g, t in zip(phi, gradients, theta, strict=True):
                        p -= STEPSIZE * (g + STRENGTH * (p - t))
            v = flat(torch.autograd.grad(loss(query), phi))
            gradient = flat(torch.autograd.grad(loss(support), phi, create_graph=True))

            def product(u: Tensor) -> Tensor:
                return u + flat(torch.autograd.grad(gradient, phi, u, retain_graph=True)) / STRENGTH  # noqa: B023

            total += cg(product, v, rtol=0.0, max_iterations=CG_STEPS) / TASKS
        return [total]

    return ready(run)


def ours(batch: Task, task_chunk: int | None, kind: Callable[[int], nn.Module] = ConvNet) -> Way:
    model = network(kind)
    learner = IMAML(
        model,
        nn.functional.cross_entropy,
        inner_solver=GradientDescent(STEPSIZE, max_iterations=STEPS, tol=0.0, on_failure="ignore"),
        linear_solver=idf.CG(rtol=1e-6, max_iterations=CG_STEPS, on_failure="ignore"),
        regularization=STRENGTH,
        task_chunk=task_chunk,
    )

    def run() -> list[Tensor]:
        learner.zero_grad()
        learner.meta_loss(batch).backward()
        return [flat([p.grad for p in model.parameters()])]

    return ready(run)


def by_torchopt(batch: Task) -> Way:
    """Its module for implicit meta-gradients, as in its own iMAML example."""
    import torchopt

    solve_cg = torchopt.linear_solve.solve_cg(rtol=0.0, atol=0.0, maxiter=CG_STEPS)

    class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solve_cg):
        def __init__(self, meta: nn.Module) -> None:
            super().__init__()
            self.meta = meta
            self.net = torchopt.module_clone(meta, by="deepcopy", detach_buffers=True)

        def objective(self, inputs: Tensor, targets: Tensor) -> Tensor:
            return regularized(self.net, list(self.meta.parameters()), (inputs, targets))

        def solve(self, inputs: Tensor, targets: Tensor) -> Any:
            parameters = tuple(self.parameters())
            optimizer = torch.optim.SGD(parameters, lr=STEPSIZE)
            with torch.enable_grad():
                for _ in range(STEPS):
                    optimizer.zero_grad()
                    self.objective(inputs, targets).backward(inputs=parameters)
                    optimizer.step()
            return self

    model = network()

    def run() -> list[Tensor]:
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its own calls of functorch
            for support, query in each_task(batch):
                inner = Inner(model)
                inner.solve(*support)
                (loss_of(inner.net, query) / TASKS).backward()
        return [flat([p.grad for p in model.parameters()])]

    return ready(run)


def by_higher(batch: Task) -> Way:
    """Unrolled: the gradient through the steps, which is another one, so that only its cost can be compared."""
    import higher

    model = network()
    theta = list(model.parameters())

    def run() -> None:
        model.zero_grad()
        optimizer = torch.optim.SGD(theta, lr=STEPSIZE)
        for support, query in each_task(batch):
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, steps):
                for _ in range(STEPS):
                    steps.step(regularized(fast, theta, support))
                (loss_of(fast, query) / TASKS).backward()

    return ready(run)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def main() -> None:
    batch = tasks(TASKS, WAYS, SHOTS)
    ways = {"by hand, one by one": by_hand(batch), "published code's way": in_the_published_way(batch)}
    if importable("torchopt"):
        ways["torchopt, solve_cg"] = by_torchopt(batch)
    if importable("higher"):
        ways["higher, unrolled"] = by_higher(batch)
    for chunk in (1, 4, 8, None):
        label = "all together" if chunk is None else f"task_chunk={chunk}"
        ways[f"implicitdiff, {label}"] = ours(batch, chunk)
    (reference,) = by_hand(batch)()()
    compare(f"{TASKS} tasks", ways, [reference], AGREEMENT, seconds=60.0)
    print("\npeak of memory, MiB", flush=True)
    for name, way in ways.items():
        print(f"{name:44} {peak_memory(way()) / 2**20:8.1f}", flush=True)


if __name__ == "__main__":
    main()
