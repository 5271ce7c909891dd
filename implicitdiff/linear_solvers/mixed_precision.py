"""Products in a lower precision, and iterative refinement."""

from __future__ import annotations

import torch
from torch import Tensor

from .._iteration import Ended
from .._vectors import largest, scaled_norm, vector_norm
from ..errors import ImplicitDiffError
from ..info import RUNNING, LinearSolution, SolveInfo, Status
from ..operators import LinearOperator
from .base import LinearSolver
from .iterative import IterativeLinearSolver
from .system import System

DIGITS = {torch.bfloat16: 0.03, torch.float16: 0.01}
"""To what fraction a correction lowers its residual: much below, it would follow the rounding of its products."""


class MixedPrecision(LinearSolver):
    """An iterative linear solver on products in a lower precision, refined (Higham 2002, Algorithm 12.1).

    All vectors keep their dtype. The residual r = b − A x is computed in full precision, the given solver finds the
    correction, A d = r, from products in ``dtype`` to the digits that those carry, x + d is the next x, and so on until
    the tolerance of the given solver holds in full precision, system by system. A system whose residual a correction
    does not halve is not solved: it is STAGNATED, or what the given solver says. That happens where the condition
    number is beyond what ``dtype`` resolves: from about a thousand on for bfloat16, later for float16.

    All settings are those of the given solver. The report's ``iterations`` are those of all corrections, its
    ``matvecs`` products of both kinds, and its ``method`` says how many of each. A preconditioner is made for the
    products in ``dtype``.

    Those are matrix products and convolutions, as under ``torch.autocast``; like that, they leave float64 as it is
    unless the operator is a matrix. There are a tenth to a half more of them than in full precision alone, and three to
    five in full precision besides: it pays where products are large, more than some fifteen are needed, and ``dtype``
    is at least twice as fast. float16 hardly ever is on a CPU.

    Raises TypeError for a solver that is not iterative, ValueError for another dtype, and ImplicitDiffError for
    complex systems.

    Shapes and other errors are those of :class:`~implicitdiff.LinearSolver`.

    >>> from implicitdiff import CG
    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), structure="positive_definite")
    >>> solution = MixedPrecision(CG(rtol=1e-6))(A, torch.tensor([1.0, 2.0]))
    >>> torch.testing.assert_close(solution.value, torch.tensor([1 / 11, 7 / 11]))
    """

    def __init__(self, linear_solver: IterativeLinearSolver, *, dtype: torch.dtype = torch.bfloat16) -> None:
        if not isinstance(linear_solver, IterativeLinearSolver):
            raise TypeError(f"linear_solver is {linear_solver!r}, but it must be an iterative one, such as CG().")
        if dtype not in DIGITS:
            raise ValueError(f"dtype is {dtype!r}, but it must be one of {', '.join(map(str, DIGITS))}.")
        super().__init__(rtol=linear_solver.rtol, atol=linear_solver.atol, on_failure=linear_solver.on_failure)
        self.linear_solver, self.dtype = linear_solver, dtype

    @property
    def solves_on_support(self) -> bool:
        return self.linear_solver.solves_on_support

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        if b.is_complex():
            raise ImplicitDiffError(f"b is {b.dtype}, but {self.name} is for real systems: use the solver alone.")
        solver, system = self.linear_solver, System(A, b)
        low = solver._system(A.in_precision(self.dtype), b)
        norm = scaled_norm(b)
        scale = torch.where(norm > 0, norm, 1).unsqueeze(-1)
        unit, threshold = b / scale, self._threshold(norm)
        x0 = x0 / scale if x0 is not None else solver._last_start(b, A.shape[1])
        # b = 0 is solved exactly, by 0, whatever the start.
        x = torch.zeros_like(b) if x0 is None else torch.where((norm > 0).unsqueeze(-1), x0, 0)
        r = unit if x0 is None else unit - system(x)
        residual = vector_norm(r)
        status = torch.where(residual.isfinite(), RUNNING, int(Status.NON_FINITE))
        iterations, corrections = torch.zeros_like(status), 0
        budget = solver.max_iterations or max(100, 10 * b.shape[-1])
        while bool((running := (status == RUNNING) & (residual > threshold)).any()):
            left = budget - int(iterations[running].max())
            ended, d = self._correction(low, r, torch.where(running, residual, 0), threshold, left)
            new_x = x + d
            new_r = unit - system(new_x)
            new = vector_norm(new_r)
            iterations, corrections = iterations + ended.iterations, corrections + 1
            why = torch.where(ended.status == Status.CONVERGED, int(Status.STAGNATED), ended.status)
            status = torch.where(running & ~(new <= 0.5 * residual), why, status)
            better = new < residual
            x, r = (torch.where(better.unsqueeze(-1), n, o) for n, o in ((new_x, x), (new_r, r)))
            residual = torch.where(better, new, residual)
        if solver.warm_start:
            solver._last = torch.where((residual < 1).unsqueeze(-1), x, 0)
        value = x * scale
        overflown = ~largest(value).isfinite()
        converged = (residual <= threshold) & ~overflown
        status = torch.where(converged, int(Status.CONVERGED), status)
        status = torch.where(overflown, int(Status.NON_FINITE), status)
        matvecs = low.matvecs + system.matvecs
        dtype = str(self.dtype).removeprefix("torch.")
        method = f"{self.name}({solver.name}, {dtype}): {corrections} corrections, by {low.matvecs} of the products"
        return LinearSolution(value, SolveInfo(iterations, residual, converged, status, matvecs, method, scale=norm))

    def _correction(self, low: System, r: Tensor, norm: Tensor, threshold: Tensor, budget: int) -> tuple[Ended, Tensor]:
        """d of A d = r, of 0 where the norm is 0. Its own residual is not verified: that of x + d will be."""
        solver, scale = self.linear_solver, torch.where(norm > 0, norm, 1)
        unit = torch.where((norm > 0).unsqueeze(-1), r / scale.unsqueeze(-1), 0)  # as float16 may underflow
        enough = torch.clamp(0.5 * threshold / scale, min=DIGITS[self.dtype])
        ended = solver._iterate(low, solver.start(low, unit, None), enough, budget)
        return ended, solver.finish(low, ended.state) * scale.unsqueeze(-1)
