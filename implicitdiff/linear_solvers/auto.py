"""The default: a solver by structure and size."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..info import FailurePolicy, LinearSolution, Status
from ..operators import LinearOperator, SparseOperator
from ._structured import has_direct_solve
from .base import LinearSolver, check_max_iterations
from .cg import CG
from .dense import Dense
from .gmres import GMRES
from .iterative import IterativeLinearSolver
from .lsmr import LSMR
from .minres import MINRES

RTOL = 1e-6
DENSE_UP_TO = 64
"""Below this n, one batched sweep for the whole matrix costs less than the steps of an iterative method."""


SPARSE_UP_TO = 50_000
"""Beyond this n the factors of a sparse matrix may fill the memory."""


class Auto(LinearSolver):
    """Chooses by structure and size, and says in ``info.method`` what it chose.

    Systems that are small, or of a structure that is solved directly, are factorised (:class:`Dense`); rectangular ones
    go to :class:`LSMR`. Of the others, general ones go to :class:`GMRES`, and symmetric ones to :class:`CG`, continued
    by :class:`MINRES` where CG meets negative curvature. Small means n ≤ 64.

    Its ``rtol`` is 1e-6 by default, and 1.2e-5, a hundred rounding errors, in float32, whose digits seldom give more.

    Shapes, further settings and errors are those of :class:`~implicitdiff.LinearSolver`; ``max_iterations`` as in
    :class:`~implicitdiff.IterativeLinearSolver`, for the iterative methods.

    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[2.0, 0.0], [0.0, -1.0]]), structure="symmetric")
    >>> solution = Auto()(A, torch.tensor([2.0, 1.0]))
    >>> solution.value, solution.info.method
    (tensor([ 1., -1.]), 'Auto: Dense, as n = 2 is at most 64')
    """

    takes_rectangular = True

    def __init__(
        self,
        *,
        rtol: float | None = None,
        atol: float = 0.0,
        max_iterations: int | None = None,
        on_failure: FailurePolicy = "warn",
    ) -> None:
        super().__init__(rtol=RTOL if rtol is None else rtol, atol=atol, on_failure=on_failure)
        self._by_dtype = rtol is None
        self.max_iterations = check_max_iterations(max_iterations)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        n = A.origin.whole or A.shape[0]  # as many products as unknowns pay where a product is small
        if not A.is_square:
            return _said(self._by(LSMR, A, b, x0), f"Auto: LSMR, as A is rectangular, {A.shape}")
        is_structured = has_direct_solve(A) and (n <= SPARSE_UP_TO or not isinstance(A, SparseOperator))
        if is_structured or n <= DENSE_UP_TO:
            by_dense = Dense(rtol=self._reachable(b), atol=self.atol).solve(A, b)
            why = f"{type(A).__name__} is solved as it is" if is_structured else f"n = {n} is at most {DENSE_UP_TO}"
            return _said(by_dense, f"Auto: {by_dense.info.method}, as {why}")
        if not A.is_symmetric:
            return _said(self._by(GMRES, A, b, x0), "Auto: GMRES, as A is general")
        by_cg = self._by(CG, A, b, x0)
        if not bool((by_cg.info.status == Status.INDEFINITE).any()):
            return _said(by_cg, f"Auto: CG, as A is {A.structure.replace('_', ' ')}")
        # MINRES goes on from where CG stands; the systems that CG solved are already at their tolerance.
        by_minres = self._by(MINRES, A, b, by_cg.value)
        info = replace(
            by_minres.info,
            iterations=by_cg.info.iterations + by_minres.info.iterations,
            matvecs=by_cg.info.matvecs + by_minres.info.matvecs,
        )
        return _said(LinearSolution(by_minres.value, info), "Auto: MINRES, as CG met negative curvature")

    def _reachable(self, b: Tensor) -> float:
        """``rtol``; where nobody has given or set it, nothing that the dtype has not the digits for."""
        is_default = self._by_dtype and self.rtol == RTOL
        return max(RTOL, 100 * torch.finfo(b.dtype).eps) if is_default else self.rtol

    def _by(
        self, method: type[IterativeLinearSolver], A: LinearOperator, b: Tensor, x0: Tensor | None
    ) -> LinearSolution:
        return method(rtol=self._reachable(b), atol=self.atol, max_iterations=self.max_iterations).solve(A, b, x0)


def _said(solution: LinearSolution, method: str) -> LinearSolution:
    return LinearSolution(solution.value, replace(solution.info, method=method))
