"""Conjugate gradients on the normal equations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._vectors import inner, vector_norm
from ..info import RUNNING, Status
from ..operators import FunctionOperator, LinearOperator
from .iterative import IterativeLinearSolver
from .system import System, initial


class NormalCGState(NamedTuple):
    x: Tensor
    residual: Tensor  # b − A x
    residual_norm: Tensor
    status: Tensor
    direction: Tensor
    gamma: Tensor  # ‖Aᵀ r‖² in the norm of the preconditioner, with the last dimension kept


class NormalCG(IterativeLinearSolver):
    """CG on AᵀA x = Aᵀ b (CGNR: Saad 2003, Algorithm 8.4), for any square operator that has a transpose.

    An iteration takes one product with A and one with Aᵀ, and three vectors are carried along. Its residual never
    grows, but its iterations go with the condition number, not with its root: LSMR is the more accurate form of it,
    GMRES and BiCGStab are usually faster. A preconditioner is made for AᵀA and must be positive definite. Where A is
    singular and b not in its range, it ends with ``Status.BREAKDOWN`` or ``MAX_ITERATIONS``.

    Shapes and errors are those of :class:`~implicitdiff.LinearSolver`, settings those of
    :class:`~implicitdiff.IterativeLinearSolver`.

    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    >>> NormalCG()(A, torch.tensor([2.0, 2.0])).value
    tensor([1.0000, 1.0000])
    """

    def start(self, A: System, b: Tensor, x0: Tensor | None) -> NormalCGState:
        x, r = initial(A, b, x0)
        gradient = A.rmatvec(r)
        z = A.precondition(gradient)
        norm = vector_norm(r)
        status = torch.full_like(norm, RUNNING, dtype=torch.int64)
        return NormalCGState(x, r, norm, status, z, inner(gradient, z))

    def step(self, A: System, state: NormalCGState) -> NormalCGState:
        Ad = A(state.direction)
        square = inner(Ad, Ad).real
        # Aᵀr = 0 with r ≠ 0: A is singular, and this is as near to b as it reaches.
        broken = (square == 0) | (state.gamma.abs() == 0)
        alpha = torch.where(broken, 0, state.gamma / square)
        x = torch.addcmul(state.x, alpha, state.direction)
        r = torch.addcmul(state.residual, alpha, Ad, value=-1)
        gradient = A.rmatvec(r)
        z = A.precondition(gradient)
        gamma = inner(gradient, z)
        direction = torch.addcmul(z, torch.where(broken, 0, gamma / state.gamma), state.direction)
        status = torch.where(broken.squeeze(-1), int(Status.BREAKDOWN), state.status)
        return NormalCGState(x, r, vector_norm(r), status, direction, gamma)

    def preconditioned(self, A: LinearOperator) -> LinearOperator:
        return FunctionOperator(
            lambda v: A.rmatvec(A.matvec(v)),
            A.shape[1],
            structure="symmetric",
            batch_shape=A.batch_shape,
            dtype=A.dtype,
            device=A.device,
        )
