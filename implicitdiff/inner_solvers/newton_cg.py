"""Newton's method for minima, its systems solved by truncated conjugate gradients (Hessian-free)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._iteration import iterate
from ..info import FailurePolicy
from ..linear_solvers.base import check_max_iterations
from ..linear_solvers.cg import CG
from ..linear_solvers.system import System
from ._line_search import Iterate, advance, first_iterate
from .base import DECIDES, InnerProblem, InnerSolver


class NewtonCGState(NamedTuple):
    x: Tensor
    residual_norm: Tensor
    status: Tensor
    here: Iterate


class NewtonCG(InnerSolver):
    """Line-search Newton-CG (Nocedal and Wright 2006, Algorithm 7.1), the Hessian known by its products only.

    Each Newton system is solved until its residual is below min(½, √‖∇f‖)·‖∇f‖, by at most ``cg_iterations`` steps,
    and truncated where CG meets negative curvature (Steihaug 1983); the steepest descent direction where it does so at
    once.

    * ``cg_iterations``: at least 1; None means 10·n, at least 100.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. It needs an
    objective, and cannot be unrolled.

    >>> import implicitdiff as idf
    >>> layer = idf.ArgminLayer(lambda x, t: (torch.exp(x) - t * x).sum(), inner_solver=NewtonCG())
    >>> layer(torch.zeros(1), torch.tensor([1.0])).item()
    0.0
    """

    uncompilable = DECIDES

    def __init__(
        self,
        cg_iterations: int | None = None,
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
        self.cg_iterations = check_max_iterations(cg_iterations, "cg_iterations")

    def start(self, problem: InnerProblem, x0: Tensor) -> NewtonCGState:
        return self._state(first_iterate(problem, x0))

    def step(self, problem: InnerProblem, state: NewtonCGState) -> NewtonCGState:
        direction = self._direction(problem, state.here)
        return self._state(advance(problem, state.here, direction, torch.ones_like(state.here.step)))

    @staticmethod
    def _state(here: Iterate) -> NewtonCGState:
        return NewtonCGState(here.x, here.residual_norm, here.progress.status, here)

    def _direction(self, problem: InnerProblem, here: Iterate) -> Tensor:
        norm = here.residual_norm.detach()
        scale = torch.where((norm > 0) & norm.isfinite(), norm, 1).unsqueeze(-1)
        cg, b = CG(), -here.gradient / scale
        hessian = System(problem.hessian(here.x), b)
        budget = self.cg_iterations or max(100, 10 * b.shape[-1])
        forcing = norm.sqrt().clamp(max=0.5)
        ended = iterate(lambda state: cg.step(hessian, state), cg.start(hessian, b, None), forcing, budget)
        return ended.state.x * scale
