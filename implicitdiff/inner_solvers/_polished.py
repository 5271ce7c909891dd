"""One Newton step after any inner solver."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._linear_problem import solve_and_report
from .._vectors import vector_norm
from ..info import SolveInfo
from ..linear_solvers.base import LinearSolver
from ._wrapper import Wrapper
from .base import InnerProblem


class Polished(Wrapper):
    """An inner solver whose solution x is improved to x − A⁻¹ F(x) where that lowers ‖F‖₂, system by system.

    The error of a derivative is of the order of ‖x − x*‖, which the step squares (Ablin, Peyré and Moreau 2020 on such
    super-efficient estimates). What it tells on its way: d = A⁻¹ F(x) is the way to the solution as far as A does not
    change along it, so ‖d‖₂ estimates the distance; and ‖F(x − d)‖ / ‖F(x)‖ = ρ is half of how much A changes, relative
    to itself. As the derivative changes about as much as A does, its relative error is about 2ρ at x, and 2ρ² after the
    step, which leaves ρ of the distance.

    The linear system is solved loosely, to the root of the solver's ``rtol``: a better solution would not outlast the
    error of the step itself.
    """

    def __init__(self, inner_solver: Any, linear_solver: LinearSolver) -> None:
        super().__init__(inner_solver)
        self.linear_solver = copy.copy(linear_solver)
        self.linear_solver.rtol = linear_solver.rtol**0.5

    def solve(self, problem: InnerProblem, x0: Tensor) -> tuple[Tensor, SolveInfo]:
        x, info = self.inner_solver.solve(problem, x0)
        residual = problem.residual(x)
        correction = solve_and_report(self.linear_solver, problem.jacobian(x), residual, None, "linear", None)
        distance = vector_norm(correction.value)
        closer = x - correction.value
        norm, before = vector_norm(problem.residual(closer)), vector_norm(residual)
        taken = norm <= before  # not so for a NaN
        x = torch.where(taken.unsqueeze(-1), closer, x)
        ratio = torch.where(before > 0, norm / torch.where(before > 0, before, 1), 0)
        return x, replace(
            info,
            residual_norm=torch.where(taken, norm, before),
            estimated_distance=distance,
            gradient_error=2 * torch.where(taken, ratio**2, ratio),
        )

    def __repr__(self) -> str:
        return f"{self.inner_solver!r} and a Newton step"
