"""The stabilised method of biconjugate gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._vectors import inner, vector_norm
from ..info import RUNNING, Status
from .iterative import IterativeLinearSolver
from .system import System, initial


class BiCGStabState(NamedTuple):
    x: Tensor
    residual: Tensor
    residual_norm: Tensor
    status: Tensor
    shadow: Tensor  # the first residual, which the residuals are made orthogonal to
    direction: Tensor
    rho: Tensor  # ⟨shadow, residual⟩, with the last dimension kept


class BiCGStab(IterativeLinearSolver):
    """BiCGStab (van der Vorst 1992), for any square operator, in short recurrences: two products an iteration.

    Preconditioned from the right, so that its residual is the true one. Where a recurrence divides by a number that is
    zero up to rounding, it ends with ``Status.BREAKDOWN``; GMRES has no such case. About seven vectors of n are held.

    Shapes and errors are those of :class:`~implicitdiff.LinearSolver`, settings those of
    :class:`~implicitdiff.IterativeLinearSolver`.

    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    >>> BiCGStab()(A, torch.tensor([2.0, 2.0])).value
    tensor([1.0000, 1.0000])
    """

    def start(self, A: System, b: Tensor, x0: Tensor | None) -> BiCGStabState:
        x, r = initial(A, b, x0)
        norm = vector_norm(r)
        return BiCGStabState(x, r, norm, torch.full_like(norm, RUNNING, dtype=torch.int64), r, r, inner(r, r))

    def step(self, A: System, state: BiCGStabState) -> BiCGStabState:
        tiny = torch.finfo(state.residual_norm.dtype).eps ** 2
        along = A.precondition(state.direction)
        v = A(along)
        slope = inner(state.shadow, v)
        size = vector_norm(state.shadow) * vector_norm(v)
        broken = slope.abs().squeeze(-1) <= tiny * size
        alpha = torch.where(broken.unsqueeze(-1), 0, state.rho / slope)
        halfway = torch.addcmul(state.residual, alpha, v, value=-1)

        turned = A.precondition(halfway)
        t = A(turned)
        square = inner(t, t).real
        omega = torch.where(square > 0, inner(t, halfway) / torch.where(square > 0, square, 1), 0)
        x = torch.addcmul(torch.addcmul(state.x, alpha, along), omega, turned)
        r = torch.addcmul(halfway, omega, t, value=-1)

        norm = vector_norm(r)
        rho = inner(state.shadow, r)
        # Without either number the next direction is not defined.
        broken = broken | ((rho.abs() * omega.abs()).squeeze(-1) == 0)
        beta = torch.where(broken.unsqueeze(-1), 0, (rho / state.rho) * (alpha / omega))
        direction = torch.addcmul(r, beta, torch.addcmul(state.direction, omega, v, value=-1))
        status = torch.where(broken, int(Status.BREAKDOWN), state.status)
        return BiCGStabState(x, r, norm, status, state.shadow, direction, rho)
