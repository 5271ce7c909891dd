"""What an inner solver is: settings, the loop, a tolerance per system, honest reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._compiled import STEPS, CompiledSteps, compiled_steps
from .._iteration import Ended, Marched, check_interval, every, iterate, march
from .._jacobian import JacobianOperator
from .._limited_memory import LimitedMemory
from .._names import call_of, name_of
from .._vectors import vector_norm
from ..conditions import Condition, Stationary
from ..errors import ImplicitDiffError
from ..info import FailurePolicy, SolveInfo, Status
from ..linear_solvers.base import LinearSolver, check_count, check_not_negative, check_policy
from ..operators import LinearOperator

DECIDES = "its steps decide by values, as in a search for a step length, where a compiled step cannot branch"
"""Why most methods are not compiled."""

AT_X = ("value", "gradient", "residual", "residual_norm")
"""The fields of a state that are functions of x (:meth:`InnerSolver.cut`)."""


class InnerProblem(Protocol):
    """The problem at fixed args, on tensors x of shape (*batch, n), system by system.

    What an inner solver gets from its layer. Objectives come with an :class:`~implicitdiff.ArgminLayer` only: elsewhere
    ``objective``, ``gradient`` and ``hessian`` raise :class:`~implicitdiff.ImplicitDiffError`, as everything does where
    the function of the layer returns what it must not.

    An inner solver of one's own, Newton's method with a fixed number of steps:

    >>> import implicitdiff as idf
    >>> from implicitdiff.inner_solvers import InnerProblem
    >>> def newton(problem: InnerProblem, x0: torch.Tensor) -> torch.Tensor:
    ...     x = x0
    ...     for _ in range(6):
    ...         x = x - idf.Dense()(problem.jacobian(x), problem.residual(x)).value
    ...     return x
    >>> idf.RootLayer(lambda x, y: x**2 - y, inner_solver=newton)(torch.ones(2), torch.tensor([4.0, 9.0]))
    tensor([2., 3.])
    """

    def objective(self, x: Tensor) -> Tensor:
        """The objective, of shape (*batch,)."""

    def gradient(self, x: Tensor) -> Tensor:
        """Its gradient, of shape (*batch, n)."""

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both from one evaluation."""

    def residual(self, x: Tensor) -> Tensor:
        """F(x), of shape (*batch, n): the gradient, for an objective."""

    def jacobian(self, x: Tensor) -> LinearOperator:
        """∂F/∂x at x."""

    def hessian(self, x: Tensor) -> LinearOperator:
        """The Hessian of the objective at x."""

    def system(self, index: tuple[int, ...]) -> InnerProblem:
        """The problem of one system of the batch, on x of shape (n,)."""

    def apply(self, function: Callable[..., Any], x: Tensor, *numbers: float | Tensor) -> Tensor:
        """A function of the user's, ``(x, *numbers, *args, **kwargs) -> a tree like x``, at x (*batch, n)."""

    def least_squares_residual(self, x: Tensor) -> Tensor:
        """r of an objective ½‖r(x)‖², of shape (*batch, m)."""

    def least_squares_jacobian(self, x: Tensor) -> JacobianOperator:
        """∂r/∂x at x, of shape (m, n), with r as its ``value``."""

    def leave_inverse(self, inverse: LimitedMemory) -> None:
        """Leave an estimate of the inverse Hessian for the backward pass."""


