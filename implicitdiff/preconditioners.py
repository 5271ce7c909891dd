"""Preconditioners: callables ``A -> (v -> M⁻¹ v)`` with M ≈ A, for the ``preconditioner`` setting of linear solvers.

Any such callable serves. It is given the operator that is solved with, which in a backward pass is Aᵀ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .operators import LinearOperator


class Jacobi:
    """M = the diagonal of A, with 1 in the place of zeros.

    Exact: for an operator that does not know its diagonal this takes n products.

    >>> from implicitdiff.operators import DenseOperator
    >>> apply = Jacobi()(DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 4.0]])))
    >>> apply(torch.tensor([2.0, 4.0]))
    tensor([1., 1.])
    """

    def __call__(self, A: LinearOperator) -> Callable[[Tensor], Tensor]:
        diagonal = A.diagonal()
        if A.is_symmetric:
            diagonal = diagonal.abs()  # M must be positive definite for CG and MINRES
        diagonal = torch.where(diagonal == 0, 1, diagonal)
        return lambda v: v / diagonal
