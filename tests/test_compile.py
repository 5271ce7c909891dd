"""``compile=True`` gives the numbers and reports of the eager loop, or goes on eagerly and says why; check_every."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import implicitdiff as idf
from implicitdiff.inner_solvers import LBFGS, Anderson, FixedPointIteration, GradientDescent, ProximalGradient
from implicitdiff.operators import DenseOperator, FunctionOperator

# The compiler itself warns of what it imports.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def strict_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch checks what it compiles more strictly where CI is set, as it is where most users' tests run."""
    monkeypatch.setenv("CI", "true")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definite(*batch: int, n: int = 6) -> Tensor:
    X = random(*batch, n + 2, n)
    return X.mT @ X + torch.eye(n, dtype=X.dtype)


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def same_reports(one: idf.SolveInfo, other: idf.SolveInfo, atol: float = 1e-12) -> None:
    for name in ("iterations", "status", "converged"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)
    torch.testing.assert_close(one.residual_norm, other.residual_norm, rtol=1e-6, atol=atol, equal_nan=True)


NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler"
)
SLOW = pytest.mark.slow  # a compilation each


@NEEDS_COMPILER
@pytest.mark.parametrize(
    "solver",
    [
        idf.CG,
        pytest.param(idf.MINRES, marks=SLOW),
        *(pytest.param(s, marks=SLOW) for s in (idf.BiCGStab, idf.NormalCG, idf.LSMR)),
    ],
    ids=lambda s: s.__name__,
)
def test_linear_solves_have_the_same_numbers_and_reports(solver: Any) -> None:
    eager, compiled = solver(rtol=1e-8), solver(rtol=1e-8, compile=True)
    b = random(3, 6, seed=1)
    b[1] = 0
    before = 0
    for scale in (1.0, 3.0):  # other values: no other compilation
        A = DenseOperator(scale * definite(3), "positive_definite")
        want, got = eager(A, b), compiled(A, b)
        torch.testing.assert_close(got.value, want.value, rtol=1e-9, atol=1e-12)
        # The last of n steps leaves what rounding does, which normal equations amplify: far below the 1e-8 asked for.
        same_reports(got.info, want.info, atol=1e-9)
        assert got.info.matvecs == want.info.matvecs
        assert before in (0, compilations())
        before = compilations()
    if solver in (idf.CG, idf.MINRES):
        for one, other in zip(got.info.eigenvalue_range, want.info.eigenvalue_range, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, equal_nan=True)


@NEEDS_COMPILER
def test_how_a_compiled_solve_ends() -> None:
    indefinite = torch.diag(torch.tensor([1.0, 2.0, -3.0, 4.0, 5.0, 6.0], dtype=torch.float64))
    A = DenseOperator(torch.stack([definite(), indefinite, definite() * torch.nan]), "symmetric")
    b = torch.ones(3, 6, dtype=torch.float64)
    for limit in (None, 3):  # 3 is not a multiple of the steps in one call
        eager, compiled = (
            idf.CG(rtol=1e-10, max_iterations=limit, on_failure="ignore", compile=c)(A, b).info for c in (False, True)
        )
        same_reports(compiled, eager)
    assert compiled.iterations[0] == 3


X, Y = random(20, 4), random(20, seed=1)
W = 0.9 * random(5, 5) / torch.linalg.matrix_norm(random(5, 5), 2)


def ridge(w: Tensor, strength: Tensor) -> Tensor:
    return ((X @ w - Y) ** 2).mean() + strength * (w * w).sum()


def update(z: Tensor, u: Tensor) -> Tensor:
    return torch.tanh(W @ z + u)


LAYERS: dict[str, tuple[Callable[[bool], idf.ArgminLayer | idf.FixedPointLayer], Tensor, Tensor]] = {
    "gradient descent, momentum; CG": (
        lambda c: idf.ArgminLayer(
            ridge,
            inner_solver=GradientDescent(0.2, momentum=0.5, nesterov=True, compile=c),
            linear_solver=idf.CG(compile=c),
        ),
        torch.zeros(4, dtype=torch.float64),
        torch.tensor(0.1, dtype=torch.float64),
    ),
    "iteration": (
        lambda c: idf.FixedPointLayer(update, inner_solver=FixedPointIteration(compile=c)),
        torch.zeros(5, dtype=torch.float64),
        random(5),
    ),
    "Anderson; BiCGStab": (
        lambda c: idf.FixedPointLayer(update, inner_solver=Anderson(compile=c), linear_solver=idf.BiCGStab(compile=c)),
        torch.zeros(5, dtype=torch.float64),
        random(5),
    ),
}


