"""The interior-point method: optima that were chosen first, SciPy's, and proofs that there is none."""

from __future__ import annotations

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import implicitdiff as idf
from implicitdiff.layers import _interior_point
from implicitdiff.layers._interior_point import Optimum, Program, default_tolerance, solve_program

from .problems import random

D = torch.float64
SOLVED, INFEASIBLE, UNBOUNDED = (int(idf.Status[s]) for s in ("CONVERGED", "INFEASIBLE", "UNBOUNDED"))


def times(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)


def chosen(
    seed: int, batch: int, n: int, p: int, m: int, *, rank: int | None = None, active: int | None = None
) -> tuple[Program, Tensor, Tensor]:
    """Programs with a strictly complementary optimum (x, y): Q of the given rank, so many active inequalities.

    It is unique where rank and active constraints leave no direction free.
    """
    rank, active = n if rank is None else rank, min(m, (n - p) // 2) if active is None else active
    F, C, x, y, s = (
        random(seed + i, batch, *shape) for i, shape in enumerate([(n, rank), (p + m, n), (n,), (p + m,), (p + m,)])
    )
    Q = F @ F.mT + (torch.eye(n, dtype=D) if rank == n else 0)
    is_active = torch.arange(m) < active
    y, s = (torch.cat([v[:, :p], 0.1 + v[:, p:].abs()], -1) for v in (y, s))
    y[:, p:] *= is_active
    s[:, p:] *= ~is_active
    s[:, :p] = 0
    return Program(Q, -times(Q, x) - times(C.mT, y), C, times(C, x) + s, p), x, y


def solve(program: Program, start: tuple[Tensor, Tensor] | None = None) -> Optimum:
    return solve_program(program, default_tolerance(program.q.dtype), 100, start)


def single(program: Program) -> Program:
    return Program(*(v.float() for v in program[:4]), program.equalities)  # type: ignore[arg-type]


def residual(program: Program, x: Tensor, y: Tensor) -> float:
    Q, q, C, c, p = program
    slack = c - times(C, x)
    parts = [times(Q, x) + q + times(C.mT, y), slack[..., :p], torch.minimum(y, slack)[..., p:]]
    return max(float(v.abs().max()) for v in parts if v.numel())


@pytest.mark.parametrize(
    ("n", "p", "m"), [(1, 0, 0), (1, 0, 1), (1, 1, 0), (5, 2, 0), (6, 0, 9), (10, 3, 15), (12, 4, 30)], ids=str
)
def test_finds_the_chosen_optimum_to_rounding(n: int, p: int, m: int) -> None:
    """Rounding, not the tolerance of the iteration: the active set is solved on at the end."""
    program, x, y = chosen(1, 30, n, p, m)
    optimum = solve(program)
    assert optimum.status.eq(SOLVED).all()
    torch.testing.assert_close(optimum.x, x, rtol=0, atol=1e-11)
    torch.testing.assert_close(optimum.y, y, rtol=0, atol=1e-10)
    assert int(optimum.iterations.max()) <= (12 if m else 0)
    assert not optimum.degenerate.any()


def test_finds_it_in_single_precision() -> None:
    program, x, _ = chosen(2, 30, 8, 2, 12)
    optimum = solve(single(program))
    assert optimum.status.eq(SOLVED).all()
    torch.testing.assert_close(optimum.x.double(), x, rtol=0, atol=1e-5)


def test_corrects_the_active_set_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multipliers and slacks of 1e-3 and less: the root of the tolerance does not tell which one is zero."""
    (Q, _, C, c, p), x, y = chosen(18, 60, 8, 2, 12)
    small = 10 ** -(3 + random(19, 60, 3).abs().clamp(max=1))
    y[:, 2:5], slack = small, c - times(C, x)
    slack[:, 5:8] = small
    slack[:, 2:5] = y[:, 5:8] = 0
    program = Program(Q, -times(Q, x) - times(C.mT, y), C, times(C, x) + slack, p)
    optimum = solve(single(program))
    assert optimum.status.eq(SOLVED).all()
    torch.testing.assert_close(optimum.x.double(), x, rtol=0, atol=2e-5)

    monkeypatch.setattr(_interior_point, "CORRECTIONS", 1)  # too few for some, which are reported
    optimum = solve(single(program))
    solved = optimum.status.eq(SOLVED)
    assert 0 < int(solved.sum()) < 60
    torch.testing.assert_close(optimum.x[solved].double(), x[solved], rtol=0, atol=2e-5)
    assert optimum.status[~solved].eq(int(idf.Status.STAGNATED)).all()


def test_ill_conditioned_programs_in_single_precision() -> None:
    """An objective whose terms cancel, at an x of size 100: its gap is of rounding, and the point is the optimum."""
    F = random(24, 250, 10, 10) * torch.logspace(0, -3, 10, dtype=D)
    Q, C = 0.1 * F @ F.mT + 1e-3 * torch.eye(10, dtype=D), random(27, 250, 14, 10)
    slack = torch.nn.functional.pad(random(28, 250, 12).abs(), (2, 0))
    program = Program(Q, random(29, 250, 10), C, times(C, random(30, 250, 10)) + slack, 2)
    x, optimum = solve(program).x, solve(single(program))
    assert optimum.status.eq(SOLVED).all()
    assert float(((optimum.x - x).abs().amax(-1) / x.abs().amax(-1)).max()) < 1e-4


@pytest.mark.parametrize("inequalities", [False, True])
def test_proofs_in_single_precision(inequalities: bool) -> None:
    """x₁ falls without an end, or two equalities, or inequalities, contradict each other."""
    Q, q, C, c, p = chosen(25, 40, 8, 2, 10)[0]
    Q[:, 0] = Q[:, :, 0] = 0
    q[:, 0], C[:, :p, 0], C[:, p:, 0] = -1, 0, -C[:, p:, 0].abs()
    k = None if inequalities else p
    optimum = solve(single(Program(Q, q, C[:, :k], c[:, :k], p)))
    assert optimum.status.eq(UNBOUNDED).all()
    Q, q, C, c, p = chosen(26, 40, 8, 2, 10)[0]
    row, side = (-C[:, -1:], -c[:, -1:] - 1) if inequalities else (C[:, :1], c[:, :1] + 1)
    parts = [(C, c), (row, side)] if inequalities else [(row, side), (C, c)]
    C, c = (torch.cat(v, 1) for v in zip(*parts, strict=True))
    optimum = solve(single(Program(Q, q, C, c, p + (not inequalities))))
    assert float(optimum.status.eq(INFEASIBLE).double().mean()) > 0.9  # rounding stops some before a proof
    assert not optimum.status.eq(SOLVED).any()


def test_linear_programs_against_scipy() -> None:
    """At a vertex, n active constraints and Q = 0; and where the optimum is a face, by its value."""
    for active in (4, 2):
        program, x, _ = chosen(3, 20, 6, 2, 15, rank=0, active=active)
        optimum = solve(program)
        assert optimum.status.eq(SOLVED).all()
        _, q, C, c, p = program
        for i in range(20):
            found = scipy.optimize.linprog(
                *(v.numpy() for v in (q[i], C[i, p:], c[i, p:], C[i, :p], c[i, :p])),
                bounds=(None, None),
                method="highs",
            )
            assert abs(found.fun - float(q[i] @ optimum.x[i])) < 1e-7 * (1 + abs(found.fun))  # HiGHS' own tolerance
        assert residual(program, optimum.x, optimum.y) < 1e-7
        if active == 4:
            torch.testing.assert_close(optimum.x, x, rtol=0, atol=1e-8)


def test_quadratic_programs_without_curvature_in_some_directions_against_scipy() -> None:
    program, x, _ = chosen(4, 6, 5, 1, 8, rank=2, active=2)
    optimum = solve(program)
    torch.testing.assert_close(optimum.x, x, rtol=0, atol=1e-8)
    for i in range(6):
        Q, q, C, c = (v[i].numpy() for v in program[:4])  # type: ignore[union-attr]
        found = scipy.optimize.minimize(
            lambda x, Q=Q, q=q: 0.5 * x @ Q @ x + q @ x,
            [0.0] * 5,
            jac=lambda x, Q=Q, q=q: Q @ x + q,
            constraints=[
                {"type": "eq", "fun": lambda x, C=C, c=c: C[:1] @ x - c[:1], "jac": lambda x, C=C: C[:1]},
                {"type": "ineq", "fun": lambda x, C=C, c=c: c[1:] - C[1:] @ x, "jac": lambda x, C=C: -C[1:]},
            ],
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 200},
        )
        torch.testing.assert_close(optimum.x[i], torch.as_tensor(found.x), rtol=0, atol=1e-5)  # SLSQP's accuracy


def test_each_problem_of_a_batch_is_as_if_alone() -> None:
    """Easy and hard ones, one infeasible, one unbounded, one with a NaN: by their own count, and no word leaks."""
    program, x, _ = chosen(5, 6, 6, 0, 10)
    Q, q, C, c = (v.clone() for v in program[:4])  # type: ignore[union-attr]
    C[0, 0], c[0, 0] = -C[0, 1], -c[0, 1] - 1  # its opposite is above: infeasible
    Q[1], C[1, :, 0], q[1, 0] = torch.diag(torch.tensor([0.0, 1, 1, 1, 1, 1], dtype=D)), 0, 1  # falls along −e₁
    q[2, 3] = torch.nan
    q[3], c[3] = 1e8 * q[3], 1e8 * c[3]
    optimum = solve(Program(Q, q, C, c, 0))
    statuses = [INFEASIBLE, UNBOUNDED, int(idf.Status.NON_FINITE), SOLVED, SOLVED, SOLVED]
    assert optimum.status.tolist() == statuses
    for i in range(6):
        alone = solve(Program(Q[i], q[i], C[i], c[i], 0))
        assert int(alone.status) == statuses[i]
        if statuses[i] == SOLVED:
            torch.testing.assert_close(alone.x, optimum.x[i], rtol=1e-9, atol=1e-9)
            assert abs(int(alone.iterations) - int(optimum.iterations[i])) <= 1  # rounds otherwise
    torch.testing.assert_close(optimum.x[4:], x[4:], rtol=0, atol=1e-11)
    torch.testing.assert_close(optimum.x[3], 1e8 * x[3], rtol=1e-9, atol=0)
    assert int(optimum.iterations[4]) < int(optimum.iterations.max())


@pytest.mark.parametrize("equality", [False, True])
def test_infeasible_problems_come_with_a_proof(equality: bool) -> None:
    """Farkas: y with Cᵀy = 0, y ≥ 0 at the inequalities and cᵀy = −1."""
    program, _, _ = chosen(6, 40, 8, 2, 10)
    Q, q, C, c, p = program
    if equality:
        program = Program(Q, q, torch.cat([C[:, :1], C], 1), torch.cat([c[:, :1] + 1, c], 1), p + 1)
    else:
        program = Program(Q, q, torch.cat([C, -C[:, 3:4]], 1), torch.cat([c, -c[:, 3:4] - 1], 1), p)
    optimum = solve(program)
    assert optimum.status.eq(INFEASIBLE).all()
    y = optimum.y
    # The proof is as good as ε^½ after scaling.
    assert float(times(program.C.mT, y).abs().max()) < 1e-6
    assert float(y[:, program.equalities :].min()) >= 0
    torch.testing.assert_close((program.c * y).sum(-1), -torch.ones(40, dtype=D))


@pytest.mark.parametrize("m", [0, 6])
def test_unbounded_problems_come_with_a_direction(m: int) -> None:
    """x with Qx = 0, Ax = 0, Gx ≤ 0 and qᵀx = −1."""
    d = torch.nn.functional.normalize(random(7, 40, 10), dim=-1).unsqueeze(-1)
    F, A, G = (v - v @ d @ d.mT for v in (random(8, 40, 3, 10), random(9, 40, 2, 10), random(10, 40, m, 10)))
    C = torch.cat([A, G - random(11, 40, m, 1).abs() @ d.mT], 1)
    slack = torch.cat([torch.zeros(40, 2, dtype=D), random(12, 40, m).abs()], 1)
    program = Program(F.mT @ F, random(13, 40, 10), C, times(C, random(14, 40, 10)) + slack, 2)
    q = program.q - ((program.q * d.squeeze(-1)).sum(-1, keepdim=True) + 1) * d.squeeze(-1)
    program = program._replace(q=q)
    optimum = solve(program)
    assert optimum.status.eq(UNBOUNDED).all()
    # The proof is as good as ε^½ after scaling.
    assert float(times(program.Q, optimum.x).abs().max()) < 1e-6
    along = times(C, optimum.x)
    assert float(along[:, :2].abs().max()) < 1e-6
    assert not m or float(along[:, 2:].max()) < 1e-6
    torch.testing.assert_close((q * optimum.x).sum(-1), -torch.ones(40, dtype=D))


def test_rows_may_depend_on_each_other() -> None:
    program, x, _ = chosen(8, 20, 8, 3, 6)
    Q, q, C, c, _ = program
    C, c = torch.cat([C[:, :3].sum(1, keepdim=True), C], 1), torch.cat([c[:, :3].sum(1, keepdim=True), c], 1)
    optimum = solve(Program(Q, q, C, c, 4))
    assert optimum.status.eq(SOLVED).all()
    torch.testing.assert_close(optimum.x, x, rtol=0, atol=1e-10)
    assert not optimum.derivative.active_set.is_regular.any()


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_units_do_not_matter(scale: float) -> None:
    """Of the objective, of x, and of each row."""
    program, x, y = chosen(9, 20, 7, 2, 9)
    Q, q, C, c, p = program
    rows = torch.exp(3 * random(10, 20, 11))
    for changed, factor, dual in (
        (Program(scale * Q, scale * q, C, c, p), 1.0, scale),
        (Program(Q, scale * q, C, scale * c, p), scale, scale),
        (Program(Q, q, rows.unsqueeze(-1) * C, rows * c, p), 1.0, 1 / rows),
    ):
        optimum = solve(changed)
        assert optimum.status.eq(SOLVED).all()
        torch.testing.assert_close(optimum.x, factor * x, rtol=0, atol=1e-10 * factor)
        torch.testing.assert_close(optimum.y / dual, y, rtol=0, atol=1e-8)


def test_a_start_at_the_optimum_takes_no_iterations_and_a_bad_one_does_no_harm() -> None:
    program, x, y = chosen(11, 20, 8, 2, 12)
    near = solve(program._replace(q=program.q + 1e-3 * random(12, 20, 8)), (x, y))
    assert int(near.iterations.max()) == 0
    bad = x.clone()
    bad[:10] = 1e3 * random(13, 10, 8)
    bad[5] = torch.nan
    optimum = solve(program, (bad, y.roll(1, -1)))
    assert optimum.status.eq(SOLVED).all()
    torch.testing.assert_close(optimum.x, x, rtol=0, atol=1e-11)


def test_a_degenerate_optimum_is_found_and_known() -> None:
    """min ½‖x‖² subject to x ≥ 0: every constraint is active with a multiplier of zero."""
    eye, zero = torch.eye(3, dtype=D), torch.zeros(3, dtype=D)
    optimum = solve(Program(eye, zero, -eye, zero, 0))
    assert int(optimum.status) == SOLVED
    torch.testing.assert_close(optimum.x, zero, rtol=0, atol=1e-8)
    assert bool(optimum.degenerate)


def test_the_derivative_that_is_left() -> None:
    """J = [Q Cᵀ; C 0], the rows of inequalities −G where they are active and those of the identity where not."""
    program, _, y = chosen(15, 6, 7, 2, 9)
    Q, _, C, _, p = program
    C = C.clone()
    C[:, p:] *= -1
    active = torch.cat([torch.ones(6, p, dtype=torch.bool), y[:, p:] > 0], -1)
    rows = torch.cat([active.unsqueeze(-1) * C, torch.diag_embed((~active).double())], -1)
    J = torch.cat([torch.cat([Q, program.C.mT], -1), rows], -2)
    derivative, v = solve(program).derivative, random(16, 6, 18)
    torch.testing.assert_close(derivative.solve(times(J, v), False), v, rtol=0, atol=1e-10)
    torch.testing.assert_close(derivative.solve(times(J.mT, v), True), v, rtol=0, atol=1e-10)


def test_empty_problems() -> None:
    empty = torch.zeros(0, dtype=D)
    assert solve(Program(torch.zeros(0, 0, dtype=D), empty, torch.zeros(0, 0, dtype=D), empty, 0)).x.shape == (0,)
    optimum = solve(Program(torch.zeros(0, 0, dtype=D), empty, torch.zeros(1, 0, dtype=D), torch.ones(1, dtype=D), 0))
    assert int(optimum.status) == SOLVED


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 8),
    p=st.integers(0, 3),
    m=st.integers(0, 12),
    rank=st.integers(0, 8),
    active=st.integers(0, 12),
    seed=st.integers(0, 10_000),
)
def test_random_problems_are_solved(n: int, p: int, m: int, rank: int, active: int, seed: int) -> None:
    """Feasible and bounded by construction, unique or not: always solved, and the optimality conditions hold."""
    p, rank = min(p, n), min(rank, n)
    program, x, _ = chosen(seed, 3, n, p, m, rank=rank, active=min(active, m, n - p))
    optimum = solve(program)
    assert optimum.status.eq(SOLVED).all()
    size = 1 + max(float(v.abs().max()) for v in (program.q, optimum.x, optimum.y, x) if v.numel())
    assert residual(program, optimum.x, optimum.y) < 1e-7 * size
