"""Conjugate gradients."""

from __future__ import annotations

import math
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
    rho: Tensor | float  # rᵀ M⁻¹ r
    residual_norm: Tensor | float
    status: Tensor | int


class CG(IterativeLinearSolver):
    """Conjugate gradients (Hestenes and Stiefel 1952; Saad 2003, Algorithm 9.1 with a preconditioner).

    For positive definite operators. Where it meets negative curvature, dᵀA d ≤ 0, it stops at the iterate it has and
    says ``Status.INDEFINITE``. A preconditioner must be symmetric and positive definite too. An iteration takes one
    product; four vectors of n are held (one more with a preconditioner).

    Shapes and errors are those of :class:`~implicitdiff.LinearSolver`, settings those of
    :class:`~implicitdiff.IterativeLinearSolver`.

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
        if A.in_place:
            x, r, z = x.clone(), r.clone(), z.clone()  # the step writes into them
        return CGState(x, r, z, dot(r, z), norm, status)

    def step(self, A: System, state: CGState) -> CGState:
        x, r, d = state.x, state.residual, state.direction
        Ad = A.matvec(d)
        if A.in_place and r.device.type == "cpu":
            return self._step_of_one(A, state, Ad)
        curvature = dot(d, Ad).real
        stopped = curvature <= 0  # not so for a NaN, which goes on into the residual and is found there
        length = state.rho / curvature
        alpha = torch.where(stopped, 0, length).unsqueeze(-1)  # a step of length 0 leaves x where it is
        # The state of a single system is written over: fresh memory for it costs as much as the arithmetic. In a batch,
        # the old state of a system that has ended is still asked for.
        to_x, to_r, to_d = (x, r, d) if A.in_place else (None, None, None)
        x = torch.addcmul(x, alpha, d, out=to_x)
        r = torch.addcmul(r, alpha, Ad, value=-1, out=to_r)
        z = A.precondition(r)
        rho = dot(r, z)
        ratio = rho / state.rho
        d = torch.addcmul(z, ratio.unsqueeze(-1), d, out=to_d)
        A.notes.append((length, ratio))
        norm = vector_norm(r) if A.is_preconditioned else rho.real.sqrt()  # a pass over r less
        return CGState(x, r, d, rho, norm, torch.where(stopped, INDEFINITE, RUNNING))

    def _step_of_one(self, A: System, state: CGState, Ad: Tensor) -> CGState:
        """The same with Python's numbers for α, β and ρ: as tensors they would cost more than a small product."""
        x, r, d, rho = state.x, state.residual, state.direction, _number(state.rho)
        if not A.notes:
            A.first_product = Ad
        curvature = float(torch.vdot(d, Ad).real)
        length = rho / curvature if curvature else math.inf
        if curvature <= 0:
            A.notes.append((length, 1.0))
            return state._replace(status=INDEFINITE)
        x.add_(d, alpha=length)
        r.sub_(Ad, alpha=length)
        z = A.precondition(r)
        new = float(torch.vdot(r, z).real)
        ratio = new / rho if rho else math.nan
        torch.add(z, d, alpha=ratio, out=d)
        A.notes.append((length, ratio))
        norm = float(vector_norm(r)) if A.is_preconditioned else math.sqrt(max(new, 0.0) if new == new else new)
        return CGState(x, r, d, new, norm, RUNNING)

    def drift(self, A: System, b: Tensor, state: CGState) -> float | None:
        """k ε ‖A‖ ‖x‖ bounds it to a small factor (Greenbaum 1997), with ‖A‖ by Gershgorin from the Lanczos matrix.

        That needs products that are linear, symmetric and good to rounding, of which bᵀA x = (A b)ᵀx is the sign.
        """
        if A.first_product is None or A.is_preconditioned or not A.notes:
            return None
        epsilon, size = torch.finfo(b.dtype).eps, float(vector_norm(state.x))
        at_b = float(vector_norm(A.first_product))
        disagreement = abs(complex(torch.vdot(A.first_product, state.x)) - (1 - complex(torch.vdot(b, state.residual))))
        if not disagreement <= 100 * epsilon * (1 + at_b * size):
            return None
        before, norm = 0.0, 0.0
        for note in A.notes:
            length, ratio = map(float, note)
            norm = max(norm, 1 / length + before + 2 * math.sqrt(ratio) / length)
            before = ratio / length
        return 10 * len(A.notes) * epsilon * norm * size


def _number(value: Tensor | float) -> float:
    return value if isinstance(value, float) else float(value.real)
