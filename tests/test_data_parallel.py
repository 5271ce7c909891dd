"""Layers whose problem is the sum over processes, each with a shard of the data, against one process.

Every test runs in real processes that talk by gloo. They wait for input that comes by a pipe, so that they are started
once; a test that hangs or fails ends them, and the next one starts others.
"""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import implicitdiff as idf
from implicitdiff import prox
from implicitdiff._data_parallel import _checksum, nothing
from implicitdiff.inner_solvers import (
    LBFGS,
    Anderson,
    BlockCoordinateDescent,
    GradientDescent,
    MirrorDescent,
    Newton,
    NewtonCG,
    ProximalGradient,
    SciPyMinimize,
    TorchOptimizer,
)

from .problems import random, vector
from .test_transforms import AFFINE, DERIVATIVES, NESTINGS, SINH_ROOT, TIGHT, Case, N, by_inverse, close

D = torch.float64
PATIENCE = 120
"""Seconds for one test in all its processes, and for their start: on a busy machine they wait for each other."""


# ------------------------------------------------------------------------------------------------------ processes


class Processes:
    """So many processes in one group."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pipes: list[Connection] = []

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", __name__])  # with what torch imports late
        meeting = tempfile.mktemp()
        self.processes = []
        for rank in range(self.count):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, rank, self.count, meeting), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(here)
        self.wait()

    def run(self, check: Callable[..., None], *args: Any) -> None:
        """Call ``check(*args)`` on all of them."""
        if not self.pipes:
            self.start()
        for pipe in self.pipes:
            pipe.send((check, args))
        self.wait()

    def wait(self) -> None:
        """Until all have done what they were told."""
        waiting, deadline, failures = list(self.pipes), time.monotonic() + PATIENCE, []
        while waiting and not failures:
            ready = wait(waiting, deadline - time.monotonic())
            if not ready:
                failures.append(f"the ranks {[self.pipes.index(pipe) for pipe in waiting]} hang")
            for pipe in ready:
                waiting.remove(pipe)
                failures += [f"rank {self.pipes.index(pipe)}: {text}" for text in [pipe.recv()] if text]
        if failures:
            self.stop()
            pytest.fail("\n".join(failures))

    def stop(self) -> None:
        for process in self.processes if self.pipes else ():
            process.kill()
            process.join()
        self.pipes = []


def serve(pipe: Connection, rank: int, count: int, meeting: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=timedelta(seconds=PATIENCE)
    )
    pipe.send("")
    while True:
        check, args = pipe.recv()
        try:
            check(*args)
            pipe.send("")
        except BaseException:
            pipe.send(traceback.format_exc())


@pytest.fixture(scope="module", params=[2, 4])
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    processes = Processes(request.param)
    yield processes
    processes.stop()


def world() -> Any:
    return dist.group.WORLD


def same_everywhere(*tensors: Tensor) -> None:
    """The tensors have the same bits on all ranks."""
    for tensor in tensors:
        copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, tensor.detach().contiguous())
        assert all(torch.equal(tensor, copy) for copy in copies), copies


# ------------------------------------------------------------------------------------------- every derivative


def shard(data: Tensor) -> Tensor:
    """This rank's rows: unequal shares, and none for the second rank."""
    parts = {2: [len(data), 0], 4: [len(data) - 4, 0, 3, 1]}[dist.get_world_size()]
    return data.split(parts)[dist.get_rank()]


def ridge_case() -> Case:
    """Ridge regression with scaled features; the penalty is added by the first rank only."""
    X, y = random(1, 9, N), random(2, 9)
    X_here, y_here = shard(X), shard(y)

    def objective(w: Tensor, penalty: Tensor, scale: Tensor) -> Tensor:
        fit = 0.5 * ((X_here * scale) @ w - y_here).square().sum()
        return fit + 0.5 * penalty * w.square().sum() if dist.get_rank() == 0 else fit

    def closed(penalty: Tensor, scale: Tensor) -> Tensor:
        return by_inverse((X * scale).T @ (X * scale) + penalty * torch.eye(N, dtype=D), (X * scale).T @ y)

    layer = idf.ArgminLayer(
        objective, inner_solver=NewtonCG(**TIGHT), linear_solver=idf.CG(rtol=1e-12), process_group=world()
    )
    return Case("argmin", layer, closed, (torch.tensor(0.7, dtype=D), 1 + 0.3 * random(3, N)))