@NEEDS_COMPILER
@pytest.mark.parametrize("name", [name if name == "iteration" else pytest.param(name, marks=SLOW) for name in LAYERS])
def test_layers_have_the_same_solutions_reports_and_derivatives(name: str) -> None:
    make, x0, arg = LAYERS[name]
    solutions = {}
    for compiled in (False, True):
        layer, theta = make(compiled), arg.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            solution = layer.solve(x0, theta)
            (gradient,) = torch.autograd.grad(solution.value.square().sum(), theta)
        solutions[compiled] = solution, gradient, layer
    (eager, want, _), (compiled, got, layer) = solutions[False], solutions[True]
    torch.testing.assert_close(compiled.value, eager.value, rtol=1e-10, atol=1e-12)
    same_reports(compiled.forward, eager.forward)
    same_reports(compiled.backward, eager.backward)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    if name.startswith("gradient"):  # the solvers are compiled below every transform
        batched = torch.func.vmap(torch.func.grad(lambda a: layer(x0, a).square().sum()))(torch.stack([arg, 2 * arg]))
        torch.testing.assert_close(batched[0], want, rtol=1e-8, atol=1e-12)


@NEEDS_COMPILER
@pytest.mark.filterwarnings("error:.*goes on uncompiled:UserWarning")
def test_what_a_function_closes_over_is_not_frozen() -> None:
    target = torch.ones(2, dtype=torch.float64)

    def objective(x: Tensor, scale: Tensor) -> Tensor:
        return (scale * x - target).square().sum()

    layer = idf.ArgminLayer(objective, inner_solver=GradientDescent(0.3, compile=True))
    scale = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(layer(torch.zeros_like(target), scale), torch.ones_like(target))
    target = torch.full_like(target, 3.0)
    torch.testing.assert_close(layer(torch.zeros_like(target), scale), torch.full_like(target, 3.0))


@SLOW
@NEEDS_COMPILER
def test_a_module_and_its_parameters() -> None:
    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.target = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x - self.target).square().sum() + (x**4).sum() / 4

    module = Distance()
    grads = []
    for compiled in (False, True):
        layer = idf.ArgminLayer(module, inner_solver=GradientDescent(0.05, tol=1e-10, compile=compiled))
        (gradient,) = torch.autograd.grad(layer(torch.zeros(2, dtype=torch.float64)).sum(), module.target)
        grads.append(gradient)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-8, atol=0)


def branching(x: Tensor, t: Tensor) -> Tensor:
    return (x - t).square().sum() if float(x.sum()) > -1e9 else x.sum()


FALLBACKS: dict[str, tuple[Callable[[], Any], str]] = {
    "a line search": (lambda: idf.ArgminLayer(ridge_to(0.0), inner_solver=GradientDescent(compile=True)), "decide by"),
    "LBFGS": (lambda: idf.ArgminLayer(ridge_to(0.0), inner_solver=LBFGS(compile=True)), "decide by values"),
    "a proximal step": (
        lambda: idf.ArgminLayer(ridge_to(0.0), inner_solver=ProximalGradient(lambda v, s, t: v, compile=True)),
        "decide by values",
    ),
    "a function that branches": (
        lambda: idf.ArgminLayer(branching, inner_solver=GradientDescent(0.4, compile=True)),
        "torch.compile failed with",
    ),
}


def ridge_to(strength: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: (x - t).square().sum() + strength * x.square().sum()


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_cannot_be_compiled_goes_on_with_one_warning(name: str) -> None:
    make, reason = FALLBACKS[name]
    layer, t = make(), torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            x = layer(torch.zeros(2, dtype=torch.float64), t)
    said = [w for w in caught if "compile=True" in str(w.message)]
    assert len(said) == 1
    assert reason in str(said[0].message)
    assert said[0].filename == __file__
    torch.testing.assert_close(x, t.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), t)[0], torch.ones(2, dtype=torch.float64))


