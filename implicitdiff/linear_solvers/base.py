"""What a linear solver is: settings, scaling, the loop, honest reports, and derivatives when it is called directly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd import solution_of
from .._captures import Capture, Substituted, dual_level_is_open, find_captures, is_transformed, transform_level
from .._iteration import iterate
from .._linear_problem import LinearProblem
from ..errors import ImplicitDiffError
from ..info import FailurePolicy, LinearSolution, SolveInfo, Status
from ..operators import FunctionOperator, LinearOperator

Preconditioner = Callable[[LinearOperator], Callable[[Tensor], Tensor]]
"""From the operator A to v ↦ M⁻¹ v, M ≈ A. It is given the operator that is solved with, so Aᵀ in a backward pass."""


def check_policy(on_failure: FailurePolicy) -> FailurePolicy:
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f'on_failure is {on_failure!r}, but it must be "warn", "raise" or "ignore".')
    return on_failure


def check_max_iterations(max_iterations: int | None) -> int | None:
    if max_iterations is not None and (int(max_iterations) != max_iterations or max_iterations < 1):
        raise ValueError(f"max_iterations is {max_iterations!r}, but it must be a whole number of at least 1, or None.")
    return max_iterations


def check_not_negative(**settings: float) -> None:
    for name, value in settings.items():
        if not value >= 0:
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

    Settings common to all:

    * ``rtol``, ``atol``: converged means ‖b − A u‖₂ ≤ max(rtol·‖b‖₂, atol), on the true residual of each system;
    * ``on_failure``: "warn" (default), "raise" or "ignore" when a system was not solved.
    """

    def __init__(self, *, rtol: float = 1e-6, atol: float = 0.0, on_failure: FailurePolicy = "warn") -> None:
        check_not_negative(rtol=rtol, atol=atol)
        self.rtol, self.atol, self.on_failure = rtol, atol, check_policy(on_failure)

    @property
    def name(self) -> str:
        """What reports call it."""
        return type(self).__name__

    @abstractmethod
    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        """The solution and its report, on plain tensors, without derivatives and without acting on a failure."""

    def __call__(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        """Solve A u = b, b of shape (*batch, n), from x0 (zeros by default).

        Raises ValueError where shapes or dtypes of A and b do not fit, and :class:`ConvergenceError` under
        ``on_failure="raise"``.
        """
        _check_system(A, b, x0)
        family = _OperatorWithCaptures(A)
        captured = family.find(b)
        kept = _Kept()
        problem = LinearProblem(family, False, _Keeping(self, kept), "linear")
        followed = transform_level() or dual_level_is_open()
        x0 = None if x0 is None else x0.detach()
        if followed or (torch.is_grad_enabled() and any(t.requires_grad for t in (b, *captured))):
            value = solution_of(problem, x0, b, *captured)
        else:
            with torch.no_grad():
                value = problem.solve(x0, b, *captured)
        assert kept.info is not None
        return LinearSolution(value, kept.info)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{self.name}({settings})"

    def _info(self, system: System, b: Tensor, x: Tensor, iterations: Tensor, status: Tensor) -> SolveInfo:
        """The report at x, from the true residual; one that does not hold what was claimed says so."""
        norm = scaled_norm(b)
        residual = b - system(x)
        relative = scaled_norm(residual / torch.where(norm > 0, norm, 1).unsqueeze(-1))
        converged = relative <= self._threshold(norm)
        status = torch.where(converged, int(Status.CONVERGED), status)
        status = torch.where(~converged & (status == Status.CONVERGED), int(Status.STAGNATED), status)
        status = torch.where(relative.isfinite(), status, int(Status.NON_FINITE))
        return SolveInfo(iterations, relative, converged, status, system.matvecs, self.name)

    def _threshold(self, norm: Tensor) -> Tensor:
        """The asked residual, relative to ‖b‖."""
        return torch.clamp(self.atol / torch.where(norm > 0, norm, 1), min=self.rtol)


class System(LinearOperator):
    """The operator that a solver works with: it counts the products and carries the preconditioner."""

    def __init__(self, A: LinearOperator, b: Tensor, precondition: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(
            A.shape[0], structure=A.structure, batch_shape=A.batch_shape, dtype=A.dtype or b.dtype, device=b.device
        )
        self.A, self.matvecs = A, 0
        self.precondition = precondition or (lambda v: v)
        """v ↦ M⁻¹ v; the identity without a preconditioner."""

    def matvec(self, v: Tensor) -> Tensor:
        self.matvecs += 1
        return self.A.matvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        self.matvecs += 1
        return self.A.rmatvec(v)

    def to_dense(self) -> Tensor:
        self.matvecs += self.shape[0]
        return self.A.to_dense() if self.A.dtype is not None else super().to_dense()

    def diagonal(self) -> Tensor:
        return self.A.diagonal() if self.A.dtype is not None else super().diagonal()


class IterativeLinearSolver(LinearSolver):
    """The base of iterative solvers: a subclass writes ``start`` and ``step``, everything else is brought.

    The loop, stopping and freezing per system, scaling of b to unit norm, warm start, the check of the true residual
    before success is claimed (with a restart where a recursive residual had drifted), reports, the failure policy,
    batches and every transform. Further settings:

    * ``max_iterations``: per system; None means 10·n, at least 100;
    * ``preconditioner``: ``A -> (v -> M⁻¹ v)``; in ``start`` and ``step`` it is ``A.precondition(v)``;
    * ``warm_start``: start from the last solution of the same shape and dtype.

    A state is a NamedTuple with at least ``x`` (*batch, n) and ``residual_norm`` (*batch,), the estimated ‖b − A x‖₂:

    >>> from typing import NamedTuple
    >>> class State(NamedTuple):
    ...     x: torch.Tensor
    ...     residual: torch.Tensor
    ...     residual_norm: torch.Tensor
    >>> class Richardson(IterativeLinearSolver):
    ...     def start(self, A, b, x0):
    ...         x, r = initial(A, b, x0)
    ...         return State(x, r, torch.linalg.vector_norm(r, dim=-1))
    ...     def step(self, A, state):
    ...         x = state.x + 0.3 * state.residual
    ...         r = state.residual - 0.3 * A(state.residual)
    ...         return State(x, r, torch.linalg.vector_norm(r, dim=-1))
    >>> from implicitdiff.operators import DenseOperator
    >>> b = torch.tensor([1.0, 2.0])
    >>> Richardson()(DenseOperator(2 * torch.eye(2), structure="positive_definite"), b).value
    tensor([0.5000, 1.0000])
    """

    def __init__(
        self,
        *,
        rtol: float = 1e-6,
        atol: float = 0.0,
        max_iterations: int | None = None,
        preconditioner: Preconditioner | None = None,
        warm_start: bool = False,
        on_failure: FailurePolicy = "warn",
    ) -> None:
        super().__init__(rtol=rtol, atol=atol, on_failure=on_failure)
        if preconditioner is not None and not callable(preconditioner):
            raise TypeError(
                f"preconditioner is {preconditioner!r}, but it must be a callable that takes the operator A and "
                f"returns a callable v -> M⁻¹ v."
            )
        self.max_iterations = check_max_iterations(max_iterations)
        self.preconditioner = preconditioner
        self.warm_start = warm_start
        self._last: Tensor | None = None

    @abstractmethod
    def start(self, A: System, b: Tensor, x0: Tensor | None) -> Any:
        """The state at x0 (None: at zero), with b scaled to unit norm; b and x0 have the shape (*batch, n)."""

    @abstractmethod
    def step(self, A: System, state: Any) -> Any:
        """The state after one iteration."""

    def finish(self, A: System, state: Any) -> Tensor:
        """The iterate of a state, for methods that assemble it only at the end."""
        return state.x

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        system = System(A, b)
        if self.preconditioner is not None:
            system.precondition = self.preconditioner(system)
        norm = scaled_norm(b)
        # Unit norm inside, so that a cotangent of 1e-30 is solved as well as one of 1.
        scale = torch.where((norm > 0) & norm.isfinite(), norm, 1).unsqueeze(-1)
        unit, threshold = b / scale, self._threshold(norm)
        x0 = x0 / scale if x0 is not None else self._last_start(b)
        if x0 is not None:  # b = 0 is solved exactly, by 0, whatever the start
            x0 = torch.where((norm > 0).unsqueeze(-1), x0, 0)
        x, iterations, status, residual = self._run(system, unit, x0, threshold)
        value = x * scale
        overflown = ~value.isfinite().all(-1)
        converged = (residual <= threshold) & ~overflown
        status = torch.where(converged, int(Status.CONVERGED), status)
        status = torch.where(overflown, int(Status.NON_FINITE), status)
        if self.warm_start:
            # For b of unit norm: a start of the right size, whatever the next b's. Zero where it would be no help.
            self._last = torch.where((residual < 1).unsqueeze(-1), x, 0)
        info = SolveInfo(iterations, residual, converged, status, system.matvecs, self.name)
        return LinearSolution(value, info)

    def _last_start(self, b: Tensor) -> Tensor | None:
        last = self._last
        fits = last is not None and last.shape == b.shape and last.dtype == b.dtype and last.device == b.device
        return last if fits else None

    def _run(self, A: System, b: Tensor, x: Tensor | None, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Iterate until the *true* residual is small, restarting where the recursive one had drifted from it."""
        budget = self.max_iterations or max(100, 10 * b.shape[-1])
        ended = iterate(lambda state: self.step(A, state), self.start(A, b, x), threshold, budget)
        x, done, status, best = self.finish(A, ended.state), ended.iterations, ended.status, None
        while True:
            # Only a claim of success is worth a product; a failure is reported by the recursive residual.
            claims = bool((status == Status.CONVERGED).any())
            residual = vector_norm(b - A(x)) if claims else ended.state.residual_norm
            claimed = (status == Status.CONVERGED) & ~(residual <= threshold)
            if best is not None:
                # A restart that does not halve the residual will not do better: rounding rules.
                stalled = claimed & ~(residual <= 0.5 * best)
                status = torch.where(stalled, int(Status.STAGNATED), status)
                claimed = claimed & ~stalled
            status = torch.where(residual.isfinite(), status, int(Status.NON_FINITE))
            claimed = claimed & residual.isfinite()
            if not bool(claimed.any()):
                return x, done, status, residual
            left = budget - int(done[claimed].max())
            if left <= 0:
                status = torch.where(claimed, int(Status.MAX_ITERATIONS), status)
                return x, done, status, residual
            best = residual
            # The other systems have ended, well or badly, and stay as they are.
            limit = torch.where(claimed, threshold, torch.inf)
            ended = iterate(lambda state: self.step(A, state), self.start(A, b, x), limit, left)
            x = torch.where(claimed.unsqueeze(-1), self.finish(A, ended.state), x)
            done = done + torch.where(claimed, ended.iterations, 0)
            status = torch.where(claimed, ended.status, status)


class CallableLinearSolver(LinearSolver):
    """Any callable ``(A, b) -> x`` as a linear solver: its true residual is checked once and reported."""

    def __init__(self, function: Callable[[LinearOperator, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

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
        return LinearSolution(x, self._info(system, b, x.to(b.dtype), torch.zeros_like(status), status))


def as_linear_solver(solver: Any, default: type[LinearSolver]) -> LinearSolver:
    """What the user passed as ``linear_solver``, as a :class:`LinearSolver`."""
    if solver is None:
        return default()
    if isinstance(solver, LinearSolver):
        return solver
    if isinstance(solver, type) or not callable(solver):
        hint = f" (did you mean {solver.__name__}()?)" if isinstance(solver, type) else ""
        raise TypeError(
            f"linear_solver is {solver!r}, but it must be a LinearSolver such as CG(), or a callable (A, b) -> x{hint}."
        )
    return CallableLinearSolver(solver)


def initial(A: System, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first iterate and its residual; the start at zero needs no product."""
    return (torch.zeros_like(b), b) if x0 is None else (x0, b - A(x0))


def scaled_norm(v: Tensor) -> Tensor:
    """The norm where squares may under- or overflow: 1e-30 in float32."""
    if v.shape[-1] == 0:
        return vector_norm(v)
    largest = v.abs().amax(-1)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    return scale * vector_norm(v / scale.unsqueeze(-1))


def vector_norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1)


def dot(u: Tensor, v: Tensor) -> Tensor:
    """⟨u, v⟩ over the last dimension, conjugating u."""
    return torch.linalg.vecdot(u, v)


def inner(u: Tensor, v: Tensor) -> Tensor:
    """⟨u, v⟩ over the last dimension, conjugating u, with that dimension kept."""
    return torch.linalg.vecdot(u, v).unsqueeze(-1)


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
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(f"x0 has the shape {tuple(x0.shape)}, but it must have the shape of b, {tuple(b.shape)}.")


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


class _OperatorWithCaptures:
    """A user's operator as a family: its parameters are the tensors that it holds."""

    def __init__(self, A: LinearOperator, captures: Sequence[Capture] = (), levels: tuple[Any, ...] = ()) -> None:
        self.A, self.captures, self.levels = A, tuple(captures), levels

    def find(self, b: Tensor) -> list[Tensor]:
        if not (transform_level() or dual_level_is_open() or torch.is_grad_enabled()):
            return []
        found, captures = find_captures(self.A.matvec, torch.zeros_like(b), [], [self.A])
        self.captures = tuple(captures)
        return found

    def product(self, v: Tensor, *parameters: Tensor, transposed: bool) -> Tensor:
        return self._call(self.A.rmatvec if transposed else self.A.matvec)(v, *parameters)

    def operator(self, *parameters: Tensor) -> LinearOperator:
        plain = not any(c.is_dual or any(map(is_transformed, c.current())) for c in self.captures)
        if plain and not self.levels:
            return self.A
        A = self.A
        return FunctionOperator(
            lambda v: self.product(v, *parameters, transposed=False),
            A.shape[0],
            rmatvec=lambda v: self.product(v, *parameters, transposed=True),
            structure=A.structure,
            batch_shape=(*(size for size, _ in self.levels), *A.batch_shape),
            dtype=A.dtype,
            device=A.device,
        )

    def batched(self, size: int, dims: Sequence[int | None], parameters: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        levels = ((size, tuple(dims)), *self.levels)
        return _OperatorWithCaptures(self.A, self.captures, levels), list(parameters)

    def _call(self, product: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = Substituted(product, self.captures)
        for _, dims in reversed(self.levels):
            function = torch.func.vmap(function, in_dims=(0, *dims))
        return function
