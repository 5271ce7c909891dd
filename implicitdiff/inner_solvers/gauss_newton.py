"""The Gauss–Newton method for nonlinear least squares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..info import FailurePolicy
from ..linear_solvers.auto import DENSE_UP_TO
from ..linear_solvers.base import LinearSolver, LinearSolverLike, as_linear_solver
from ..linear_solvers.dense import Dense
from ..linear_solvers.lsmr import LSMR
from ._line_search import Iterate, advance, first_iterate
from .base import DECIDES, InnerProblem, InnerSolver


class GaussNewtonState(NamedTuple):
    x: Tensor
    residual_norm: Tensor
    status: Tensor
    here: Iterate


class GaussNewton(InnerSolver):
    """x ← x + step · d, d the shortest minimiser of ‖J d + r‖ (Nocedal and Wright 2006, section 10.3).

    For ``ArgminLayer(LeastSquares(residual))`` and residuals that are small or nearly linear near the solution: there
    it converges as Newton's method does, with first derivatives only. The steps are shortened until ½‖r‖² has
    decreased enough, each system's by itself. Where the rank of J changes on the way it may get stuck:
    :class:`LevenbergMarquardt` does not.

    * ``linear_solver``: finds d. It must take rectangular operators: :class:`~implicitdiff.Dense` (the default up to
      n = 64), :class:`~implicitdiff.LSMR` (the default above) or :class:`~implicitdiff.Auto`.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. Raises ValueError
    for another linear solver, and :class:`~implicitdiff.ImplicitDiffError` where the objective is not a
    :class:`~implicitdiff.LeastSquares`. It cannot be unrolled.

    >>> import implicitdiff as idf
    >>> t = torch.tensor([0.0, 1.0, 2.0])
    >>> decay = idf.LeastSquares(lambda x, y: torch.exp(-x * t) - y)
    >>> layer = idf.ArgminLayer(decay, inner_solver=GaussNewton())
    >>> layer(torch.zeros(()), torch.tensor([1.0, 0.5, 0.25])).exp()
    tensor(2.0000)
    """

    uncompilable = DECIDES

    def __init__(
        self,
        linear_solver: LinearSolverLike | None = None,
        *,
        tol: float | None = None,
        max_iterations: int = 200,
        on_failure: FailurePolicy = "warn",
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        super().__init__(
            tol=tol, max_iterations=max_iterations, on_failure=on_failure, compile=compile, check_every=check_every
        )
        self.linear_solver = None if linear_solver is None else as_linear_solver(linear_solver, Dense)
        if self.linear_solver is not None and not self.linear_solver.takes_rectangular:
            raise ValueError(
                f"linear_solver is {linear_solver!r}, but the systems of Gauss-Newton are rectangular: use Dense(), "
                f"LSMR() or Auto()."
            )

    def start(self, problem: InnerProblem, x0: Tensor) -> GaussNewtonState:
        here = first_iterate(problem, x0)
        return self._state(here)

    def step(self, problem: InnerProblem, state: GaussNewtonState) -> GaussNewtonState:
        J = problem.least_squares_jacobian(state.x)
        direction = -self._solver(state.x.shape[-1]).solve(J, J.value).value
        # An overflown one is not taken: the steepest descent is.
        direction = torch.where(direction.isfinite().all(-1, keepdim=True), direction, 0)
        return self._state(advance(problem, state.here, direction, torch.ones_like(state.here.step)))

    def _solver(self, n: int) -> LinearSolver:
        return self.linear_solver or (Dense() if n <= DENSE_UP_TO else LSMR())

    @staticmethod
    def _state(here: Iterate) -> GaussNewtonState:
        return GaussNewtonState(here.x, here.residual_norm, here.progress.status, here)
