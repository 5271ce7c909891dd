"""Products in bfloat16 and float16 with iterative refinement, beside the same solver in float32.

For each workload: the time of one product with the Hessian in the lower precision over that in float32 and its error,
then the time of a whole solve to a relative residual of 1e-6 by ``MixedPrecision(CG())`` over that by ``CG()``, with
the error of both against a solve in float64, and the number of products. Interleaved, medians; CPU seconds on a CPU,
where float16 is left out unless asked for. Run as
``python -m benchmarks.mixed_precision [--device cuda] [--dtypes bfloat16 float16]``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import implicitdiff as idf
from imaml.models import MLP

from .problems import Workload, _network, mlp

RTOL, NOISE = 1e-6, 0.05


class Block(nn.Module):
    """A transformer's block and a linear head; attention is written out, as torch's own has no second derivative."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.projection, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).mT for t in self.projection(self.norms[0](x)).chunk(3, dim=-1))
        q, k, v = (t.movedim(-1, -3) for t in (q, k, v))  # (batch, heads, length, width / heads)
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        x = x + self.out((weights @ v).movedim(-3, -2).flatten(-2))
        x = x + self.mlp(self.norms[1](x))
        return self.head(x.mean(-2))


def wide(width: int, layers: int, rows: int, strength: float) -> Workload:
    """An MLP with hidden layers of one width."""
    torch.manual_seed(0)
    name = f"{layers} layers of {width}, {rows} rows"
    return _fitted(name, MLP([width] * (layers + 1) + [1]), torch.randn(rows, width), strength)


def block(width: int, batch: int, length: int, strength: float) -> Workload:
    torch.manual_seed(0)
    name = f"block of width {width}, {batch} × {length} tokens"
    return _fitted(name, Block(width, width // 64), torch.randn(batch, length, width), strength)


def _fitted(name: str, model: nn.Module, inputs: Tensor, strength: float) -> Workload:
    """With targets that the network fits but for some noise: its Hessian is then definite with a small strength."""
    with torch.no_grad():
        fit = model(inputs)
    targets = fit + NOISE * fit.std() * torch.randn_like(fit)
    count = sum(p.numel() for p in model.parameters())
    name = f"{name} ({count / 1e6:.1f}M parameters), λ = {strength:g}"
    return _network(name, model, inputs, targets, nn.functional.mse_loss, strength)


def workloads() -> list[Workload]:
    return [
        mlp(),
        wide(1024, 2, 512, 1.0),
        wide(1024, 2, 512, 0.1),
        wide(2048, 2, 512, 0.3),
        block(512, 8, 64, 1.0),
        block(512, 8, 64, 0.3),
    ]


def in_backward(work: Workload, device: str, dtype: torch.dtype, linear_solver: Any) -> None:
    """Run a linear solver, or a callable (A, b) -> x, on what a backward pass of the workload gives it."""
    x = {k: v.to(device, dtype) for k, v in work.x.items()}
    args = [a.detach().to(device, dtype) for a in work.args]
    attached = idf.attach(
        idf.Stationary(work.objective), x, args[0].requires_grad_(), *args[1:], linear_solver=linear_solver
    )
    # An outer loss on other data; without the pull towards the meta-parameters, whose gradient is 0 here.
    work.objective(attached, args[0].detach(), args[1].flip(0), -args[2]).backward()


def seconds(function: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def interleaved(functions: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of each function, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return {name: statistics.median(t) for name, t in times.items()}


def measure(work: Workload, device: str, dtypes: list[torch.dtype], rounds: int) -> None:
    exact: list[Tensor] = []

    def solve_exactly(A: idf.LinearOperator, b: Tensor) -> Tensor:
        exact.append(idf.CG(rtol=1e-12, max_iterations=2000, on_failure="ignore").solve(A, b).value)
        return exact[0]

    def compare(A: idf.LinearOperator, b: Tensor) -> Tensor:
        cg = idf.CG(rtol=RTOL, on_failure="ignore")
        solvers: dict[str, idf.LinearSolver] = {"float32": cg}
        operators = {"float32": A}
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            solvers[name], operators[name] = idf.MixedPrecision(cg, dtype=dtype), A.in_precision(dtype)
        products = interleaved({n: (lambda o=o: o(b)) for n, o in operators.items()}, device, 3 * rounds)
        solves = interleaved({n: (lambda s=s: s.solve(A, b)) for n, s in solvers.items()}, device, rounds)
        product = A(b)
        for name, solver in solvers.items():
            solution = solver.solve(A, b)
            info, lost = solution.info, float((operators[name](b) - product).norm() / product.norm())
            error = float((solution.value.double() - exact[0]).norm() / exact[0].norm())
            print(
                f"    {name:9} product {1e3 * products[name]:7.2f} ms ({products[name] / products['float32']:4.2f}), "
                f"error {lost:7.1e} | solve {1e3 * solves[name]:8.1f} ms ({solves[name] / solves['float32']:4.2f}), "
                f"error {error:7.1e}, residual {float(info.residual_norm):7.1e} "
                f"{idf.Status(int(info.status)).name.lower()}, {info.matvecs} products: {info.method}",
                flush=True,
            )
        return solution.value

    print(work.name)
    in_backward(work, device, torch.float64, solve_exactly)
    in_backward(work, device, torch.float32, compare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {given.device}, {torch.get_num_threads()} threads; in brackets: over float32")
    for work in workloads():
        measure(work, given.device, [getattr(torch, name) for name in given.dtypes], given.rounds)


if __name__ == "__main__":
    main()
