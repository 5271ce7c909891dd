"""A condition at its args: what the implicit Function needs, and what the inner solvers see."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from ._autograd import Problem
from ._captures import Capture, Substituted, is_transformed, transform_level
from ._chunks import terms_on_slices
from ._equations import Equations
from ._jacobian import TALL, ChunkedJacobian, JacobianOperator
from ._kinks import has_kink
from ._limited_memory import LimitedMemory
from ._linear_problem import LinearProblem, solve_and_report
from ._support import Support, diagonal_of
from ._timing import timed
from ._vectors import vector_norm
from .conditions import FixedPoint, Stationary
from .conditions.proximal_gradient import ForwardBackward
from .errors import ImplicitDiffError
from .info import Solution, SolveInfo, report
from .least_squares import LeastSquares
from .operators import LinearOperator
from .operators.base import Origin, check_structure


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
    unjudged: list[SolveInfo] = field(default_factory=list)
    """The report of a solver that has a tolerance of its own. Shared by all forms of this problem."""

    @timed("inner solver")
    def solve(self, x0: Tensor | None, *inputs: Tensor) -> Tensor:
        assert x0 is not None
        if self.inner_solver is None:
            return x0.clone()
        x, info = self.inner_solver.solve(InnerProblem(self, inputs), x0)
        solution = self.solution()
        if solution is not None:
            solution.forward = info
        if not info.judged:
            self.unjudged[:] = [info]
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

    @timed("evaluations")
    def objective(self, x: Tensor) -> Tensor:
        """The objective, of shape (*batch,). Raises ImplicitDiffError for a problem that has none."""
        self._need_objective("objective")
        return self._objective(x, *self.inputs)

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of the objective, of shape (*batch, n). Raises ImplicitDiffError where there is none."""
        return self.value_and_gradient(x)[1]

    @timed("evaluations")
    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and gradient from one evaluation."""
        self._need_objective("gradient")
        if torch.compiler.is_compiling() or (self._differentiable and torch.is_grad_enabled()) or transform_level():
            return self._graph_gradient(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self._objective(x, *self.inputs)
            if not value.requires_grad:
                self._refuse_constant("objective", x)
                return value, torch.zeros_like(x)
            (gradient,) = torch.autograd.grad(value, x, torch.ones_like(value), allow_unused=True)
            if gradient is None:  # it depends on what it captures alone
                self._refuse_constant("objective", x)
        return value.detach(), torch.zeros_like(x) if gradient is None else gradient

    @timed("evaluations")
    def residual(self, x: Tensor) -> Tensor:
        """F(x), of shape (*batch, n): the gradient, for an objective."""
        return self.gradient(x) if self._is_stationarity else self._function(x, *self.inputs)

    def jacobian(self, x: Tensor) -> JacobianOperator | ChunkedJacobian:
        """∂F/∂x at x, an operator on (*batch, n) whose products share one graph."""
        self._need_no_derivative()
        origin = Origin(of_fixed_point=isinstance(self._condition, FixedPoint))
        inverses = self.problem.inverses
        if inverses and inverses[-1].scale.shape[:-1] == x.shape[:-1]:
            origin.estimated_inverse = inverses[-1].apply
        if isinstance(self._condition, Stationary) and self._condition.chunks is not None:
            chunked = ChunkedJacobian(self._slices(x, *self._condition.chunks), x)
            chunked.origin = self._unless_judged(origin, x, lambda: self.residual(x))
            return chunked
        structure = check_structure(self._condition.structure)
        operator = JacobianOperator(
            self.graph_residual, x, structure, self._matrices, lambda x: self.of_constants().graph_residual(x)
        )
        operator.origin = self._unless_judged(origin, x, lambda: operator.value)
        if not operator.value_depends_on_x:
            self._refuse_constant("residual", x)
        if isinstance(self._condition, ForwardBackward):
            forward = functools.lru_cache(1)(lambda: self._forward_step(x))
            origin.support = lambda: self._support(x, forward())
            # All its kinks are those of the backward step.
            origin.kinks = lambda: has_kink(self._backward_step, forward(), vector_norm(operator.value))
        elif not getattr(self._condition, "smooth", True):
            origin.kinks = lambda: has_kink(self._general_jacobian, x, vector_norm(operator.value))
        return operator

    def _unless_judged(self, origin: Origin, x: Tensor, residual: Callable[[], Tensor]) -> Origin:
        """With the residual at x, where nobody has said that x is a solution."""
        if self.problem.unjudged:
            origin.unjudged = lambda: residual().detach() / vector_norm(x).clamp(min=1).unsqueeze(-1)
        return origin

    tallies = None
    """What a compiled part of a solve has counted: nothing."""

    def opened(self) -> InnerProblem:
        """The problem for a few compiled steps: nothing is shared by its evaluations."""
        return self

    def of_constants(self) -> InnerProblem:
        """The same problem with inputs that nothing follows."""
        inputs = [t.detach() for t in self.inputs]
        return InnerProblem(self.problem, inputs, substituted=self._substituted)

    def _matrices(self, x: Tensor) -> Tensor:
        """∂F/∂x of each system."""
        F = self.problem.equations.primitive
        return self._dense((lambda x, *tensors: torch.func.grad(F)(x, *tensors)) if self._is_stationarity else F, x)

    def _dense(self, primitive: Callable[..., Tensor], x: Tensor) -> Tensor:
        """The Jacobian in x of a function of one system, for each system.

        Its rows, or columns, are vmapped inside the systems: the other way round, torch copies for each of them what
        the systems do not share.
        """

        def of_one_system(x: Tensor, *tensors: Tensor) -> Tensor:
            out, pullback = torch.func.vjp(lambda x: primitive(x, *tensors), x)[:2]
            if len(out) > TALL * len(x):
                push = torch.func.vjp(lambda u: pullback(u)[0], torch.zeros_like(out))[1]
                return torch.func.vmap(push)(torch.eye(len(x), dtype=out.dtype, device=out.device))[0].mT
            return torch.func.vmap(pullback)(torch.eye(len(out), dtype=out.dtype, device=out.device))[0].conj()

        return self._part(of_one_system)(x, *(t.detach() for t in self.inputs)).resolve_conj()

    def _slices(self, x: Tensor, argument: int | str, dim: int, k: int) -> list[tuple[float, Callable[..., Tensor]]]:
        """Weights and gradients whose sum is the gradient, each on a slice of the data."""
        equations = self.problem.equations
        sliced = equations.arguments.places_of(argument)
        sizes = sorted({equations.arguments.tensors[i].shape[dim] for i in sliced})
        if len(sizes) != 1:
            raise ImplicitDiffError(
                f"chunks slices the tensors of argument {argument!r} along dimension {dim}, where they have the sizes "
                f"{sizes}: there must be at least one tensor, and all of one size."
            )

        def on_slice(start: int, stop: int) -> Callable[[Tensor], Tensor]:
            def primitive(x: Tensor, *tensors: Tensor) -> Tensor:
                parts = [t.narrow(dim, start, stop - start) if i in sliced else t for i, t in enumerate(tensors)]
                return equations.objective(x, *parts)

            function = self._part(primitive)
            return lambda x: function(x, *self.inputs)

        with torch.no_grad():
            terms = terms_on_slices(on_slice, sizes[0], k, x)
        return [(weight, functools.partial(_gradient, term)) for weight, term in terms]

    def _support(self, x: Tensor, v: Tensor) -> Support | None:
        """Where the condition's systems can be solved on the support of its backward step, which is taken at v."""
        condition = cast(ForwardBackward, self._condition)
        d = diagonal_of(self._backward_step(v).rmatvec, v)
        if d is None:
            return None
        return Support(d, self.apply(lambda x, *args, **kwargs: condition.stepsizes(x), x), self.hessian(x))

    def _general_jacobian(self, x: Tensor) -> JacobianOperator:
        return JacobianOperator(self.graph_residual, x, "general")

    def _forward_step(self, x: Tensor) -> Tensor:
        return self.apply(cast(ForwardBackward, self._condition).forward_step, x).detach()

    def _backward_step(self, v: Tensor) -> JacobianOperator:
        step = cast(ForwardBackward, self._condition).backward_step
        return JacobianOperator(lambda v: self.apply(step, v), v, "general")

    @property
    def aligned_inputs(self) -> list[Tensor]:
        """The inputs with a place for every batch dimension, of size 1 where they do not have it."""
        aligned = []
        for i, tensor in enumerate(self.inputs):
            for place, dims in enumerate(self.problem.levels):
                tensor = tensor.unsqueeze(place) if dims[i] is None else tensor
            aligned.append(tensor)
        return aligned

    def system(self, index: tuple[int, ...]) -> InnerProblem:
        """The problem of one system of the batch, on x of shape (n,)."""
        inputs: Sequence[Tensor] = self.inputs
        for i, dims in zip(index, self.problem.levels, strict=True):
            inputs = [t if d is None else t[i] for t, d in zip(inputs, dims, strict=True)]
        problem = replace(self.problem, levels=())
        return InnerProblem(problem, inputs, differentiable=self._differentiable, substituted=self._substituted)

    @timed("evaluations")
    def apply(self, function: Callable[..., Any], x: Tensor, *numbers: float | Tensor) -> Tensor:
        """What a function of the user's, ``(x, *numbers, *args, **kwargs) -> a tree like x``, gives for each system.

        ``numbers`` are floats or tensors of shape (*batch,), such as step lengths.
        """
        lifted = self._part(self.problem.equations.mapped(function, len(numbers)), len(numbers))
        values = (n if isinstance(n, Tensor) else x.new_full(x.shape[:-1], n) for n in numbers)
        return lifted(x, *values, *self.inputs)

    @timed("evaluations")
    def least_squares_residual(self, x: Tensor) -> Tensor:
        """r of an objective ½‖r(x)‖², of shape (*batch, m). Raises ImplicitDiffError for another objective."""
        self._need_least_squares()
        return self._part(self.problem.equations.least_squares)(x, *self.inputs)

    def least_squares_jacobian(self, x: Tensor) -> JacobianOperator:
        """∂r/∂x at x, of shape (m, n), with r as its ``value``."""
        self._need_no_derivative()
        residual = self.problem.equations.least_squares
        return JacobianOperator(self.least_squares_residual, x, "general", lambda x: self._dense(residual, x))

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
        return _graph_gradient(lambda x: self._objective(x, *self.inputs), x)

    def _refuse_constant(self, what: str, x: Tensor) -> None:
        """Raise where a function of the user's has lost x. A least-squares problem may have no equations at all."""
        if x.numel() and not isinstance(self.problem.equations.minimised, LeastSquares):
            raise ImplicitDiffError(
                f"the {what} does not depend on x as torch sees it: is x detached in it, used under torch.no_grad(), "
                f"through .data, or in NumPy? Write it in torch operations on x itself."
            )

    def _need_no_derivative(self) -> None:
        if self._differentiable:
            raise ImplicitDiffError(
                "an inner solver that uses problem.hessian or problem.jacobian cannot be unrolled, as its products are "
                "not followed: unroll a first-order one (GradientDescent, LBFGS, Anderson), or use an implicit layer."
            )

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


def _graph_gradient(objective: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() or transform_level():
        gradient, value = torch.func.grad(lambda x: _sum_and_value(objective(x)), has_aux=True)(x)
        return value, gradient
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    value = objective(x)
    if not value.requires_grad:
        return value, torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(value, x, torch.ones_like(value), create_graph=True, materialize_grads=True)
    return value, gradient


def _gradient(objective: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return _graph_gradient(objective, x)[1]


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
