"""Limited-memory BFGS, without and with bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._iteration import any_of
from .._limited_memory import LimitedMemory, Pair
from .._vectors import inner, vector_norm
from ..conditions import Condition, ProjectedGradient, Stationary, Tree
from ..errors import ImplicitDiffError
from ..info import FailurePolicy
from ..linear_solvers.base import check_count
from ._line_search import Iterate, Projection, advance_projected, first_iterate, unit_length
from ._strong_wolfe import advance_wolfe
from .base import DECIDES, InnerProblem, InnerSolver

CURVATURE = 0.9
LEAST_CURVATURE = 1e-10
"""The least cosine between a step and the change of the gradient along it that tells something of the Hessian."""


class LBFGSState(NamedTuple):
    x: Tensor
    residual_norm: Tensor
    status: Tensor
    here: Iterate
    memory: LimitedMemory


class LBFGS(InnerSolver):
    """L-BFGS (Nocedal and Wright 2006, Algorithm 7.4) with a line search for the strong Wolfe conditions.

    * ``history``: the number of pairs (step, change of the gradient) that it keeps, at least 1;
    * ``lower``, ``upper``: bounds of x, each a number for all of x or a tree like x; None: no bound. Where x starts
      outside it starts from the nearest point inside. Bounds that are tensors get gradients.

    With bounds it is the two-metric projection of Bertsekas (1982): the variables that a gradient step would put on
    their bounds make just that step, the others an L-BFGS step by what the pairs say of them alone (as Kim, Sra and
    Dhillon 2010), and backtracking follows the projected arc. Its condition is then
    :class:`~implicitdiff.conditions.ProjectedGradient`: converged means ‖x − P(x − ∇f)‖₂ ≤ tol, P the projection onto
    the bounds, and derivatives are those of the variables that are not on their bounds.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. It needs an
    objective. Raises ValueError, or :class:`~implicitdiff.ImplicitDiffError` when called, where a lower bound is above
    the upper one or a bound does not fit x.

    >>> import implicitdiff as idf
    >>> layer = idf.ArgminLayer(lambda x, t: (torch.cosh(x - t) + x**2).sum(), inner_solver=LBFGS(tol=1e-6))
    >>> bool(layer.solve(torch.zeros(3, dtype=torch.float64), 1.0).forward.converged)
    True
    >>> bounded = idf.ArgminLayer(lambda x, t: ((x - t) ** 2).sum(), inner_solver=LBFGS(lower=0.0))
    >>> bounded(torch.ones(2), torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    uncompilable = DECIDES

    def __init__(
        self,
        history: int = 10,
        *,
        lower: Any = None,
        upper: Any = None,
        tol: float | None = None,
        max_iterations: int = 500,
        on_failure: FailurePolicy = "warn",
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        super().__init__(
            tol=tol, max_iterations=max_iterations, on_failure=on_failure, compile=compile, check_every=check_every
        )
        if _is_number(lower) and _is_number(upper) and not lower <= upper:
            raise ValueError(f"lower is {lower!r} and upper {upper!r}, but lower must not be above upper.")
        self.history = check_count(history, "history")
        self.lower, self.upper = lower, upper

    def condition(self, objective: Callable[..., Tensor]) -> Condition:
        return ProjectedGradient(objective, self._projection) if self._is_bounded else Stationary(objective)

    def start(self, problem: InnerProblem, x0: Tensor) -> LBFGSState:
        if self._is_bounded:
            infinity = torch.full_like(x0, torch.inf)
            if any_of(problem.apply(self._above, -infinity) > problem.apply(self._below, infinity)):
                raise ImplicitDiffError(
                    f"LBFGS has bounds with a lower one above the upper one, lower={self.lower!r} and "
                    f"upper={self.upper!r}: no x satisfies both."
                )
            x0 = problem.apply(self._projection, x0).detach()  # a start is a constant
            here = first_iterate(problem, x0, lambda v: problem.apply(self._projection, v))
        else:
            here = first_iterate(problem, x0)
        return self._state(here, LimitedMemory((None,) * self.history, unit_length(here.gradient)))

    def step(self, problem: InnerProblem, state: LBFGSState) -> LBFGSState:
        here, memory = state.here, state.memory
        if self._is_bounded:
            there = self._advance_bounded(problem, here, memory)
        else:
            direction = -memory.apply(here.gradient)
            there = advance_wolfe(problem, here, direction, torch.ones_like(here.step), CURVATURE)
        pair = _pair(there.x - here.x, there.gradient - here.gradient)
        pairs, scale = (*memory.pairs[1:], pair), _scale(pair, memory.scale)
        # Where no step was found, the pairs are to blame if there are any: the next step goes without.
        failed = there.step == 0
        if any_of(failed):
            status = torch.where(failed & _is_used(memory), here.progress.status, there.progress.status)
            there = there._replace(progress=there.progress._replace(status=status))
            column = failed.unsqueeze(-1)
            pairs = tuple(p and p._replace(weight=torch.where(column, 0, p.weight)) for p in pairs)
            scale = torch.where(column, unit_length(here.gradient), scale)
        return self._state(there, LimitedMemory(pairs, scale))

    def _advance_bounded(self, problem: InnerProblem, here: Iterate, memory: LimitedMemory) -> Iterate:
        project: Projection = lambda v: problem.apply(self._projection, v)  # noqa: E731
        steepest = -memory.scale * here.gradient
        ahead = (here.x + steepest).detach()
        free = project(ahead).detach() == ahead
        gradient = torch.where(free, here.gradient, 0)
        direction = -_restricted(memory, free).apply(gradient)
        descends = (inner(direction, gradient) < 0) & free
        direction = torch.where(descends, direction, steepest)
        return advance_projected(problem, here, direction, free, torch.ones_like(here.step), project)

    def leave(self, problem: InnerProblem, state: LBFGSState) -> None:
        if not self._is_bounded:
            problem.leave_inverse(state.memory)

    @property
    def _is_bounded(self) -> bool:
        return self.lower is not None or self.upper is not None

    def _projection(self, v: Tree, *args: Any, **kwargs: Any) -> Tree:
        return self._below(self._above(v))

    def _above(self, v: Tree, *args: Any, **kwargs: Any) -> Tree:
        return v if self.lower is None else _map(lambda v, bound: v.clamp(min=bound), v, self.lower, "lower")

    def _below(self, v: Tree, *args: Any, **kwargs: Any) -> Tree:
        return v if self.upper is None else _map(lambda v, bound: v.clamp(max=bound), v, self.upper, "upper")

    @staticmethod
    def _state(here: Iterate, memory: LimitedMemory) -> LBFGSState:
        return LBFGSState(here.x, here.residual_norm, here.progress.status, here, memory)


def _pair(step: Tensor, change: Tensor) -> Pair:
    """The pair, skipped where it has no positive curvature."""
    curvature = inner(step, change)
    kept = curvature > LEAST_CURVATURE * (vector_norm(step) * vector_norm(change)).unsqueeze(-1)
    weight = 1 / torch.where(kept, curvature, 1)
    return Pair(step, change, torch.where(kept & weight.isfinite(), weight, 0))


def _scale(pair: Pair, otherwise: Tensor) -> Tensor:
    """The scale of the inverse Hessian that the last pair suggests (Nocedal and Wright 2006, Eq. 7.20)."""
    kept = pair.weight > 0
    return torch.where(kept, 1 / torch.where(kept, pair.weight * inner(pair.change, pair.change), 1), otherwise)


def _is_used(memory: LimitedMemory) -> Tensor:
    """Whether there is a pair that counts, system by system."""
    used = torch.zeros_like(memory.scale, dtype=torch.bool)
    for pair in memory.pairs:
        used = used if pair is None else used | (pair.weight > 0)
    return used.squeeze(-1)


def _restricted(memory: LimitedMemory, free: Tensor) -> LimitedMemory:
    """What the pairs say of the free variables alone."""
    pairs, scale = [], memory.scale
    for pair in memory.pairs:
        if pair is not None:
            part = _pair(torch.where(free, pair.step, 0), torch.where(free, pair.change, 0))
            pair = part._replace(weight=torch.where(pair.weight > 0, part.weight, 0))
            scale = _scale(pair, scale)
        pairs.append(pair)
    return LimitedMemory(tuple(pairs), scale)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _map(function: Callable[[Tensor, Any], Tensor], v: Tree, bound: Any, name: str) -> Tree:
    if _is_number(bound):
        return pytree.tree_map(lambda v: function(v, bound), v)
    leaves, spec = pytree.tree_flatten(v)
    bounds, of = pytree.tree_flatten(bound)
    if of != spec or any(not isinstance(b, Tensor) or b.shape != v.shape for v, b in zip(leaves, bounds, strict=True)):
        raise ImplicitDiffError(
            f"LBFGS has {name}={bound!r}, but a bound must be a number, or a tree of tensors of the shapes of x, which "
            f"here are {[tuple(v.shape) for v in leaves]}."
        )
    return pytree.tree_unflatten([function(v, b.to(v.dtype)) for v, b in zip(leaves, bounds, strict=True)], spec)
