"""Implicit layers: modules whose output is the solution of a problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .._data_parallel import Ranks, summed, summed_condition
from .._names import text_of
from ..api import check_condition, solve_condition
from ..conditions import Condition, FixedPoint, Root, Tree
from ..info import Solution
from ..inner_solvers import LBFGS, Anderson, LevenbergMarquardt, Newton
from ..inner_solvers._polished import Polished
from ..inner_solvers._verified import Verified
from ..inner_solvers.base import InnerSolverLike, as_inner_solver
from ..least_squares import LeastSquares
from ..linear_solvers import Auto
from ..linear_solvers.base import LinearSolverLike, as_linear_solver

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ImplicitLayer(nn.Module):
    """What the layers share: a condition, the inner solver that satisfies it, the linear solver for derivatives.

    A function that is a module is registered, so that its parameters are the layer's.
    """

    objective: Callable[..., Tensor] | None = None
    """What the inner solver may minimise, where the condition does not say it."""

    def __init__(
        self,
        function: Any,
        condition: Condition,
        inner_solver: Any,
        linear_solver: LinearSolverLike | None,
        polish: bool,
        ranks: Ranks | None,
    ) -> None:
        super().__init__()
        self.function, self._ranks = function, ranks
        self.condition = condition
        self.linear_solver = as_linear_solver(linear_solver, Auto)
        self.inner_solver = Polished(inner_solver, self.linear_solver) if polish else inner_solver

    def forward(self, init: Tree, *args: Any, **kwargs: Any) -> Tree:
        """The solution, a tree like ``init``, differentiable in args, kwargs and captured tensors, not in init."""
        return self.solve(init, *args, **kwargs).value

    def solve(self, init: Tree, *args: Any, **kwargs: Any) -> Solution:
        """The solution with its reports: ``.value``, ``.forward``, and ``.backward`` once a derivative was taken."""
        return solve_condition(
            self.condition, self.inner_solver, self.linear_solver, init, args, kwargs, self.objective, self._ranks
        )

    def extra_repr(self) -> str:
        settings = f"inner_solver={self.inner_solver!r}, linear_solver={self.linear_solver!r}"
        # A module is a line of its own.
        return settings if isinstance(self.function, nn.Module) else f"{text_of(self.function)}, {settings}"


class ArgminLayer(ImplicitLayer):
    """``layer(init, *args)`` is the x near init that minimises ``objective(x, *args)``, a scalar.

    Its derivatives in the args, of every order, are those of the solution by the implicit function theorem (Blondel et
    al. 2022, Section 2), whatever found it.

    * ``init``: a tensor or a tree of them (dict, list, tuple, namedtuple), of any shapes; x is one like it. It gets no
      gradient.
    * ``args``: whatever else the objective takes; every tensor in them gets a gradient.
    * ``objective``: a callable or an ``nn.Module``; tensors it closes over get gradients like arguments.
    * ``inner_solver``: finds x; :class:`~implicitdiff.inner_solvers.LBFGS` by default, and
      :class:`~implicitdiff.inner_solvers.LevenbergMarquardt` for :class:`~implicitdiff.LeastSquares`. An
      :class:`~implicitdiff.inner_solvers.InnerSolver`, or any callable ``(problem, x0) -> x``.
    * ``linear_solver``: solves with the Hessian for derivatives; :class:`~implicitdiff.Auto` by default. A
      :class:`~implicitdiff.LinearSolver`, or any callable ``(A, b) -> x``.
    * ``condition``: what the solution satisfies, for derivatives. None means what the inner solver's own iteration
      solves (those of proximal and projected gradient, mirror descent and block coordinate descent know theirs, and
      ``LBFGS`` with bounds), otherwise :class:`~implicitdiff.Stationary`. With one that is given, the report says
      whether *it* holds at the solution.
    * ``polish``: one Newton step after the inner solver, by a loose solve with ``linear_solver``. It squares the error
      of the derivative and fills ``solution.forward.distance`` and ``.gradient_error``. It is kept where it lowers the
      residual only: a distance beyond ‖x‖ says that x is not near a solution.
    * ``process_group``: for a data-parallel problem. What is minimised is the *sum* over the group's ranks of their
      objectives, each on its own shard of the data; all ranks call the layer and its derivative together, and get the
      same x. ``init`` and every tensor that is differentiated must be the same on all ranks, and its gradient is that
      of the *mean* of their outer losses, so that ``DistributedDataParallel`` around the layer changes nothing. What
      has no gradient may differ. A prox, a projection or bounds belong to the whole, not to a rank. A rank whose
      function raises leaves the others waiting until the group's timeout.

    ``layer.solve(init, *args)`` returns a :class:`~implicitdiff.Solution`, which has the reports too.

    Raises TypeError for what is not an objective, an inner solver, a linear solver or a condition;
    :class:`~implicitdiff.ImplicitDiffError` where the objective is not a scalar or init not a tree of floating
    point tensors, and on all ranks where they differ in what must be the same; warns with
    :class:`~implicitdiff.ConvergenceWarning` where a solve failed.

    >>> import torch
    >>> layer = ArgminLayer(lambda x, y: ((x**2 - y) ** 2).sum())
    >>> y = torch.tensor([4.0, 9.0], dtype=torch.float64, requires_grad=True)
    >>> layer(torch.ones(2, dtype=torch.float64), y).sum().backward()
    >>> y.grad
    tensor([0.2500, 0.1667], dtype=torch.float64)
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        *,
        inner_solver: InnerSolverLike | None = None,
        linear_solver: LinearSolverLike | None = None,
        condition: Condition | None = None,
        polish: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        ranks = Ranks.of(process_group)
        default = LevenbergMarquardt if isinstance(objective, LeastSquares) else LBFGS
        solver = as_inner_solver(inner_solver, default)
        function = objective.function if isinstance(objective, LeastSquares) else objective
        objective = summed(objective, "objective", ranks)
        if condition is None:
            condition = solver.condition(objective)
        else:
            solver = Verified(solver)
            condition = summed_condition(check_condition(condition), ranks)
        super().__init__(function, condition, solver, linear_solver, polish, ranks)
        self.objective, self._condition_is_given = objective, isinstance(solver, Verified)

    def extra_repr(self) -> str:
        given = f", condition={text_of(self.condition)}" if self._condition_is_given else ""
        return super().extra_repr() + given


