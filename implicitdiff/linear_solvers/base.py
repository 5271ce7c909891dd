"""What a linear solver is: settings, scaling, the loop, honest reports, and derivatives when it is called directly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._autograd import solution_of
from .._captures import dual_level_is_open, is_differentiated, transform_level
from .._linear_problem import LinearProblem
from .._names import call_of, name_of
from .._timing import timed
from .._vectors import scaled_norm
from ..errors import ImplicitDiffError
from ..info import FailurePolicy, LinearSolution, SolveInfo, Status
from ..operators import LinearOperator
from ._operator_family import OperatorWithCaptures
from .system import System


def check_policy(on_failure: FailurePolicy) -> FailurePolicy:
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f'on_failure is {on_failure!r}, but it must be "warn", "raise" or "ignore".')
    return on_failure


def check_max_iterations(value: int | None, name: str = "max_iterations") -> int | None:
    if value is not None and not (isinstance(value, Real | Tensor) and value >= 1 and value % 1 == 0):
        raise ValueError(f"{name} is {value!r}, but it must be a whole number of at least 1, or None.")
    return None if value is None else int(value)


def check_count(value: int, name: str = "max_iterations") -> int:
    count = check_max_iterations(value, name)
    if count is None:
        raise ValueError(f"{name} is None, but it must be a whole number of at least 1.")
    return count


def check_not_negative(**settings: float) -> None:
    for name, value in settings.items():
        if not isinstance(value, Real | Tensor) or not value >= 0:
            raise ValueError(f"{name} is {value!r}, but it must be a number of at least 0.")


class LinearSolver(ABC):
    """Solves A u = b. Call it with an operator and b of shape (*batch, n):

    >>> from implicitdiff import CG
    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), structure="positive_definite")
    >>> solution = CG()(A, torch.tensor([1.0, 2.0]))
    >>> torch.testing.assert_close(solution.value, torch.tensor([1 / 11, 7 / 11]))
    >>> bool(solution.info.converged)
    True

    The call is differentiable in b and in every tensor that A holds, and works under torch.func's transforms.

    * ``A``: a :class:`~implicitdiff.LinearOperator` of shape (n, n), one for all systems or a batch of them. Of shape
      (m, n) only for :class:`~implicitdiff.LSMR`, :class:`~implicitdiff.Dense` and :class:`~implicitdiff.Auto`, which
      then solve the least-squares problem, with b of shape (*batch, m);
    * ``b``: a real or complex tensor of A's dtype, (*batch, n), with the batch dimensions of A;
    * ``x0``: a start of the shape of u, as in ``linear_solver(A, b, x0)``; zeros by default.

    It returns a :class:`~implicitdiff.LinearSolution`: ``value``, the u of shape (*batch, n), and ``info``.

    Settings common to all:

    * ``rtol``, ``atol``: converged means ‖b − A u‖₂ ≤ max(rtol·‖b‖₂, atol), on the true residual of each system; both
      at least 0;
    * ``on_failure``: "warn" (default), "raise" or "ignore" when a system was not solved.

    A subclass writes ``solve(A, b, x0)``; an iterative one is easier made from
    :class:`~implicitdiff.IterativeLinearSolver`.

    Raises:
        ValueError: a setting out of its range; shapes or dtypes of A, b and x0 that do not fit each other.
        TypeError: A is not a LinearOperator, or b or x0 not a tensor of numbers.
        ConvergenceError: a system was not solved, under ``on_failure="raise"``.

    Warns:
        ConvergenceWarning: a system was not solved, under ``on_failure="warn"``.
    """

    def __init__(self, *, rtol: float = 1e-6, atol: float = 0.0, on_failure: FailurePolicy = "warn") -> None:
        check_not_negative(rtol=rtol, atol=atol)
        self.rtol, self.atol, self.on_failure = rtol, atol, check_policy(on_failure)

    takes_rectangular = False
    """Whether A may be rectangular; the solution is then the one of least squares."""

    @property
    def solves_on_support(self) -> bool:
        """Whether a layer may hand it, in the place of A, the smaller symmetric system on the support of a prox."""
        return True

    @property
    def name(self) -> str:
        """What reports call it."""
        return type(self).__name__

    def of_one_operator(self) -> LinearSolver:
        """The solver for right-hand sides of one operator and its transpose, of which it may keep what it finds."""
        return self

    @abstractmethod
    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        """The solution and its report, on plain tensors, without derivatives and without acting on a failure."""

    @timed("linear solve")
    def __call__(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        """Solve A u = b, b of shape (*batch, n), from x0 (zeros by default).

        Raises ValueError where shapes or dtypes of A and b do not fit, and :class:`ConvergenceError` under
        ``on_failure="raise"``.
        """
        _check_system(A, b, x0)
        if not (A.is_square or self.takes_rectangular):
            raise ValueError(
                f"{self.name} needs a square operator, but A has the shape {A.shape}: use LSMR() or Dense()."
            )
        family = OperatorWithCaptures(A)
        captured = family.find(b)
        kept = _Kept()
        problem = LinearProblem(family, False, _Keeping(self.of_one_operator(), kept), "linear")
        followed = transform_level() or dual_level_is_open()
        x0 = None if x0 is None else x0.detach()
        if not A.is_square and any(map(is_differentiated, captured)):
            raise ImplicitDiffError(
                f"A is rectangular, {A.shape}, and depends on a tensor that a derivative is taken in: a "
                f"least-squares solution is differentiated in b only. For one in A, minimise ‖A x − b‖² by ArgminLayer."
            )
        if followed or (torch.is_grad_enabled() and any(t.requires_grad for t in (b, *captured))):
            value = solution_of(problem, x0, b, *captured)
        else:
            with torch.no_grad():
                value = problem.solve(x0, b, *captured)
        assert kept.info is not None
        return LinearSolution(value, kept.info)

    def __repr__(self) -> str:
        return call_of(self.name, vars(self))

    def _info(
        self,
        system: System,
        b: Tensor,
        x: Tensor,
        iterations: Tensor,
        status: Tensor,
        product: Tensor | None = None,
    ) -> SolveInfo:
        """The report at x, from the true residual; one that does not hold what was claimed says so.

        ``product`` is A x, where it is known already.
        """
        norm = scaled_norm(b)
        residual = b - (system(x) if product is None else product)
        relative = scaled_norm(residual / torch.where(norm > 0, norm, 1).unsqueeze(-1))
        converged = relative <= self._threshold(norm)
        status = torch.where(converged, int(Status.CONVERGED), status)
        status = torch.where(~converged & (status == Status.CONVERGED), int(Status.STAGNATED), status)
        status = torch.where(relative.isfinite(), status, int(Status.NON_FINITE))
        return SolveInfo(iterations, relative, converged, status, system.matvecs, self.name)

    def _threshold(self, norm: Tensor) -> Tensor:
        """The asked residual, relative to ‖b‖."""
        if self.atol == 0:
            return torch.full_like(norm, self.rtol)
        return torch.clamp(self.atol / torch.where(norm > 0, norm, 1), min=self.rtol)


class CallableLinearSolver(LinearSolver):
    """Any callable ``(A, b) -> x`` as a linear solver: its true residual is checked once and reported."""

    def __init__(self, function: Callable[[LinearOperator, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    @property
    def solves_on_support(self) -> bool:
        return False  # it may know the size of A

    @property
    def name(self) -> str:
        return name_of(self.function)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        x = self.function(A, b)
        if not isinstance(x, Tensor) or x.shape != b.shape:
            given = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ImplicitDiffError(
                f"the linear solver {self.name} returned {given}, but it must return a tensor of the shape of b, "
                f"{tuple(b.shape)}."
            )
        status = torch.full(b.shape[:-1], int(Status.BREAKDOWN), device=b.device)
        system = System(A, b)
        info = self._info(system, b, x.to(b.dtype), torch.zeros_like(status), status)
        return LinearSolution(x, replace(info, by_function=True))

    def __repr__(self) -> str:
        return self.name


LinearSolverLike = LinearSolver | Callable[[LinearOperator, Tensor], Tensor]
"""What may be passed as ``linear_solver``."""


def as_linear_solver(solver: LinearSolverLike | None, default: type[LinearSolver]) -> LinearSolver:
    """What the user passed as ``linear_solver``, as a :class:`LinearSolver`."""
    if solver is None:
        return default()
    if isinstance(solver, LinearSolver):
        return solver
    kind = solver if isinstance(solver, type) else type(solver)
    # An inner solver is callable too.
    is_inner = not issubclass(kind, LinearSolver) and hasattr(kind, "start") and hasattr(kind, "step")
    if kind is solver or is_inner or not callable(solver):
        meant = f"inner_solver={kind.__name__}()" if is_inner else f"{kind.__name__}()"
        hint = f" (did you mean {meant}?)" if kind is solver or is_inner else ""
        raise TypeError(
            f"linear_solver is {solver!r}, but it must be a LinearSolver such as CG(), or a callable (A, b) -> x{hint}."
        )
    return CallableLinearSolver(solver)


def _check_system(A: Any, b: Any, x0: Any) -> None:
    if not isinstance(A, LinearOperator):
        raise TypeError(
            f"A is a {type(A).__name__}, but it must be a LinearOperator: wrap a matrix as DenseOperator(matrix) and "
            f"a function as FunctionOperator(matvec, n)."
        )
    if not isinstance(b, Tensor) or not (b.is_floating_point() or b.is_complex()):
        raise TypeError(f"b is {b!r}, but it must be a floating-point or complex tensor of shape (*batch, n).")
    if b.ndim == 0 or b.shape[-1] != A.shape[0]:
        raise ValueError(
            f"b has the shape {tuple(b.shape)}, but A has the shape {A.shape}: b must be (*batch, {A.shape[0]})."
        )
    if A.dtype is not None and A.dtype != b.dtype:
        raise ValueError(f"A is {A.dtype} and b is {b.dtype}: convert one of them.")
    if not _broadcasts(A.batch_shape, b.shape[:-1]):
        raise ValueError(
            f"A has the batch shape {A.batch_shape} and b has {tuple(b.shape[:-1])}: expand b to the batch of A."
        )
    if x0 is not None and not isinstance(x0, Tensor):
        raise TypeError(f"x0 is a {type(x0).__name__}, but it must be a tensor of the shape of b, {tuple(b.shape)}.")
    if x0 is not None and x0.shape != (expected := (*b.shape[:-1], A.shape[1])):
        raise ValueError(f"x0 has the shape {tuple(x0.shape)}, but the solution will have the shape {expected}.")


def _broadcasts(shape: tuple[int, ...], to: torch.Size) -> bool:
    """Whether a shape expands to another."""
    return len(shape) <= len(to) and all(s in (1, t) for s, t in zip(shape[::-1], to[::-1], strict=False))


class _Kept:
    info: SolveInfo | None = None


class _Keeping:
    """The solver, keeping the report of its first solve (the primal one)."""

    def __init__(self, solver: LinearSolver, kept: _Kept) -> None:
        self.solver, self.kept, self.on_failure = solver, kept, solver.on_failure

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> LinearSolution:
        solution = self.solver.solve(A, b, x0)
        self.kept.info = self.kept.info or solution.info
        return solution
