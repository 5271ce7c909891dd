"""Minimal residuals for symmetric operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._lanczos import Lanczos, LanczosOfMINRES
from .._vectors import inner, vector_norm
from ..info import RUNNING, Status
from .iterative import IterativeLinearSolver
from .system import System, initial


class MINRESState(NamedTuple):
    """Paige and Saunders' quantities, all (*batch, n) or (*batch, 1)."""

    x: Tensor
    residual: Tensor
    residual_norm: Tensor
    status: Tensor
    before: Tensor  # the Lanczos vector before the last one, times its β
    last: Tensor  # the last Lanczos vector, times β
    preconditioned: Tensor  # M⁻¹ last
    beta_before: Tensor
    beta: Tensor
    dbar: Tensor
    epsilon: Tensor
    phibar: Tensor
    c: Tensor
    s: Tensor
    w: Tensor
    w_before: Tensor


class MINRES(IterativeLinearSolver):
    """MINRES (Paige and Saunders 1975), for symmetric operators, definite or not, singular consistent ones too.

    Its residual never grows, and is tracked as a vector, so that it is ‖b − A x‖₂ with a preconditioner too. A
    preconditioner must be symmetric and positive definite. An iteration takes one product; about eight vectors of n are
    held. Where A is singular and b not in its range it ends with ``Status.BREAKDOWN`` or ``MAX_ITERATIONS``, with the
    former where the preconditioner is not definite.

    Shapes and errors are those of :class:`~implicitdiff.LinearSolver`, settings those of
    :class:`~implicitdiff.IterativeLinearSolver`.

    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.diag(torch.tensor([1.0, -2.0, 4.0])), structure="symmetric")
    >>> MINRES()(A, torch.ones(3)).value
    tensor([ 1.0000, -0.5000,  0.2500])
    """

    def lanczos(self, A: System, steps: Tensor) -> Lanczos | None:
        return LanczosOfMINRES(A.notes, steps) if A.notes and self.preconditioner is None else None

    def start(self, A: System, b: Tensor, x0: Tensor | None) -> MINRESState:
        x, r = initial(A, b, x0)
        y = A.precondition(r)
        norm, beta = vector_norm(r), inner(r, y).real.clamp(min=0).sqrt()
        zero, vector = torch.zeros_like(beta), torch.zeros_like(r)
        status = torch.full_like(norm, RUNNING, dtype=torch.int64)
        return MINRESState(
            x, r, norm, status, vector, r, y, zero, beta, zero, zero, beta, zero - 1, zero, vector, vector
        )

    def step(self, A: System, state: MINRESState) -> MINRESState:
        # Lanczos: the next vector of the basis, orthogonal to the last two.
        v = _over(state.preconditioned, state.beta)
        p = A(v) - _over(state.beta, state.beta_before) * state.before
        alpha = inner(v, p).real
        p = p - _over(alpha, state.beta) * state.last
        y = A.precondition(p)
        square = inner(p, y).real
        beta = square.clamp(min=0).sqrt()

        # Givens rotation: one more column of the QR factorisation of the tridiagonal matrix.
        delta = state.c * state.dbar + state.s * alpha
        gbar = state.s * state.dbar - state.c * alpha
        epsilon, dbar = state.s * beta, -state.c * beta
        gamma = torch.hypot(gbar, beta)
        # A column that is zero up to rounding: A is singular and nothing is left to gain. No step: c = 0, s = 1.
        size = alpha.abs() + beta + torch.where(state.beta_before > 0, state.beta, 0)
        singular = gamma <= 4 * torch.finfo(gamma.dtype).eps * size
        c = torch.where(singular, 0, _over(gbar, gamma))
        s = torch.where(singular, 1, _over(beta, gamma))
        phi, phibar = c * state.phibar, s * state.phibar

        w = _over(v - state.epsilon * state.w_before - delta * state.w, gamma)
        x = state.x + phi * w
        r = s * s * state.residual - _over(phibar * c, beta) * p
        broken = (square < 0) | singular
        A.notes.append((alpha, beta))
        status = torch.where(broken.squeeze(-1), int(Status.BREAKDOWN), state.status)
        return MINRESState(
            x, r, vector_norm(r), status, state.last, p, y, state.beta, beta, dbar, epsilon, phibar, c, s, w, state.w
        )


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is 0 (a system that is done, or the first step)."""
    ok = denominator != 0
    return torch.where(ok, numerator / torch.where(ok, denominator, 1), 0)
