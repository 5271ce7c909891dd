"""What a solve tells: the status of each system, the numbers it reached, and the history of all solves in a block."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ._lanczos import Lanczos
from .errors import ConvergenceError, ConvergenceWarning

FailurePolicy = Literal["warn", "raise", "ignore"]
"""What a solver does with systems that it could not solve."""


class Status(IntEnum):
    """How the solve of one system ended. ``SolveInfo.status`` holds these numbers, one per system, and
    ``SolveInfo.statuses`` the members.

    >>> print(Status(1))
    MAX_ITERATIONS
    """

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return format(self.name, spec)

    CONVERGED = 0
    """The asked tolerance was reached, measured on the true residual."""
    MAX_ITERATIONS = 1
    """The allowed number of iterations was used up first."""
    BREAKDOWN = 2
    """The method cannot continue: a division by zero, a singular matrix."""
    INDEFINITE = 3
    """Negative curvature was met where the method needs a positive definite operator."""
    STAGNATED = 4
    """Rounding stopped the progress before the tolerance was reached."""
    NON_FINITE = 5
    """A NaN or an infinity appeared."""
    NOT_SMOOTH = 6
    """A system was solved, but x lies at a kink of its condition: the derivative is that of one side."""
    INFEASIBLE = 7
    """No point satisfies the constraints; a certificate of that was found."""
    UNBOUNDED = 8
    """The objective has no lower bound on the feasible set; a direction that shows it was found."""
    NOT_A_SOLUTION = 9
    """A system was solved, but x is so far from satisfying its condition that what is differentiated is off by more
    than a hundredth of max(1, ‖x‖)."""


RUNNING = -1
"""Inside the solvers' loops: a system that has not ended yet."""

_REMEDIES = {
    Status.MAX_ITERATIONS: "raise max_iterations (terms, for Neumann), loosen the tolerance, "
    "or use a preconditioner or a better start",
    Status.BREAKDOWN: "the operator may be singular (a flat minimum, a double root), the derivative is then not "
    "determined: regularise the problem; Dense() and LSMR() give the least-squares answer of minimum norm; or the "
    "declared structure is wrong: implicitdiff.check finds out",
    Status.INDEFINITE: "the operator is not positive definite (a saddle point, or too little regularisation?): "
    "use MINRES, Dense() or Auto()",
    Status.STAGNATED: "rounding errors rule: loosen the tolerance, rescale the problem, or use float64; where CG met "
    "negative curvature, x is no strict minimum: lower the inner solver's tol first",
    Status.NON_FINITE: "look for overflow, a division by zero or a log of zero, at the solution or in the cotangent",
    Status.NOT_SMOOTH: "x lies where its condition has a kink (degenerate: a constraint active with a zero multiplier, "
    "a coefficient about to enter or leave the support), and the derivative is that of one side: move the arguments "
    "off it, or smooth the problem",
    Status.INFEASIBLE: "the constraints contradict each other: relax them, or look for a sign error in them",
    Status.UNBOUNDED: "the objective falls without end: add constraints or a quadratic term",
    Status.NOT_A_SOLUTION: "x does not satisfy its condition: by its residual, what is differentiated is off by more "
    "than a hundredth of max(1, ‖x‖). Solve the inner problem more accurately, or see whether the condition describes "
    "what it solves (implicitdiff.check)",
}

_REMEDIES_OF_INNER_SOLVES = _REMEDIES | {
    Status.STAGNATED: "rounding errors rule, or there is no solution near the start: loosen the tolerance, rescale the "
    "problem, use float64, or start elsewhere",
    Status.MAX_ITERATIONS: "raise max_iterations, loosen tol, or start nearer to the solution; where ‖F(x)‖ does not "
    "fall, see whether there is a solution at all (an objective without a minimum?)",
    Status.BREAKDOWN: "the method cannot go on from where it is (no change of sign between the bounds of a bisection, "
    "a matrix that is singular or not finite, linear systems that are not solved): start elsewhere, take another "
    "linear_solver (Newton(Dense()), or a preconditioner), or another inner solver",
    Status.NON_FINITE: "the iterates may diverge (too long a stepsize, an objective without a minimum); otherwise look "
    "for a NaN in init or the args, an overflow, a division by zero or a log of zero in the function",
}


