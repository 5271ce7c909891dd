"""Products in a lower precision: refined to the asked tolerance, or said not to be; and layers under autocast."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff import Status
from implicitdiff._jacobian import JacobianOperator
from implicitdiff.linear_solvers.mixed_precision import MixedPrecision
from implicitdiff.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    FunctionOperator,
    LinearOperator,
    LowRankUpdate,
    SparseOperator,
)
from implicitdiff.preconditioners import Jacobi
from implicitdiff.testing.linear_solver import true_residual

from ..problems import random, rotated, second_difference, spread, with_singular_values

N = 24
BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
H, G = rotated(spread(10, N), 1), with_singular_values(spread(5, N), 2)


def nonlinear_jacobian(residual: Callable[[Tensor], Tensor], structure: Any) -> LinearOperator:
    return JacobianOperator(residual, torch.linspace(-1, 1, N), structure)


def operators() -> dict[str, tuple[LinearOperator, Tensor]]:
    """Operators in float32 and their matrices in float64, of which bfloat16 carries every product but loses digits."""
    h, g = H.float(), G.float()
    slope = 1 - (G @ torch.linspace(-1, 1, N, dtype=torch.float64)).tanh() ** 2
    dense, general = DenseOperator(h, "positive_definite"), DenseOperator(g)
    U = random(3, N, 2)
    return {
        "dense": (general, G),
        "transposed": (general.T, G.mT),
        "function": (FunctionOperator(lambda v: v @ g.mT, N, rmatvec=lambda v: v @ g, dtype=torch.float32), G),
        "sum": (general + dense, G + H),
        "scaled and shifted": ((2.0 * general).shift(0.5), 2 * G + 0.5 * torch.eye(N)),
        "product": (general @ dense, G @ H),
        "low rank": (LowRankUpdate(dense, U.float()), H + U @ U.mT),
        "blocks": (BlockDiagonalOperator(general, dense), torch.block_diag(G, H)),
        "Jacobian": (nonlinear_jacobian(lambda x: torch.tanh(g @ x), "general"), slope[:, None] * G),
        "Hessian": (nonlinear_jacobian(lambda x: h @ x + 0 * x**2, "symmetric"), H),
    }


@DTYPES
@pytest.mark.parametrize("name", operators())
def test_products_are_those_of_the_operator_with_few_digits(name: str, dtype: torch.dtype) -> None:
    """Fails for A in the place of Aᵀ, and where the product is computed in full precision after all."""
    A, matrix = operators()[name]
    low, eps = A.in_precision(dtype), torch.finfo(dtype).eps
    v = random(4, N if name != "blocks" else 2 * N)
    for product, exact in ((low.matvec, matrix @ v), (low.rmatvec, matrix.mT @ v), (low.T.matvec, matrix.mT @ v)):
        found = product(v.float())
        assert found.dtype == torch.float32
        error = float((found - exact).norm() / exact.norm())
        assert 0.01 * eps < error < 2 * eps, error
    assert (low.shape, low.structure, low.dtype) == (A.shape, A.structure, A.dtype)


def test_a_sparse_operator_keeps_its_precision() -> None:
    """torch has no sparse product in bfloat16, so inside autocast it would fail."""
    A = SparseOperator(second_difference(N).float().to_sparse(), "positive_definite")
    v = random(1, N).float()
    assert torch.equal(A.in_precision(BF16)(v), A(v))
    with torch.autocast("cpu", BF16):
        assert torch.equal(A(v), A.in_precision(BF16)(v))


# ------------------------------------------------------------------------------------------------------- refinement


@DTYPES
@pytest.mark.parametrize(
    ("solver", "matrix", "structure"),
    [
        (idf.CG(), H, "positive_definite"),
        (idf.MINRES(), H - 0.3 * torch.eye(N), "symmetric"),
        (idf.GMRES(), G, "general"),
        (idf.BiCGStab(), torch.eye(N) + 0.2 * G / 5, "general"),
    ],
    ids=["CG", "MINRES", "GMRES", "BiCGStab"],
)
def test_is_as_accurate_as_in_full_precision(solver: Any, matrix: Tensor, structure: Any, dtype: torch.dtype) -> None:
    """Against dense algebra in float64: without refinement the error would be a thousand times as large."""
    A, b = DenseOperator(matrix.float(), structure), random(5, N)
    exact = torch.linalg.solve(matrix.float().double(), b.float().double())
    solution = MixedPrecision(solver, dtype=dtype)(A, b.float())
    assert bool(solution.info.converged)
    assert true_residual(A.matrix, solution.value, b.float())[0] <= 1.3e-6  # rounding adds 2e-7 to the asked 1e-6
    error = float((solution.value - exact).norm() / exact.norm())
    assert error <= float(torch.linalg.cond(matrix)) * 1.3e-6
    unrefined = solver.solve(A.in_precision(dtype), b.float()).value  # without the warning that it is not solved
    assert float((unrefined - exact).norm() / exact.norm()) > 30 * error


def test_each_system_by_its_own() -> None:
    """Systems of condition numbers 1 … 100, b = 0, one beyond bfloat16 and a NaN: what each is alone, it is there."""
    matrices = [rotated(spread(c, N), i).float() for i, c in enumerate((1.0, 10.0, 50.0, 10.0, 1e6, 10.0))]
    A, b = torch.stack(matrices), random(6, 6, N).float()
    b[3], b[5, 2] = 0, torch.nan
    solver = MixedPrecision(idf.CG(rtol=1e-5, on_failure="ignore"))
    together = solver(DenseOperator(A, "positive_definite"), b)
    status = together.info.status.tolist()
    assert [status[i] for i in (0, 1, 2, 3, 5)] == [Status.CONVERGED] * 4 + [Status.NON_FINITE]
    assert status[4] in (Status.STAGNATED, Status.INDEFINITE)
    assert torch.equal(together.value[3], torch.zeros(N))
    assert int(together.info.iterations[3]) == 0
    for i in (0, 1, 2, 4):
        alone = solver(DenseOperator(A[i], "positive_definite"), b[i])
        residual, rounding = true_residual(A[i], together.value[i], b[i])
        assert abs(float(together.info.residual_norm[i] - residual)) <= float(rounding)
        assert bool(alone.info.converged) == bool(together.info.converged[i])
        # The one that is not solved follows its rounding, but is left alone once it has ended.
        steps = int(alone.info.iterations)
        assert abs(steps - int(together.info.iterations[i])) <= (0.5 if i == 4 else 0.2) * steps


def test_what_the_low_precision_cannot_resolve_is_reported() -> None:
    """Fails where the recursive residual of the corrections is believed; and x is never worse than its start."""
    A, b = DenseOperator(rotated(spread(1e6, N), 1).float(), "positive_definite"), random(7, N).float()
    with pytest.warns(idf.ConvergenceWarning, match=r"MixedPrecision\(MINRES, bfloat16\): . corrections"):
        solution = MixedPrecision(idf.MINRES())(A, b)
    assert not bool(solution.info.converged)
    residual, rounding = true_residual(A.matrix, solution.value, b)
    assert abs(float(solution.info.residual_norm - residual)) <= float(rounding)
    assert float(residual) <= 1 + float(rounding)
    with pytest.raises(idf.ConvergenceError, match="MixedPrecision"):
        MixedPrecision(idf.MINRES(on_failure="raise"))(A, b)


def test_what_float32_cannot_resolve_is_not_claimed() -> None:
    A = DenseOperator(H.float(), "positive_definite")
    info = MixedPrecision(idf.CG(rtol=1e-8, on_failure="ignore"))(A, random(5, N).float()).info
    assert int(info.status) == Status.STAGNATED
    assert not bool(info.converged)


def test_an_overflow_of_float16_is_named() -> None:
    A = DenseOperator(1e6 * torch.eye(3), "positive_definite")
    info = MixedPrecision(idf.CG(on_failure="ignore"), dtype=FP16)(A, torch.ones(3)).info
    assert int(info.status) == Status.NON_FINITE
    assert bool(MixedPrecision(idf.CG(), dtype=BF16)(A, torch.ones(3)).info.converged)


def test_small_right_hand_sides_do_not_underflow() -> None:
    """The residuals of later corrections too are far below what float16 holds."""
    A, b = DenseOperator(H.float(), "positive_definite"), random(5, N).float()
    for scale in (1e-30, 1e30):
        assert bool(MixedPrecision(idf.CG(), dtype=FP16)(A, scale * b).info.converged)


def test_the_settings_are_those_of_the_given_solver() -> None:
    s = MixedPrecision(idf.CG(rtol=1e-3, atol=0.1, on_failure="raise"))
    assert (s.rtol, s.atol, s.on_failure) == (1e-3, 0.1, "raise")
    A, b = DenseOperator(H.float(), "positive_definite"), random(5, N).float()
    few = MixedPrecision(idf.CG(max_iterations=7, on_failure="ignore"))(A, b).info
    assert (int(few.iterations), int(few.status)) == (7, Status.MAX_ITERATIONS)
    exact = torch.linalg.solve(H, b.double()).float()
    assert int(MixedPrecision(idf.CG(rtol=1e-5))(A, b, exact).info.iterations) == 0
    zero = MixedPrecision(idf.CG())(A, 0 * b, exact)
    assert torch.equal(zero.value, 0 * b)
    assert int(zero.info.iterations) == 0
    warm = MixedPrecision(idf.CG(rtol=1e-5, warm_start=True))
    first, second = (int(warm(A, b).info.iterations) for _ in range(2))
    assert first > 0
    assert second == 0


def test_a_preconditioner_is_made_once_and_used() -> None:
    calls = []

    def jacobi(A: LinearOperator) -> Callable[[Tensor], Tensor]:
        calls.append(A)
        return Jacobi()(A)

    d = spread(1e3, N).sqrt()
    A = DenseOperator((d[:, None] * H * d).float(), "positive_definite")
    plain, preconditioned = (
        MixedPrecision(idf.CG(rtol=1e-5, preconditioner=p, on_failure="ignore"))(A, random(5, N).float()).info
        for p in (None, jacobi)
    )
    assert len(calls) == 1
    assert bool(preconditioned.converged)
    assert int(preconditioned.iterations) < 0.7 * int(plain.iterations)


def test_products_are_counted() -> None:
    calls, h = [0], H.float()

    def matvec(v: Tensor) -> Tensor:
        calls[0] += 1
        return v @ h

    A = FunctionOperator(matvec, N, structure="positive_definite", dtype=torch.float32)
    with torch.no_grad():
        info = MixedPrecision(idf.CG())(A, random(5, N).float()).info
    assert info.matvecs == calls[0]
    steps = int(info.iterations)
    said = f"MixedPrecision(CG, bfloat16): {info.matvecs - steps} corrections, by {steps} of the products"
    assert info.method == said


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: MixedPrecision(idf.Dense()), TypeError, "iterative"),
        (lambda: MixedPrecision(idf.CG), TypeError, "CG()"),
        (lambda: MixedPrecision(idf.CG(), dtype=torch.float64), ValueError, "bfloat16"),
        (
            lambda: MixedPrecision(idf.CG())(DenseOperator(torch.eye(2).cfloat()), torch.ones(2).cfloat()),
            idf.ImplicitDiffError,
            "complex64",
        ),
    ],
)
def test_what_is_not_accepted(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


# ----------------------------------------------------------------------------------------------------------- layers

X, Y, V = random(8, 40, N), random(9, 40), random(10, N)
REFINED = MixedPrecision(idf.CG(rtol=1e-6, on_failure="raise"))
REFINED_OR_IGNORED = MixedPrecision(idf.CG(on_failure="ignore"))


def ridge(w: Tensor, log_penalty: Tensor) -> Tensor:
    x, y = X.to(w.dtype), Y.to(w.dtype)
    return 0.5 * ((x @ w - y) ** 2).mean() + 0.5 * (log_penalty.exp() * w * w).sum()


def solve_ridge(log_penalty: Tensor, linear_solver: Any = REFINED) -> Tensor:
    inner_solver = idf.inner_solvers.NewtonCG(tol=1e-6)
    layer = idf.ArgminLayer(ridge, inner_solver=inner_solver, linear_solver=linear_solver)
    return layer(torch.zeros_like(log_penalty), log_penalty)


def closed_ridge(log_penalty: Tensor) -> Tensor:
    return torch.linalg.inv(X.mT @ X / 40 + torch.diag(log_penalty.exp())) @ (X.mT @ Y / 40)


AT = torch.linspace(-1, 1, N, dtype=torch.float64)


def close(found: Tensor, exact: Tensor, rtol: float = 1e-5) -> bool:
    """Against float64: a float32 solution at its tolerance, where bfloat16 alone would be off by 1e-3."""
    return float((found.double() - exact).norm()) <= rtol * float(exact.norm())


def test_a_layer_of_every_order_and_transform() -> None:
    """First and second derivatives in both modes, batches, and several cotangents of one operator."""
    at, batch = AT.float(), torch.stack([AT, AT.flip(0), 0 * AT])
    exact = jacrev(closed_ridge)(AT)
    with idf.record() as history:
        assert close(jacrev(solve_ridge)(at), exact)
    assert history[-1].info.method.startswith("MixedPrecision(CG, bfloat16): ")
    assert close(jacfwd(solve_ridge)(at), exact)
    assert close(vmap(jacrev(solve_ridge))(batch.float()), torch.stack([jacrev(closed_ridge)(a) for a in batch]))

    def outer(solve: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
        return (solve(a) @ V.to(a.dtype)) ** 2

    assert close(hessian(lambda a: outer(solve_ridge, a))(at), hessian(lambda a: outer(closed_ridge, a))(AT), 3e-5)
    leaf = at.clone().requires_grad_()
    (first,) = torch.autograd.grad(outer(solve_ridge, leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first @ V.float(), leaf)
    exact_second = grad(lambda a: grad(lambda a: outer(closed_ridge, a))(a) @ V)(AT)
    assert close(second, exact_second, 3e-5)


def test_a_root_has_its_own_side() -> None:
    """Fails for A in the place of Aᵀ in the second graph."""
    W = 0.5 * G / 5

    def residual(x: Tensor, t: Tensor) -> Tensor:
        return x + W.to(x.dtype) @ torch.tanh(x) - t

    solver = MixedPrecision(idf.GMRES(rtol=1e-6, on_failure="raise"))
    layer = idf.RootLayer(residual, inner_solver=idf.inner_solvers.Newton(), linear_solver=solver)
    reference = idf.RootLayer(residual, inner_solver=idf.inner_solvers.Newton(), linear_solver=idf.Dense(rtol=1e-12))
    run = lambda layer: lambda t: layer(torch.zeros_like(t), t)  # noqa: E731
    x = run(reference)(AT)
    exact = torch.linalg.inv(torch.eye(N) + W * (1 - x.tanh() ** 2))
    assert close(jacrev(run(layer))(AT.float()), exact)
    assert close(jacfwd(run(layer))(AT.float()), exact)


def test_products_over_chunks_of_the_data() -> None:
    def objective(w: Tensor, log_penalty: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        return 0.5 * ((x @ w - y) ** 2).mean() + 0.5 * (log_penalty.exp() * w * w).sum()

    condition, leaf = idf.Stationary(objective, chunks=(1, 0, 4)), AT.float().requires_grad_()
    with idf.record() as history:
        w = idf.attach(condition, closed_ridge(AT).float(), leaf, (X.float(), Y.float()), linear_solver=REFINED)
        (found,) = torch.autograd.grad(w, leaf, V.float())
    assert close(found, jacrev(closed_ridge)(AT).mT @ V)
    assert "MixedPrecision" in history[-1].info.method


def test_on_the_support_of_a_lasso() -> None:
    """∂w_S/∂λ = −G_S⁻¹ sign(w_S), solved on the support by low products with the Hessian."""
    layer = idf.ArgminLayer(
        lambda w, strength: 0.5 * ((X.to(w.dtype) @ w - Y.to(w.dtype)) ** 2).mean(),
        inner_solver=idf.inner_solvers.ProximalGradient(lambda v, s, strength: idf.prox.lasso(v, s * strength)),
        linear_solver=REFINED,
    )
    with idf.record() as history:
        strength = torch.tensor(0.05, requires_grad=True)
        w = layer(torch.zeros(N), strength)
        (w @ V.float()).backward()
    on = w.detach() != 0
    gram = X[:, on].mT @ X[:, on] / 40
    exact = -V[on] @ torch.linalg.solve(gram, w.detach()[on].sign().double())
    assert "MixedPrecision" in history[-1].info.method
    assert "on the support" in history[-1].info.method
    assert strength.grad is not None
    torch.testing.assert_close(strength.grad.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunks", [None, (1, 0, 4)])
@pytest.mark.parametrize("several", ["one", "jacrev", "vmap"])
def test_a_layer_gives_an_operator_whose_products_can_be_lowered(several: str, chunks: Any) -> None:
    """Fails where a wrapper around the Jacobian falls back to full precision: no result would tell."""
    seen = []

    def solver(A: LinearOperator, b: Tensor) -> Tensor:
        full, low = A(b), A.in_precision(BF16)(b)
        seen.append(float((low - full).norm() / full.norm()))
        return idf.CG().solve(A, b).value

    def objective(w: Tensor, log_penalty: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * ((data[0] @ w - data[1]) ** 2).mean() + 0.5 * (log_penalty.exp() * w * w).sum()

    def run(a: Tensor) -> Tensor:
        condition = idf.Stationary(objective, chunks=chunks)
        return idf.attach(condition, closed_ridge(AT).float(), a, (X.float(), Y.float()), linear_solver=solver)

    at = AT.float()
    if several == "one":
        run(at.requires_grad_()).sum().backward()
    else:
        jacrev(run)(at) if several == "jacrev" else vmap(grad(lambda a: run(a).sum()))(torch.stack([at, -at]))
    assert 1e-4 < seen[-1] < 1e-2


def test_a_low_product_of_a_network_is_low_and_its_gradient_is_not() -> None:
    """The gradient of an outer loss through a fitted network: refined, it is that of float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    inputs, targets = random(11, 30, 6), random(12, 30, 1)
    theta = {k: v.detach() for k, v in net.named_parameters()}

    def objective(phi: dict[str, Tensor], center: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(net, phi, (inputs.to(phi["0.bias"].dtype),))
        pull = sum(((p - c) ** 2).sum() for p, c in zip(phi.values(), center.values(), strict=True))
        return ((out - targets.to(out.dtype)) ** 2).mean() + pull

    with torch.no_grad():
        solution = idf.ArgminLayer(objective)(theta, theta)

    def gradient(dtype: torch.dtype, solver: Any) -> tuple[Tensor, idf.SolveInfo]:
        center = {k: v.to(dtype, copy=True).requires_grad_() for k, v in theta.items()}
        x = {k: v.to(dtype) for k, v in solution.items()}
        with idf.record() as history:
            at = idf.attach(idf.Stationary(objective), x, center, linear_solver=solver)
            sum((v**2).sum() for v in at.values()).backward()
        return torch.cat([c.grad.reshape(-1) for c in center.values()]), history[-1].info

    exact, _ = gradient(torch.float64, idf.Dense(rtol=1e-10))
    refined, _ = gradient(torch.float32, REFINED)
    assert close(refined, exact)

    def unrefined_solver(A: LinearOperator, b: Tensor) -> Tensor:
        return idf.CG().solve(A.in_precision(BF16), b).value

    with pytest.warns(idf.ConvergenceWarning):
        unrefined, _ = gradient(torch.float32, unrefined_solver)
    assert 3e-4 < float((unrefined - exact).norm() / exact.norm()) < 3e-2


# ------------------------------------------------------------------------------------------ a layer under autocast


def test_a_backward_pass_under_autocast_is_as_good_as_bfloat16_and_says_so() -> None:
    """Krylov vectors stay in float32; what is left is the rounding of the products, found by the true residual."""
    exact = jacrev(closed_ridge)(AT).mT @ V
    leaf = AT.float().requires_grad_()

    def gradient(solver: Any, backward_too: bool) -> tuple[Tensor, idf.SolveInfo]:
        with warnings.catch_warnings(), idf.record() as history:
            warnings.simplefilter("ignore", idf.ConvergenceWarning)
            w = solve_ridge(leaf, solver)
            with torch.autocast("cpu", BF16, enabled=backward_too):
                (found,) = torch.autograd.grad(w, leaf, V.float())
        return found, history[-1].info

    for solver in (idf.CG(), idf.MINRES(), idf.GMRES(), REFINED_OR_IGNORED):
        full, info = gradient(solver, False)
        assert bool(info.converged)
        assert close(full, exact)
        low, info = gradient(solver, True)
        assert int(info.status) == Status.STAGNATED, solver
        assert 1e-4 < float(info.residual_norm) < 2e-2
        assert not close(low, exact, 1e-4)
        assert close(low, exact, 3e-2)
    assert bool(gradient(idf.CG(rtol=3e-2), True)[1].converged)  # which is what bfloat16 can do


def test_a_layer_under_autocast_says_how_far_it_came() -> None:
    """The inner solution is as good as the rounding of its objective; its report is that of ‖F(x)‖ in bfloat16."""
    leaf = AT.float().requires_grad_()
    with pytest.warns(idf.ConvergenceWarning, match="inner problem"), torch.autocast("cpu", BF16):
        w = solve_ridge(leaf)
    assert w.dtype == torch.float32
    exact = closed_ridge(AT)
    assert not close(w.detach(), exact, 1e-5)
    assert close(w.detach(), exact, 3e-2)


@pytest.mark.parametrize("used_before", [False, True])
def test_a_module_of_a_layer_under_autocast_gets_its_gradient(used_before: bool) -> None:
    """Fails where a weight that autocast has converted already, with a graph of its own, is taken for a capture."""
    torch.manual_seed(0)
    net, b = nn.Linear(N, N), random(13, N).float()
    with torch.no_grad():
        net.weight.mul_(0.5)
    # Products in bfloat16 are good to two or three digits, so that no solve can be asked for more.
    layer = idf.FixedPointLayer(
        lambda z, b: torch.tanh(net(z) + b),
        inner_solver=idf.inner_solvers.FixedPointIteration(tol=3e-2),
        linear_solver=idf.GMRES(rtol=1e-2),
    )

    def gradient(enabled: bool) -> Tensor:
        with torch.autocast("cpu", BF16, enabled=enabled):
            before = net(b).sum() if used_before else 0.0
            total = layer(torch.zeros(N), b).sum() + before
        return torch.autograd.grad(total, net.weight)[0]

    assert close(gradient(True), gradient(False).double(), 3e-2)
