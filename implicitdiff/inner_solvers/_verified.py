"""An inner solver under a condition that is not its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._vectors import vector_norm
from ..info import FailurePolicy, SolveInfo, Status
from .base import InnerProblem

SLACK = 10.0
"""F of a given condition may be scaled otherwise than what the inner solver brought below its tolerance."""


class Verified:
    """An inner solver whose solution counts as one where the residual of the layer's condition is small there."""

    def __init__(self, inner_solver: Any) -> None:
        self.inner_solver = inner_solver

    @property
    def on_failure(self) -> FailurePolicy:
        return self.inner_solver.on_failure

    @property
    def tol(self) -> float | None:
        """That of the inner solver."""
        return getattr(self.inner_solver, "tol", None)

    @tol.setter
    def tol(self, tol: float | None) -> None:
        self.inner_solver.tol = tol

    def solve(self, problem: InnerProblem, x0: Tensor) -> tuple[Tensor, SolveInfo]:
        x, info = self.inner_solver.solve(problem, x0)
        norm, first = (vector_norm(problem.residual(at)).detach() for at in (x, x0))
        tol = self.tol or torch.finfo(norm.dtype).eps ** 0.5
        holds = norm <= SLACK * tol * first.clamp(min=1).nan_to_num(1.0)
        lost = torch.where(norm.isfinite(), int(Status.STAGNATED), int(Status.NON_FINITE))
        status = torch.where(info.converged, torch.where(holds, int(Status.CONVERGED), lost), info.status)
        return x, replace(info, residual_norm=norm, converged=info.converged & holds, status=status)

    def __repr__(self) -> str:
        return repr(self.inner_solver)
