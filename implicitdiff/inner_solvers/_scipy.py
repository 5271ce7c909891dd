"""What the solvers of scipy.optimize share: one system after the other on NumPy's vectors, and reports of our own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from .._vectors import vector_norm
from ..errors import ImplicitDiffError
from ..info import FailurePolicy, SolveInfo, Status
from ._unfollowed import not_unrolled
from .base import InnerProblem, InnerSolver

T = TypeVar("T")


class Ended(Exception):  # noqa: N818  # no error: the way out of SciPy's loop
    """A system has been solved, or has used up its iterations."""

    def __init__(self, status: Status) -> None:
        super().__init__()
        self.status = status


class OneSystem:
    """One system of a batch on float64 vectors of NumPy; its residual is judged at every point that is met."""

    def __init__(self, problem: InnerProblem, x0: Tensor, threshold: float, max_iterations: int) -> None:
        self.problem, self.like, self.threshold, self.max_iterations = problem, x0, threshold, max_iterations
        self.x, self.iterations = self.array(x0), 0
        self.is_evaluating = False

    def tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(x, dtype=np.float64)).to(self.like)

    @staticmethod
    def array(x: Tensor) -> np.ndarray:
        return x.detach().cpu().double().numpy().copy()

    def evaluate(self, function: Callable[[Tensor], T], x: np.ndarray) -> T:
        """A function of the problem at x; what it raises is the user's."""
        self.is_evaluating = True
        value = function(self.tensor(x))
        self.is_evaluating = False
        return value

    def count(self, x: np.ndarray) -> None:
        """Note the iterate at the end of an iteration."""
        self.x, self.iterations = np.array(x), self.iterations + 1
        if self.iterations >= self.max_iterations:
            raise Ended(Status.MAX_ITERATIONS)

    def judge(self, x: np.ndarray, residual: Tensor) -> None:
        """End where the residual at x satisfies the tolerance."""
        if float(vector_norm(residual)) <= self.threshold:
            self.x = np.array(x)
            self.iterations += 1
            raise Ended(Status.CONVERGED)


class SciPySolver(InnerSolver):
    """A solver of scipy.optimize by its name: ``search`` calls it."""

    methods: ClassVar[tuple[str, ...]]

    def __init__(
        self, method: str, *, tol: float | None = None, max_iterations: int = 1000, on_failure: FailurePolicy = "warn"
    ) -> None:
        super().__init__(tol=tol, max_iterations=max_iterations, on_failure=on_failure)
        if method not in self.methods:
            raise ValueError(f"method is {method!r}, but it must be one of {', '.join(self.methods)}.")
        self.method = method

    @abstractmethod
    def search(self, system: OneSystem) -> Status:
        """Run SciPy's solver from ``system.x``, until :class:`Ended` is raised or it ends by itself: say how.

        Its own tolerances are zero, so that it is :attr:`Status.STAGNATED` unless SciPy says otherwise.
        """

    def solve(self, problem: InnerProblem, x0: Tensor) -> tuple[Tensor, SolveInfo]:
        if x0.is_complex():
            raise ImplicitDiffError(f"{type(self).__name__} needs real unknowns, but init is {x0.dtype}.")
        x, norm = x0.detach().clone(), vector_norm(problem.residual(x0))
        threshold = self._threshold(norm)
        status = torch.where(norm.isfinite(), int(Status.CONVERGED), int(Status.NON_FINITE))
        iterations = torch.zeros_like(status)
        for index in np.ndindex(*norm.shape):
            if bool((norm[index] > threshold[index]) & norm[index].isfinite()):
                system = OneSystem(problem.system(index), x0[index], float(threshold[index]), self.max_iterations)
                status[index] = int(self._ended(system))
                x[index], iterations[index] = system.tensor(system.x), system.iterations
                norm[index] = vector_norm(system.problem.residual(x[index]))
        converged = norm <= threshold
        status = torch.where(converged, int(Status.CONVERGED), status)
        status = torch.where(norm.isfinite(), status, int(Status.NON_FINITE))
        return x, SolveInfo(iterations, norm, converged, status, 0, f"{type(self).__name__}: {self.method}")

    def _ended(self, system: OneSystem) -> Status:
        try:
            with np.errstate(all="ignore"):  # what overflows is found in the residual
                return self.search(system)
        except Ended as end:
            return end.status
        except (ArithmeticError, ValueError):  # SciPy's own; a numpy.linalg.LinAlgError is a ValueError
            if system.is_evaluating:
                raise
            return Status.BREAKDOWN

    def start(self, problem: InnerProblem, x0: Tensor) -> Any:
        raise not_unrolled(self)

    def step(self, problem: InnerProblem, state: Any) -> Any:
        raise not_unrolled(self)
