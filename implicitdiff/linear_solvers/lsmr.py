"""Least squares by minimal residuals of the normal equations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._vectors import quotient, vector_norm
from ..info import RUNNING, FailurePolicy, Status
from .iterative import IterativeLinearSolver
from .system import System, initial


class LSMRState(NamedTuple):
    """The quantities of Fong and Saunders 2011, Table 2.1 and section 5; vectors (*batch, ·), numbers (*batch, 1)."""

    x: Tensor
    residual_norm: Tensor
    status: Tensor
    u: Tensor
    v: Tensor
    h: Tensor
    hbar: Tensor
    alpha: Tensor
    alphabar: Tensor
    zetabar: Tensor  # ± ‖Aᵀ r‖
    zeta: Tensor
    rho: Tensor
    rhobar: Tensor
    cbar: Tensor
    sbar: Tensor
    betadd: Tensor
    betad: Tensor
    rhodold: Tensor
    tautildeold: Tensor
    thetatilde: Tensor
    square: Tensor  # ‖A‖² in the Frobenius norm, as far as it was seen


class LSMR(IterativeLinearSolver):
    """LSMR (Fong and Saunders 2011), for any operator, rectangular and rank-deficient ones too.

    Among several solutions it finds, from zero, the one of minimum norm. Where A is square, converged means what it
    means everywhere, a small residual. Where A is rectangular, it may also mean that no x comes nearer to b:
    ‖Aᵀr‖ ≤ rtol · ‖A‖ · ‖r‖ (their section 6.1). It takes no preconditioner: scale the columns of A.

    An iteration takes one product with A and one with Aᵀ; about six vectors are held. Where A is square and singular
    and b not in its range, it ends with ``Status.BREAKDOWN``.

    A of shape (*batch, m, n), b (*batch, m), u (*batch, n). Errors are those of :class:`~implicitdiff.LinearSolver`,
    settings those of :class:`~implicitdiff.IterativeLinearSolver`, but for the preconditioner.

    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[1.0], [1.0], [1.0]]))
    >>> LSMR()(A, torch.tensor([1.0, 2.0, 6.0])).value  # the mean
    tensor([3.0000])
    """

    takes_rectangular = True

    def __init__(
        self,
        *,
        rtol: float = 1e-6,
        atol: float = 0.0,
        max_iterations: int | None = None,
        warm_start: bool = False,
        on_failure: FailurePolicy = "warn",
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        super().__init__(
            rtol=rtol,
            atol=atol,
            max_iterations=max_iterations,
            warm_start=warm_start,
            on_failure=on_failure,
            compile=compile,
            check_every=check_every,
        )

    def start(self, A: System, b: Tensor, x0: Tensor | None) -> LSMRState:
        x, r = initial(A, b, x0)
        u, beta = _normalised(r)
        v, alpha = _normalised(A.rmatvec(u))
        norm = vector_norm(r)
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        return LSMRState(
            x=x,
            residual_norm=norm,
            status=torch.full_like(norm, RUNNING, dtype=torch.int64),
            u=u,
            v=v,
            h=v,
            hbar=torch.zeros_like(v),
            alpha=alpha,
            alphabar=alpha,
            zetabar=alpha * beta,
            zeta=zero,
            rho=one,
            rhobar=one,
            cbar=one,
            sbar=zero,
            betadd=beta,
            betad=zero,
            rhodold=one,
            tautildeold=zero,
            thetatilde=zero,
            square=alpha**2,
        )

    def step(self, A: System, state: LSMRState) -> LSMRState:
        # Golub-Kahan bidiagonalisation.
        u, beta = _normalised(A(state.v) - state.alpha * state.u)
        v, alpha = _normalised(A.rmatvec(u) - beta * state.v)

        # Two rotations: from lower to upper bidiagonal, and the QR factorisation of that.
        c, s, rho = _rotation(state.alphabar, beta)
        theta, alphabar = s * alpha, c * alpha
        thetabar = state.sbar * rho
        cbar, sbar, rhobar = _rotation(state.cbar * rho, theta)
        zeta, zetabar = cbar * state.zetabar, -sbar * state.zetabar
        hbar = state.h - quotient(thetabar * rho, state.rho * state.rhobar) * state.hbar
        x = state.x + quotient(zeta, rho * rhobar) * hbar
        h = v - quotient(theta, rho) * state.h

        # ‖r‖ from the same numbers.
        betahat, betadd = c * state.betadd, -s * state.betadd
        ctilde, stilde, rhotilde = _rotation(state.rhodold, thetabar)
        thetatilde, rhodold = stilde * rhobar, ctilde * rhobar
        betad = -stilde * state.betad + ctilde * betahat
        tautilde = quotient(state.zeta - state.thetatilde * state.tautildeold, rhotilde)
        taud = quotient(zeta - thetatilde * tautilde, rhodold)
        norm = torch.hypot(betad - taud, betadd).squeeze(-1)

        square = state.square + alpha**2 + beta**2
        optimality = quotient(zetabar.abs(), square.sqrt() * norm.unsqueeze(-1)).squeeze(-1)
        if A.is_square:
            # Nothing is left to gain, and b is not reached.
            ended = torch.where(optimality <= torch.finfo(norm.dtype).eps, int(Status.BREAKDOWN), RUNNING)
        else:
            ended = torch.where(optimality <= self.rtol, int(Status.CONVERGED), RUNNING)
        return LSMRState(
            x, norm, ended, u, v, h, hbar, alpha, alphabar, zetabar, zeta, rho, rhobar, cbar, sbar, betadd, betad,
            rhodold, tautilde, thetatilde, square,
        )  # fmt: skip

    def accepts(self, A: System, state: LSMRState, r: Tensor, threshold: Tensor) -> Tensor:
        solved = super().accepts(A, state, r, threshold)
        if A.is_square:
            return solved
        return solved | (vector_norm(A.rmatvec(r)) <= self.rtol * state.square.sqrt().squeeze(-1) * vector_norm(r))


def _normalised(v: Tensor) -> tuple[Tensor, Tensor]:
    norm = vector_norm(v).unsqueeze(-1)
    return v / torch.where(norm > 0, norm, 1), norm


def _rotation(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c, s, r with c a + s b = r and −s a + c b = 0."""
    r = torch.hypot(a, b)
    return quotient(a, r), quotient(b, r), r
