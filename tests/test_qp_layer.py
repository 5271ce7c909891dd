"""QPLayer: known answers, all six gradients, every transform, and honest words on each problem of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.layers.quadratic_program import QPLayer

from .problems import random, vector
from .test_interior_point import chosen

D = torch.float64
NAMES = ("Q", "q", "A", "b", "G", "h")


def arguments(seed: int = 1, n: int = 5, p: int = 2, m: int = 6, batch: int = 1) -> list[Tensor]:
    """Q, q, A, b, G, h of programs with a strictly complementary optimum, with some constraints active."""
    Q, q, C, c, _ = chosen(seed, batch, n, p, m)[0]
    data = [Q, q, C[:, :p], c[:, :p], C[:, p:], c[:, p:]]
    return [v[0] if batch == 1 else v for v in data]


def test_the_equality_constrained_program() -> None:
    """Q = [[4, 1], [1, 2]], c = 1, x₁ + x₂ = 1: x = (¼, ¾), ν = −2.75, dx/db = (¼, ¾), dx/dc = ¼ [[−1, 1], [1, −1]]."""
    Q, A = torch.tensor([[4.0, 1], [1, 2]], dtype=D), torch.ones(1, 2, dtype=D)
    c, b = vector(1, 1), vector(1)
    solution = QPLayer().solve(Q, c, A, b)
    torch.testing.assert_close(solution.value.primal, vector(0.25, 0.75), rtol=0, atol=1e-12)
    torch.testing.assert_close(solution.value.dual_equality, vector(-2.75), rtol=0, atol=1e-12)
    assert solution.value.dual_inequality is None
    assert int(solution.forward.iterations) == 0  # a linear system
    by_c, by_b = jacrev(lambda c, b: QPLayer()(Q, c, A, b), (0, 1))(c, b)
    torch.testing.assert_close(by_c, 0.25 * torch.tensor([[-1.0, 1], [1, -1]], dtype=D), rtol=0, atol=1e-12)
    torch.testing.assert_close(by_b, vector(0.25, 0.75).unsqueeze(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_projection_onto_the_simplex(jacobian: Any) -> None:
    """min ½‖x − v‖² with 1ᵀx = 1, x ≥ 0: J = diag(s) − s sᵀ/‖s‖₀ for the support s."""
    v = vector(0.9, 0.5, -0.3, 0.4, -1.0)
    eye, zero, one = torch.eye(5, dtype=D), torch.zeros(5, dtype=D), torch.ones(1, dtype=D)
    s = vector(1, 1, 0, 1, 0)
    x = QPLayer()(eye, -v, one.expand(1, 5), one, -eye, zero)
    torch.testing.assert_close(x, s * (v - ((s * v).sum() - 1) / 3), rtol=0, atol=1e-12)
    J = jacobian(lambda v: QPLayer()(eye, -v, one.expand(1, 5), one, -eye, zero))(v)
    torch.testing.assert_close(J, torch.diag(s) - torch.outer(s, s) / 3, rtol=0, atol=1e-10)


@pytest.mark.parametrize("absent", ["", "Ab", "Gh", "AbGh"])
def test_gradients_in_all_arguments_against_central_differences(absent: str) -> None:
    """Backward, forward mode, batched cotangents, and second derivatives against differences of the first."""
    args = [None if name in absent else v for name, v in zip(NAMES, arguments(2, n=3, p=1, m=2), strict=True)]
    given = [v.clone().requires_grad_() for v in args if v is not None]

    def layer(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        solution = QPLayer().solve(*(None if v is None else next(rest) for v in args))  # type: ignore[arg-type]
        return tuple(v for v in solution.value if v is not None)

    assert gradcheck(layer, given, check_forward_ad=True, check_batched_grad=True, atol=1e-6)
    assert gradgradcheck(lambda *t: layer(*t)[0], given, atol=1e-5, fast_mode=True)


def test_the_derivative_sees_the_symmetric_part_of_q() -> None:
    Q, *rest = arguments()
    skew = random(9, 5, 5)
    Q = (Q + skew - skew.mT).requires_grad_()
    x = QPLayer()(Q, *rest)
    torch.testing.assert_close(x, QPLayer()(0.5 * (Q + Q.mT).detach(), *rest))
    (g,) = torch.autograd.grad(x @ random(10, 5), Q)
    torch.testing.assert_close(g, g.mT)


def loss_of(layer: QPLayer, w: Tensor) -> Callable[..., Tensor]:
    return lambda *args: (torch.sin(layer(*args)) * w).sum()


def test_all_transforms_agree_with_one_by_one() -> None:
    args, w, layer = arguments(3, batch=4), random(4, 5), QPLayer()
    loss = loss_of(layer, w)
    alone = [tuple(v[i] for v in args) for i in range(4)]
    every = tuple(range(6))
    x = torch.stack([layer(*a) for a in alone])
    gradients = [torch.stack(g) for g in zip(*(grad(loss, every)(*a) for a in alone), strict=True)]
    torch.testing.assert_close(layer(*args), x)  # leading dimensions
    torch.testing.assert_close(vmap(layer)(*args), x)
    torch.testing.assert_close(vmap(lambda *a: layer(*(v.unsqueeze(0) for v in a))[0])(*args), x)
    for found in (grad(loss, every)(*args), vmap(grad(loss, every))(*args)):
        for f, g in zip(found, gradients, strict=True):
            torch.testing.assert_close(f, g, rtol=1e-8, atol=1e-9)
    leaves = [v.clone().requires_grad_() for v in args]
    for f, g in zip(torch.autograd.grad(loss(*leaves), leaves), gradients, strict=True):
        torch.testing.assert_close(f, g, rtol=1e-8, atol=1e-9)

    one = lambda q: layer(args[0][0], q, *(v[0] for v in args[2:]))  # noqa: E731
    q = args[1]
    torch.testing.assert_close(jacfwd(one)(q[0]), jacrev(one)(q[0]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(vmap(jacrev(one))(q), torch.stack([jacrev(one)(v) for v in q]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(vmap(jacfwd(one))(q), torch.stack([jacrev(one)(v) for v in q]), rtol=1e-8, atol=1e-10)
    scalar = lambda b: loss(*(v[0] for v in args[:3]), b, *(v[0] for v in args[4:]))  # noqa: E731
    H, step = hessian(scalar)(args[3][0]), 1e-5
    differences = [
        (grad(scalar)(args[3][0] + step * e) - grad(scalar)(args[3][0] - step * e)) / (2 * step)
        for e in torch.eye(2, dtype=D)
    ]
    torch.testing.assert_close(H, torch.stack(differences), rtol=1e-5, atol=1e-6)  # truncation of the differences


def test_batch_dimensions_broadcast() -> None:
    Q, q, A, b, G, h = arguments()
    many = q + 0.01 * random(5, 3, 1, 5)
    sides = b + 0.01 * random(6, 2, 2)
    solution = QPLayer().solve(Q, many, A, sides, G.unsqueeze(0), h)
    assert solution.value.primal.shape == (3, 2, 5)
    assert solution.value.dual_inequality.shape == (3, 2, 6)
    assert solution.forward.status.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(solution.value.primal[i, j], QPLayer()(Q, many[i, 0], A, sides[j], G, h))
    leaf = G.clone().requires_grad_()
    solution = QPLayer().solve(Q, many, A, sides, leaf, h)
    solution.value.primal.sum().backward()
    each = [
        grad(lambda G, i=i, j=j: QPLayer()(Q, many[i, 0], A, sides[j], G, h).sum())(G)
        for i in range(3)
        for j in range(2)
    ]
    torch.testing.assert_close(leaf.grad, sum(each), rtol=1e-8, atol=1e-10)
    assert solution.backward is not None
    assert solution.backward.converged.shape == (3, 2)
    one = QPLayer().solve(*(v.unsqueeze(0) for v in (Q, q, A, b, G, h)))
    assert one.value.primal.shape == (1, 5)


def test_a_program_without_an_optimum_does_not_touch_the_others() -> None:
    """min ½ t x² + q x subject to lower ≤ x ≤ 1 with a shared q: one infeasible, one unbounded, two with optima."""
    t = torch.tensor([[[1.0]], [[0.0]], [[2.0]], [[1.0]]], dtype=D)
    G = torch.tensor([[[1.0], [-1]], [[1.0], [0]], [[1.0], [-1]], [[1.0], [-1]]], dtype=D)
    h = torch.tensor([[1.0, -2], [1, 0], [1, 2], [1, 2]], dtype=D)
    q, scale = vector(0.5).requires_grad_(), torch.ones((), dtype=D, requires_grad=True)  # met by all four
    layer, words = QPLayer(), "QPLayer did not solve the inner problem for 2 of 4.*INFEASIBLE, UNBOUNDED"
    with pytest.warns(idf.ConvergenceWarning, match=words):
        solution = layer.solve(scale * t, q, None, None, G, h)
    x = solution.value.primal
    statuses = [idf.Status.INFEASIBLE, idf.Status.UNBOUNDED, idf.Status.CONVERGED, idf.Status.CONVERGED]
    assert solution.forward.status.tolist() == [int(s) for s in statuses]
    assert x[:2].isnan().all()
    torch.testing.assert_close(x[2:, 0], vector(-0.25, -0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody asks for what does not exist
        by_q, by_scale = torch.autograd.grad(x[2:].sum(), (q, scale), retain_graph=True)
    torch.testing.assert_close(by_q, vector(-1.5))
    torch.testing.assert_close(by_scale, vector(0.75).squeeze())
    with pytest.warns(idf.ConvergenceWarning, match="backward"):
        (by_q,) = torch.autograd.grad(x.sum(), q)
    assert by_q.isnan().all()
    with pytest.raises(idf.ConvergenceError, match="INFEASIBLE"):
        QPLayer(on_failure="raise")(t[0], q, None, None, G[0], h[0])


def test_inference_mode_and_an_empty_batch() -> None:
    args = arguments()
    with torch.inference_mode():
        torch.testing.assert_close(QPLayer()(*args), QPLayer()(*args).clone())
    q = torch.zeros(0, 5, dtype=D, requires_grad=True)
    x = QPLayer()(args[0], q, *args[2:])
    assert x.shape == (0, 5)


def test_too_few_iterations_are_reported() -> None:
    with pytest.warns(idf.ConvergenceWarning, match="MAX_ITERATIONS"):
        solution = QPLayer(max_iterations=1).solve(*arguments(7, n=20, p=3, m=40))
    assert not bool(solution.forward.converged)
    assert solution.value.primal.isfinite().all()


def test_a_degenerate_optimum_is_reported_where_a_derivative_is_asked_for() -> None:
    """min ½(x − t)² subject to x ≥ 0 at t = 0: the left derivative is 0, the right one 1."""
    t, one = torch.zeros(1, dtype=D, requires_grad=True), torch.ones(1, 1, dtype=D)
    for linear_solver in (None, idf.Dense()):
        solution = QPLayer(linear_solver=linear_solver).solve(one, -t, None, None, -one, torch.zeros(1, dtype=D))
        assert bool(solution.forward.converged)
        with pytest.warns(idf.ConvergenceWarning, match="NOT_SMOOTH"):
            solution.value.primal.sum().backward()


def test_dependent_rows_give_the_gradient_of_minimum_norm() -> None:
    """With M A and M b in the place of A and b: the gradient in b is M (MᵀM)⁻¹ b̄, the others are those without M."""
    Q, q, A, b, G, h = arguments()
    w, M, every = random(8, 5), random(18, 4, 2), (0, 1, 2, 3, 4, 5)
    once = grad(loss_of(QPLayer(), w), every)(Q, q, A, b, G, h)
    more = grad(loss_of(QPLayer(), w), every)(Q, q, M @ A, M @ b, G, h)
    for i in (0, 1, 4, 5):
        torch.testing.assert_close(more[i], once[i], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(more[3], M @ torch.linalg.solve(M.T @ M, once[3]), rtol=1e-7, atol=1e-8)


def test_warm_start_takes_over_the_active_set() -> None:
    layer, (Q, q, A, b, G, h) = QPLayer(warm_start=True), arguments(11, n=8, m=12, batch=5)
    first = layer.solve(Q, q, A, b, G, h)
    assert int(first.forward.iterations.min()) > 0
    moved = q + 1e-4 * random(12, 5, 8)
    second = layer.solve(Q, moved, A, b, G, h)
    assert int(second.forward.iterations.max()) == 0
    torch.testing.assert_close(second.value.primal, QPLayer()(Q, moved, A, b, G, h), rtol=0, atol=1e-10)
    far = layer.solve(Q, q + random(13, 5, 8), A, b, G, h)
    torch.testing.assert_close(far.value.primal, QPLayer()(Q, q + random(13, 5, 8), A, b, G, h), rtol=0, atol=1e-10)
    layer(Q[0, :3, :3], q[0, :3])  # another shape


def test_a_linear_solver_of_ones_own_is_used() -> None:
    args = [v.requires_grad_() for v in arguments()]
    w = random(14, 5)
    expected = torch.autograd.grad(loss_of(QPLayer(), w)(*args), args)
    with idf.record() as history:
        found = torch.autograd.grad(loss_of(QPLayer(linear_solver=idf.GMRES(rtol=1e-10)), w)(*args), args)
    assert [s.info.method.split()[0] for s in history] == ["QPLayer", "GMRES"]
    for f, g in zip(found, expected, strict=True):
        torch.testing.assert_close(f, g, rtol=1e-6, atol=1e-7)


def test_single_precision() -> None:
    args = arguments(15, n=6, m=8, batch=3)
    w = random(16, 6)
    exact = grad(loss_of(QPLayer(), w), (0, 1, 5))(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = grad(loss_of(QPLayer(), w.float()), (0, 1, 5))(*(v.float() for v in args))
    for f, g in zip(found, exact, strict=True):
        assert f.dtype is torch.float32
        torch.testing.assert_close(f.double(), g, rtol=1e-3, atol=1e-4)


def nonnegative_points(n: int, p: int) -> list[Tensor]:
    """64 projections onto {x ≥ 0, A x = b}: Q, q, A, b, G, h."""
    A, eye = torch.rand(p, n, generator=torch.Generator().manual_seed(n), dtype=D), torch.eye(n, dtype=D)
    return [eye, random(18, 64, n), A, A.sum(-1) / 2, -eye, torch.zeros(n, dtype=D)]


def with_gradient(data: list[Tensor], dtype: torch.dtype) -> tuple[idf.Solution, Tensor, Tensor]:
    """The solution, and x and the gradient in q of a weighted sum of x, both in double precision."""
    Q, q, *rest = (v.to(dtype) for v in data)
    q.requires_grad_()
    solution = QPLayer(on_failure="ignore").solve(Q, q, *rest)
    x = solution.value.primal
    (g,) = torch.autograd.grad((x * random(19, *x.shape).to(dtype)).sum(), q)
    return solution, x.detach().double(), g.double()


@pytest.mark.parametrize("kind", ["nonnegative 8", "nonnegative 50", "chosen 40", "steep 10", "linear 8"])
def test_single_precision_is_as_good_as_its_rounding(kind: str) -> None:
    """x within 1e-5 of its size, gradients within 1e-3 or reported; at most 2 of 64 reported."""
    name, n = kind.split()
    data = nonnegative_points(int(n), int(n) // 4) if name == "nonnegative" else arguments(20, int(n), 3, 40, batch=64)
    if name == "steep":
        F = random(24, 64, 10, 10)
        data[0] = F @ F.mT + 0.1 * torch.eye(10, dtype=D)
    if name == "linear":  # at a vertex, which q does not move
        Q, q, C, c, _ = chosen(25, 64, 8, 3, 20, rank=0, active=5)[0]
        data = [Q, q, C[:, :3], c[:, :3], C[:, 3:], c[:, 3:]]
    _, x, g = with_gradient(data, D)
    solution, found, gradient = with_gradient(data, torch.float32)
    assert bool(solution.forward.converged.all())
    error = (found - x).abs().amax(-1) / x.abs().amax(-1)
    assert float(error.max()) < 1e-5
    assert solution.backward is not None
    flagged = ~solution.backward.converged
    assert int(flagged.sum()) <= 2
    wrong = (gradient - g).norm(dim=-1) > 1e-3 * (g.norm(dim=-1) + 1e-2)
    assert not bool((wrong & ~flagged).any())


def test_single_precision_reports_what_it_cannot_tell() -> None:
    """A constraint that is met with a multiplier of zero, and a Q whose condition number is 1e10."""
    Q, q, A, b, G, h = arguments(21, n=8, m=12, batch=64)
    x = QPLayer()(Q, q, A, b, G, h)
    h[:, -1] = (G[:, -1] * x).sum(-1)
    solution, found, _ = with_gradient([Q, q, A, b, G, h], torch.float32)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4)
    assert solution.backward is not None
    assert bool((solution.backward.status == idf.Status.NOT_SMOOTH).all())

    steep = torch.diag(torch.logspace(0, -10, 8, dtype=D))
    turn = torch.linalg.qr(random(22, 64, 8, 8))[0]
    Q = turn @ steep @ turn.mT
    data = [Q, -(Q @ random(23, 64, 8, 1)).squeeze(-1), A, b, G, h + 100]
    _, _, g = with_gradient(data, D)
    solution, _, gradient = with_gradient(data, torch.float32)
    assert solution.backward is not None
    good = (gradient - g).norm(dim=-1) < 1e-2 * g.norm(dim=-1)
    assert not bool((~good & solution.backward.converged).any())


def test_a_larger_program_against_scipy() -> None:
    Q, q, A, b, G, h = arguments(17, n=30, p=4, m=50)
    x = QPLayer()(Q, q, A, b, G, h)
    found = scipy.optimize.minimize(
        lambda x: 0.5 * x @ Q.numpy() @ x + q.numpy() @ x,
        [0.0] * 30,
        jac=lambda x: Q.numpy() @ x + q.numpy(),
        constraints=[
            {"type": "eq", "fun": lambda x: A.numpy() @ x - b.numpy(), "jac": lambda x: A.numpy()},
            {"type": "ineq", "fun": lambda x: h.numpy() - G.numpy() @ x, "jac": lambda x: -G.numpy()},
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    torch.testing.assert_close(x, torch.as_tensor(found.x), rtol=0, atol=1e-6)


Q2, q2, one2 = torch.eye(2, dtype=D), torch.ones(2, dtype=D), torch.ones(1, 2, dtype=D)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: QPLayer(tol=-1.0), ValueError, "tol is -1.0"),
        (lambda: QPLayer(max_iterations=0), ValueError, "max_iterations is 0"),
        (lambda: QPLayer(on_failure="never"), ValueError, "on_failure is 'never'"),  # type: ignore[arg-type]
        (lambda: QPLayer(linear_solver="cg"), TypeError, "linear_solver is 'cg'"),
        (lambda: QPLayer()(Q2, q2, one2), idf.ImplicitDiffError, "A was given without b"),
        (lambda: QPLayer()(Q2, q2, h=q2), idf.ImplicitDiffError, "h was given without G"),
        (lambda: QPLayer()(Q2, q2, one2.mT, q2[:1]), idf.ImplicitDiffError, r"A \(2, 1\), b \(1,\)"),
        (lambda: QPLayer()(Q2, torch.ones(3, dtype=D)), idf.ImplicitDiffError, r"Q \(2, 2\), q \(3,\)"),
        (lambda: QPLayer()(Q2.expand(3, 2, 2), q2.expand(2, 2)), idf.ImplicitDiffError, "do not broadcast"),
        (lambda: QPLayer()(Q2.float(), q2), idf.ImplicitDiffError, "Q is torch.float32.* q is torch.float64"),
        (lambda: QPLayer()(Q2.long(), q2), idf.ImplicitDiffError, "Q must be a floating-point tensor"),
        (lambda: QPLayer()([[1.0]], q2), idf.ImplicitDiffError, "Q must be a floating-point tensor"),  # type: ignore[arg-type]
        (lambda: QPLayer()(-Q2, q2), idf.ImplicitDiffError, "smallest eigenvalue is -1:"),
        (lambda: QPLayer()(torch.stack([Q2, -2 * Q2]), q2), idf.ImplicitDiffError, "eigenvalue is -2 in 1 of 2"),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
