"""Convex quadratic programs, many at once, by a primal–dual interior-point method on the homogeneous embedding.

    min ½ xᵀQx + qᵀx   subject to   Cx + s = c,   s = 0 in the first rows (equalities), s ≥ 0 in the others

with the multipliers y, y ≥ 0 where s ≥ 0. The embedding (Goulart and Chen 2024, Clarabel, Eq. 8)

    Qx + Cᵀy + qτ = 0,   Cx + s − cτ = 0,   qᵀx + cᵀy + xᵀQx/τ + κ = 0,   s, y, τ, κ ≥ 0

has a solution for every program: τ > 0 gives the optimum (x, y)/τ, τ = 0 a proof that there is none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._iteration import iterate, select
from .._vectors import dot, inner
from ..info import RUNNING, Status

BACK_OFF = 0.99
"""The part of the way to the boundary that a step goes."""
SHORTEST_STEP = 1e-5
"""A step that is shorter tells that rounding rules."""
EQUILIBRATIONS = 3
CORRECTIONS = 8
"""Of the active set, in single precision, where it is not right at once."""


class Program(NamedTuple):
    """The data of a program or of a batch, of shapes (*batch, n, n), (*batch, n), (*batch, k, n) and (*batch, k)."""

    Q: Tensor
    q: Tensor
    C: Tensor
    c: Tensor
    equalities: int


class Optimum(NamedTuple):
    """How the programs ended: x (*batch, n), y (*batch, k), and per program iterations and status.

    Where the status is INFEASIBLE, y is a proof of it: Cᵀy = 0 and cᵀy = −1. Where it is UNBOUNDED, x is a direction
    with Qx = 0, Cx ≤ 0 (= 0 for equalities) and qᵀx = −1.
    """

    x: Tensor
    y: Tensor
    iterations: Tensor
    status: Tensor
    degenerate: Tensor
    """Whether a constraint is active with a multiplier of zero, so that x has no derivative."""
    derivative: Derivative
    """∂F/∂(x, y) there for F = (Qx + q + Cᵀy, Ax − b, min(μ, h − Gx)), A and b the equalities, G and h the others."""


class Iterate(NamedTuple):
    """A point of the embedding, τ behind the multipliers and κ behind the slacks, and its residuals."""

    x: Tensor
    y: Tensor
    """(multipliers, τ)"""
    s: Tensor
    """(slacks of the inequalities, κ)"""
    Qx: Tensor
    dual: Tensor
    primal: Tensor
    gap: Tensor
    residual_norm: Tensor
    status: Tensor


def default_tolerance(dtype: torch.dtype) -> float:
    """ε^0.6 = 4e-10 for float64; ε^0.85 = 1e-6 for float32, as the root of a gap of ε^0.6 is an error of 8e-3 in x."""
    return float(torch.finfo(dtype).eps ** (0.6 if is_double(dtype) else 0.85))


def is_double(dtype: torch.dtype) -> bool:
    """Whether there are digits to spare: roots of what rounding leaves are still small."""
    return torch.finfo(dtype).eps < 1e-12


def solve_program(program: Program, tol: float, max_iterations: int, start: tuple[Tensor, Tensor] | None) -> Optimum:
    """The optimum of each program, to a residual of ``tol`` relative to data and solution.

    ``start``, a point (x, y), is for its active set: where the optimum has the same one, it takes no iterations. An
    interior-point method cannot use more of it (it must stay away from the boundary on which the optimum lies).
    """
    scaled, scaling = _equilibrated(program)
    state = _initial(scaled)
    if start is None and scaled.c.shape[-1] == scaled.equalities:
        start = program.q, program.c  # all constraints are active
    if start is not None:
        guess, *_ = _on_active_set(scaled, *scaling.inward(*start))
        state = select(guess.residual_norm <= tol, guess, state)
    iterations = torch.zeros_like(state.status)
    # A third of the digits shows the active set as a rule, and with it the optimum to rounding.
    for threshold in (tol ** (1 / 3), tol):
        left = max_iterations - int(iterations.max()) if iterations.numel() else 0
        ended = iterate(
            lambda state: _step(scaled, state), state, torch.full_like(state.residual_norm, threshold), left
        )
        state, iterations, status = ended.state, iterations + ended.iterations, ended.status
        tau = torch.where((state.status == RUNNING).unsqueeze(-1), state.y[..., -1:], 1)
        may_be_wrong = state.status == RUNNING
        polished, active_set = _polished(scaled, state.x / tau, state.y[..., :-1] / tau, tol, may_be_wrong)
        solved = polished.residual_norm <= tol
        state = select(solved, polished, state)
        status = torch.where(solved, int(Status.CONVERGED), status)
        if bool(((state.status != RUNNING) | solved).all()):
            break
    proven = (status == Status.INFEASIBLE) | (status == Status.UNBOUNDED)
    tau = torch.where(proven.unsqueeze(-1), 1, state.y[..., -1:])
    x, y, s = state.x / tau, state.y[..., :-1] / tau, state.s[..., :-1] / tau
    # Both members of a degenerate pair are of the size of the root of their product.
    eps, pair = torch.finfo(x.dtype).eps, (y[..., program.equalities :], s)
    error = state.residual_norm.clamp(min=eps).unsqueeze(-1) ** 0.5
    if not is_double(x.dtype):
        # That root is large here. On the active set there is only rounding; elsewhere, pairs may be left undecided, or
        # no finite step leads on from a point that is near. Such an x is kept, and reported.
        error = torch.where(solved.unsqueeze(-1), eps**0.7, error)
        undecided = (status == Status.CONVERGED) & (torch.minimum(*pair) > eps**0.7).any(-1)
        near = (status == Status.NON_FINITE) & (state.residual_norm <= eps**0.6)
        status = torch.where(~solved & (undecided | near), int(Status.STAGNATED), status)
    degenerate = (torch.maximum(*pair) <= error).any(-1)
    x, y = scaling.outward(x, y)
    x = torch.where((status == Status.UNBOUNDED).unsqueeze(-1), x / -inner(program.q, x), x)
    y = torch.where((status == Status.INFEASIBLE).unsqueeze(-1), y / -inner(program.c, y), y)
    return Optimum(x, y, iterations, status, degenerate, Derivative(program.C, program.equalities, scaling, active_set))


# ------------------------------------------------------------------------------------------------- one iteration


def _step(program: Program, state: Iterate) -> Iterate:
    """Mehrotra's predictor and corrector (Goulart and Chen 2024, section 3)."""
    Q, q, _, c, p = program
    x, y, s = state.x, state.y, state.s
    z, tau, kappa = y[..., p:], y[..., -1:], s[..., -1:]
    ratio = s / z
    system = _System(program, torch.nn.functional.pad(ratio[..., :-1], (p, 0)))

    # Both right-hand sides of the predictor at once: that of the residuals, and that of τ.
    dual, primal = torch.stack([-state.dual, -q], -2), torch.stack([_pad(s, p) - state.primal, c], -2)
    (x1, x2), (y1, y2) = (v.unbind(-2) for v in system.solve(dual, primal))
    # The pivot of τ as a sum of squares: κ/τ + ‖x₂ − x/τ‖²_Q + ‖y₂‖²_W, and what the shifts add.
    Qx2 = times(Q, x2)
    away = x2 - x / tau
    pivot = kappa / tau + inner(away, Qx2 - state.Qx / tau) + inner(y2, y2 / system.D) + system.shift * inner(x2, x2)
    slope = q + 2 * state.Qx / tau

    def direction(x1: Tensor, y1: Tensor, gap: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtau = (gap.unsqueeze(-1) - t[..., -1:] + inner(slope, x1) + inner(c, y1)) / pivot
        dy = torch.cat([y1 + dtau * y2, dtau], -1)
        return x1 + dtau * x2, dy, -t - ratio * dy[..., p:]

    dx, dy, ds = direction(x1, y1, state.gap, s)
    dz = dy[..., p:]
    mu = inner(s, z) / s.shape[-1]
    sigma = (1 - _longest(z, dz, s, ds, 1.0)) ** 3
    t = s + (ds * dz - sigma * mu) / z
    rest = 1 - sigma
    x1, y1 = system.solve_one(-rest * state.dual, _pad(t, p) - rest * state.primal)
    dx, dy, ds = direction(x1, y1, rest.squeeze(-1) * state.gap, t)
    step = _longest(z, dy[..., p:], s, ds, BACK_OFF)
    x, y, s = x + step * dx, y + step * dy, s + step * ds
    # The embedding is homogeneous: without a scale, its points may grow or vanish.
    size = torch.maximum(y[..., -1:], s[..., -1:])
    return _evaluated(program, x / size, y / size, s / size, step.squeeze(-1))


def _longest(z: Tensor, dz: Tensor, s: Tensor, ds: Tensor, fraction: float) -> Tensor:
    """The step to the boundary of z, s ≥ 0, times the fraction, at most 1; of shape (*batch, 1)."""
    steepest = torch.maximum((-dz / z).amax(-1, keepdim=True), (-ds / s).amax(-1, keepdim=True))
    return fraction / steepest.clamp(min=fraction)


def _evaluated(
    program: Program, x: Tensor, y: Tensor, s: Tensor, step: Tensor | None = None, *, complementary: bool = False
) -> Iterate:
    """The point with its residuals, and whether it proves that there is no optimum.

    Where it is ``complementary``, y or s is zero in each pair, and its gap is xᵀ(dual) + yᵀ(primal). In single
    precision the sum is of rounding there, and counts for less: it tells only that there is an optimum at all.
    """
    Q, q, C, c, p = program
    tau, kappa = y[..., -1], s[..., -1]
    y0, s0 = y[..., :-1], _pad(s, p)
    Qx, Cx, CTy = times(Q, x), times(C, x), times(C.mT, y0)
    linear, bound, curvature = dot(q, x), dot(c, y0), dot(x, Qx) / tau
    dual = Qx + CTy + q * y[..., -1:]
    primal = Cx + s0 - c * y[..., -1:]
    gap = linear + bound + curvature + kappa

    size = torch.maximum(_largest(x), tau)
    residual_norm = torch.maximum(
        _largest(dual) / torch.maximum(size, _largest(y0)), _largest(primal) / torch.maximum(size, _largest(s0))
    )
    difference = (linear + bound + curvature).abs()
    value = torch.minimum((0.5 * curvature + linear).abs(), (0.5 * curvature + bound).abs())
    relative_gap = difference / torch.maximum(tau, value)
    if complementary and not is_double(x.dtype):
        relative_gap = torch.finfo(x.dtype).eps ** 0.25 * relative_gap
    residual_norm = torch.maximum(residual_norm, relative_gap)
    stuck = torch.zeros_like(tau, dtype=torch.bool) if step is None else step < SHORTEST_STEP
    status = torch.where(stuck, int(Status.STAGNATED), RUNNING)
    if bool((kappa > tau).any()):  # not so near an optimum
        small = torch.finfo(x.dtype).eps ** 0.5
        unbounded = (linear < 0) & (torch.maximum(_largest(Qx), _largest(Cx + s0)) <= -small * linear)
        infeasible = (bound < 0) & (_largest(CTy) <= -small * bound)
        status = torch.where(unbounded & (kappa > tau), int(Status.UNBOUNDED), status)
        status = torch.where(infeasible & (kappa > tau), int(Status.INFEASIBLE), status)
    return Iterate(x, y, s, Qx, dual, primal, gap, residual_norm, status)


def _initial(program: Program) -> Iterate:
    """The optimum with the inequalities as least squares, its slacks and multipliers moved inside (ibid., section 3.5).

    Where there are no inequalities, that is the optimum.
    """
    _, q, _, c, p = program
    one = q.new_ones(*q.shape[:-1], 1)
    weights = torch.cat([c.new_zeros(p), c.new_ones(c.shape[-1] - p)]).expand(c.shape)
    x, y = _System(program, weights).solve_one(-q, c)
    z = y[..., p:]
    s = _moved_inside(-z)
    return _evaluated(program, x, torch.cat([y[..., :p], _moved_inside(z), one], -1), torch.cat([s, one], -1))


def _moved_inside(v: Tensor) -> Tensor:
    if v.shape[-1] == 0:
        return v
    least = v.amin(-1, keepdim=True)
    return torch.where(least > 0, v, v + (1 - least))


def _polished(program: Program, x: Tensor, y: Tensor, tol: float, may_be_wrong: Tensor) -> tuple[Iterate, ActiveSet]:
    """The optimum on the active set at (x, y), corrected in single precision where that is not the right one.

    A gap of ε^0.85 is not small enough there to tell it: slack and multiplier of a pair may both be 1e-3. The
    corrections are those of the primal–dual active-set method (Hintermüller, Ito and Kunisch 2002).
    """
    polished, active_set, x, y = _on_active_set(program, x, y)
    for _ in range(0 if is_double(x.dtype) else CORRECTIONS):
        wrong = may_be_wrong & (polished.residual_norm > tol)
        if not bool(wrong.any()):
            break
        other, its_set, x, y = _on_active_set(program, x, y)
        mended = wrong & (other.residual_norm <= tol)
        polished, active_set = select(mended, other, polished), select(mended, its_set, active_set)
    return polished, active_set


def _on_active_set(program: Program, x: Tensor, y: Tensor) -> tuple[Iterate, ActiveSet, Tensor, Tensor]:
    """The optimum if the active constraints are those at (x, y), where y exceeds the slack; and its own (x, y).

    The optimum has no negative multipliers or slacks; (x, y) has them where other constraints are active.
    """
    Q, q, C, c, p = program
    active = torch.cat([torch.ones_like(y[..., :p], dtype=torch.bool), (y > c - times(C, x))[..., p:]], -1)
    active_set = ActiveSet.of(program, active)
    x, y = active_set.solve(-q, c)
    # The factorisation is of a matrix that was shifted: one refinement takes that out.
    dx, dy = active_set.solve(-q - times(Q, x) - times(C.mT, y), c - times(C, x))
    x, y, one = x + dx, y + dy, q.new_ones(*q.shape[:-1], 1)
    z = torch.cat([y[..., :p], y[..., p:].clamp(min=0), one], -1)
    s = torch.cat([(c - times(C, x))[..., p:].clamp(min=0), torch.zeros_like(one)], -1)
    return _evaluated(program, x, z, s, complementary=True), active_set, x, y


class ActiveSet(NamedTuple):
    """[Q Cᵀ; C 0] (x, y) = (r, t) with the active rows of C, factorised; y = 0 at the others."""

    active: Tensor
    factor: Tensor
    pivots: Tensor

    @classmethod
    def of(cls, program: Program, active: Tensor) -> ActiveSet:
        """The factorisation, with a shift of some rounding units in the place of dependent rows."""
        C = torch.where(active.unsqueeze(-1), program.C, 0)
        K = torch.cat([torch.cat([program.Q, C.mT], -1), torch.nn.functional.pad(C, (0, C.shape[-2]))], -2)
        shift = torch.finfo(C.dtype).eps ** 0.9
        K.diagonal(dim1=-2, dim2=-1).add_(
            torch.cat([torch.full_like(program.q, shift), torch.where(active, -shift, 1)], -1)
        )
        factor, pivots, _ = torch.linalg.lu_factor_ex(K)
        return cls(active, factor, pivots)

    def solve(self, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        rhs = torch.cat([r, torch.where(self.active, t, 0)], -1).unsqueeze(-1)
        x, y = torch.linalg.lu_solve(self.factor, self.pivots, rhs).squeeze(-1).split([r.shape[-1], t.shape[-1]], -1)
        return x, y

    @property
    def is_regular(self) -> Tensor:
        """Whether the rows are independent and the optimum is unique, (*batch,)."""
        U = self.factor.diagonal(dim1=-2, dim2=-1).abs()
        return U.amin(-1) > torch.finfo(U.dtype).eps ** 0.75 * U.amax(-1) if U.shape[-1] else U.sum(-1) == 0


class Derivative(NamedTuple):
    """J = [Q Cᵀ; ±C 0] with rows (0, eᵢ) for inactive constraints, the sign that of equality and inequality."""

    C: Tensor
    equalities: int
    scaling: Scaling
    active_set: ActiveSet

    def solve(self, b: Tensor, adjoint: bool) -> Tensor:
        """J⁻¹ b or J⁻ᵀ b for b of shape (*batch, n + k)."""
        r, t = b.split([self.C.shape[-1], self.C.shape[-2]], -1)
        active, s = self.active_set.active, self.scaling
        sign = torch.ones_like(t)
        sign[..., self.equalities :] = -1
        if not adjoint:
            r = r - times(self.C.mT, torch.where(active, 0, t))
        x, y = self.active_set.solve(s.columns * r / s.price, s.rows * (t if adjoint else sign * t) / s.length)
        x, y = s.outward(x, y)
        y = torch.where(active, sign * y, t - times(self.C, x)) if adjoint else torch.where(active, y, t)
        return torch.cat([x, y], -1)


class _System:
    """[Q + δI, Cᵀ; C, −W − δI] (x, y) = (r, t), by Cholesky's factorisation of what remains after y is eliminated.

    With the small shift δ it always exists, and the step is that of a proximal-point method: rows of C may depend on
    each other, and where the equations contradict each other, the step leads towards a proof of it.
    """

    def __init__(self, program: Program, W: Tensor) -> None:
        self.C, self.shift = program.C, torch.finfo(W.dtype).eps ** 0.45
        self.D = 1 / (W + self.shift)
        M = program.Q + self.C.mT @ (self.D.unsqueeze(-1) * self.C)
        M.diagonal(dim1=-2, dim2=-1).add_(self.shift)
        self.factor = torch.linalg.cholesky_ex(M)[0]

    def solve(self, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x and y for right-hand sides in rows, (*batch, rows, n) and (*batch, rows, k)."""
        D = self.D.unsqueeze(-2)
        x = torch.cholesky_solve((r + (D * t) @ self.C).mT, self.factor).mT
        return x, D * (x @ self.C.mT - t)

    def solve_one(self, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x and y for one right-hand side."""
        x, y = self.solve(r.unsqueeze(-2), t.unsqueeze(-2))
        return x.squeeze(-2), y.squeeze(-2)


# ------------------------------------------------------------------------------------------------------- scaling


class Scaling(NamedTuple):
    """x = length · columns · x̂ and y = price · rows · ŷ."""

    length: Tensor
    price: Tensor
    columns: Tensor
    rows: Tensor

    def outward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.length * self.columns * x, self.price * self.rows * y

    def inward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x / (self.length * self.columns), y / (self.price * self.rows)


def _equilibrated(program: Program) -> tuple[Program, Scaling]:
    """The program with rows and columns of [Q Cᵀ; C 0] of norm about 1 (Ruiz 2001), and q and c too."""
    Q, q, C, c, p = program
    # The scale of the objective is free, and that of each row: Ruiz's iteration would come to them slowly.
    Q = Q / _positive(_largest(Q.flatten(-2)))[..., None, None]
    columns, rows = torch.ones_like(q), 1 / _positive(_largest(C))
    C = rows.unsqueeze(-1) * C
    for _ in range(EQUILIBRATIONS):
        by_column = torch.maximum(_largest(Q), _largest(C.mT))
        by_row = _largest(C)
        f, e = (_positive(v).rsqrt() for v in (by_column, by_row))
        Q, C = f.unsqueeze(-1) * Q * f.unsqueeze(-2), e.unsqueeze(-1) * C * f.unsqueeze(-2)
        columns, rows = columns * f, rows * e
    Q, q, c = columns.unsqueeze(-1) * program.Q * columns.unsqueeze(-2), columns * q, rows * c
    curvature, slope, length = (_largest(v).unsqueeze(-1) for v in (Q.flatten(-2), q, c))
    length = _positive(torch.where(length > 0, length, slope / _positive(curvature)))
    price = _positive(torch.maximum(length * curvature, slope))
    scaled = Program((length / price).unsqueeze(-1) * Q, q / price, C, c / length, p)
    return scaled, Scaling(length, price, columns, rows)


def _positive(v: Tensor) -> Tensor:
    """v, or 1 where it is 0: a scale to divide by."""
    return torch.where(v > 0, v, 1)


def _largest(v: Tensor) -> Tensor:
    """The norm of the largest component; 0 where there is none."""
    return v.abs().amax(-1) if v.shape[-1] else v.new_zeros(v.shape[:-1])


def times(matrix: Tensor, v: Tensor) -> Tensor:
    """The product of each system."""
    return (v.unsqueeze(-2) @ matrix.mT).squeeze(-2)  # batches of rows are the faster ones


def _pad(s: Tensor, equalities: int) -> Tensor:
    """The slacks of all rows: zeros for the equalities, and without κ."""
    return torch.nn.functional.pad(s[..., :-1], (equalities, 0))