def root_case() -> Case:
    """The first rank knows sinh(Mx), the last one −t; what is between them depends on nothing."""

    def residual(x: Tensor, t: Tensor, M: Tensor) -> Tensor:
        if dist.get_rank() == 0:
            return torch.sinh(M @ x)
        return -t if dist.get_rank() == dist.get_world_size() - 1 else torch.zeros(N, dtype=D)

    layer = idf.RootLayer(
        residual, inner_solver=Newton(**TIGHT), linear_solver=idf.GMRES(rtol=1e-12), process_group=world()
    )
    return Case("root", layer, SINH_ROOT.closed, SINH_ROOT.args)


def fixed_point_case() -> Case:
    def update(x: Tensor, b: Tensor, W: Tensor) -> Tensor:
        if dist.get_rank() == 0:
            return W @ x
        return b if dist.get_rank() == dist.get_world_size() - 1 else torch.zeros(N, dtype=D)

    layer = idf.FixedPointLayer(
        update, inner_solver=Anderson(**TIGHT), linear_solver=idf.Dense(), process_group=world()
    )
    return Case("fixed point", layer, AFFINE.closed, AFFINE.args)


def check_derivative(make: Callable[[], Case], name: str) -> None:
    case, (transform, rtol) = make(), (DERIVATIVES | NESTINGS)[name]
    implicit, closed = case.scalars
    got = transform(case.implicit, implicit, case)
    close(got, transform(case.closed, closed, case), rtol)


# Of all derivatives, those that are tried each time: in two processes all of these, in four the first two.
QUICK = {
    ridge_case: [
        "double backward",
        "jacfwd of jacfwd",
        "hessian",
        "is_grads_batched",
        "dual numbers",
        "vmap(grad), in_dims None",
        "jvp(vmap)",
    ],
    root_case: ["double backward", "jacfwd of jacfwd", "vmap(jacfwd)"],
    fixed_point_case: ["jacrev"],
}


@pytest.mark.parametrize(
    ("processes", "make", "name"),
    [
        pytest.param(count, make, name, marks=() if name in quick[: 8 if count == 2 else 2] else pytest.mark.slow)
        for count in (2, 4)
        for make, quick in QUICK.items()
        for name in (*DERIVATIVES, *NESTINGS)
    ],
    indirect=["processes"],
)
def test_equals_the_closed_form(processes: Processes, make: Callable[[], Case], name: str) -> None:
    processes.run(check_derivative, make, name)


# ---------------------------------------------------------------------------------------- gradients on all ranks


def check_gradients_of_the_mean_loss() -> None:
    """Each rank has an outer loss of its own; what comes back is the same everywhere, in the second order too."""
    case, rank, count = ridge_case(), dist.get_rank(), dist.get_world_size()
    weights = random(5, count, N)

    def losses(w: Tensor, ranks: range) -> Tensor:
        return sum(((weights[r] * w).sum() ** 2 + r * w.sum() for r in ranks), torch.zeros((), dtype=D))

    def gradients(f: Callable[..., Tensor], loss: Callable[..., Tensor], sharpness: Callable[..., Tensor]) -> Any:
        leaves = [a.clone().requires_grad_() for a in case.args]
        first = torch.autograd.grad(loss(f(*leaves)), leaves, create_graph=True)
        return first, torch.autograd.grad(sharpness(first), leaves)

    here = range(rank, rank + 1)
    got = gradients(case.implicit, lambda w: losses(w, here), lambda g: (1 + rank) * g[1].square().sum())
    everywhere = (1 + count) / 2
    want = gradients(case.closed, lambda w: losses(w, range(count)) / count, lambda g: everywhere * g[1].square().sum())
    for order, rtol in zip(range(2), (1e-9, 1e-8), strict=True):
        same_everywhere(*got[order])
        close(got[order], want[order], rtol)
    # Tangents that differ are averaged as well.
    tangent = torch.func.jvp(lambda p: case.implicit(p, case.args[1]), (case.args[0],), (torch.tensor(1.0 + rank),))[1]
    want = torch.func.jvp(lambda p: case.closed(p, case.args[1]), (case.args[0],), (torch.tensor(everywhere),))[1]
    same_everywhere(tangent)
    close(tangent, want, 1e-9)