@dataclass(frozen=True)
class SolveInfo:
    """The report of one solve, per system: each tensor has the shape ``(*batch,)``, so ``()`` for a single system.

    Under ``torch.func.vmap`` the batch dimensions are those of all systems that were solved together, the outermost
    first, as plain tensors. Printed, it is one line.

    >>> import implicitdiff as idf
    >>> A = idf.operators.DiagonalOperator(torch.tensor([[1.0, 2.0], [1.0, 9.0]]), structure="positive_definite")
    >>> info = idf.CG()(A, torch.ones(2, 2)).info  # of two systems
    >>> info.iterations, info.statuses
    (tensor([2, 2]), [<Status.CONVERGED: 0>, <Status.CONVERGED: 0>])
    >>> [bound.round().tolist() for bound in info.eigenvalue_range]
    [[1.0, 1.0], [2.0, 9.0]]
    """

    iterations: Tensor
    """Iterations used (int64)."""
    residual_norm: Tensor
    """Linear solves: ‖b − A u‖₂ / ‖b‖₂, the true one wherever a system is said to have converged; an iterative method
    that failed reports the residual of its own recursion. Inner solves: ‖F(x)‖₂ at the point of differentiation."""
    converged: Tensor
    """Whether the tolerance was reached (bool)."""
    status: Tensor
    """One :class:`Status` number per system (int64)."""
    matvecs: int
    """Products with the operator, each counted once for the whole batch."""
    method: str
    """The solver, and for ``Auto`` what it chose."""
    estimated_distance: Tensor | None = None
    """Inner solves of a layer with ``polish=True``: ‖x − x*‖₂ before the Newton step, as that step estimates it."""
    gradient_error: Tensor | None = None
    """Inner solves of a layer with ``polish=True``: the estimated relative error of derivatives that is left after the
    Newton step, due to the inner solution alone; right to a small factor where the step was short."""
    lanczos: Lanczos | None = None
    """What CG and MINRES saw of the spectrum; the properties below read it."""
    scale: Tensor | None = None
    """‖b‖₂ of a linear solve by an iterative method."""
    judged: bool = True
    """False where somebody else's solver found x, by a tolerance that is not known here: ``converged`` then says that x
    is finite. Whether x is a solution is asked where it is differentiated, and reported there as NOT_A_SOLUTION."""
    by_function: bool = False
    """Whether a function of the user's, (A, b) -> x, solved the linear system: it has no settings."""

    @property
    def eigenvalue_range(self) -> tuple[Tensor, Tensor] | None:
        """The extreme Ritz values, from CG and MINRES without a preconditioner; None elsewhere.

        They lie inside the spectrum of A (for x0 and b that contain every eigenvector, near its ends). A negative one
        betrays an indefinite A. NaN for a system that took no steps.
        """
        return None if self.lanczos is None else self.lanczos.extremes[:2]

    @property
    def condition_number(self) -> Tensor | None:
        """The largest modulus of the Ritz values over the smallest: a bound from below where A is definite."""
        if self.lanczos is None:
            return None
        low, high, least = self.lanczos.extremes
        return torch.maximum(low.abs(), high.abs()) / least

    @property
    def distance(self) -> Tensor | None:
        """The estimated ‖x − x*‖₂, where known: for CG and MINRES ‖b − A u‖₂ over the smallest modulus of a Ritz value.

        That is an upper bound of ‖u − u*‖₂ as far as the smallest Ritz value has converged, which it has by the time
        that the residual is small.
        """
        if self.lanczos is None or self.scale is None:
            return self.estimated_distance
        solved_at_once = self.lanczos.steps == 0
        distance = self.residual_norm * self.scale / self.lanczos.extremes[2]
        return torch.where(solved_at_once & (self.residual_norm == 0), 0, distance)

    @property
    def statuses(self) -> list[Status]:
        """The :class:`Status` of each system, over all batch dimensions."""
        return [Status(number) for number in self.status.flatten().tolist()]

    def summary(self) -> str:
        """One line for a log; iterations and products where there are any, the status where a system failed.

        >>> zero = torch.tensor(0)
        >>> SolveInfo(zero + 3, zero * 1.0, zero == 0, zero, 4, "CG").summary()
        'CG: 1 of 1 converged, 3 iterations, residual at most 0.0e+00, 4 products'
        >>> SolveInfo(zero, zero + 1.0, zero == 1, zero + 2, 3, "Dense").summary()
        'Dense: 0 of 1 converged (BREAKDOWN), residual at most 1.0e+00, 3 products'
        """
        total, done = self.converged.numel(), int(self.converged.sum())
        worst = float(self.residual_norm.max()) if total else 0.0
        failures = ", ".join(map(str, sorted({*self.statuses} - {Status.CONVERGED})))
        parts = [
            f"{self.method}: {done} of {total} {'converged' if self.judged else 'finite'}",
            _counted(int(self.iterations.max()) if total else 0, "iteration"),
            f"residual at most {worst:.1e}",
            _counted(self.matvecs, "product"),
        ]
        if failures:
            parts[0] += f" ({failures})"
        return ", ".join(filter(None, parts))

    def __repr__(self) -> str:
        return f"SolveInfo({self.summary()})"

    def __str__(self) -> str:
        return self.summary()


