"""QPLayer beside qpth and cvxpylayers: batches of dense quadratic programs, forward and backward.

    min ½ ‖L x‖² + qᵀx   subject to   A x = b, G x ≤ h

with a chosen, strictly complementary optimum, a third of the free dimensions taken by active inequalities. First all
three have to agree on x and on the gradients in L, q, A, b, G and h, to 1e-6 of the largest entry. Then they are timed
in turns: medians, double precision. Run as ``python -m benchmarks.quadratic_programs``; needs qpth and cvxpylayers.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import cvxpy
import torch
from cvxpylayers.torch import CvxpyLayer
from qpth.qp import QPFunction
from torch import Tensor

from implicitdiff import QPLayer

AGREEMENT = 1e-6
SETTINGS = {"solve_method": "SCS", "eps": 1e-9, "mode": "dense"}
"""Of cvxpylayers: by default it stops at 1e-4. Clarabel, which sees ‖L x‖² as a cone, ends at 5e-6 in x."""

Layer = Callable[..., Tensor]
"""(L, q, A, b, G, h) ↦ x"""


def problems(batch: int, n: int, p: int, m: int) -> list[Tensor]:
    """L, q, A, b, G, h, made for an optimum x with multipliers ν and μ and slacks s."""
    torch.manual_seed(0)
    random = lambda *shape: torch.randn(batch, *shape, dtype=torch.float64)  # noqa: E731
    L = torch.eye(n, dtype=torch.float64) + 0.5 * random(n, n) / n**0.5
    A, G = random(p, n) / n**0.5, random(m, n) / n**0.5
    x, nu, is_active = random(n), random(p), torch.arange(m) < (n - p) // 3
    mu, s = is_active * (1 + random(m).abs()), ~is_active * (1 + random(m).abs())
    times = lambda M, v: (M @ v.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    q = -times(L.mT @ L, x) - times(A.mT, nu) - times(G.mT, mu)
    return [L, q, A, times(A, x), G, times(G, x) + s]


def implicitdiff_layer() -> Layer:
    layer = QPLayer()
    return lambda L, q, A, b, G, h: layer(L.mT @ L, q, A, b, G, h)


def qpth_layer() -> Layer:
    layer = QPFunction(verbose=-1)
    return lambda L, q, A, b, G, h: layer(L.mT @ L, q, G, h, A, b)


def cvxpylayers_layer(n: int, p: int, m: int) -> Layer:
    x = cvxpy.Variable(n)
    L, q, A, b, G, h = (cvxpy.Parameter(s) for s in ((n, n), n, (p, n), p, (m, n), m))
    objective = cvxpy.Minimize(0.5 * cvxpy.sum_squares(L @ x) + q @ x)
    layer = CvxpyLayer(cvxpy.Problem(objective, [A @ x == b, G @ x <= h]), [L, q, A, b, G, h], [x])
    return lambda *args: layer(*args, solver_args=SETTINGS)[0]


def interleaved(functions: dict[str, Callable[[], object]], budget: float = 4.0) -> dict[str, float]:
    """Median seconds of each function, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < 3 or time.perf_counter() - start < budget:
        for name, function in functions.items():
            before = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - before)
    return {name: statistics.median(t) for name, t in times.items()}


def compare(batch: int, n: int, p: int, m: int) -> None:
    args = [v.requires_grad_() for v in problems(batch, n, p, m)]
    layers = {
        "implicitdiff": implicitdiff_layer(),
        "qpth": qpth_layer(),
        "cvxpylayers": cvxpylayers_layer(n, p, m),
    }
    w = torch.randn(batch, n, dtype=torch.float64)
    x = {name: layer(*args) for name, layer in layers.items()}
    gradients = {name: torch.autograd.grad(v, args, w, retain_graph=True) for name, v in x.items()}
    worst = {}
    for name in ("qpth", "cvxpylayers"):
        pairs = [(x["implicitdiff"], x[name]), *zip(gradients["implicitdiff"], gradients[name], strict=True)]
        worst[name] = max(float((a - b).detach().abs().max() / a.detach().abs().max().clamp(min=1)) for a, b in pairs)
        assert worst[name] <= AGREEMENT, f"{name} differs by {worst[name]:.1e} from implicitdiff"
    forward = interleaved({name: lambda layer=layer: layer(*args) for name, layer in layers.items()})
    backward = interleaved(
        {name: lambda v=v: torch.autograd.grad(v, args, w, retain_graph=True) for name, v in x.items()}
    )
    both = {name: forward[name] + backward[name] for name in layers}
    for what, times in (("forward", forward), ("backward", backward), ("both", both)):
        label = f"{batch} of n = {n}, {p} = , {m} ≤" if what == "forward" else ""
        row = " ".join(f"{1e3 * t:10.2f} ({t / times['implicitdiff']:6.2f})" for t in times.values())
        print(f"{label:>26} {what:>9} {row}", flush=True)
    print(f"{'':36} differ by at most {worst['qpth']:.0e} (qpth), {worst['cvxpylayers']:.0e} (cvxpylayers)", flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ms (ratio to implicitdiff)")
    print(f"{'':36} " + " ".join(f"{name:>19}" for name in ("implicitdiff", "qpth", "cvxpylayers")))
    for batch in (1, 64, 256):
        for n, p, m in ((10, 2, 10), (20, 5, 20), (50, 10, 50)):
            compare(batch, n, p, m)


if __name__ == "__main__":
    main()