def check_lock_step() -> None:
    """The same x, bit by bit, in the same numbers of iterations, with the reports where they belong."""
    X, y = shard(random(1, 40, 12)), shard(random(2, 40))
    scale = (1 + torch.rand(12, dtype=D, generator=torch.Generator().manual_seed(0))).requires_grad_()
    layer = idf.ArgminLayer(
        lambda w, scale: 0.5 * (X @ w - y).square().sum() + 0.5 * (scale * w).square().sum() / dist.get_world_size(),
        linear_solver=idf.CG(preconditioner=idf.preconditioners.Nystrom(4)),
        process_group=world(),
        polish=True,
    )
    with idf.record() as history:
        solution = layer.solve(torch.zeros(12, dtype=D), scale)
        solution.value.sum().backward()
    assert [entry.kind for entry in history] == ["linear", "forward", "backward"]
    assert scale.grad is not None
    assert solution.backward is not None
    same_everywhere(solution.value, scale.grad, solution.forward.iterations, solution.backward.iterations)
    assert 2 <= int(solution.backward.iterations) <= 12


def check_same_bits_as_one_process() -> None:
    """A sum that rounds nowhere gives what one process gives, and so does its gradient."""
    c, rank = torch.tensor([0.25, -0.5], requires_grad=True), dist.get_rank()
    layer = idf.RootLayer(lambda x, c: (x - c) / 4 if rank < 2 else 0 * x, process_group=world())
    one = idf.RootLayer(lambda x, c: (x - c) / 2)
    got, want = (torch.autograd.grad(f(torch.zeros(2), c).square().sum(), c)[0] for f in (copy.deepcopy(layer), one))
    assert torch.equal(got, want)


def check_trees() -> None:
    """An unknown of two dtypes and an empty leaf, arguments in a dict, a keyword, a float32 outer loss."""
    rank, count = dist.get_rank(), dist.get_world_size()
    here = random(7 + rank, 3)
    mean = sum(random(7 + r, 3) for r in range(count)) / count

    def objective(x: dict[str, Tensor], shift: dict[str, Tensor], *, factor: Tensor) -> Tensor:
        return ((x["a"] - factor * here - shift["a"]) ** 2).sum() + ((x["b"] - shift["b"]) ** 2).sum()

    layer = idf.ArgminLayer(objective, process_group=world())
    shift = {"a": random(5, 3).requires_grad_(), "b": torch.tensor([2.0], requires_grad=True)}
    factor = torch.tensor(2.0, dtype=D, requires_grad=True)
    init = {"a": torch.zeros(3, dtype=D), "b": torch.zeros(1), "empty": torch.zeros(0)}
    x = layer(init, shift, factor=factor)
    close(x["a"], factor.detach() * mean + shift["a"].detach(), 1e-9)
    assert x["b"].dtype == torch.float32
    (x["a"].sum() + 3 * x["b"].sum()).backward()
    close(shift["a"].grad, torch.ones(3, dtype=D), 1e-9)
    close(shift["b"].grad, torch.tensor([3.0]), 1e-6)
    close(factor.grad, mean.sum(), 1e-9)
    nothing = idf.ArgminLayer(lambda x: x.sum(), process_group=world())(torch.zeros(0))
    assert nothing.shape == (0,)


def check_lasso() -> None:
    """The penalty is met in the prox, which is not summed, by the first rank's objective, and where it is captured."""
    X, w = random(22, 12, 5), vector(1, 0, -2, 0, 0.5)
    penalty, ridge = torch.tensor(0.7, dtype=D, requires_grad=True), torch.tensor(0.3, dtype=D, requires_grad=True)
    s, G = vector(1, 0.3, -1, -0.6, 1), X.mT @ X
    # The data are made for the solution w: (G + ridge) w − Xᵀy + penalty s = 0.
    y = X @ torch.linalg.inv(G) @ ((G + 0.3 * torch.eye(5, dtype=D)) @ w + 0.7 * s)
    X_here, y_here = shard(X), shard(y)

    def objective(w: Tensor, *args: Tensor) -> Tensor:
        fit = 0.5 * (X_here @ w - y_here).square().sum()
        return fit + 0.5 * ridge * w.square().sum() if dist.get_rank() == 0 else fit + 0 * ridge

    S = s.abs() == 1
    inverse = torch.linalg.inv(G[S][:, S] + 0.3 * torch.eye(3, dtype=D))
    for proximal, args in (
        (lambda v, step, penalty: prox.lasso(v, step, penalty), (penalty,)),
        (lambda v, step: prox.lasso(v, step, penalty + 0 * ridge), ()),
    ):
        solver = ProximalGradient(proximal, tol=1e-11)
        layer = idf.ArgminLayer(objective, inner_solver=solver, process_group=world())
        x = layer(torch.zeros(5, dtype=D), *args)
        close(x, w, 1e-8)
        got = torch.autograd.grad(x.sum(), (penalty, ridge))
        same_everywhere(x, *got)
        close(got, (-(inverse @ s[S]).sum(), -(inverse @ w[S]).sum()), 1e-6)


