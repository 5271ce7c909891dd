"""An inner solver around another one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from ..info import FailurePolicy, SolveInfo
from .base import InnerProblem


class Wrapper(ABC):
    """Looks at, or improves, what an inner solver found; settings and policy are those of that one."""

    def __init__(self, inner_solver: Any) -> None:
        self.inner_solver = inner_solver

    @property
    def on_failure(self) -> FailurePolicy:
        return self.inner_solver.on_failure

    @property
    def tol(self) -> float | None:
        return getattr(self.inner_solver, "tol", None)

    @tol.setter
    def tol(self, tol: float | None) -> None:
        self.inner_solver.tol = tol

    @abstractmethod
    def solve(self, problem: InnerProblem, x0: Tensor) -> tuple[Tensor, SolveInfo]:
        """The solution from x0 and its report, without acting on a failure."""

    def __repr__(self) -> str:
        return repr(self.inner_solver)