@NEEDS_COMPILER
def test_a_failed_compilation_leaves_the_process_healthy() -> None:
    layer = idf.ArgminLayer(branching, inner_solver=GradientDescent(0.4, compile=True))
    t = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="goes on uncompiled"):
        layer(torch.zeros(2, dtype=torch.float64), t)
    assert torch._C._functorch.peek_interpreter_stack() is None
    _, tangent = torch.func.jvp(torch.sin, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(tangent, t.cos())
    torch.testing.assert_close(torch.compile(torch.func.grad(lambda t: t.sin().sum()), fullgraph=True)(t), t.cos())
    hessian = torch.func.hessian(lambda t: layer(torch.zeros_like(t), t.sin()).sum())(t)
    torch.testing.assert_close(hessian, torch.diag(-t.sin()), rtol=1e-6, atol=1e-9)


def test_an_error_of_the_users_function_is_the_users_error() -> None:
    def wrong(x: Tensor, t: Tensor) -> Tensor:
        raise KeyError("no such key")

    layer = idf.ArgminLayer(wrong, inner_solver=GradientDescent(0.4, compile=True))
    with pytest.raises(KeyError, match="no such key"):
        layer(torch.zeros(2), torch.ones(2))


def test_gmres_says_at_once_that_it_is_not_compiled() -> None:
    A, b = DenseOperator(definite()), random(6)
    with pytest.warns(UserWarning, match=r"GMRES\(compile=True\) goes on uncompiled.*shapes of its own"):
        solution = idf.GMRES(rtol=1e-10, compile=True)(A, b)
    torch.testing.assert_close(definite() @ solution.value, b, rtol=1e-8, atol=1e-9)


@NEEDS_COMPILER
def test_a_layer_inside_the_users_torch_compile() -> None:
    layer = idf.RootLayer(lambda x, y: x * x - y)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([4.0, 9.0], dtype=torch.float64))

        def forward(self, t: Tensor) -> Tensor:
            return (layer(torch.ones_like(t), self.scale * t) * 2).sum()

    model = Model()
    t = torch.tensor([1.0, 4.0], dtype=torch.float64)
    value = torch.compile(model)(t)
    torch.testing.assert_close(value, 2 * (model.scale * t).sqrt().sum())
    (gradient,) = torch.autograd.grad(value, model.scale)
    torch.testing.assert_close(gradient, (t / model.scale).sqrt().detach())


class HostReads(TorchDispatchMode):
    """Counts how often a value is read from a tensor, which on an accelerator waits for it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("solver", [idf.CG, idf.MINRES, idf.BiCGStab, idf.GMRES], ids=lambda s: s.__name__)
def test_between_looks_nothing_is_read(solver: Any, batch: tuple[int, ...]) -> None:
    matrix, b = definite(*batch, n=12), random(*batch, 12)
    A = FunctionOperator(lambda v: (matrix @ v.unsqueeze(-1)).squeeze(-1), 12, structure="symmetric", dtype=b.dtype)
    want = solver(rtol=1e-10)(A, b)
    reads = {}
    for every in (1, 5, 100):
        with HostReads() as mode:
            got = solver(rtol=1e-10, check_every=every)(A, b)
        reads[every] = mode.count
        torch.testing.assert_close(got.value, want.value, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(got.info.iterations, want.info.iterations, rtol=0, atol=1)
    steps = int(want.info.iterations.max())
    assert reads[1] >= reads[5] + steps // 2
    restarts = 100 // 12 if solver is idf.GMRES else 0  # a cycle ends with one
    assert reads[100] <= 12 + restarts  # what does not depend on the steps


def test_inner_solvers_look_as_often_as_they_are_told() -> None:
    make = lambda every: idf.FixedPointLayer(  # noqa: E731
        update, inner_solver=FixedPointIteration(tol=1e-12, check_every=every)
    )
    reads, values = [], []
    for every in (1, 50):
        with HostReads() as mode, torch.no_grad():
            solution = make(every).solve(torch.zeros(5, dtype=torch.float64), random(5))
        reads.append(mode.count)
        values.append(solution.value)
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    assert reads[1] < reads[0] - int(solution.forward.iterations) + 5


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_check_every_is_a_whole_number(value: Any) -> None:
    for make in (idf.CG, GradientDescent):
        with pytest.raises(ValueError, match="check_every is"):
            make(check_every=value)
