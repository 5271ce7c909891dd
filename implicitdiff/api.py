"""From the user's call to the implicit Function: ``attach`` and ``implicit``, and what the layers share with them."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from ._autograd import solution_of
from ._captures import dual_level_is_open, find_captures, plain_value, transform_level
from ._data_parallel import DataParallelProblem, Ranks
from ._equations import Equations
from ._names import name_of
from ._problem import ConditionProblem, InnerProblem
from ._timing import timed
from ._tree import Vectorizer
from .conditions import Condition
from .errors import ImplicitDiffError
from .info import FailurePolicy, Solution, SolveInfo
from .inner_solvers._polished import Polished
from .inner_solvers.base import reported_at
from .linear_solvers import Auto
from .linear_solvers.base import LinearSolverLike, as_linear_solver
from .operators.base import check_structure

_X = TypeVar("_X")
_P = ParamSpec("_P")
_R = TypeVar("_R", covariant=True)


class _ImplicitFunction(Protocol[_P, _R]):
    """A solver wrapped by :func:`implicit`: it is called as before."""

    condition: Condition

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R: ...


def attach(
    condition: Condition,
    x_star: _X,
    *args: Any,
    linear_solver: LinearSolverLike | None = None,
    polish: bool = False,
    **kwargs: Any,
) -> _X:
    """A solution that you already have, made differentiable in ``args`` and ``kwargs``.

    ``x_star`` is a tree of tensors with ``condition.residual(x_star, *args, **kwargs) = 0``; what comes back is equal
    to it. Its residual is reported (:func:`implicitdiff.record`), as the derivative is only as good as it;
    ``polish=True`` takes one Newton step from it first, as on the layers (:class:`~implicitdiff.ArgminLayer`).

    Raises TypeError for what is not a condition or a linear solver, and :class:`~implicitdiff.ImplicitDiffError` where
    the residual is not a tree like ``x_star``. Warns as :func:`~implicitdiff.implicit` does.

    >>> import implicitdiff as idf
    >>> y = torch.tensor([4.0, 9.0], requires_grad=True)
    >>> x = attach(idf.Root(lambda x, y: x * x - y), torch.tensor([2.0, 3.0]), y)
    >>> torch.autograd.grad(x.sum(), y)[0]
    tensor([0.2500, 0.1667])
    """
    Vectorizer.of(x_star, "x_star")  # below it is called init
    inner = _polished(_Given(), linear_solver) if polish else _Given()
    return solve_condition(check_condition(condition), inner, linear_solver, x_star, args, kwargs).value


def implicit(
    condition: Condition,
    linear_solver: LinearSolverLike | None = None,
    has_aux: bool = False,
    batched: bool = False,
    polish: bool = False,
) -> Callable[[Callable[_P, _R]], _ImplicitFunction[_P, _R]]:
    """Make a solver of your own differentiable: ``@implicit(condition)`` above ``def solver(init, *args, **kwargs)``.

    The solver may be anything (NumPy, SciPy, scikit-learn, C++): it gets plain tensors without a graph, and returns
    x, a tree of tensors like ``init`` that satisfies ``condition.residual(x, *args, **kwargs) = 0`` (``init`` may be
    None); with ``has_aux=True`` it returns ``(x, aux)``, and so does the call.

    Under ``torch.func.vmap`` the solver is called once per sample and the results are stacked (aux becomes a list);
    ``batched=True`` says that it takes leading batch dimensions by itself: init and every batched tensor of the args
    then come with them.

    * ``condition``: what the solution satisfies, such as :class:`~implicitdiff.Root` or :class:`~implicitdiff.KKT`;
    * ``linear_solver``: for derivatives; :class:`~implicitdiff.Auto` by default;
    * ``polish``: one Newton step from x, by a loose solve with ``linear_solver``, as on the layers
      (:class:`~implicitdiff.ArgminLayer`). It squares the error of x and of the derivative.

    Raises TypeError for what is not a condition, a linear solver or a function, and in use
    :class:`~implicitdiff.ImplicitDiffError` where the solver or the residual does not return a tree like init. Warns
    with :class:`~implicitdiff.ConvergenceWarning` where a linear solve failed.

    >>> import numpy, implicitdiff as idf
    >>> @implicit(idf.Root(lambda x, y: x * x - y))
    ... def square_root(init, y):
    ...     return torch.from_numpy(numpy.sqrt(y.numpy()))
    >>> torch.func.grad(lambda y: square_root(None, y).sum())(torch.tensor([4.0, 9.0]))
    tensor([0.2500, 0.1667])
    """
    check_condition(condition)
    as_linear_solver(linear_solver, Auto)

    def decorate(solver: Callable[_P, _R]) -> _ImplicitFunction[_P, _R]:
        if not callable(solver):
            raise TypeError(f"implicit decorates a callable solver(init, *args), but it was given {solver!r}.")

        @functools.wraps(solver)
        def solve(init: Any, *args: Any, **kwargs: Any) -> Any:
            inner = _UserSolver(solver, has_aux, batched)
            if init is None:
                init = inner.shape_of_solution(args, kwargs)
                inner.init_is_none = True
            by = _polished(inner, linear_solver) if polish else inner
            value = solve_condition(condition, by, linear_solver, init, args, kwargs).value
            return (value, inner.aux) if has_aux else value

        solve.condition = condition  # type: ignore[attr-defined]
        return cast(_ImplicitFunction[_P, _R], solve)

    return decorate


def _polished(inner_solver: Any, linear_solver: LinearSolverLike | None) -> Polished:
    return Polished(inner_solver, as_linear_solver(linear_solver, Auto))


def check_condition(condition: Any) -> Condition:
    """The condition, or an error that says what it lacks."""
    if isinstance(condition, type) or not callable(getattr(condition, "residual", None)):
        raise TypeError(
            f"condition is {condition!r}, but it must be an object with residual(x, *args, **kwargs) and structure, "
            f"such as Root(residual), FixedPoint(update) or Stationary(objective)."
        )
    check_structure(getattr(condition, "structure", None))  # type: ignore[arg-type]
    return condition


def refuse_tracing() -> None:
    """Raise where a trace is recorded, which could not follow a solver."""
    if get_proxy_mode() is not None:
        raise ImplicitDiffError(
            "the layer is being traced (torch.func.linearize, make_fx): a solver's control flow depends on values that "
            "a trace does not have. Use torch.func.jvp or jacfwd in place of linearize."
        )


@torch.compiler.disable  # a solver branches on values: inside a user's torch.compile it runs as it is
@timed("layer")
def solve_condition(
    condition: Condition,
    inner_solver: Any,
    linear_solver: Any,
    init: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    objective: Callable[..., Tensor] | None = None,
    ranks: Ranks | None = None,
) -> Solution:
    """The solution of a condition by an inner solver, differentiable in args, kwargs and captured tensors.

    ``objective`` is what the inner solver may minimise; by default the condition's own, where it has one. ``ranks``
    are those that the condition's function is summed over.
    """
    refuse_tracing()
    equations = Equations.of(condition, init, args, kwargs, objective=objective)
    vectorizer = equations.vectorizer
    solution = Solution(None, None)  # type: ignore[arg-type]  # filled in below
    parts = equations, inner_solver, as_linear_solver(linear_solver, Auto), weakref.ref(solution)
    problem = ConditionProblem(*parts) if ranks is None else DataParallelProblem(*parts, ranks=ranks)
    x0 = vectorizer.ravel(init, "init").detach()
    if isinstance(problem, DataParallelProblem):
        problem.check_arguments(x0, args, kwargs)
    solution.value = vectorizer.unravel(_differentiable(problem, x0))
    return solution


def _differentiable(problem: ConditionProblem, x0: Tensor) -> Tensor:
    tensors = problem.equations.arguments.tensors
    if transform_level() or dual_level_is_open():
        # The values are out of reach here: the Function is applied first, and solves where they are plain.
        problem, captured = _with_captures(problem, x0, {})
        x = _applied(problem, x0, *tensors, *captured.values())
        seen = len(captured)
        problem, captured = _with_captures(problem, x.detach(), captured)
        if len(captured) == seen:
            return x
        # At the solution the function takes a branch that uses further tensors.
        return _applied(replace(problem, inner_solver=None), x.detach(), *tensors, *captured.values())
    x = _plain_solution(problem, x0, tensors)
    if not torch.is_grad_enabled():
        return x
    problem, captured = _with_captures(problem, x, {})
    if not any(t.requires_grad for t in (*tensors, *captured.values())):
        return x
    return _applied(replace(problem, inner_solver=None), x, *tensors, *captured.values())


def _applied(problem: ConditionProblem, x0: Tensor, *inputs: Tensor) -> Tensor:
    if isinstance(problem, DataParallelProblem):
        return problem.shared_solution(x0, inputs)
    return solution_of(problem, x0, *inputs)


def _plain_solution(problem: ConditionProblem, x0: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    # Solvers differentiate, which inference mode and its tensors forbid.
    with torch.inference_mode(False), torch.no_grad():
        plain = [t.clone() if t.is_inference() else t.detach() for t in (x0, *tensors)]
        return problem.solve(*plain)


@timed("captured tensors")
def _with_captures(
    problem: ConditionProblem, x: Tensor, known: dict[int, Tensor]
) -> tuple[ConditionProblem, dict[int, Tensor]]:
    """The problem with the tensors that its function captures at x, after those that are known already."""
    equations = problem.equations
    # Which tensors a rank captures may depend on the rank, so that no rank can wait for another one here.
    with problem.ranks.alone() if isinstance(problem, DataParallelProblem) else contextlib.nullcontext():
        found, captures = find_captures(equations.primitive, x, equations.arguments.tensors, [equations.condition])
    new = [(t, c) for t, c in zip(found, captures, strict=True) if id(t) not in known]
    captured = known | {id(t): t for t, _ in new}
    if isinstance(problem, DataParallelProblem):
        problem.check_captures(x, [t for t, _ in new], [c for _, c in new])
    return replace(problem, captures=(*problem.captures, *(c for _, c in new))), captured


class _Given:
    """The inner solver of a solution that is given: its residual is reported."""

    on_failure: FailurePolicy = "warn"

    def solve(self, problem: InnerProblem, x0: Tensor) -> tuple[Tensor, SolveInfo]:
        return x0, reported_at(problem, x0, "attach")


@dataclass
class _UserSolver:
    """A wrapped solver ``(init, *args, **kwargs) -> x`` as an inner solver."""

    solver: Callable[..., Any]
    has_aux: bool
    batched: bool
    init_is_none: bool = False
    known: tuple[Any, Any] | None = None
    """x and aux of the call that told the shape: of a problem without a batch they are the solution already."""
    aux: Any = None
    on_failure: FailurePolicy = "warn"

    @property
    def name(self) -> str:
        return name_of(self.solver)

    def solve(self, problem: InnerProblem, x0: Tensor) -> tuple[Tensor, SolveInfo]:
        equations = problem.problem.equations
        levels = problem.problem.levels
        inputs = problem.inputs[: len(equations.arguments.tensors)]
        if self.known is not None and not levels:
            tree, self.aux = self.known
            x, self.known = equations.vectorizer.ravel(tree, f"what {self.name} returned"), None
        elif self.batched and levels:
            x, self.aux = self._call_batched(equations, x0, inputs)
        else:
            x, self.aux = self._per_sample(equations, x0, inputs, levels)
        x = x.detach().to(x0)
        return x, reported_at(problem, x, self.name)

    def _per_sample(
        self, equations: Equations, x0: Tensor, inputs: Sequence[Tensor], levels: Any
    ) -> tuple[Tensor, Any]:
        if not levels:
            args, kwargs = equations.arguments.rebuild([t.detach() for t in inputs])
            init = None if self.init_is_none else equations.vectorizer.unravel(x0)
            x, aux = self._call(init, args, kwargs)
            return equations.vectorizer.ravel(x, f"what {self.name} returned"), aux
        parts = [
            self._per_sample(
                equations,
                x0[i],
                [t if d is None else t[i] for t, d in zip(inputs, levels[0], strict=False)],
                levels[1:],
            )
            for i in range(len(x0))
        ]
        return torch.stack([x for x, _ in parts]), [aux for _, aux in parts]

    def _call_batched(self, equations: Equations, x0: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        vectorizer = equations.vectorizer
        batch = x0.shape[:-1]
        unravel, ravel = vectorizer.unravel, lambda tree: vectorizer.ravel(tree, f"what {self.name} returned")
        for _ in batch:
            unravel, ravel = torch.func.vmap(unravel), torch.func.vmap(ravel)
        args, kwargs = equations.arguments.rebuild([t.detach() for t in inputs])
        x, aux = self._call(None if self.init_is_none else unravel(x0), args, kwargs)
        return ravel(x), aux

    def shape_of_solution(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tree like the solution, found by solving one plain sample."""
        plain_args, plain_kwargs = pytree.tree_map_only(Tensor, _plain_sample, (args, kwargs))
        with temporarily_clear_interpreter_stack(), torch.no_grad():
            self.known = self._call(None, plain_args, plain_kwargs)
        Vectorizer.of(self.known[0], f"what {self.name} returned")
        return self.known[0]

    def _call(self, init: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        out = self.solver(init, *args, **kwargs)
        if not self.has_aux:
            return out, None
        if not isinstance(out, tuple) or len(out) != 2:
            raise ImplicitDiffError(
                f"{self.name} has has_aux=True and must return (x, aux), but it returned {type(out).__name__}."
            )
        return out


def _plain_sample(tensor: Tensor) -> Tensor:
    """One sample's value of a tensor, below all transforms."""
    value = plain_value(tensor)
    return value[(0,) * (value.ndim - tensor.ndim)]
