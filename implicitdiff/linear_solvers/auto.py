"""The default: a solver by structure and size."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..info import FailurePolicy, LinearSolution, Status
from ..operators import LinearOperator, SparseOperator
from ._structured import has_direct_solve
from .base import LinearSolver
from .cg import CG
from .dense import Dense
from .gmres import GMRES
from .lsmr import LSMR
from .minres import MINRES

DENSE_UP_TO = 64
"""Below this n, one batched sweep for the whole matrix costs less than the steps of an iterative method."""


SPARSE_UP_TO = 50_000
"""Beyond this n the factors of a sparse matrix may fill the memory."""


class Auto(LinearSolver):
    """Chooses by structure and size, and says in ``info.method`` what it chose.

    Systems that are small, or of a structure that is solved directly, are factorised (:class:`Dense`); rectangular ones
    go to :class:`LSMR`. Of the others, general ones go to :class:`GMRES`, and symmetric ones to :class:`CG`, continued
    by :class:`MINRES` where CG meets negative curvature.

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
        rtol: float = 1e-6,
        atol: float = 0.0,
        max_iterations: int | None = None,
        on_failure: FailurePolicy = "warn",
    ) -> None:
        super().__init__(rtol=rtol, atol=atol, on_failure=on_failure)
        self._dense = Dense(rtol=rtol, atol=atol)
        self._cg = CG(rtol=rtol, atol=atol, max_iterations=max_iterations)
        self._minres = MINRES(rtol=rtol, atol=atol, max_iterations=max_iterations)
        self._lsmr = LSMR(rtol=rtol, atol=atol, max_iterations=max_iterations)
        self._gmres = GMRES(rtol=rtol, atol=atol, max_iterations=max_iterations)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        n = A.shape[0]
        if not A.is_square:
            return _said(self._lsmr.solve(A, b, x0), f"Auto: LSMR, as A is rectangular, {A.shape}")
        if has_direct_solve(A) and (n <= SPARSE_UP_TO or not isinstance(A, SparseOperator)):
            by_dense = self._dense.solve(A, b)
            return _said(by_dense, f"Auto: {by_dense.info.method}, as {type(A).__name__} is solved as it is")
        if n <= DENSE_UP_TO:
            by_dense = self._dense.solve(A, b)
            return _said(by_dense, f"Auto: {by_dense.info.method}, as n = {n} is at most {DENSE_UP_TO}")
        if not A.is_symmetric:
            return _said(self._gmres.solve(A, b, x0), "Auto: GMRES, as A is general")
        by_cg = self._cg.solve(A, b, x0)
        if not bool((by_cg.info.status == Status.INDEFINITE).any()):
            return _said(by_cg, f"Auto: CG, as A is {A.structure.replace('_', ' ')}")
        # MINRES goes on from where CG stands; the systems that CG solved are already at their tolerance.
        by_minres = self._minres.solve(A, b, by_cg.value)
        info = replace(
            by_minres.info,
            iterations=by_cg.info.iterations + by_minres.info.iterations,
            matvecs=by_cg.info.matvecs + by_minres.info.matvecs,
        )
        return _said(LinearSolution(by_minres.value, info), "Auto: MINRES, as CG met negative curvature")


def _said(solution: LinearSolution, method: str) -> LinearSolution:
    return LinearSolution(solution.value, replace(solution.info, method=method))
