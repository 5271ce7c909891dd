"""The base of iterative solvers: the loop, honest reports, scaling, warm start."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._compiled import STEPS, compiled_steps
from .._iteration import Ended, Marched, check_interval, every, iterate, march
from .._lanczos import Lanczos
from .._names import text_of
from .._timing import timed
from .._vectors import largest, scaled_norm, vector_norm
from ..errors import ImplicitDiffError
from ..info import FailurePolicy, LinearSolution, SolveInfo, Status
from ..operators import LinearOperator
from ..preconditioners import Preconditioner
from .base import LinearSolver, check_max_iterations
from .system import System

NEGLIGIBLE = 0.01
"""A residual that a method carries along is the true one where it has drifted by no more, in parts of the tolerance."""


class IterativeLinearSolver(LinearSolver):
    """The base of iterative solvers: a subclass writes ``start`` and ``step``, everything else is brought.

    The loop, stopping and freezing per system, scaling of b to unit norm, warm start, the check of the true residual
    before success is claimed (with a restart where a recursive residual had drifted), reports, the failure policy,
    batches and every transform. Shapes, ``rtol``, ``atol``, ``on_failure`` and errors are those of
    :class:`~implicitdiff.LinearSolver`; a ``preconditioner`` that is not callable raises TypeError. Further settings:

    * ``max_iterations``: per system; None means 10·n, at least 100;
    * ``preconditioner``: ``A -> (v -> M⁻¹ v)``; in ``start`` and ``step`` it is ``A.precondition(v)``;
    * ``warm_start``: start from the last solution of the same shape and dtype;
    * ``compile``: run the steps through torch.compile, four in a call. It takes seconds the first time and pays for
      problems so small that calling torch costs more than the work. Numbers and reports are the same to rounding. What
      torch.compile cannot follow goes on uncompiled, with one warning that says why;
    * ``check_every``: after so many steps the loop looks whether all systems have ended. None: after each on the CPU,
      after four on an accelerator, where a look waits for the steps under way.

    A state is a NamedTuple with at least ``x`` (*batch, n) and ``residual_norm`` (*batch,), the estimated ‖b − A x‖₂.
    A subclass with settings of its own passes all others on, and keeps its own as attributes, which ``repr`` shows:

    >>> from typing import Any, NamedTuple
    >>> from implicitdiff.linear_solvers import System
    >>> class State(NamedTuple):
    ...     x: torch.Tensor
    ...     residual: torch.Tensor
    ...     residual_norm: torch.Tensor
    >>> class Richardson(IterativeLinearSolver):
    ...     def __init__(self, stepsize: float, **settings: Any) -> None:
    ...         super().__init__(**settings)
    ...         self.stepsize = stepsize
    ...     def start(self, A: System, b: torch.Tensor, x0: torch.Tensor | None) -> State:
    ...         x = torch.zeros_like(b) if x0 is None else x0
    ...         r = b - A(x)
    ...         return State(x, r, torch.linalg.vector_norm(r, dim=-1))
    ...     def step(self, A: System, state: State) -> State:
    ...         x = state.x + self.stepsize * state.residual
    ...         r = state.residual - self.stepsize * A(state.residual)
    ...         return State(x, r, torch.linalg.vector_norm(r, dim=-1))
    >>> from implicitdiff.operators import DenseOperator
    >>> b = torch.tensor([1.0, 2.0])
    >>> solver = Richardson(0.3, rtol=1e-5)
    >>> solver
    Richardson(rtol=1e-05, atol=0.0, on_failure='warn', stepsize=0.3)
    >>> solver(DenseOperator(2 * torch.eye(2), structure="positive_definite"), b).value
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
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        super().__init__(rtol=rtol, atol=atol, on_failure=on_failure)
        is_class = isinstance(preconditioner, type)
        if preconditioner is not None and (is_class or not callable(preconditioner)):
            hint = f" (did you mean {preconditioner.__name__}()?)" if isinstance(preconditioner, type) else ""
            raise TypeError(
                f"preconditioner is {preconditioner!r}, but it must be a callable that takes the operator A and "
                f"returns a callable v -> M⁻¹ v{hint}."
            )
        self.max_iterations = check_max_iterations(max_iterations)
        self.preconditioner = preconditioner
        self.warm_start, self.compile, self.check_every = warm_start, compile, check_interval(check_every)
        self._last: Tensor | None = None

    uncompilable: str | None = None
    """Why torch.compile cannot serve the method, where that is known."""

    @property
    def solves_on_support(self) -> bool:
        return self.preconditioner is None  # which may know the size of A

    @abstractmethod
    def start(self, A: System, b: Tensor, x0: Tensor | None) -> Any:
        """The state at x0 (None: at zero), with b scaled to unit norm; b and x0 have the shape (*batch, n)."""

    @abstractmethod
    def step(self, A: System, state: Any) -> Any:
        """The state after one iteration."""

    def accepts(self, A: System, state: Any, r: Tensor, threshold: Tensor) -> Tensor:
        """Whether systems with the true residuals r, of shape (*batch, n), are solved; b has unit norm here."""
        return vector_norm(r) <= threshold

    def drift(self, A: System, b: Tensor, state: Any) -> float | None:
        """A bound of ‖(b − A x) − r‖, r the residual that the method carried along from x = 0; None: not known."""
        return None

    def lanczos(self, A: System, steps: Tensor) -> Lanczos | None:
        """What the method has noted of the spectrum of A in so many steps."""
        return None

    def preconditioned(self, A: LinearOperator) -> LinearOperator:
        """The operator that the preconditioner is made for."""
        return A

    def finish(self, A: System, state: Any) -> Tensor:
        """The iterate of a state, for methods that assemble it only at the end."""
        return state.x

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        system = self._system(A, b)
        norm = scaled_norm(b)
        # Unit norm inside, so that a cotangent of 1e-30 is solved as well as one of 1.
        scale = torch.where(norm > 0, norm, 1).unsqueeze(-1)
        unit, threshold = b / scale, self._threshold(norm)
        x0 = x0 / scale if x0 is not None else self._last_start(b, A.shape[1])
        if x0 is not None:  # b = 0 is solved exactly, by 0, whatever the start
            x0 = torch.where((norm > 0).unsqueeze(-1), x0, 0)
        x, iterations, status, residual, lanczos = self._run(system, unit, x0, threshold)
        value = x * scale
        converged = (status == Status.CONVERGED) | (residual <= threshold)
        overflown = ~largest(value).isfinite()
        if bool(overflown.any()):
            converged, status = converged & ~overflown, torch.where(overflown, int(Status.NON_FINITE), status)
        status = torch.where(converged, int(Status.CONVERGED), status)
        if self.warm_start:
            # For b of unit norm: a start of the right size, whatever the next b's. Zero where it would be no help.
            self._last = torch.where((residual < 1).unsqueeze(-1), x, 0)
        info = SolveInfo(
            iterations, residual, converged, status, system.matvecs, self.name, lanczos=lanczos, scale=norm
        )
        return LinearSolution(value, info)

    def _system(self, A: LinearOperator, b: Tensor) -> System:
        """The system as this solver works with it."""
        system = System(A, b)
        system.in_place = system.in_place and not self.compile and (self.check_every or every(system.device)) == 1
        if self.preconditioner is not None:
            timed_part = timed("preconditioner")
            apply = timed_part(self.preconditioner)(self.preconditioned(system))
            system.precondition = timed_part(self._checked(apply))
        return system

    def _checked(self, apply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The product with M⁻¹, which must leave the shape of v as it is."""
        if not callable(apply):
            raise ImplicitDiffError(
                f"the preconditioner {text_of(self.preconditioner)} returned {type(apply).__name__} for A, but it must "
                f"return a callable v -> M⁻¹ v."
            )

        def checked(v: Tensor) -> Tensor:
            out = apply(v)
            if not isinstance(out, Tensor) or out.shape != v.shape:
                given = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
                raise ImplicitDiffError(
                    f"the preconditioner {text_of(self.preconditioner)} made {given} of v of shape {tuple(v.shape)}, "
                    f"but M⁻¹ v must have the shape of v."
                )
            return out

        return checked

    def _started(self, A: System, b: Tensor, x0: Tensor | None) -> Any:
        """The first state, which must have what the loop reads."""
        state = self.start(A, b, x0)
        shapes = {"x": (*b.shape[:-1], A.shape[1]), "residual_norm": tuple(b.shape[:-1])}
        given: dict[str, Any] = {name: getattr(state, name, None) for name in shapes}
        fits = (isinstance(given[name], Tensor) and given[name].shape == shape for name, shape in shapes.items())
        if hasattr(state, "_replace") and all(fits):
            return state
        found = ", ".join(
            f"{name} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"no tensor {name}"
            for name, value in given.items()
        )
        raise ImplicitDiffError(
            f"{self.name}.start returned {type(state).__name__} with {found}, but it must return a NamedTuple with at "
            f"least x of shape (*batch, n) = {shapes['x']} and residual_norm of shape (*batch,) = "
            f"{shapes['residual_norm']}."
        )

    def _last_start(self, b: Tensor, n: int) -> Tensor | None:
        last = self._last
        shape = (*b.shape[:-1], n)
        fits = last is not None and last.shape == shape and last.dtype == b.dtype and last.device == b.device
        return last if fits else None

    def _iterate(self, A: System, state: Any, threshold: Tensor, budget: int) -> Ended:
        compiled = compiled_steps(self) if self.compile else None
        if compiled is None:
            interval = self.check_every or every(A.device)
            return iterate(lambda state: self.step(A, state), state, threshold, budget, interval)
        part, limit = A.traceable(), torch.full_like(threshold, budget, dtype=torch.int64)

        def steps(state: Any, iterations: Tensor, active: Tensor, left: int) -> Marched:
            marched, tallies = compiled(self, part, state, iterations, active, threshold, limit)
            A.add(tallies, int((marched[1] - iterations).max()), STEPS)
            return marched

        return march(steps, state, threshold, budget, STEPS)

    def _run(
        self, A: System, b: Tensor, x: Tensor | None, threshold: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Lanczos | None]:
        """Iterate until the *true* residual is small, restarting where the recursive one had drifted from it."""
        budget, from_zero = self.max_iterations or max(100, 10 * b.shape[-1]), x is None
        ended = self._iterate(A, self._started(A, b, x), threshold, budget)
        x, done, status, best = self.finish(A, ended.state), ended.iterations, ended.status, None
        lanczos = self.lanczos(A, done)
        if from_zero and b.ndim == 1 and int(status) == Status.CONVERGED:
            drift = self.drift(A, b, ended.state)
            if drift is not None and drift <= NEGLIGIBLE * float(threshold):
                return x, done, status, ended.state.residual_norm, lanczos
        while True:
            residual, claimed = ended.state.residual_norm, status == Status.CONVERGED
            # Only a claim of success is worth a product; a failure is reported by the recursive residual.
            if bool(claimed.any()):
                r = b - A(x)
                residual = vector_norm(r)
                claimed = claimed & ~self.accepts(A, ended.state, r, threshold)
            if best is not None:
                # A restart that does not halve the residual will not do better: rounding rules.
                stalled = claimed & ~(residual <= 0.5 * best)
                status = torch.where(stalled, int(Status.STAGNATED), status)
                claimed = claimed & ~stalled
            status = torch.where(residual.isfinite(), status, int(Status.NON_FINITE))
            claimed = claimed & residual.isfinite()
            if not bool(claimed.any()):
                return x, done, status, residual, lanczos
            left = budget - int(done[claimed].max())
            if left <= 0:
                status = torch.where(claimed, int(Status.MAX_ITERATIONS), status)
                return x, done, status, residual, lanczos
            best = residual
            # The other systems have ended, well or badly, and stay as they are.
            limit = torch.where(claimed, threshold, torch.inf)
            ended = self._iterate(A, self.start(A, b, x), limit, left)
            x = torch.where(claimed.unsqueeze(-1), self.finish(A, ended.state), x)
            done = done + torch.where(claimed, ended.iterations, 0)
            status = torch.where(claimed, ended.status, status)