class InnerSolver(ABC):
    """Finds x with F(x, *args) = 0, on plain tensors of shape (*batch, n), each system with its own stopping.

    A subclass writes ``start(problem, x0)`` and ``step(problem, state)``; a state is a NamedTuple with at least ``x``
    and ``residual_norm``, the ‖F(x)‖₂ of each system; what else it knows of the problem at x is called ``value``,
    ``gradient`` or ``residual``. Steps written with torch operations can be unrolled too
    (:class:`implicitdiff.UnrolledLayer`).

    Settings common to all:

    * ``tol``: converged means ‖F(x)‖₂ ≤ tol, per system. None means √ε · max(1, ‖F(x₀)‖₂), ε the rounding unit of the
      dtype: 1.5e-8 for float64 and 3.5e-4 for float32;
    * ``max_iterations``: per system;
    * ``on_failure``: "warn" (default), "raise" or "ignore" when a system was not solved;
    * ``compile``, ``check_every``: as in :class:`~implicitdiff.IterativeLinearSolver`, for methods whose steps search
      for nothing. An unrolled layer runs the steps as they are.

    A fixed number of steps is ``max_iterations=16, tol=0.0, on_failure="ignore"``.

    x is the layer's tree ``init`` as a vector of n numbers; under ``torch.func.vmap`` there is one for each system of
    the batch.

    Raises:
        ValueError: a setting out of its range: ``tol`` below 0, ``max_iterations`` or ``check_every`` below 1.
        ImplicitDiffError: when called: a problem that the method is not for, such as one without an objective.
        ConvergenceError: when called: a system was not solved, under ``on_failure="raise"``.

    Warns:
        ConvergenceWarning: a system was not solved, under ``on_failure="warn"``.

    A custom inner solver may also be any callable ``(problem, x0) -> x``; ``problem`` offers ``objective(x)``,
    ``gradient(x)``, ``residual(x)``, and ``hessian(x)`` / ``jacobian(x)`` as operators
    (:class:`~implicitdiff.inner_solvers.InnerProblem`).

    >>> from typing import Any, NamedTuple
    >>> import implicitdiff as idf
    >>> from implicitdiff.inner_solvers import InnerProblem
    >>> class State(NamedTuple):
    ...     x: torch.Tensor
    ...     gradient: torch.Tensor
    ...     residual_norm: torch.Tensor
    >>> class Descent(InnerSolver):
    ...     def __init__(self, stepsize: float, **settings: Any) -> None:
    ...         super().__init__(**settings)
    ...         self.stepsize = stepsize
    ...     def start(self, problem: InnerProblem, x0: torch.Tensor) -> State:
    ...         gradient = problem.gradient(x0)
    ...         return State(x0, gradient, torch.linalg.vector_norm(gradient, dim=-1))
    ...     def step(self, problem: InnerProblem, state: State) -> State:
    ...         return self.start(problem, state.x - self.stepsize * state.gradient)
    >>> layer = idf.ArgminLayer(lambda x, t: ((x - t) ** 2).sum(), inner_solver=Descent(0.4))
    >>> layer(torch.zeros(2), torch.tensor([1.0, 2.0])).round(decimals=2)
    tensor([1., 2.])
    """

    def __init__(
        self,
        *,
        tol: float | None = None,
        max_iterations: int = 1000,
        on_failure: FailurePolicy = "warn",
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        if tol is not None:
            check_not_negative(tol=tol)
        self.tol, self.max_iterations, self.on_failure = tol, check_count(max_iterations), check_policy(on_failure)
        self.compile, self.check_every = compile, check_interval(check_every)

    uncompilable: str | None = None
    """Why torch.compile cannot serve the method, where that is known."""

    @abstractmethod
    def start(self, problem: InnerProblem, x0: Tensor) -> Any:
        """The state at x0."""

    @abstractmethod
    def step(self, problem: InnerProblem, state: Any) -> Any:
        """The state after one iteration."""

    def condition(self, objective: Callable[..., Tensor]) -> Condition:
        """The condition that the method's own iteration solves for an objective; an ``ArgminLayer`` asks for it."""
        return Stationary(objective)

    def leave(self, problem: InnerProblem, state: Any) -> None:
        """Leave with the problem what the method has learned that may serve the backward pass."""
        return

    def solve(self, problem: InnerProblem, x0: Tensor) -> tuple[Tensor, SolveInfo]:
        """The solution from x0 and its report, without acting on a failure."""
        compiled = compiled_steps(self) if self.compile else None
        if compiled is None:
            ended = self.run(problem, x0, lambda state: self.step(problem, state))
        else:
            ended = self._run_compiled(compiled, problem, x0)
        self.leave(problem, ended.state)
        status, x = ended.status, ended.state.x
        norm = ended.state.residual_norm.detach()
        return x, SolveInfo(ended.iterations, norm, status == Status.CONVERGED, status, 0, type(self).__name__)

    def run(self, problem: InnerProblem, x0: Tensor, step: Callable[[Any], Any]) -> Any:
        """The loop from x0 with a given form of the step."""
        state = self.start(problem, x0)
        threshold = self._threshold(state.residual_norm.detach())
        return iterate(step, state, threshold, self.max_iterations, self.check_every or every(x0.device))

    def _run_compiled(self, compiled: CompiledSteps, problem: InnerProblem, x0: Tensor) -> Ended:
        state = self.start(problem, x0)
        threshold = self._threshold(state.residual_norm)
        limit = torch.full_like(threshold, self.max_iterations, dtype=torch.int64)

        def steps(state: Any, iterations: Tensor, active: Tensor, left: int) -> Marched:
            return compiled(self, problem, state, iterations, active, threshold, limit)[0]

        return march(steps, state, threshold, self.max_iterations, STEPS)

    def cut(self, problem: InnerProblem, state: Any) -> Any:
        """The state as a constant, but for what it holds of the problem at x: where a truncated unrolling begins."""
        constant = pytree.tree_map_only(Tensor, Tensor.detach, state)
        return _renewed(constant, self.start(problem, constant.x))

    def __call__(self, problem: InnerProblem, x0: Tensor) -> Tensor:
        return self.solve(problem, x0)[0]

    def _threshold(self, initial: Tensor) -> Tensor:
        if self.tol is not None:
            return torch.full_like(initial, self.tol)
        return torch.finfo(initial.dtype).eps ** 0.5 * initial.clamp(min=1.0).nan_to_num(1.0)

    def __repr__(self) -> str:
        return call_of(type(self).__name__, vars(self))


def _renewed(state: Any, fresh: Any) -> Any:
    """The state with the values of the problem at x taken from a fresh one."""
    fields = {}
    for name in state._fields:
        old, new = getattr(state, name), getattr(fresh, name)
        fields[name] = new if name in AT_X else _renewed(old, new) if hasattr(old, "_fields") else old
    return state._replace(**fields)


class CallableInnerSolver:
    """Any callable ``(problem, x0) -> x``: the residual at what it returns is reported.

    It has a tolerance of its own that is not known here, so that no failure is acted on unless x is not finite. Where x
    is differentiated and is no solution, that is reported.
    """

    on_failure: FailurePolicy = "warn"

    def __init__(self, function: Callable[[InnerProblem, Tensor], Tensor]) -> None:
        self.function = function

    def condition(self, objective: Callable[..., Tensor]) -> Condition:
        return Stationary(objective)

    def solve(self, problem: InnerProblem, x0: Tensor) -> tuple[Tensor, SolveInfo]:
        name = name_of(self.function)
        x = self.function(problem, x0)
        if not isinstance(x, Tensor) or x.shape != x0.shape:
            given = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ImplicitDiffError(
                f"the inner solver {name} returned {given}, but it must return a tensor of the shape of x0, "
                f"{tuple(x0.shape)}."
            )
        x = x.detach().to(x0)
        return x, reported_at(problem, x, name)

    def __repr__(self) -> str:
        return name_of(self.function)


InnerSolverLike = InnerSolver | Callable[[InnerProblem, Tensor], Tensor]
"""What may be passed as ``inner_solver``."""


def reported_at(problem: InnerProblem, x: Tensor, name: str) -> SolveInfo:
    """The report of a solution that somebody else found: ‖F(x)‖₂, and whether it is finite."""
    norm = vector_norm(problem.residual(x)).detach()
    finite = norm.isfinite()
    zero = torch.zeros_like(norm, dtype=torch.int64)
    status = torch.where(finite, int(Status.CONVERGED), int(Status.NON_FINITE))
    return SolveInfo(zero, norm, finite, status, 0, name, judged=False)


def as_inner_solver(solver: InnerSolverLike | None, default: Callable[[], InnerSolver]) -> Any:
    """What the user passed as ``inner_solver``, as an object with ``solve`` and ``on_failure``."""
    if solver is None:
        return default()
    if isinstance(solver, InnerSolver):
        return solver
    if isinstance(solver, type | LinearSolver) or not callable(solver):
        kind = solver if isinstance(solver, type) else type(solver)
        is_linear = issubclass(kind, LinearSolver)
        meant = f"linear_solver={kind.__name__}()" if is_linear else f"{kind.__name__}()"
        hint = f" (did you mean {meant}?)" if kind is solver or is_linear else ""
        raise TypeError(
            f"inner_solver is {solver!r}, but it must be an InnerSolver such as LBFGS(), or a callable "
            f"(problem, x0) -> x{hint}."
        )
    return CallableInnerSolver(solver)


__all__ = ["InnerProblem", "InnerSolver"]
