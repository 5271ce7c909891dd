"""A user's condition as equations between vectors: what the inner solvers see, and what the implicit Function needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from ._autograd import Problem
from ._captures import Capture, Substituted, is_transformed, transform_level
from ._jacobian import JacobianOperator
from ._limited_memory import LimitedMemory
from ._linear_problem import LinearProblem, solve_and_report
from ._support import Support, diagonal_of
from ._tree import Arguments, Vectorizer
from ._vectors import GOLDEN, SILVER, probe, vector_norm
from .conditions import Condition, FixedPoint, Stationary
from .conditions.proximal_gradient import ForwardBackward
from .errors import ImplicitDiffError
from .info import Solution, report
from .least_squares import LeastSquares
from .operators import LinearOperator, Origin, check_structure

KINK = 0.1
"""A change of the derivative, relative to its size, that a step of the size of the solution's error cannot explain."""


@dataclass(frozen=True)
class Equations:
    """A condition with its trees flattened: functions of one system's x of shape (n,) and the tensors of the args."""

    condition: Condition
    vectorizer: Vectorizer
    arguments: Arguments
    minimised: Callable[..., Any] | None
    """The objective, where there is one."""

    @classmethod
    def of(
        cls,
        condition: Condition,
        init: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        what: str = "init",
        objective: Callable[..., Any] | None = None,
    ) -> Equations:
        """The equations in the unknowns of ``init``; the objective is the condition's own where it has one."""
        minimised = getattr(condition, "objective", objective)
        return cls(condition, Vectorizer.of(init, what), Arguments.of(args, kwargs), minimised)

    @property
    def is_stationarity(self) -> bool:
        """Whether the equations are the gradient of a scalar, which the products can then be taken of directly."""
        return isinstance(self.condition, Stationary)

    def primitive(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """The user's own function: the objective of a stationarity condition, the residual of any other."""
        if self.is_stationarity:
            return self.objective(x, *tensors)
        return self.mapped(self.condition.residual)(x, *tensors)

    def objective(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """The objective, a scalar."""
        assert self.minimised is not None
        args, kwargs = self.arguments.rebuild(tensors)
        value = self.minimised(self.vectorizer.unravel(x), *args, **kwargs)
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ImplicitDiffError(
                f"the objective returned {given}, but it must return a scalar tensor: sum or average."
            )
        return value.reshape(())

    def mapped(self, function: Callable[..., Any], numbers: int = 0) -> Callable[..., Tensor]:
        """A function of the user's, ``(x, *numbers, *args, **kwargs) -> a tree like x``, as one of vectors."""

        def on_vectors(x: Tensor, *inputs: Tensor) -> Tensor:
            args, kwargs = self.arguments.rebuild(inputs[numbers:])
            name = getattr(function, "__name__", type(function).__name__)
            what = "the residual" if name == "residual" else f"what {name} returned"
            return self.vectorizer.ravel(function(self.vectorizer.unravel(x), *inputs[:numbers], *args, **kwargs), what)

        return on_vectors

    def least_squares(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """The residual of a least-squares objective, as a vector (m,)."""
        assert isinstance(self.minimised, LeastSquares)
        args, kwargs = self.arguments.rebuild(tensors)
        tree = self.minimised.residual(self.vectorizer.unravel(x), *args, **kwargs)
        return Vectorizer.of(tree, "the residual").ravel(tree, "the residual")


@dataclass(frozen=True)
class ConditionProblem(Problem):
    """F(x, *inputs) = 0 for a condition; the inputs are the tensors of the args, then the captured tensors."""

    equations: Equations
    inner_solver: Any
    """An object with ``solve(problem, x0) -> (x, SolveInfo)`` and ``on_failure``; None where x0 is the solution."""
    linear_solver: Any
    solution: weakref.ref[Solution]
    """Where the reports are left, by weak reference: the graph must not own what owns the graph."""
    captures: tuple[Capture, ...] = ()
    levels: tuple[tuple[int | None, ...], ...] = ()
    """One entry per batch dimension, outermost first: which inputs have it."""
    inverses: list[LimitedMemory] = field(default_factory=list)
    """What the inner solver found of A⁻¹; the last one counts. Shared by all forms of this problem."""

    def solve(self, x0: Tensor | None, *inputs: Tensor) -> Tensor:
        assert x0 is not None
        if self.inner_solver is None:
            return x0.clone()
        x, info = self.inner_solver.solve(InnerProblem(self, inputs), x0)
        solution = self.solution()
        if solution is not None:
            solution.forward = info
        report("forward", info, self.inner_solver.on_failure)
        return x.clone()

    def residual(self, x: Tensor, *inputs: Tensor) -> Tensor:
        function = self.function(substituted=True)
        if not self.equations.is_stationarity:
            return function(x, *inputs)
        return torch.func.grad(lambda x: function(x, *inputs).sum())(x)

    def linearized(self, x: Tensor, rhs: Tensor, inputs: Sequence[Tensor], *, adjoint: bool) -> tuple[Problem, Any]:
        kind = "backward" if adjoint else "tangent"
        return LinearProblem(_JacobianFamily(self), adjoint, self.linear_solver, kind, self.solution), (rhs, x, *inputs)

    def plain_pullback(self, x: Tensor, g: Tensor, inputs: Sequence[Tensor], wanted: Sequence[int]) -> list[Any] | None:
        values = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        A = InnerProblem(self, values, substituted=bool(self.captures)).jacobian(x)
        u = solve_and_report(self.linear_solver, A.T, g, None, "backward", self.solution).value
        return A.pull_to([values[i] for i in wanted], u)

    def batched(self, size: int, dims: Sequence[int | None], inputs: Sequence[Tensor]) -> tuple[Any, Any]:
        return replace(self, levels=(tuple(dims), *self.levels)), inputs

    def function(self, substituted: bool) -> Callable[..., Tensor]:
        """The user's function over all batch dimensions: (x, *inputs) ↦ objectives (*batch,) or residuals (*batch, n).

        Only the substituted form sees the inputs that stand for captured tensors; the other one is faster.
        """
        return self.lifted(self.equations.primitive, substituted)

    def lifted(
        self, primitive: Callable[..., Tensor], substituted: bool, part: bool = False, numbers: int = 0
    ) -> Callable[..., Tensor]:
        """A function of one system, (x, *numbers, *inputs), over all batch dimensions.

        It is ``part`` of the user's function where it need not meet every captured tensor.
        """
        count = numbers + len(self.equations.arguments.tensors)
        function: Callable[..., Tensor] = (
            Substituted(primitive, self.captures, part)
            if substituted
            else lambda x, *inputs: primitive(x, *inputs[:count])
        )
        for dims in reversed(self.levels):
            function = torch.func.vmap(function, in_dims=(0, *(0 for _ in range(numbers)), *dims))
        return function

    @property
    def needs_substitution(self) -> bool:
        """Whether a captured tensor is one that plain code cannot meet, or belongs to the value of one sample."""
        return any(c.is_dual or any(map(is_transformed, c.current())) for c in self.captures)


class InnerProblem:
    """What an inner solver is given: the problem at fixed args, on plain tensors x of shape (*batch, n).

    Every function works system by system; a system's row depends on its row of x only.
    """

    def __init__(
        self,
        problem: ConditionProblem,
        inputs: Sequence[Tensor],
        *,
        differentiable: bool = False,
        substituted: bool = False,
    ) -> None:
        self.problem, self.inputs, self._differentiable = problem, tuple(inputs), differentiable
        self._substituted = substituted or problem.needs_substitution
        self._condition, self._is_stationarity = problem.equations.condition, problem.equations.is_stationarity
        self._function = problem.function(self._substituted)
        self._objective = self._function if self._is_stationarity else self._part(problem.equations.objective)

    def _part(self, primitive: Callable[..., Tensor], numbers: int = 0) -> Callable[..., Tensor]:
        return self.problem.lifted(primitive, self._substituted, part=True, numbers=numbers)

    def objective(self, x: Tensor) -> Tensor:
        """The objective, of shape (*batch,). Raises ImplicitDiffError for a problem that has none."""
        self._need_objective("objective")
        return self._objective(x, *self.inputs)

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of the objective, of shape (*batch, n). Raises ImplicitDiffError where there is none."""
        return self.value_and_gradient(x)[1]

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and gradient from one evaluation."""
        self._need_objective("gradient")
        if self._differentiable or transform_level():
            return self._graph_gradient(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self._objective(x, *self.inputs)
            if not value.requires_grad:
                return value, torch.zeros_like(x)
            (gradient,) = torch.autograd.grad(value.sum(), x, materialize_grads=True)
        return value.detach(), gradient

    def residual(self, x: Tensor) -> Tensor:
        """F(x), of shape (*batch, n): the gradient, for an objective."""
        return self.gradient(x) if self._is_stationarity else self._function(x, *self.inputs)

    def jacobian(self, x: Tensor) -> JacobianOperator:
        """∂F/∂x at x, an operator on (*batch, n) whose products share one graph."""
        if self._differentiable:
            raise ImplicitDiffError(
                "an inner solver that uses problem.hessian or problem.jacobian cannot be unrolled, as its products are "
                "not followed: unroll a first-order one (GradientDescent, LBFGS, Anderson), or use an implicit layer."
            )
        operator = JacobianOperator(self.graph_residual, x, check_structure(self._condition.structure))
        operator.origin = Origin(of_fixed_point=isinstance(self._condition, FixedPoint))
        inverses = self.problem.inverses
        if inverses and inverses[-1].scale.shape[:-1] == x.shape[:-1]:
            operator.origin.estimated_inverse = inverses[-1].apply
        if not getattr(self._condition, "smooth", True):
            operator.origin.kinks = lambda: self._kinks(x, operator.value)
        if isinstance(self._condition, ForwardBackward):
            operator.origin.support = lambda: self._support(x)
        return operator

    def _support(self, x: Tensor) -> Support | None:
        """Where the condition's systems can be solved on the support of its backward step."""
        condition = cast(ForwardBackward, self._condition)
        v = self._forward_step(x)
        d = diagonal_of(self._backward_step(v).rmatvec, v)
        if d is None:
            return None
        return Support(d, self.apply(lambda x, *args, **kwargs: condition.stepsizes(x), x), self.hessian(x))

    def _kinks(self, x: Tensor, residual: Tensor) -> Tensor:
        """Which systems have a kink of F within the error of x: the derivative differs on two sides of x."""
        at: Tensor = x
        derivative: Callable[[Tensor], LinearOperator] = lambda x: JacobianOperator(self.graph_residual, x, "general")  # noqa: E731
        if isinstance(self._condition, ForwardBackward):  # all its kinks are those of the backward step
            at, derivative = self._forward_step(x), self._backward_step
        if not at.numel():
            return torch.zeros(at.shape[:-1], dtype=torch.bool, device=at.device)
        v, side = probe(at, GOLDEN), probe(at, SILVER)
        side = torch.where(v > 1.5, side, -side)
        size = torch.finfo(at.dtype).eps ** 0.5 * at.abs().amax(-1).clamp(min=1) + 10 * vector_norm(residual)
        ahead, behind = (derivative(at + sign * size.unsqueeze(-1) * side).rmatvec(v) for sign in (1, -1))
        largest = torch.maximum(ahead.abs().amax(-1), behind.abs().amax(-1))
        return (ahead - behind).abs().amax(-1) > KINK * largest

    def _forward_step(self, x: Tensor) -> Tensor:
        return self.apply(cast(ForwardBackward, self._condition).forward_step, x).detach()

    def _backward_step(self, v: Tensor) -> JacobianOperator:
        step = cast(ForwardBackward, self._condition).backward_step
        return JacobianOperator(lambda v: self.apply(step, v), v, "general")

    def apply(self, function: Callable[..., Any], x: Tensor, *numbers: float | Tensor) -> Tensor:
        """What a function of the user's, ``(x, *numbers, *args, **kwargs) -> a tree like x``, gives for each system.

        ``numbers`` are floats or tensors of shape (*batch,), such as step lengths.
        """
        lifted = self._part(self.problem.equations.mapped(function, len(numbers)), len(numbers))
        values = (n if isinstance(n, Tensor) else x.new_full(x.shape[:-1], n) for n in numbers)
        return lifted(x, *values, *self.inputs)

    def least_squares_residual(self, x: Tensor) -> Tensor:
        """r of an objective ½‖r(x)‖², of shape (*batch, m). Raises ImplicitDiffError for another objective."""
        self._need_least_squares()
        return self._part(self.problem.equations.least_squares)(x, *self.inputs)

    def least_squares_jacobian(self, x: Tensor) -> JacobianOperator:
        """∂r/∂x at x, of shape (m, n)."""
        return JacobianOperator(self.least_squares_residual, x, "general")

    def leave_inverse(self, inverse: LimitedMemory) -> None:
        """Leave an estimate of the inverse Hessian for the backward pass."""
        self.problem.inverses[:] = [inverse]

    def hessian(self, x: Tensor) -> LinearOperator:
        """The Hessian of the objective at x, an operator whose products share one graph."""
        self._need_objective("hessian")
        if self._is_stationarity:
            return self.jacobian(x)
        return JacobianOperator(lambda x: self._graph_gradient(x)[1], x, "symmetric")

    def graph_residual(self, x: Tensor) -> Tensor:
        return self._graph_gradient(x)[1] if self._is_stationarity else self._function(x, *self.inputs)

    def _graph_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and gradient with a graph, for what differentiates through them."""
        if transform_level():
            gradient, value = torch.func.grad(lambda x: _sum_and_value(self._objective(x, *self.inputs)), has_aux=True)(
                x
            )
            return value, gradient
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        value = self._objective(x, *self.inputs)
        if not value.requires_grad:
            return value, torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True, materialize_grads=True)
        return value, gradient

    def _need_objective(self, name: str) -> None:
        if self.problem.equations.minimised is None:
            raise ImplicitDiffError(
                f"problem.{name} was asked for, but this problem is a root or a fixed point and has no objective: the "
                f"inner solver must work with problem.residual and problem.jacobian, or belongs into an ArgminLayer."
            )

    def _need_least_squares(self) -> None:
        if not isinstance(self.problem.equations.minimised, LeastSquares):
            raise ImplicitDiffError(
                "the inner solver works with the residual of a least-squares problem, but the objective is not one: "
                "give ArgminLayer(implicitdiff.LeastSquares(residual), ...), which minimises ½‖residual‖²."
            )


def _sum_and_value(value: Tensor) -> tuple[Tensor, Tensor]:
    return value.sum(), value


class _JacobianFamily:
    """∂F/∂x as a function of its parameters (x, *inputs)."""

    def __init__(self, problem: ConditionProblem) -> None:
        self.problem = problem

    def operator(self, *parameters: Tensor) -> LinearOperator:
        x, *inputs = parameters
        return InnerProblem(self.problem, inputs).jacobian(x)

    def product(self, v: Tensor, *parameters: Tensor, transposed: bool) -> Tensor:
        x, *inputs = parameters
        residual, pullback = torch.func.vjp(lambda x: self.problem.residual(x, *inputs), x)[:2]
        if transposed or self.problem.equations.condition.structure != "general":
            return pullback(v)[0]
        pullback_of_pullback = torch.func.vjp(lambda u: pullback(u)[0], torch.zeros_like(residual))[1]
        return pullback_of_pullback(v)[0]

    def batched(self, size: int, dims: Sequence[int | None], parameters: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        x, *inputs = parameters
        if dims[0] is None:
            x = x.expand(size, *x.shape)
        problem, moved = self.problem.batched(size, dims[1:], inputs)
        return _JacobianFamily(problem), [x, *moved]
