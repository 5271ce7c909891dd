"""Conjugate gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._lanczos import Lanczos, LanczosOfCG
from .._vectors import dot, vector_norm
from ..info import RUNNING, Status
from .iterative import IterativeLinearSolver
from .system import System, initial

INDEFINITE = int(Status.INDEFINITE)


class CGState(NamedTuple):
    x: Tensor
    residual: Tensor
    direction: Tensor
    rho: Tensor  # rᵀ M⁻¹ r
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

    def lanczos(self, A: System, steps: Tensor) -> Lanczos | None:
        return LanczosOfCG(A.notes, steps) if A.notes and self.preconditioner is None else None

    def start(self, A: System, b: Tensor, x0: Tensor | None) -> CGState:
        x, r = initial(A, b, x0)
        z = A.precondition(r)
        norm = vector_norm(r)
        status = torch.full_like(norm, RUNNING, dtype=torch.int64)
        if _is_one(r):
            x, r, z = x.clone(), r.clone(), z.clone()  # the step writes into them
        return CGState(x, r, z, dot(r, z), norm, status)

    def step(self, A: System, state: CGState) -> CGState:
        x, r, d = state.x, state.residual, state.direction
        Ad = A.matvec(d)
        curvature = dot(d, Ad).real
        stopped = curvature <= 0  # not so for a NaN, which goes on into the residual and is found there
        length = state.rho / curvature
        alpha = torch.where(stopped, 0, length).unsqueeze(-1)  # a step of length 0 leaves x where it is
        # The state of a single system is written over: fresh memory for it costs as much as the arithmetic. In a batch,
        # the old state of a system that has ended is still asked for.
        to_x, to_r, to_d = (x, r, d) if _is_one(r) else (None, None, None)
        x = torch.addcmul(x, alpha, d, out=to_x)
        r = torch.addcmul(r, alpha, Ad, value=-1, out=to_r)
        z = A.precondition(r)
        rho = dot(r, z)
        ratio = rho / state.rho
        d = torch.addcmul(z, ratio.unsqueeze(-1), d, out=to_d)
        A.notes.append((length, ratio))
        norm = vector_norm(r) if A.is_preconditioned else rho.real.sqrt()  # a pass over r less
        return CGState(x, r, d, rho, norm, torch.where(stopped, INDEFINITE, RUNNING))


def _is_one(r: Tensor) -> bool:
    return r.ndim == 1
