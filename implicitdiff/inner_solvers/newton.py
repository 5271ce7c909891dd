"""Newton's method for roots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._vectors import vector_norm
from ..info import RUNNING, FailurePolicy, Status
from ..linear_solvers.auto import Auto
from ..linear_solvers.base import LinearSolverLike, as_linear_solver
from .base import DECIDES, InnerProblem, InnerSolver

MAX_HALVINGS = 20
UNSOLVED = 0.1
"""A linear solver has given up on a Newton system that it leaves with a relative residual above this."""
IDLE = 0.99
"""A step from such a solve must lower ‖F‖ at least to this part of it: each further one would cost as much."""


class NewtonState(NamedTuple):
    x: Tensor
    residual: Tensor
    residual_norm: Tensor
    status: Tensor


class Newton(InnerSolver):
    """x ← x − step · A⁻¹ F(x), with the step halved until ‖F‖₂ decreases (Dennis and Schnabel 1996, section 6.5).

    For roots, fixed points and (saddle points included) stationary points. A system where no step lowers ‖F‖₂ ends as
    ``STAGNATED``; as ``BREAKDOWN`` where its linear system is not solved, so that the step is of little use.

    * ``linear_solver``: solves the Newton systems, A = ∂F/∂x; :class:`~implicitdiff.Auto` by default.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. It cannot be
    unrolled.

    >>> import implicitdiff as idf
    >>> idf.RootLayer(lambda x, y: x**2 - y, inner_solver=Newton())(torch.ones(1), torch.tensor([4.0]))
    tensor([2.])
    """

    uncompilable = DECIDES

    def __init__(
        self,
        linear_solver: LinearSolverLike | None = None,
        *,
        tol: float | None = None,
        max_iterations: int = 100,
        on_failure: FailurePolicy = "warn",
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        super().__init__(
            tol=tol, max_iterations=max_iterations, on_failure=on_failure, compile=compile, check_every=check_every
        )
        self.linear_solver = as_linear_solver(linear_solver, Auto)

    def start(self, problem: InnerProblem, x0: Tensor) -> NewtonState:
        residual = problem.residual(x0)
        norm = vector_norm(residual)
        return NewtonState(x0, residual, norm, torch.full_like(norm, RUNNING, dtype=torch.int64))

    def step(self, problem: InnerProblem, state: NewtonState) -> NewtonState:
        solution = self.linear_solver.solve(problem.jacobian(state.x), state.residual)
        direction, info = -solution.value, solution.info
        # A singular system is another matter: of a stationary point of ‖F‖, say.
        gave_up = (info.residual_norm > UNSOLVED) & (info.status != Status.BREAKDOWN)
        # The full step in parts of a system that is done may be anything: it is not taken.
        direction = torch.where(direction.isfinite().all(-1, keepdim=True), direction, 0)
        step = torch.ones_like(state.residual_norm)
        for _ in range(MAX_HALVINGS):
            x = state.x + step.unsqueeze(-1) * direction
            residual = problem.residual(x)
            norm = vector_norm(residual)
            ok = (norm <= (1 - 1e-4 * step) * state.residual_norm) | (state.residual_norm == 0)
            if bool(ok.all()):
                break
            step = torch.where(ok, step, 0.5 * step)
        # No shorter step helps: rounding, or a stationary point of ‖F‖ that is no root.
        status = torch.where(ok, state.status, int(Status.STAGNATED))
        idle = ~ok | (norm > IDLE * state.residual_norm)
        status = torch.where(gave_up & idle, int(Status.BREAKDOWN), status)
        taken = ok.unsqueeze(-1)
        return NewtonState(
            torch.where(taken, x, state.x),
            torch.where(taken, residual, state.residual),
            torch.where(ok, norm, state.residual_norm),
            status,
        )