def _counted(number: int, noun: str) -> str:
    return "" if number == 0 else f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(frozen=True)
class LinearSolution:
    """What calling a linear solver returns: the ``value`` u of shape ``(*batch, n)`` and the ``info``.

    >>> import implicitdiff as idf
    >>> solution = idf.Dense()(idf.operators.DiagonalOperator(torch.tensor([2.0, 4.0])), torch.ones(2))
    >>> solution.value, bool(solution.info.converged)
    (tensor([0.5000, 0.2500]), True)
    """

    value: Tensor
    info: SolveInfo


@dataclass
class Solution:
    """What ``layer.solve`` returns: the solution, a tree like ``init``, with its reports.

    >>> import implicitdiff as idf
    >>> y = torch.tensor([4.0, 9.0], requires_grad=True)
    >>> solution = idf.RootLayer(lambda x, y: x**2 - y).solve(torch.ones(2), y)
    >>> solution.value.detach().round(decimals=3), bool(solution.forward.converged), solution.backward is None
    (tensor([2., 3.]), True, True)
    >>> solution.value.sum().backward()
    >>> bool(solution.backward.converged)
    True
    """

    value: Any
    """The solution, a tree like ``init``; the same as calling the layer."""
    forward: SolveInfo
    """The report of the inner solve."""
    backward: SolveInfo | None = field(default=None)
    """The report of the last linear solve for a derivative; ``None`` until ``backward()`` has run."""


@dataclass(frozen=True)
class RecordedSolve:
    """One entry of :func:`~implicitdiff.record`: which solve it was, and its report, whose fields it has too.

    >>> import implicitdiff as idf
    >>> with idf.record() as history:
    ...     x = idf.RootLayer(lambda x, y: x**2 - y)(torch.ones(2), torch.tensor([4.0, 9.0]))
    >>> history[0].kind, history[0].method, history[0].statuses
    ('forward', 'Newton', [<Status.CONVERGED: 0>])
    """

    kind: str
    """``"forward"`` (an inner solve), ``"backward"`` (for a cotangent), ``"tangent"`` (for a forward-mode derivative)
    or ``"linear"`` (a linear solver that was called directly)."""
    info: SolveInfo

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.info, name)

    def __str__(self) -> str:
        return f"{self.kind}: {self.info.summary()}"