def check_inner_solvers() -> None:
    """Each finds what it finds in one process, with the derivative of its own condition."""
    count = dist.get_world_size()
    X, y, start = random(1, 9, 3), random(2, 9), torch.full((3,), 1 / 3, dtype=D)

    def objective(X: Tensor, y: Tensor, parts: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda w, t: 0.5 * (X @ (t * w) - y).square().sum() + w.square().sum() / parts

    for solver in (
        GradientDescent(tol=1e-10, max_iterations=2000),
        LBFGS(tol=1e-10, lower=0.0, upper=0.2),
        MirrorDescent(lambda v, t: torch.softmax(v, -1), torch.log, tol=0.0, max_iterations=30, on_failure="ignore"),
        BlockCoordinateDescent(lambda v, step, t: prox.lasso(v, step, t.sum()), tol=1e-10),
        TorchOptimizer(torch.optim.LBFGS, lr=1.0, tol=1e-9, on_failure="ignore"),
        SciPyMinimize("BFGS", tol=1e-9, on_failure="ignore"),
    ):
        found = []
        for sharded in (True, False):
            t = (1 + 0.1 * random(3, 3)).requires_grad_()
            function = objective(shard(X), shard(y), count) if sharded else objective(X, y, 1)
            group = world() if sharded else None
            x = idf.ArgminLayer(function, inner_solver=solver, process_group=group)(start, t)
            found.append((x, torch.autograd.grad(x.sin().sum(), t)[0]))
        same_everywhere(*found[0])
        close(found[0], found[1], 1e-6)


class Loss(nn.Module):
    """A regression on features that are learned outside; the rank has its own data."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.BatchNorm1d(5)).double().eval()
        self.penalty = nn.Parameter(torch.tensor(0.5, dtype=D))
        self.count = count
        """Over so many processes."""

    def forward(self, w: Tensor, X: Tensor, y: Tensor) -> Tensor:
        fit = 0.5 * (self.features(X) @ w - y).square().sum()
        return fit + 0.5 * self.penalty * w.square().sum() / self.count


def outer_loss(w: Tensor) -> Tensor:
    return w.sin().sum()


def gradients_of_one_process() -> dict[str, Tensor]:
    loss = Loss(1)
    layer = idf.ArgminLayer(loss, inner_solver=NewtonCG(tol=1e-11), linear_solver=idf.CG(rtol=1e-11))
    outer_loss(layer(torch.zeros(5, dtype=D), random(1, 9, 4), random(2, 9))).backward()
    return {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}


def check_module() -> None:
    """A module's parameters are captured tensors: the same gradient as in one process."""
    loss = Loss(dist.get_world_size())
    layer = idf.ArgminLayer(
        loss, inner_solver=NewtonCG(tol=1e-11), linear_solver=idf.CG(rtol=1e-11), process_group=world()
    )
    X, y = shard(random(1, 9, 4)), shard(random(2, 9))
    outer_loss(layer(torch.zeros(5, dtype=D), X, y)).backward()
    got = {name: p.grad for name, p in layer.function.named_parameters()}
    same_everywhere(*got.values())
    want = gradients_of_one_process()
    close([got[name] for name in want], list(want.values()), 1e-8)


class Outer(nn.Module):
    def __init__(self, group: Any) -> None:
        super().__init__()
        self.loss = Loss(1 if group is None else dist.get_world_size())
        self.layer = idf.ArgminLayer(
            self.loss, inner_solver=NewtonCG(tol=1e-11), linear_solver=idf.CG(rtol=1e-11), process_group=group
        )
        self.head = nn.Parameter(torch.ones(5, dtype=D))

    def forward(self, X: Tensor, y: Tensor) -> Tensor:
        return self.head * self.layer(torch.zeros(5, dtype=D), X, y)


def check_in_ddp_with_shards() -> None:
    """The problem is shared, and so is the outer loss: DDP's mean over the ranks changes nothing."""
    model = Outer(world())
    X, y = shard(random(1, 9, 4)), shard(random(2, 9))
    wrapped = DistributedDataParallel(model)
    for _ in range(2):  # DDP rebuilds its buckets after the first step
        model.zero_grad()
        outer_loss(wrapped(X, y)).backward()
    got, want = {name: p.grad for name, p in model.loss.named_parameters()}, gradients_of_one_process()
    same_everywhere(model.head.grad, *got.values())
    close([got[name] for name in want], list(want.values()), 1e-8)


def check_in_ddp_without_shards() -> None:
    """Every rank has a problem of its own: the mean of the gradients, each found in one process."""
    rank, count = dist.get_rank(), dist.get_world_size()
    model, data = Outer(None), [(random(10 + r, 9, 4), random(20 + r, 9)) for r in range(count)]
    wrapped = DistributedDataParallel(model)
    outer_loss(wrapped(*data[rank])).backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model = Outer(None)
    (sum(outer_loss(model(*each)) for each in data) / count).backward()
    close(list(got.values()), [p.grad for p in model.parameters()], 1e-8)


def check_layers_inside_layers() -> None:
    """min over x of (x − z)², z that of Σᵣ (z − t aᵣ)²: so x = t · mean a, shared or not."""
    rank, count = dist.get_rank(), dist.get_world_size()
    mean = sum(float(r + 1) for r in range(count)) / count
    inner = idf.ArgminLayer(
        lambda z, t: (z - t * float(rank + 1)).square().sum(), inner_solver=NewtonCG(tol=1e-11), process_group=world()
    )
    for group in (None, world()):
        outer = idf.ArgminLayer(
            lambda x, t: (x - inner(torch.zeros(1, dtype=D), t)).square().sum(),
            inner_solver=LBFGS(tol=1e-11),
            process_group=group,
        )
        t = torch.tensor([2.0], dtype=D, requires_grad=True)
        x = outer(torch.zeros(1, dtype=D), t)
        (gradient,) = torch.autograd.grad(x.square().sum(), t)
        close((x, gradient), (vector(2 * mean), vector(4 * mean**2)), 1e-9)


@pytest.mark.parametrize(
    "check",
    [
        check_gradients_of_the_mean_loss,
        check_lock_step,
        check_same_bits_as_one_process,
        check_trees,
        check_lasso,
        check_inner_solvers,
        check_module,
        check_in_ddp_with_shards,
        check_in_ddp_without_shards,
        check_layers_inside_layers,
    ],
)
def test_on_all_ranks(processes: Processes, check: Callable[[], None]) -> None:
    processes.run(check)


# ---------------------------------------------------------------------------------------------------------- errors


def check_differences_are_found() -> None:
    """Every rank raises, so that none waits for another one, and the group works afterwards."""
    rank, first = dist.get_rank(), dist.get_rank() == 0
    zero, same = torch.zeros(2, dtype=D), torch.ones(2, dtype=D)
    objective = lambda x, t: (x - t).square().sum()  # noqa: E731
    layer = idf.ArgminLayer(objective, process_group=world())
    own = nn.Parameter(torch.ones(2, dtype=D) + rank)
    alone = nn.Parameter(same.clone())

    def leaf(value: Tensor, followed: bool = True) -> Tensor:
        return value.clone().requires_grad_(followed)

    for what, call in (
        (r"args\[0\] has different values", lambda: layer(zero, leaf(same + rank))),
        (r"args\[0\] has different values", lambda: layer(zero, leaf(-same if first else same))),
        (r"kwargs\['t'\] has different shapes", lambda: layer(zero, t=leaf(same if first else same[:1]))),
        (r"args\[0\] takes part in the derivative on the ranks \[0\]", lambda: layer(zero, leaf(same, first))),
        ("init has different values", lambda: layer(zero + rank, leaf(same))),
        (
            "captured tensor 1 has different values",
            lambda: idf.ArgminLayer(lambda x: objective(x, own), process_group=world())(zero),
        ),
        (
            r"captured tensor 1 takes part in the derivative on the ranks \[0\]",
            lambda: idf.ArgminLayer(lambda x: objective(x, alone if first else same), process_group=world())(zero),
        ),
        (
            "the solution has different values",
            lambda: idf.ArgminLayer(objective, inner_solver=lambda p, x: x + rank, process_group=world())(
                zero, leaf(same)
            ),
        ),
        (
            "different transforms",
            lambda: torch.func.vmap(lambda t: layer(zero, t))(torch.ones(3 if first else 2, 2, dtype=D)),
        ),
        (
            "args\\[0\\] takes part in the derivative",
            lambda: torch.func.jvp(lambda t: layer(zero, t if first else same), (same,), (same,)),
        ),
    ):
        with pytest.raises(idf.ImplicitDiffError, match=what):
            call()
    t = leaf(same)
    layer(zero, t).sum().backward()
    close(t.grad, same, 1e-9)
    # What has no gradient may differ, in shape too.
    layer(zero, same + rank)
    layer(zero, same[:1] if first else same)


def check_refusals() -> None:
    residual = lambda x, t: x - t  # noqa: E731
    for arguments, match in (
        ((idf.LeastSquares(residual), None), "LeastSquares with a process_group"),
        ((sum, idf.Stationary(sum, chunks=(0, 0, 2))), "chunks"),
        ((sum, idf.Root(residual)), "Root has none"),
    ):
        with pytest.raises(idf.ImplicitDiffError, match=match):
            idf.ArgminLayer(arguments[0], condition=arguments[1], process_group=world())
    other = dist.new_group([0])
    if dist.get_rank():
        with pytest.raises(TypeError, match="of which this process is a member"):
            idf.RootLayer(residual, process_group=other)
    else:
        t = torch.ones(2, requires_grad=True)
        idf.RootLayer(residual, process_group=other)(torch.zeros(2), t).sum().backward()
        assert torch.equal(t.grad, torch.ones(2))
    close(
        idf.ArgminLayer(
            lambda x, t: (x - t).square().sum(),
            condition=idf.Stationary(lambda x, t: (x - t).square().sum()),
            process_group=world(),
        )(torch.zeros(2), torch.tensor([1.0, 2.0 * dist.get_rank()])),
        torch.tensor([1.0, dist.get_world_size() - 1.0]),
        1e-5,
    )


def check_nobody_is_connected() -> None:
    layer = idf.RootLayer(lambda x: x - 1, process_group=world())
    group = world()
    dist.destroy_process_group()
    for call in (lambda: layer(torch.zeros(2)), lambda: idf.RootLayer(lambda x: x, process_group=group)):
        with pytest.raises(idf.ImplicitDiffError, match="not initialised"):
            call()


@pytest.mark.parametrize("check", [check_differences_are_found, check_refusals])
def test_errors_on_all_ranks(processes: Processes, check: Callable[[], None]) -> None:
    processes.run(check)


def test_a_group_that_is_gone(processes: Processes) -> None:
    processes.run(check_nobody_is_connected)
    processes.stop()


def test_what_is_no_group() -> None:
    with pytest.raises(TypeError, match="process_group is 'gloo'"):
        idf.FixedPointLayer(torch.cos, process_group="gloo")


def test_checksums_tell_tensors_apart() -> None:
    x = random(0, 2, 3)
    others = [-x, x.flip(0), x + 1e-15, torch.where(x == x[0, 0], -x, torch.where(x == x[1, 1], -x, x)), x * torch.nan]
    sums = {_checksum(t) for t in [x, *others, *(t.float() for t in (x, -x)), x + 1j * x, x.flip(0) + 1j * x]}
    assert len(sums) == 10
    zeros = torch.zeros(4)
    assert _checksum(zeros) == _checksum(-zeros)
    assert _checksum(x.mT) == _checksum(x.mT.contiguous())
    assert _checksum(torch.zeros(0)) == 0
    assert _checksum(x.to(torch.bfloat16)) != _checksum(-x.to(torch.bfloat16))


def test_nothing_is_zero_beside_any_value() -> None:
    x = vector(1, torch.inf, torch.nan, -torch.inf).requires_grad_()
    value = nothing([x], x) * torch.nan
    assert float(nothing([x], x).detach()) == 0
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    assert torch.equal(gradient, torch.zeros(4, dtype=D))
    assert torch.equal(torch.autograd.grad(gradient.sum(), x)[0], torch.zeros(4, dtype=D))
