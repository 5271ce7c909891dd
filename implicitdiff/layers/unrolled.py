"""Differentiation through the steps of an inner solver: the baseline, and the way to check."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._captures import find_captures, plain_value
from .._equations import Equations
from .._iteration import any_of, select
from .._names import text_of
from .._problem import ConditionProblem, InnerProblem
from .._recomputation import Recomputation
from ..conditions import Tree
from ..errors import ImplicitDiffError
from ..info import Solution, SolveInfo, Status, report
from ..inner_solvers.base import InnerSolver


class UnrolledLayer(nn.Module):
    """``layer(init, *args)`` gives the same x as ``ArgminLayer(objective, inner_solver=...)``, by the same steps, but
    its derivative is that of the steps themselves, through torch's own graph.

    Shapes of init, args and x are those of :class:`~implicitdiff.ArgminLayer`.

    ``truncate=K`` differentiates through the last K steps of each system only: x is detached before them (Shaban et
    al. 2019). Memory grows with the number of steps that are differentiated: by all that the objective computes on its
    way, or with ``checkpoint=True`` by a few vectors like x, as backward evaluates the objective and its gradient again
    at each of them. That asks of the objective that it gives the same value then
    (:class:`~implicitdiff.ImplicitDiffError` otherwise: dropout), and it has no forward-mode derivative.

    Raises TypeError for an inner solver that is not an :class:`~implicitdiff.inner_solvers.InnerSolver`, ValueError for
    a ``truncate`` below 0, and :class:`~implicitdiff.ImplicitDiffError` for one that solves with the Hessian
    (``NewtonCG``, ``Newton``), whose products are not followed.

    >>> from implicitdiff.inner_solvers import GradientDescent
    >>> gd = GradientDescent(stepsize=0.25, max_iterations=3, tol=0.0, on_failure="ignore")
    >>> layer = UnrolledLayer(lambda x, t: ((x - t) ** 2).sum(), gd)
    >>> t = torch.tensor([1.0], requires_grad=True)
    >>> layer(torch.zeros(1), t).backward()
    >>> t.grad  # 1 − 0.5³: the exact minimum would give 1
    tensor([0.8750])
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        inner_solver: InnerSolver,
        truncate: int | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(inner_solver, InnerSolver):
            raise TypeError(
                f"inner_solver is {inner_solver!r}, but unrolling needs an InnerSolver whose steps can be followed, "
                f"such as GradientDescent(stepsize=0.1)."
            )
        if truncate is not None and (int(truncate) != truncate or truncate < 0):
            raise ValueError(
                f"truncate is {truncate!r}, but it must be a whole number of steps of at least 0, or None."
            )
        self.function, self.condition = objective, inner_solver.condition(objective)
        self.inner_solver, self.truncate, self.checkpoint = inner_solver, truncate, checkpoint

    def forward(self, init: Tree, *args: Any, **kwargs: Any) -> Tree:
        """The solution, a tree like ``init``."""
        return self.solve(init, *args, **kwargs).value

    def solve(self, init: Tree, *args: Any, **kwargs: Any) -> Solution:
        """The solution with the report of the inner solve; there is no linear solve, so no ``.backward``."""
        equations = Equations.of(self.condition, init, args, kwargs)
        vectorizer = equations.vectorizer
        solution = Solution(None, None)  # type: ignore[arg-type]  # filled in below
        problem = ConditionProblem(equations, self.inner_solver, None, weakref.ref(solution))
        differentiable = torch.is_grad_enabled() and self.truncate != 0
        x0 = vectorizer.ravel(init, "init").detach()
        if differentiable and self.checkpoint:
            inner: InnerProblem = _RecomputedProblem.at(problem, x0)
        else:
            inner = InnerProblem(problem, equations.arguments.tensors, differentiable=differentiable)
        ended = self.inner_solver.run(inner, x0, self._step(inner, x0))
        if isinstance(inner, _RecomputedProblem):
            inner.check_captures(ended.state.x.detach())
        norm, status = plain_value(ended.state.residual_norm), plain_value(ended.status)
        iterations, name = plain_value(ended.iterations), type(self.inner_solver).__name__
        solution.forward = SolveInfo(iterations, norm, status == Status.CONVERGED, status, 0, name)
        report("forward", solution.forward, self.inner_solver.on_failure)
        solution.value = vectorizer.unravel(ended.state.x if differentiable else ended.state.x.detach())
        return solution

    def extra_repr(self) -> str:
        settings = f"inner_solver={self.inner_solver!r}, truncate={self.truncate}, checkpoint={self.checkpoint}"
        # A module is a line of its own.
        return settings if isinstance(self.function, nn.Module) else f"{text_of(self.function)}, {settings}"

    def _step(self, problem: InnerProblem, x0: Tensor) -> Callable[[Any], Any]:
        """The solver's step, with the state detached where the last ``truncate`` steps of a system begin."""
        if self.truncate is None:
            return lambda state: self.inner_solver.step(problem, state)
        first = self._iterations(problem, x0) - self.truncate
        count = 0

        def step(state: Any) -> Any:
            nonlocal count
            if any_of(count < first):
                state = select(count < first, pytree.tree_map_only(Tensor, Tensor.detach, state), state)
            if any_of(first == count):  # system by system
                state = select(first == count, self.inner_solver.cut(problem, state), state)
            count += 1
            return self.inner_solver.step(problem, state)

        return step

    def _iterations(self, problem: InnerProblem, x0: Tensor) -> Tensor:
        """How many steps each system will take."""
        if self.inner_solver.tol == 0.0:
            return torch.tensor(self.inner_solver.max_iterations)
        with torch.no_grad():
            plain = InnerProblem(problem.problem, problem.inputs)
            return self.inner_solver.run(plain, x0, lambda s: self.inner_solver.step(plain, s)).iterations


class _RecomputedProblem(InnerProblem):
    """The problem with an objective and a gradient that keep no more of their evaluation than x."""

    @classmethod
    def at(cls, problem: ConditionProblem, x0: Tensor) -> _RecomputedProblem:
        """The problem, the tensors that its function captures at x0 among its inputs, as these alone are followed."""
        equations = problem.equations
        found, captures = find_captures(equations.primitive, x0, equations.arguments.tensors, [equations.condition])
        problem = replace(problem, captures=tuple(captures))
        inputs = (*equations.arguments.tensors, *found)
        return cls(problem, inputs, differentiable=True, substituted=bool(captures))

    def objective(self, x: Tensor) -> Tensor:
        self._need_objective("objective")
        return Recomputation.apply(lambda *at: (self._objective(*at),), x, *self.inputs)[0]

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._need_objective("gradient")
        gradient, value = Recomputation.apply(torch.func.grad_and_value(self._objective), x, *self.inputs)
        return value, gradient

    def residual(self, x: Tensor) -> Tensor:
        if self._is_stationarity:
            return self.gradient(x)
        return Recomputation.apply(lambda *at: (self._function(*at),), x, *self.inputs)[0]

    def check_captures(self, x: Tensor) -> None:
        """Raise where the function has met further tensors at the end of the steps, whose gradients would be lost."""
        equations = self.problem.equations
        found, _ = find_captures(equations.primitive, x, equations.arguments.tensors, [equations.condition])
        if not {id(t) for t in found} <= {id(t) for t in self.inputs}:
            raise ImplicitDiffError(
                "the objective uses other tensors at the end of the steps than at their start (it takes another "
                "branch), which checkpoint=True cannot follow: pass all tensors as arguments of the layer."
            )