histories: list[Any] = []
"""What takes the reports: lists, and whatever else has ``append``."""


@contextmanager
def record() -> Iterator[list[RecordedSolve]]:
    """Collect the reports of every solve inside the block, forward and backward, in the order they happen.

    Solves on any thread are recorded, as autograd runs the backward pass of CUDA tensors on threads of its own. Each is
    a :class:`~implicitdiff.info.RecordedSolve`, entered before its failure is warned of or raised.

    >>> import implicitdiff as idf
    >>> square_root = idf.RootLayer(lambda x, y: x * x - y)
    >>> y = torch.tensor([4.0, 9.0], requires_grad=True)
    >>> with record() as history:
    ...     square_root(torch.ones(2), y).sum().backward()
    >>> [solve.kind for solve in history]
    ['forward', 'backward']
    """
    history: list[RecordedSolve] = []
    histories.append(history)
    try:
        yield history
    finally:
        # By identity: two histories with equal entries compare equal.
        histories[:] = [other for other in histories if other is not history]


def report(kind: str, info: SolveInfo, policy: FailurePolicy) -> None:
    """Enter a finished solve into the open histories, and warn or raise as the policy says where a system failed."""
    for history in histories:
        history.append(RecordedSolve(kind, info))
    if policy == "ignore" or bool(info.converged.all()):
        return
    message = _failure_message(kind, info)
    if policy == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=level_of_the_caller())


def level_of_the_caller() -> int:
    """The ``stacklevel`` at which a warning names the user's own line: above this package and above torch."""
    inside = tuple(str(Path(module.__file__).parent) for module in (torch, sys.modules[__package__]))  # type: ignore
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level


def _failure_message(kind: str, info: SolveInfo) -> str:
    failed = ~info.converged
    count, total = int(failed.sum()), failed.numel()
    residual = info.residual_norm[failed]
    worst = float(residual.max()) if bool(residual.isfinite().all()) else float("nan")
    statuses = sorted({Status(int(s)) for s in info.status[failed].unique()})
    what = {"forward": "the inner problem", "linear": "the linear system"}.get(kind, f"the {kind} linear system")
    which = "" if total == 1 else f" for {count} of {total} systems"
    norm = "‖F(x)‖" if kind == "forward" else "relative residual"
    known = _REMEDIES_OF_INNER_SOLVES if kind == "forward" else _REMEDIES
    remedies = "; ".join(known.get(s, "") for s in statuses)
    whose = "inner" if kind == "forward" else "linear"
    silence = f'on_failure="raise" of the {whose} solver makes this an error, "ignore" silences it'
    if info.by_function:
        silence = "A subclass of LinearSolver in place of the function takes settings: rtol, atol and on_failure"
    if statuses in ([Status.NOT_SMOOTH], [Status.NOT_A_SOLUTION]):
        but = "not uniquely" if statuses == [Status.NOT_SMOOTH] else "not at a solution"
        return f"{info.method} solved {what}, but {but}{which}: {statuses[0].name}, {remedies}. {silence}."
    if info.by_function and statuses == [Status.BREAKDOWN]:
        return (
            f"{info.method} did not solve {what}{which}: BREAKDOWN, its answer does not solve A u = b: relative "
            f"residual up to {worst:.1e}. What to try: let it iterate longer, or see whether it solves another system, "
            f"such as that of the transpose. {silence}."
        )
    return (
        f"{info.method} did not solve {what}{which}: {', '.join(s.name for s in statuses)} after at most "
        f"{int(info.iterations.max())} iterations, {norm} up to {worst:.1e}. What to try: {remedies}. "
        f"The result is not to be trusted as it is. {silence}."
    )
