"""The Levenberg–Marquardt method for nonlinear least squares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._iteration import any_of, iterate
from .._jacobian import JacobianOperator
from .._vectors import dot, quotient, vector_norm
from ..info import FailurePolicy
from ..linear_solvers.cg import CG
from ..linear_solvers.system import System
from ..operators import FunctionOperator
from ._step_search import Progress, first_progress, progress_after
from .base import DECIDES, InnerProblem, InnerSolver

DENSE_UP_TO = 500
"""Above this n the steps are found by products with J and Jᵀ."""
FIRST_DAMPING = 1e-3


class LevenbergMarquardtState(NamedTuple):
    x: Tensor
    residual_norm: Tensor
    status: Tensor
    residuals: Tensor  # r, (*batch, m)
    gradient: Tensor  # Jᵀ r
    factor: Tensor | None  # R of J = Q R, (*batch, min(m, n), n), where n is small
    rotated: Tensor | None  # Qᵀ r
    scale: Tensor  # D, (*batch, n)
    damping: Tensor  # μ, (*batch,)
    growth: Tensor  # ν, what μ grows by at the next rejection
    progress: Progress


class LevenbergMarquardt(InnerSolver):
    """x ← x + d, d the minimiser of ‖J d + r‖² + μ‖D d‖², taken where it lowers ½‖r‖² (Marquardt 1963).

    For ``ArgminLayer(LeastSquares(residual))``: the method of choice up to some hundred unknowns, from poor starts and
    where J is rank-deficient too. It uses first derivatives only; derivatives of the solution do not depend on that.

    The damping μ of each system follows the ratio of the decrease to the one that the linear model foretells (Madsen,
    Nielsen and Tingleff 2004, Algorithm 3.16 with Eq. 2.21), and a rejected step is an iteration too. D has the largest
    norms that the columns of J have had, so that the units of the unknowns do not matter (Moré 1978, section 6). Up to
    n = 500 each step is found by QR factorisations of the matrix; above, by conjugate gradients, the Jacobian known by
    its products only, and D is the identity, as the columns are not at hand.

    Shapes, settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. Raises
    :class:`~implicitdiff.ImplicitDiffError` where the objective is not a :class:`~implicitdiff.LeastSquares`. It cannot
    be unrolled.

    >>> import implicitdiff as idf
    >>> rosenbrock = idf.LeastSquares(lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]))
    >>> layer = idf.ArgminLayer(rosenbrock, inner_solver=LevenbergMarquardt())
    >>> layer(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    tensor([1.0000, 1.0000], dtype=torch.float64)
    """

    uncompilable = DECIDES

    def __init__(
        self, *, tol: float | None = None, max_iterations: int = 500, on_failure: FailurePolicy = "warn",
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        super().__init__(
            tol=tol, max_iterations=max_iterations, on_failure=on_failure, compile=compile, check_every=check_every
        )

    def start(self, problem: InnerProblem, x0: Tensor) -> LevenbergMarquardtState:
        J = problem.least_squares_jacobian(x0)
        residuals = J.value
        gradient = J.rmatvec(residuals)
        norm = vector_norm(gradient)
        if x0.shape[-1] <= DENSE_UP_TO:
            factor, rotated = _factorised(J, residuals)
            columns = torch.linalg.vector_norm(factor, dim=-2)
            scale, damping = torch.where(columns > 0, columns, 1), torch.full_like(norm, FIRST_DAMPING)
        else:
            factor, rotated, scale = None, None, torch.ones_like(x0)
            # A large eigenvalue of JᵀJ, which D brings to about 1 otherwise.
            damping = FIRST_DAMPING * quotient(vector_norm(J.matvec(gradient)), norm) ** 2
        progress = first_progress(norm)
        return LevenbergMarquardtState(
            x0, norm, progress.status, residuals, gradient, factor, rotated, scale, damping, 2 * torch.ones_like(norm),
            progress,
        )  # fmt: skip

    def step(self, problem: InnerProblem, state: LevenbergMarquardtState) -> LevenbergMarquardtState:
        d = self._damped_step(problem, state)
        x = state.x + d
        J = problem.least_squares_jacobian(x)
        residuals = J.value
        gradient = J.rmatvec(residuals)
        ratio, hidden = _gain_ratio(state, d, residuals, gradient)
        accepted = (ratio > 0) & gradient.isfinite().all(-1)
        taken = accepted.unsqueeze(-1)
        factor, rotated, scale = state.factor, state.rotated, state.scale
        if factor is not None and rotated is not None and any_of(accepted):
            new_factor, new_rotated = _factorised(J, residuals)
            factor = torch.where(taken.unsqueeze(-1), new_factor, factor)
            rotated = torch.where(taken, new_rotated, rotated)
            scale = torch.maximum(scale, torch.linalg.vector_norm(factor, dim=-2))
        less = (1 - (2 * ratio - 1) ** 3).clamp(min=1 / 3)
        gradient = torch.where(taken, gradient, state.gradient)
        norm = vector_norm(gradient)
        progress = progress_after(state.progress, norm, hidden, (x != state.x).any(-1))
        return LevenbergMarquardtState(
            torch.where(taken, x, state.x),
            norm,
            progress.status,
            torch.where(taken, residuals, state.residuals),
            gradient,
            factor,
            rotated,
            scale,
            # Not below what rounding leaves of a J without full rank.
            (state.damping * torch.where(accepted, less, state.growth)).clamp(min=torch.finfo(x.dtype).eps ** 2),
            torch.where(accepted, 2, 2 * state.growth),
            progress,
        )

    @staticmethod
    def _damped_step(problem: InnerProblem, state: LevenbergMarquardtState) -> Tensor:
        if state.factor is None or state.rotated is None:
            return _by_products(problem.least_squares_jacobian(state.x), state)
        # The triangle of [J; √μ D]: JᵀJ would square the condition number.
        damped = torch.diag_embed(state.damping.sqrt().unsqueeze(-1) * state.scale)
        Q, R = torch.linalg.qr(torch.cat([state.factor, damped], dim=-2))
        top = Q[..., : state.factor.shape[-2], :]
        return -torch.linalg.solve_triangular(R, top.mT @ state.rotated.unsqueeze(-1), upper=True).squeeze(-1)


def _factorised(J: JacobianOperator, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """R and Qᵀ r."""
    Q, R = torch.linalg.qr(J.to_dense())
    return R, (Q.mT @ residuals.unsqueeze(-1)).squeeze(-1)


def _by_products(J: JacobianOperator, state: LevenbergMarquardtState) -> Tensor:
    """The step by conjugate gradients, as exact as Newton's method needs it (Nocedal and Wright 2006, Eq. 7.3)."""
    norm = state.residual_norm
    size = torch.where((norm > 0) & norm.isfinite(), norm, 1).unsqueeze(-1)
    b, cg = -state.gradient / size, CG()
    normal = FunctionOperator(
        lambda v: J.rmatvec(J.matvec(v)) + state.damping.unsqueeze(-1) * v, b.shape[-1], structure="positive_definite"
    )
    A = System(normal, b)
    budget = max(100, 10 * b.shape[-1])
    forcing = norm.sqrt().clamp(max=0.1)
    ended = iterate(lambda s: cg.step(A, s), cg.start(A, b, None), forcing, budget)
    return ended.state.x * size


def _gain_ratio(
    state: LevenbergMarquardtState, d: Tensor, residuals: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """The decrease of ½‖r‖² over the one of its model, and whether rounding hides it: then gradients tell it."""
    r, new = state.residuals, residuals
    # As d minimises the damped model, ‖J d‖² + μ‖D d‖² = −gᵀ d.
    foretold = 0.5 * (state.damping * vector_norm(state.scale * d) ** 2 - dot(state.gradient, d))
    decrease = 0.5 * dot(r - new, r + new)  # with less rounding than the difference of the values
    rounding = torch.finfo(d.dtype).eps ** (2 / 3) * 0.5 * dot(r, r)
    hidden = (foretold <= rounding) & (decrease.abs() <= rounding)
    decrease = torch.where(hidden, -0.5 * dot(state.gradient + gradient, d), decrease)
    return torch.where(foretold > 0, quotient(decrease, foretold), -1), hidden
