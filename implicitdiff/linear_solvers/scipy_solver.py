"""The solvers of scipy.sparse.linalg."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from .._vectors import scaled_norm
from ..errors import ImplicitDiffError
from ..info import FailurePolicy, LinearSolution, Status
from ..operators import LinearOperator
from .base import LinearSolver, check_max_iterations
from .system import System

TIGHTENINGS = 4
METHODS = ("bicg", "bicgstab", "cg", "cgs", "gcrotmk", "gmres", "lgmres", "lsmr", "lsqr", "minres", "qmr", "tfqmr")


class SciPy(LinearSolver):
    """An iterative solver of :mod:`scipy.sparse.linalg` by its name, for operators on the CPU.

    One system after the other, each by products with the whole batch: for reference and for single systems. SciPy's
    solver stops by a criterion of its own; the report has the true residual, as always.

    * ``method``: "bicg", "bicgstab", "cg", "cgs", "gcrotmk", "gmres", "lgmres", "lsmr", "lsqr", "minres", "qmr" or
      "tfqmr";
    * ``max_iterations``: as SciPy counts them, at least 1; None means 10·n, at least 100.

    Shapes, further settings and errors are those of :class:`~implicitdiff.LinearSolver`. It raises ValueError for
    another ``method``, and :class:`~implicitdiff.ImplicitDiffError` where b is not on the CPU.

    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[1.0, 0.0], [0.0, -2.0]]), structure="symmetric")
    >>> SciPy("minres")(A, torch.tensor([1.0, 2.0])).value
    tensor([ 1.0000, -1.0000])
    """

    def __init__(
        self,
        method: str,
        *,
        rtol: float = 1e-6,
        atol: float = 0.0,
        max_iterations: int | None = None,
        on_failure: FailurePolicy = "warn",
    ) -> None:
        super().__init__(rtol=rtol, atol=atol, on_failure=on_failure)
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, but it must be one of {', '.join(METHODS)}.")
        self.method, self.max_iterations = method, check_max_iterations(max_iterations)

    @property
    def name(self) -> str:
        return f"SciPy: {self.method}"

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        if b.device.type != "cpu":
            raise ImplicitDiffError(f"{self.name} solves on the CPU, but b is on {b.device}: use a solver of torch.")
        system = System(A, b)
        x = b.new_zeros(*b.shape[:-1], A.shape[1])
        iterations = torch.zeros(b.shape[:-1], dtype=torch.int64)
        for index in np.ndindex(*b.shape[:-1]):
            if bool(b[index].isfinite().all()) and bool((b[index] != 0).any()):
                start = None if x0 is None else x0[index]
                x[index], iterations[index] = self._solve_one(_One(system, index, b), b[index], start)
        status = torch.full_like(iterations, int(Status.MAX_ITERATIONS))
        return LinearSolution(x, self._info(system, b, x, iterations, status))

    def _solve_one(self, A: _One, b: Tensor, x0: Tensor | None) -> tuple[Tensor, int]:
        scale = float(b.abs().max())
        function: Callable[..., Any] = getattr(scipy.sparse.linalg, self.method)
        known = inspect.signature(function).parameters
        threshold = max(self.rtol, self.atol / float(scaled_norm(b)))
        settings: dict[str, Any] = {"rtol": threshold, "atol": 0.0, "btol": threshold, "conlim": 0.0}
        limit = self.max_iterations or max(100, 10 * A.shape[1])
        settings |= {"maxiter": limit, "iter_lim": limit, "x0": None if x0 is None else (x0 / scale).numpy()}
        count = [0]

        def note(_: Any) -> None:
            count[0] += 1

        settings |= {"callback": note, "callback_type": "pr_norm"}
        unit, done = (b / scale).numpy(), 0
        for _ in range(TIGHTENINGS):
            with np.errstate(all="ignore"):  # what overflows is found in the true residual
                result = function(A, unit, **{k: v for k, v in settings.items() if k in known})
            done += int(result[2]) if self.method in ("lsmr", "lsqr") else 0
            if not np.isfinite(result[0]).all() or np.linalg.norm(unit - A @ result[0]) <= threshold * np.linalg.norm(
                unit
            ):
                break
            # MINRES and others measure their residual by ‖A‖·‖x‖: go on to ours.
            settings |= {"x0": result[0], "rtol": 0.1 * settings["rtol"], "btol": 0.1 * settings["btol"]}
        return torch.from_numpy(np.asarray(result[0])).to(b.dtype) * scale, done + count[0]


class _One(scipy.sparse.linalg.LinearOperator):
    """One system of a batch, on NumPy's vectors."""

    def __init__(self, system: System, index: tuple[int, ...], b: Tensor) -> None:
        self.system, self.index, self.b = system, index, b
        super().__init__(np.dtype(str(b.dtype).removeprefix("torch.")), system.shape)

    def _matvec(self, v: np.ndarray) -> np.ndarray:
        return self._product(self.system, v)

    def _rmatvec(self, v: np.ndarray) -> np.ndarray:
        return self._product(self.system.rmatvec, v)

    def _product(self, product: Callable[[Tensor], Tensor], v: np.ndarray) -> np.ndarray:
        batch = self.b.new_zeros(*self.b.shape[:-1], len(v.reshape(-1)))
        batch[self.index] = torch.from_numpy(v.reshape(-1).copy()).to(self.b.dtype)
        return product(batch)[self.index].numpy()