class RootLayer(ImplicitLayer):
    """``layer(init, *args)`` is the x near init with ``residual(x, *args) = 0``, a tree like x.

    ``inner_solver`` is :class:`~implicitdiff.inner_solvers.Newton` by default; everything else, shapes
    and errors included, is as in :class:`ArgminLayer`. A ``residual`` that does not return a tree like x raises
    :class:`~implicitdiff.ImplicitDiffError`.

    >>> import torch
    >>> layer = RootLayer(lambda x, y: x**2 - y)
    >>> torch.func.jacrev(layer, argnums=1)(torch.ones(2), torch.tensor([4.0, 9.0]))
    tensor([[0.2500, 0.0000],
            [0.0000, 0.1667]])
    """

    def __init__(
        self,
        residual: Callable[..., Tree],
        *,
        inner_solver: InnerSolverLike | None = None,
        linear_solver: LinearSolverLike | None = None,
        polish: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        ranks = Ranks.of(process_group)
        condition = Root(summed(residual, "residual", ranks))
        super().__init__(residual, condition, as_inner_solver(inner_solver, Newton), linear_solver, polish, ranks)


class FixedPointLayer(ImplicitLayer):
    """``layer(init, *args)`` is the x near init with ``update(x, *args) = x``, a tree like x.

    ``inner_solver`` is :class:`~implicitdiff.inner_solvers.Anderson` by default; everything else, shapes
    and errors included, is as in :class:`ArgminLayer`. An ``update`` that does not return a tree like x raises
    :class:`~implicitdiff.ImplicitDiffError`.

    >>> import torch
    >>> layer = FixedPointLayer(lambda x, y: (x + y / x) / 2)  # Heron's square root
    >>> torch.func.grad(lambda y: layer(torch.ones(()), y))(torch.tensor(4.0))
    tensor(0.2500)
    """

    def __init__(
        self,
        update: Callable[..., Tree],
        *,
        inner_solver: InnerSolverLike | None = None,
        linear_solver: LinearSolverLike | None = None,
        polish: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        ranks = Ranks.of(process_group)
        condition = FixedPoint(summed(update, "update", ranks))
        super().__init__(update, condition, as_inner_solver(inner_solver, Anderson), linear_solver, polish, ranks)
