"""An inner solver under a condition that is not its own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .._vectors import vector_norm
from ..info import SolveInfo, Status
from ._wrapper import Wrapper
from .base import InnerProblem

SLACK = 10.0
"""F of a given condition may be scaled otherwise than what the inner solver brought below its tolerance."""


class Verified(Wrapper):
    """An inner solver whose solution counts as one where the residual of the layer's condition is small there."""

    def solve(self, problem: InnerProblem, x0: Tensor) -> tuple[Tensor, SolveInfo]:
        x, info = self.inner_solver.solve(problem, x0)
        norm, first = (vector_norm(problem.residual(at)).detach() for at in (x, x0))
        tol = self.tol or torch.finfo(norm.dtype).eps ** 0.5
        holds = norm <= SLACK * tol * first.clamp(min=1).nan_to_num(1.0)
        lost = torch.where(norm.isfinite(), int(Status.STAGNATED), int(Status.NON_FINITE))
        status = torch.where(info.converged, torch.where(holds, int(Status.CONVERGED), lost), info.status)
        return x, replace(info, residual_norm=norm, converged=info.converged & holds, status=status)
