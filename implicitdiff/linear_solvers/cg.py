"""Conjugate gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..info import RUNNING, Status
from .base import IterativeLinearSolver, System, initial, inner, vector_norm


class CGState(NamedTuple):
    x: Tensor
    residual: Tensor
    direction: Tensor
    rho: Tensor  # rᵀ M⁻¹ r, with the last dimension kept
    residual_norm: Tensor
    status: Tensor


class CG(IterativeLinearSolver):
    """Conjugate gradients (Hestenes and Stiefel 1952; Saad 2003, Algorithm 9.1 with a preconditioner).

    For positive definite operators. Where it meets negative curvature, dᵀA d ≤ 0, it stops at the iterate it has and
    says ``Status.INDEFINITE``. A preconditioner must be symmetric and positive definite too.

    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 4.0])), structure="positive_definite")
    >>> CG()(A, torch.ones(3)).value
    tensor([1.0000, 0.5000, 0.2500])
    """

    def start(self, A: System, b: Tensor, x0: Tensor | None) -> CGState:
        x, r = initial(A, b, x0)
        z = A.precondition(r)
        norm = vector_norm(r)
        return CGState(x, r, z, inner(r, z), norm, torch.full_like(norm, RUNNING, dtype=torch.int64))

    def step(self, A: System, state: CGState) -> CGState:
        Ad = A(state.direction)
        curvature = inner(state.direction, Ad).real
        ahead = curvature > 0
        # Frozen, and where the curvature is not positive: a step of length 0 leaves x where it is.
        alpha = torch.where(ahead, state.rho / torch.where(ahead, curvature, 1), 0)
        x = state.x + alpha * state.direction
        r = state.residual - alpha * Ad
        z = A.precondition(r)
        rho = inner(r, z)
        beta = rho / torch.where(state.rho == 0, 1, state.rho)
        status = torch.where(ahead.squeeze(-1) | curvature.squeeze(-1).isnan(), state.status, int(Status.INDEFINITE))
        norm = torch.where(curvature.isnan().squeeze(-1), torch.nan, vector_norm(r))
        return CGState(x, r, z + beta * state.direction, rho, norm, status)
