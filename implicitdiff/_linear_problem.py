"""The linear problem A u = b as a :class:`Problem`, A depending on tensors of its own."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ._autograd import Problem
from ._timing import timed
from ._vectors import dot, vector_norm
from .info import LinearSolution, SolveInfo, Status, report
from .operators import LinearOperator, Transpose

FAR = 1e-2
"""A solution that somebody else found may be off by so much, relative to its norm, before that is reported."""


class OperatorFamily(Protocol):
    """An operator for each value of its parameters."""

    def operator(self, *parameters: Tensor) -> LinearOperator:
        """The operator at plain parameters, made for many products."""

    def product(self, v: Tensor, *parameters: Tensor, transposed: bool) -> Tensor:
        """A v or Aᵀ v, in operations that every transform can follow."""

    def batched(self, size: int, dims: Sequence[int | None], parameters: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """The family with one more batch dimension in front, and its parameters."""


@dataclass(frozen=True)
class LinearProblem(Problem):
    """A u − b = 0 (Aᵀ u − b = 0 where ``transposed``) in the inputs (b, *parameters of A)."""

    family: OperatorFamily
    transposed: bool
    solver: Any
    """An object with ``solve(A, b, x0) -> LinearSolution`` and ``on_failure``."""
    kind: str
    sink: weakref.ref[Any] | None = None
    """Where the report is left, by weak reference: the graph must not own what owns the graph."""
    shared: tuple[bool, ...] = ()
    """One entry per batch dimension that vmap has added, outermost first: whether only b has it, so that one operator
    serves several right-hand sides."""

    def solve(self, x0: Tensor | None, b: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        A = self.family.operator(*parameters)
        A = A.T if self.transposed else A
        if any(self.shared):
            A = _SharedOperator(A, self.shared, b.shape)
        return solve_and_report(self.solver, A, b, x0, self.kind, self.sink).value

    def residual(self, u: Tensor, b: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        def product(v: Tensor) -> Tensor:
            return self.family.product(v, *parameters, transposed=self.transposed)

        return _over_shared(product, (u,), self.shared) - b

    def linearized(self, x: Tensor, rhs: Tensor, inputs: Sequence[Tensor], *, adjoint: bool) -> tuple[Problem, Any]:
        kind = "backward" if adjoint else "tangent"
        return replace(self, transposed=self.transposed != adjoint, kind=kind), (rhs, *inputs[1:])

    def batched(self, size: int, dims: Sequence[int | None], inputs: Sequence[Tensor]) -> tuple[Problem, Any]:
        b, *parameters = inputs
        if dims[0] is None:
            b = b.expand(size, *b.shape)
        if all(d is None for d in dims[1:]):
            return replace(self, shared=(True, *self.shared)), (b, *parameters)
        family, parameters = self.family.batched(size, dims[1:], parameters)
        return replace(self, family=family, shared=(False, *self.shared)), (b, *parameters)


def solve_and_report(
    solver: Any, A: LinearOperator, b: Tensor, x0: Tensor | None, kind: str, sink: weakref.ref[Any] | None
) -> LinearSolution:
    """A u = b on plain tensors, its report entered into the records and acted on."""
    solution = _solution(solver, A, b, x0)
    if A.origin.kinks is not None:
        solution = replace(solution, info=_but(solution.info, A.origin.kinks(), Status.NOT_SMOOTH))
    if A.origin.unjudged is not None:
        off = _is_no_solution(solver, A, A.origin.unjudged(), solution.value, b)
        solution = replace(solution, info=_but(solution.info, off, Status.NOT_A_SOLUTION))
    if sink is not None and (left_for := sink()) is not None:
        left_for.backward = solution.info
    report(kind, solution.info, solver.on_failure)
    return solution


@timed("linear solver")
def _solution(solver: Any, A: LinearOperator, b: Tensor, x0: Tensor | None) -> LinearSolution:
    """The solution, by way of the support of a forward–backward step where A has one."""
    support = A.origin.support() if A.origin.support is not None and solver.solves_on_support else None
    if support is None:
        return solver.solve(A, b, x0)
    shared = A.shared if isinstance(A, _SharedOperator) else ()
    flag = _is_transposed(A)
    K = _SharedOperator(support.operator, shared, b.shape) if any(shared) else support.operator
    reduced = solver.solve(K, _over_shared(lambda b: support.reduced(b, flag), (b,), shared), None)
    value = _over_shared(lambda w, b: support.full(w, b, flag), (reduced.value, b), shared)
    method = f"{reduced.info.method}, on the support: {support.size} of {support.n}"
    return LinearSolution(value, replace(reduced.info, method=method))


def _is_transposed(A: LinearOperator) -> bool:
    return isinstance(A.A if isinstance(A, _SharedOperator) else A, Transpose)


def _is_no_solution(solver: Any, A: LinearOperator, residual: Tensor, u: Tensor, b: Tensor) -> Tensor:
    """Which systems' x is farther from the solution than ``FAR`` max(1, ‖x‖), as far as b can tell, (*batch,).

    ``residual`` is F(x) / max(1, ‖x‖). In a backward pass, Aᵀ u = b, what is differentiated is off by
    bᵀ(x − x*) ≈ bᵀ A⁻¹ F(x) = uᵀ F(x), which costs no product (Becker and Rannacher 2001: dual-weighted residuals).
    Forward mode has no such u, unless A is symmetric: there A⁻¹ F(x) takes a solve of its own.
    """
    if A.is_symmetric or _is_transposed(A):
        return dot(u, residual).abs() > FAR * vector_norm(b)
    # By a copy: a warm start is for systems like the one that was solved.
    return vector_norm(_solution(copy.copy(solver), A, residual, None).value) > FAR


def _but(info: SolveInfo, systems: Tensor, status: Status) -> SolveInfo:
    """The report where some systems were solved, but have that status."""
    systems = systems.expand(info.status.shape) & info.converged
    return replace(info, converged=info.converged & ~systems, status=torch.where(systems, int(status), info.status))


def _over_shared(function: Any, vectors: Sequence[Tensor], shared: Sequence[bool]) -> Tensor:
    """Apply a function that lacks the shared batch dimensions to vectors that have them."""
    places = [i for i, is_shared in enumerate(shared) if is_shared]
    if not places:
        return function(*vectors)
    front = list(range(len(places)))
    moved = [v.movedim(places, front) for v in vectors]
    out = torch.func.vmap(function)(*(v.flatten(0, len(places) - 1) for v in moved))
    return out.unflatten(0, moved[0].shape[: len(places)]).movedim(front, places)


class _SharedOperator(LinearOperator):
    """One operator (or batch) for several right-hand sides: its batch has dimensions in which it is constant."""

    def __init__(self, A: LinearOperator, shared: Sequence[bool], shape: torch.Size) -> None:
        batch_shape = tuple(shape[:-1])
        super().__init__(A.shape, structure=A.structure, batch_shape=batch_shape, dtype=A.dtype, device=A.device)
        self.A, self.shared = A, tuple(shared)
        inverse, kinks, unjudged = A.origin.estimated_inverse, A.origin.kinks, A.origin.unjudged
        self.origin = replace(
            A.origin,
            estimated_inverse=None if inverse is None else lambda v: _over_shared(inverse, (v,), self.shared),
            kinks=None if kinks is None else lambda: self._spread(kinks(), trailing=0),
            unjudged=None if unjudged is None else lambda: self._spread(unjudged(), trailing=1),
        )

    def matvec(self, v: Tensor) -> Tensor:
        return _over_shared(self.A.matvec, (v,), self.shared)

    def rmatvec(self, v: Tensor) -> Tensor:
        return _over_shared(self.A.rmatvec, (v,), self.shared)

    def traceable(self) -> LinearOperator:
        return self._with(self.A.traceable())

    def opened(self) -> LinearOperator:
        return self._with(self.A.opened())

    def _with(self, A: LinearOperator) -> LinearOperator:
        return _SharedOperator(A, self.shared, torch.Size((*self.batch_shape, self.shape[0])))

    def to_dense(self) -> Tensor:
        return self._spread(self.A.to_dense(), trailing=2)

    def diagonal(self) -> Tensor:
        return self._spread(self.A.diagonal(), trailing=1)

    def in_precision(self, dtype: torch.dtype) -> LinearOperator:
        return _SharedOperator(self.A.in_precision(dtype), self.shared, torch.Size((*self.batch_shape, 0)))

    def _spread(self, value: Tensor, trailing: int) -> Tensor:
        for place, is_shared in enumerate(self.shared):
            if is_shared:
                value = value.unsqueeze(place)
        return value.expand(*self.batch_shape, *value.shape[value.ndim - trailing :])
