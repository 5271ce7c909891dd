"""Block coordinate descent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import conditions
from .._iteration import any_of
from .._vectors import dot, vector_norm
from ..conditions import Condition, Tree
from ..info import RUNNING, FailurePolicy
from ._step_search import (
    Found,
    Progress,
    first_progress,
    is_hidden,
    progress_after,
    rounding_scale,
    unit_step,
    within_curvature,
)
from .base import DECIDES, InnerProblem, InnerSolver


class BlockCoordinateDescentState(NamedTuple):
    x: Tensor
    value: Tensor
    gradient: Tensor
    residual: Tensor
    residual_norm: Tensor
    status: Tensor
    steps: Tensor  # (*batch, blocks), the first that is tried for each block
    progress: Progress


class BlockCoordinateDescent(InnerSolver):
    """Cyclic block proximal gradient for objective(x) + Σ gᵢ(xᵢ), x a container of blocks.

    See Beck and Tetruashvili 2013, and Tseng and Yun 2009 with several proxes.

    * ``proxes``: a container like x with a prox(v, stepsize, *args) for each block; a block may be a tree;
    * ``stepsizes``: a container like that of fixed steps, at most 1/Lᵢ where Lᵢ is the Lipschitz constant of ∇ᵢf in
      block i. None: by backtracking, each block and system its own, from a step that the last change of the gradient
      suggests.

    Its condition is :class:`implicitdiff.conditions.BlockProximalGradient` with these steps (1 for None).

    An iteration is a sweep over the blocks. It evaluates the objective and its gradient once for each block that moves,
    as autograd has no cheaper partial derivative; a block that a step from where the sweep begins would leave where it
    is, like a group of zeros that stay so, is passed over. It pays for few blocks, blocks of different scales and
    sparse solutions; for many blocks that all move, :class:`ProximalGradient` with one prox of all of x needs
    one gradient where a sweep needs as many as there are blocks.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. It needs an
    objective. Raises ValueError where ``proxes``, ``stepsizes`` and x do not fit each other.

    >>> import implicitdiff as idf
    >>> def shrink(v, stepsize, y):
    ...     return v.sign() * (v.abs() - stepsize).relu()
    >>> solver = BlockCoordinateDescent({"a": shrink, "b": lambda v, stepsize, y: v.clamp(min=0)})
    >>> layer = idf.ArgminLayer(lambda x, y: 0.5 * ((x["a"] + x["b"] - y) ** 2).sum() + 0.5 * (x["b"] ** 2).sum(),
    ...                         inner_solver=solver)
    >>> x = layer({"a": torch.zeros(2), "b": torch.zeros(2)}, torch.tensor([4.0, -3.0]))
    >>> [x[name].round(decimals=2).tolist() for name in "ab"]
    [[2.0, -2.0], [1.0, 0.0]]
    """

    uncompilable = DECIDES

    def __init__(
        self,
        proxes: Tree,
        stepsizes: Tree | None = None,
        *,
        tol: float | None = None,
        max_iterations: int = 2000,
        on_failure: FailurePolicy = "warn",
        compile: bool = False,
        check_every: int | None = None,
    ) -> None:
        super().__init__(
            tol=tol, max_iterations=max_iterations, on_failure=on_failure, compile=compile, check_every=check_every
        )
        self.proxes, self.stepsizes = proxes, stepsizes
        self._proxes, self._spec = pytree.tree_flatten(proxes)
        self.condition(torch.sum)  # raises where they do not fit
        self._lengths = pytree.tree_leaves(self._stepsizes_of_condition)

    def condition(self, objective: Callable[..., Tensor]) -> Condition:
        return conditions.BlockProximalGradient(objective, self.proxes, self._stepsizes_of_condition)

    @property
    def _stepsizes_of_condition(self) -> Tree:
        return pytree.tree_map(lambda prox: 1.0, self.proxes) if self.stepsizes is None else self.stepsizes

    def start(self, problem: InnerProblem, x0: Tensor) -> BlockCoordinateDescentState:
        value, gradient = problem.value_and_gradient(x0)
        residual = self._residual(problem, x0, gradient)
        norm = vector_norm(residual)
        progress = first_progress(norm)
        numbers = self._numbers(problem, x0)
        lengths = [
            unit_step(torch.where(numbers == i, gradient, 0))
            if self.stepsizes is None
            else torch.full_like(progress.norm, length)
            for i, length in enumerate(self._lengths)
        ]
        steps = torch.stack(lengths, -1) if lengths else x0[..., :0].detach()
        return BlockCoordinateDescentState(x0, value, gradient, residual, norm, progress.status, steps, progress)

    def step(self, problem: InnerProblem, state: BlockCoordinateDescentState) -> BlockCoordinateDescentState:
        x, value, gradient = state.x, state.value, state.gradient
        steps = list(state.steps.unbind(-1))
        numbers = self._numbers(problem, x)
        hidden, ok = torch.ones_like(state.status, dtype=torch.bool), torch.zeros_like(state.status, dtype=torch.bool)
        for i in range(len(self._proxes)):
            block = numbers == i
            moves = ((state.residual.detach() != 0) & block).any(-1)
            if not any_of(moves):
                continue
            found = self._search(problem, i, block, x, value, gradient, steps[i], (state.status != RUNNING) | ~moves)
            new, new_value, new_gradient = found.point, found.value, found.gradient
            if new_value is None or new_gradient is None or torch.is_grad_enabled():  # a search's finds have no graph
                new = self._move(problem, i, block, x, gradient, found.step)
                new_value, new_gradient = problem.value_and_gradient(new)
            moves = moves & found.ok
            column = moves.unsqueeze(-1)
            if self.stepsizes is None:
                change = torch.where(block, (new_gradient - gradient).detach(), 0)
                length = _suggested(found.step, (new - x).detach(), change)
                steps[i] = torch.where(moves & ~found.hidden, length, steps[i])
            x, value = torch.where(column, new, x), torch.where(moves, new_value, value)
            gradient = torch.where(column, new_gradient, gradient)
            hidden, ok = hidden & (found.hidden | ~moves), ok | moves
        residual = self._residual(problem, x, gradient)
        norm = vector_norm(residual)
        progress = progress_after(state.progress, norm, hidden, ok)
        return BlockCoordinateDescentState(
            x, value, gradient, residual, norm, progress.status, torch.stack(steps, -1), progress
        )

    def _search(
        self,
        problem: InnerProblem,
        i: int,
        block: Tensor,
        x: Tensor,
        value: Tensor,
        gradient: Tensor,
        step: Tensor,
        settled: Tensor,
    ) -> Found:
        x, value, gradient = x.detach(), value.detach(), gradient.detach()

        def path(step: Tensor) -> Tensor:
            return self._move(problem, i, block, x, gradient, step)

        if self.stepsizes is None:
            return within_curvature(problem, x, value, gradient, step, path, settled, with_gradient=True)
        with torch.no_grad():
            point = path(step)
        d = point - x
        hidden = is_hidden(dot(d, d) / step, rounding_scale(x, value, gradient))
        return Found(step, point, None, None, None, hidden, torch.ones_like(hidden))

    def _move(self, problem: InnerProblem, i: int, block: Tensor, x: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
        """The step of block i."""

        def prox(v: Tree, step: Tensor, *args: Any, **kwargs: Any) -> Tree:
            blocks = self._spec.flatten_up_to(v)
            blocks[i] = self._proxes[i](blocks[i], step, *args, **kwargs)
            return pytree.tree_unflatten(blocks, self._spec)

        return problem.apply(prox, torch.where(block, x - step.unsqueeze(-1) * gradient, x), step)

    def _residual(self, problem: InnerProblem, x: Tensor, gradient: Tensor) -> Tensor:
        """F(x), by the gradient there."""

        def prox(v: Tree, *args: Any, **kwargs: Any) -> Tree:
            parts = zip(self._spec.flatten_up_to(v), self._proxes, self._lengths, strict=True)
            return pytree.tree_unflatten([p(block, step, *args, **kwargs) for block, p, step in parts], self._spec)

        steps = problem.apply(self._spread, x)
        return x - problem.apply(prox, x - steps * gradient)

    def _spread(self, x: Tree, *args: Any, **kwargs: Any) -> Tree:
        """The step lengths of the condition, a tree like x."""
        return self._filled(x, self._lengths)

    def _numbers(self, problem: InnerProblem, x: Tensor) -> Tensor:
        """The number of the block that each entry of x belongs to."""
        numbers = [float(i) for i in range(len(self._proxes))]
        return problem.apply(lambda x, *args, **kwargs: self._filled(x, numbers), x.detach())

    def _filled(self, x: Tree, numbers: list[float]) -> Tree:
        """A tree like x with one number in each block."""
        try:
            blocks = self._spec.flatten_up_to(x)
        except (ValueError, TypeError) as error:
            raise ValueError(f"x must be a container of blocks like the proxes, {self._spec}: {error}") from error
        filled = [
            pytree.tree_map(lambda leaf, number=number: torch.full_like(leaf, number), block)
            for block, number in zip(blocks, numbers, strict=True)
        ]
        return pytree.tree_unflatten(filled, self._spec)


def _suggested(before: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """⟨s, Δ∇f⟩/‖Δ∇f‖², the shorter step length of Barzilai and Borwein; twice the last one along negative curvature."""
    curvature, square = dot(step, change), dot(change, change)
    length = torch.where(curvature > 0, curvature / torch.where(square > 0, square, 1), 2 * before)
    return torch.where(dot(step, step) > 0, length, before)
