"""Conic programmes: every cone against a closed form, under every transform, and Clarabel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import clarabel
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch
from torch import Tensor
from torch.func import jacrev, vmap

import implicitdiff as idf
from implicitdiff.conditions import ConicPoint, ConicProgram
from implicitdiff.cones import Exponential, NonNegative, PositiveSemidefinite, SecondOrder, Zero

from .problems import random, vector
from .test_transforms import DERIVATIVES, NESTINGS, Case, close

D = torch.float64


@dataclass(frozen=True)
class Conic(Case):
    """Data (A, b, c) as functions of two parameters, and the solution in closed form."""

    cones: tuple[Any, ...] = ()
    point: Callable[..., ConicPoint] = None  # type: ignore[assignment]
    data: Callable[..., tuple[Tensor, Tensor, Tensor]] = None  # type: ignore[assignment]

    def batch(self, *sizes: int, which: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
        spread = torch.linspace(1, 1.1, torch.Size(sizes).numel(), dtype=D)
        return tuple(
            spread.reshape(*sizes, *(1 for _ in arg.shape)) * arg if which is None or i in which else arg
            for i, arg in enumerate(self.args)
        )


def conic(
    name: str,
    cones: tuple[Any, ...],
    data: Callable[..., tuple[Tensor, Tensor, Tensor]],
    point: Callable[..., ConicPoint],
    *args: Tensor,
) -> Conic:
    """``point`` is also what the wrapped solver computes, on plain tensors; its primal has three entries."""

    class WithArgs(ConicProgram):
        """The residual of the data; the parameters behind them are for the solver."""

        def residual(self, x: ConicPoint, A: Tensor, b: Tensor, c: Tensor, *args: Tensor) -> ConicPoint:
            return super().residual(x, A, b, c)

    solve = idf.implicit(WithArgs(cones), linear_solver=idf.Dense())(
        lambda init, A, b, c, *args: ConicPoint(*(t.detach() for t in point(*args)))
    )
    return Conic(
        name,
        lambda init, *a: solve(None, *data(*a), *a).primal,
        lambda *a: point(*a).primal,
        args,
        cones,
        point,
        data,
    )


def linear() -> Conic:
    """min cᵀx with x₁ + x₂ + x₃ = total, x ≥ 0 and x₁ ≤ share · total: the vertex (share, 1 − share, 0) · total."""

    def data(total: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        I = torch.eye(3, dtype=D)
        A = torch.cat([torch.ones(1, 3, dtype=D), -I, I[:1]])
        return A, torch.cat([total.reshape(1), torch.zeros(3, dtype=D), (share * total).reshape(1)]), vector(1, 2, 4)

    def point(total: Tensor, share: Tensor) -> ConicPoint:
        x = torch.stack([share * total, (1 - share) * total, 0 * total])
        # Aᵀy + c = 0: the price −2 of the total, 2 of x₃ ≥ 0, 1 of the share.
        return ConicPoint(x, vector(-2, 0, 0, 2, 1))

    return conic("linear", (Zero(1), NonNegative(4)), data, point, vector(2)[0], vector(0.3)[0])


def second_order() -> Conic:
    """min ‖x − a‖ on a line: min t with (t, x − a) in the cone and gᵀx = β; the projection of a onto the line."""
    g = vector(0.6, 0.8)

    def data(beta: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        A = torch.zeros(4, 3, dtype=D)
        A[0, 1:], A[1:, :] = g, -torch.eye(3, dtype=D)
        return A, torch.cat([beta.reshape(1), 0 * beta.reshape(1), -a]), vector(1, 0, 0)

    def point(beta: Tensor, a: Tensor) -> ConicPoint:
        gap = beta - g @ a
        x, t = a + gap * g, gap.abs()
        direction = gap.sign() * g
        dual = torch.cat([(-gap.sign()).reshape(1), torch.ones(1, dtype=D), -direction])
        return ConicPoint(torch.cat([t.reshape(1), x]), dual)

    return conic("second-order", (Zero(1), SecondOrder(3)), data, point, vector(2)[0], vector(0.5, -0.2))


def exponential() -> Conic:
    """min z − price · r with exp(r) ≤ z, that is (r, 1, z) in the cone: r = log price, z = price; and w = r + d."""

    def data(price: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Unknowns (r, z, w); rows: w − r = d, then s = (r, 1, z).
        A = torch.tensor([[-1.0, 0, 1], [-1, 0, 0], [0, 0, 0], [0, -1, 0]], dtype=D)
        one = torch.ones(1, dtype=D)
        return A, torch.cat([d.reshape(1), 0 * one, one, 0 * one]), torch.stack([-price, one[0], 0 * price])

    def point(price: Tensor, d: Tensor) -> ConicPoint:
        r, one = price.log(), torch.ones_like(price)
        # Aᵀy + c = 0: y = (0, −price, y₂, 1) with y ⊥ s: y₂ = price · r − price.
        dual = torch.stack([0 * d, -price, price * r - price, one])
        return ConicPoint(torch.stack([r, price, r + d]), dual)

    return conic("exponential", (Zero(1), Exponential()), data, point, vector(1.7)[0], vector(0.4)[0])


def semidefinite() -> Conic:
    """min t with t·I − M ⪰ 0 for M = [[a, b], [b, d]]: its largest eigenvalue; two more entries are fixed."""
    cone, r = PositiveSemidefinite(2), 2**0.5

    def data(scale: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        A = torch.tensor([[0.0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, 0, 0], [-1, 0, 0]], dtype=D)
        M = scale * torch.stack([m[0], r * m[1], m[2]])
        return A, torch.cat([scale.reshape(1), scale.reshape(1) ** 2, -M]), vector(1, 0, 0)

    def point(scale: Tensor, m: Tensor) -> ConicPoint:
        half, mean = (m[0] - m[2]) / 2, (m[0] + m[2]) / 2
        radius = (half**2 + m[1] ** 2).sqrt()
        top = scale * (mean + radius)
        # The projector onto the eigenvector of the largest eigenvalue is (I + [[half, b], [b, −half]] / radius) / 2.
        P = torch.stack([(1 + half / radius) / 2, r * m[1] / radius / 2, (1 - half / radius) / 2])
        return ConicPoint(torch.stack([top, scale, scale**2]), torch.cat([torch.zeros(2, dtype=D), P]))

    return conic("semidefinite", (Zero(2), cone), data, point, vector(1.3)[0], vector(1, 0.5, -0.4))


CASES = {case.name: case for case in (linear(), second_order(), exponential(), semidefinite())}


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_satisfies_the_condition(name: str) -> None:
    case = CASES[name]
    residual = ConicProgram(case.cones).residual(case.point(*case.args), *case.data(*case.args))
    assert max(float(r.abs().max()) for r in residual) < 1e-14 * 100


@pytest.mark.parametrize("transform", [*DERIVATIVES, *NESTINGS])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_closed_form_under_every_transform(name: str, transform: str) -> None:
    case, (function, rtol) = CASES[name], (DERIVATIVES | NESTINGS)[transform]
    implicit, closed = case.scalars
    with warnings.catch_warnings():
        warnings.simplefilter("error", idf.ConvergenceWarning)
        # Some derivatives are exactly zero: rounding is measured against numbers of order 1.
        close(function(case.implicit, implicit, case), function(case.closed, closed, case), rtol, least=1.0)


def test_a_linear_programme_of_scipy_in_all_its_data() -> None:
    """Against central differences of HiGHS."""
    G, h, c = random(1, 6, 3), random(2, 6).abs() + 1, random(3, 3)
    G = torch.cat([G, torch.eye(3, dtype=D), -torch.eye(3, dtype=D)])
    h = torch.cat([h, 3 * torch.ones(6, dtype=D)])

    def solve(G: np.ndarray, h: np.ndarray, c: np.ndarray) -> Any:
        return scipy.optimize.linprog(c, A_ub=G, b_ub=h, bounds=(None, None), method="highs-ds")

    found = solve(G.numpy(), h.numpy(), c.numpy())
    point = ConicPoint(*(torch.as_tensor(t) for t in (found.x, -found.ineqlin.marginals)))
    data = (G, h, c)
    jacobians = jacrev(lambda *data: idf.attach(ConicProgram([NonNegative(12)]), point, *data).primal, (0, 1, 2))(*data)
    for k, (tensor, jacobian) in enumerate(zip(data, jacobians, strict=True)):
        for i in range(tensor.numel()):
            sides = []
            for sign in (1, -1):
                moved = [t.clone() for t in data]
                moved[k].view(-1)[i] += sign * 1e-5
                sides.append(solve(*(t.numpy() for t in moved)).x)
            difference = torch.as_tensor((sides[0] - sides[1]) / 2e-5)
            close(jacobian.reshape(3, -1)[:, i], difference, 1e-6, least=1.0)


def test_a_quadratic_objective() -> None:
    """min ½xᵀPx + cᵀx with x₁ + x₂ = 1, x ≥ 0: the equality QP, x = (.25, .75), dx/dc = ¼[[−1, 1], [1, −1]]."""
    P, c = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=D), vector(1, 1)
    A, b = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=D), vector(1, 0, 0)
    point = ConicPoint(vector(0.25, 0.75), vector(-2.75, 0, 0))
    program = ConicProgram([Zero(1), NonNegative(2)])
    in_c, in_P = jacrev(lambda c, P: idf.attach(program, point, A, b, c, P).primal, (0, 1))(c, P)
    close(in_c, torch.tensor([[-0.25, 0.25], [0.25, -0.25]], dtype=D), 1e-12)
    # P is seen by its symmetric part: dx = dx/dc · (dP + dPᵀ)/2 · x.
    close(
        in_P,
        torch.einsum("ij,jk,l->ikl", in_c, torch.eye(2, dtype=D), point.primal).add(
            torch.einsum("ij,jl,k->ikl", in_c, torch.eye(2, dtype=D), point.primal)
        )
        / 2,
        1e-12,
    )


def test_a_degenerate_vertex_is_reported() -> None:
    """min x subject to x ≥ 0 twice: the multipliers are not unique, and one is zero at an active constraint."""
    program, A = ConicProgram([NonNegative(2)]), -torch.ones(2, 1, dtype=D)
    point = ConicPoint(vector(0), vector(1, 0))
    b = torch.zeros(2, dtype=D, requires_grad=True)
    with pytest.warns(idf.ConvergenceWarning, match="NOT_SMOOTH"):
        idf.attach(program, point, A, b, vector(1)).primal.sum().backward()


def test_a_batch_of_programmes() -> None:
    case = CASES["second-order"]
    args = case.batch(5)
    close(vmap(jacrev(case.implicit, 1))(*args), vmap(jacrev(case.closed, 1))(*args), 1e-9)


@pytest.mark.parametrize(
    "seed", [1, 3, 11, 17, 19, 21, 23, 27]
)  # those that are regular, with no kink in the differences
def test_clarabel_on_all_cones_at_once(seed: int) -> None:
    """A random programme with a chosen solution; Clarabel's solution is differentiated, and differenced."""
    cones = (Zero(2), NonNegative(3), SecondOrder(4), Exponential(), PositiveSemidefinite(3))
    theirs = [
        clarabel.ZeroConeT(2),
        clarabel.NonnegativeConeT(3),
        clarabel.SecondOrderConeT(4),
        clarabel.ExponentialConeT(),
        clarabel.PSDTriangleConeT(3),
    ]
    m, n = sum(c.size for c in cones), 8
    v = random(10 + seed, m)
    sizes = [c.size for c in cones]
    y = torch.cat([c.project_dual(part) for c, part in zip(cones, v.split(sizes), strict=True)])
    s, A, x = y - v, random(20 + seed, m, n), random(30 + seed, n)
    b, c = A @ x + s, -A.mT @ y

    def solve(A: Tensor, b: Tensor, c: Tensor) -> ConicPoint:
        options = clarabel.DefaultSettings()
        options.verbose = False
        options.tol_gap_abs = options.tol_gap_rel = options.tol_feas = 1e-12
        P = scipy.sparse.csc_matrix((n, n))
        found = clarabel.DefaultSolver(
            P, c.numpy(), scipy.sparse.csc_matrix(A.numpy()), b.numpy(), theirs, options
        ).solve()
        return ConicPoint(*(torch.as_tensor(np.array(t)) for t in (found.x, found.z)))

    point = solve(A, b, c)
    direction = (random(40 + seed, m, n), random(50 + seed, m), random(60 + seed, n))
    residual = lambda x, y: torch.cat([*ConicProgram(cones).residual(ConicPoint(x, y), A, b, c)])  # noqa: E731
    jacobian = torch.cat(torch.func.jacrev(residual, (0, 1))(x, y), -1)
    assert float(torch.linalg.svdvals(jacobian)[-1]) > 0.02
    attach = lambda *data: idf.attach(ConicProgram(cones), point, *data).primal  # noqa: E731
    got = torch.func.jvp(attach, (A, b, c), direction)[1]
    moved = lambda h: solve(*(t + h * d for t, d in zip((A, b, c), direction, strict=True))).primal  # noqa: E731
    difference = (moved(2e-5) - moved(-2e-5)) / 4e-5
    close(got, difference, 2e-3)  # Clarabel's x is good to about 1e-9, so these to about 1e-4


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ConicProgram([3]), TypeError, "cones has 3"),
        (
            lambda: idf.attach(
                ConicProgram([NonNegative(2)]), ConicPoint(vector(0), vector(0)), vector(1, 1).unsqueeze(-1),
                vector(1, 1), vector(1),
            ),
            idf.ImplicitDiffError,
            r"'dual': \(2,\).*'dual': \(1,\)",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
