"""Quadratic programs as a layer."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._autograd import solution_of
from .._equations import Equations
from .._problem import ConditionProblem, InnerProblem
from .._vectors import vector_norm
from ..api import refuse_tracing
from ..conditions import KKT, KKTPoint
from ..errors import ImplicitDiffError
from ..info import FailurePolicy, LinearSolution, Solution, SolveInfo, Status
from ..linear_solvers import Dense, LinearSolver
from ..linear_solvers.base import (
    LinearSolverLike,
    as_linear_solver,
    check_count,
    check_not_negative,
    check_policy,
)
from ..linear_solvers.system import System
from ..operators import LinearOperator, Transpose
from ._interior_point import Optimum, Program, default_tolerance, is_double, solve_program, times


class QPLayer(nn.Module):
    """``layer(Q, q, A, b, G, h)`` is the x that minimises ½ xᵀQx + qᵀx subject to A x = b and G x ≤ h.

    Q of shape (n, n) is symmetric and positive semidefinite (of any other Q the objective sees (Q + Qᵀ)/2 only; zero
    makes a linear program), q is (n,), A (p, n), b (p,), G (m, n), h (m,). A and b, G and h, or all four may be absent.
    Rows of A may depend on each other. All may have leading batch dimensions, which broadcast; x is (*batch, n),
    differentiable in all six.

    It is solved by a primal–dual interior-point method on the homogeneous embedding (Goulart and Chen 2024, Clarabel),
    all problems of a batch at once, and finished on its active set. Each problem is reported by itself: as
    ``CONVERGED``, ``INFEASIBLE`` or ``UNBOUNDED`` (with a proof found for either), or as not solved. What has no
    optimum has NaN for x; the other problems, and their gradients, do not see it. If that x is left out of the loss,
    its own gradient is zero; if not, it is reported in the backward pass too.

    * ``linear_solver``: for derivatives; None means the factorisation that is left from finding x, and
      :class:`~implicitdiff.Dense` where that is singular, to a relative residual of 1e-6 in float64 and ε^½ = 3e-4 in
      float32;
    * ``tol``: the residual, relative to the data and the solution; None means 4e-10 for float64 and 1e-6 for float32
      (ε^0.6 and ε^0.85, ε the rounding unit);
    * ``max_iterations``: per problem; ten are usual;
    * ``warm_start``: try the active set of the last call of the same shape first. Where it still holds, that takes the
      place of all iterations;
    * ``on_failure``: "warn" (default), "raise" or "ignore" when a problem was not solved.

    Raises :class:`~implicitdiff.ImplicitDiffError` where shapes do not fit or Q is not positive semidefinite, and
    ValueError for a setting out of its range; warns with :class:`~implicitdiff.ConvergenceWarning`, or raises
    :class:`~implicitdiff.ConvergenceError`, where a problem was not solved.

    >>> Q, q = torch.tensor([[4.0, 1.0], [1.0, 2.0]]), torch.ones(2)
    >>> b = torch.tensor([1.0], requires_grad=True)
    >>> x = QPLayer()(Q, q, torch.ones(1, 2), b)
    >>> x
    tensor([0.2500, 0.7500], grad_fn=...)
    >>> torch.autograd.grad(x[0], b)[0]
    tensor([0.2500])
    """

    def __init__(
        self,
        *,
        linear_solver: LinearSolverLike | None = None,
        tol: float | None = None,
        max_iterations: int = 100,
        warm_start: bool = False,
        on_failure: FailurePolicy = "warn",
    ) -> None:
        super().__init__()
        if tol is not None:
            check_not_negative(tol=tol)
        self.linear_solver = None if linear_solver is None else as_linear_solver(linear_solver, Dense)
        self.tol, self.max_iterations, self.warm_start = tol, check_count(max_iterations), warm_start
        self.on_failure: FailurePolicy = check_policy(on_failure)
        self._last: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        Q: Tensor,
        q: Tensor,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
    ) -> Tensor:
        """The optimum x, of shape (*batch, n). Name the constraints, G=G, h=h: qpth has them in another order."""
        return self.solve(Q, q, A, b, G, h).value.primal

    def solve(
        self,
        Q: Tensor,
        q: Tensor,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
    ) -> Solution:
        """The optimum with its multipliers, and the reports.

        ``.value`` is a :class:`~implicitdiff.KKTPoint` (x, ν, μ) with Qx + q + Aᵀν + Gᵀμ = 0 and μ ≥ 0, ``.forward``
        and ``.backward`` have one entry per problem.
        """
        data: dict[str, Any] = {"Q": Q, "q": q, "A": A, "b": b, "G": G, "h": h}
        batch = _checked(data)
        refuse_tracing()
        names = [name for name, value in data.items() if value is not None]
        unknowns = [name if name in names else None for name in ("q", "b", "h")]  # of the sizes of x, ν and μ
        options: Any = {"dtype": q.dtype, "device": q.device}
        init = KKTPoint(*(None if k is None else torch.zeros(data[k].shape[-1], **options) for k in unknowns))
        tensors, levels = _aligned(batch, {name: data[name] for name in names})

        condition = _Optimality(_objective, None if A is None else _equality, None if G is None else _inequality)
        factorised = _Factorised(self.on_failure)
        condition.smooth = self.linear_solver is None  # as the default one finds kinks by itself
        linear_solver = factorised if self.linear_solver is None else self.linear_solver
        # The functions above capture nothing, so that nobody need look for it.
        equations = Equations.of(condition, init, tuple(tensors.get(name) for name in data), {})
        solution = Solution(None, None)  # type: ignore[arg-type]  # filled in below
        problem = ConditionProblem(
            equations, _InteriorPoint(self, factorised), linear_solver, weakref.ref(solution), levels=levels
        )
        start = torch.zeros(*batch, equations.vectorizer.size, **options)
        parts = iter(
            solution_of(problem, start, *tensors.values()).split([v.shape[-1] for v in init if v is not None], -1)
        )
        solution.value = KKTPoint(*(None if k is None else next(parts) for k in unknowns))
        return solution

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        settings = ("linear_solver", "tol", "max_iterations", "warm_start", "on_failure")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in settings)


def _objective(x: Tensor, Q: Tensor, q: Tensor, *constraints: Any) -> Tensor:
    return 0.5 * x @ (Q @ x) + q @ x


def _equality(x: Tensor, Q: Tensor, q: Tensor, A: Tensor, b: Tensor, G: Any, h: Any) -> Tensor:
    return A @ x - b


def _inequality(x: Tensor, Q: Tensor, q: Tensor, A: Any, b: Any, G: Tensor, h: Tensor) -> Tensor:
    return G @ x - h


class _Optimality(KKT):
    """A problem without an optimum is looked at in x = 0, and x moves nothing: so its NaN spread to nobody."""

    def residual(self, x: KKTPoint, *args: Any, **kwargs: Any) -> KKTPoint:
        return super().residual(
            pytree.tree_map_only(Tensor, lambda v: torch.where(v.isnan(), 0, v), x), *args, **kwargs
        )


class _InteriorPoint:
    """The inner solver of one call; it leaves what it has factorised."""

    def __init__(self, layer: QPLayer, factorised: _Factorised) -> None:
        self.layer, self.factorised, self.on_failure = layer, factorised, layer.on_failure

    def solve(self, problem: InnerProblem, x0: Tensor) -> tuple[Tensor, SolveInfo]:
        """The optima of all problems, vectors (x, ν, μ) of shape (*batch, n + p + m), and their report."""
        program, layer = _program(problem, x0.shape[:-1]), self.layer
        start = layer._last if layer.warm_start else None
        if start is not None and (start[0].shape, start[1].shape) != (program.q.shape, program.c.shape):
            start = None
        tol = default_tolerance(x0.dtype) if layer.tol is None else layer.tol
        optimum = solve_program(program, tol, layer.max_iterations, start)
        if layer.warm_start:
            layer._last = optimum.x, optimum.y
        self.factorised.optimum = optimum
        found = torch.cat([optimum.x, optimum.y], -1)
        found = torch.where(_has_none(optimum).unsqueeze(-1), torch.nan, found)
        norm, status = _residual_norm(program, optimum), optimum.status
        return found, SolveInfo(optimum.iterations, norm, status == Status.CONVERGED, status, 0, "QPLayer")


def _has_none(optimum: Optimum) -> Tensor:
    """Which problems have no optimum, or none that is finite."""
    status = optimum.status
    return (status == Status.INFEASIBLE) | (status == Status.UNBOUNDED) | (status == Status.NON_FINITE)


class _Factorised(LinearSolver):
    """The linear solver of one call: by the factorisation that the inner solver has left.

    Its solutions are verified by a product. What it does not solve goes to :class:`Dense`: singular systems, and those
    of other points that higher derivatives may ask for.
    """

    optimum: Optimum | None = None

    def __init__(self, on_failure: FailurePolicy) -> None:
        super().__init__(on_failure=on_failure)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        optimum = self.optimum
        self.rtol = max(1e-6, torch.finfo(b.dtype).eps ** 0.5)  # what rounding leaves of single precision
        if optimum is None or not _ends_with(b.shape[:-1], optimum.status.shape):
            return Dense(rtol=self.rtol, on_failure=self.on_failure).solve(A, b)
        system, none = System(A, b), torch.zeros(b.shape[:-1], dtype=torch.int64, device=b.device)
        adjoint = isinstance(A, Transpose) or isinstance(getattr(A, "A", None), Transpose)
        u = optimum.derivative.solve(b, adjoint)
        if not is_double(b.dtype):  # one refinement takes out the shifts, which tell there
            u = u + optimum.derivative.solve(b - system(u), adjoint)
        # What has no optimum has no derivative; nobody asks for it where b = 0.
        lost = _has_none(optimum)
        u = torch.where(lost.unsqueeze(-1), torch.where((b == 0).all(-1, keepdim=True), 0, torch.nan), u)
        info = self._info(system, b, u, none, none + int(Status.BREAKDOWN))
        good = (info.converged & optimum.derivative.active_set.is_regular) | lost
        if not bool(good.all()):
            u = torch.where(good.unsqueeze(-1), u, Dense(rtol=self.rtol).solve(A, b).value)
            info = self._info(system, b, u, none, none + int(Status.BREAKDOWN))
        kinked = info.converged & optimum.degenerate & ~lost & (b != 0).any(-1)
        status = torch.where(kinked, int(Status.NOT_SMOOTH), info.status)
        return LinearSolution(u, replace(info, status=status, converged=info.converged & ~kinked, method="QPLayer"))


def _ends_with(shape: torch.Size, end: torch.Size) -> bool:
    return shape[len(shape) - len(end) :] == end


def _program(problem: InnerProblem, batch: torch.Size) -> Program:
    """The data of all problems, each with all batch dimensions."""
    arguments = problem.problem.equations.arguments
    inputs = problem.aligned_inputs[: len(arguments.tensors)]
    tensors = [tensor.detach().expand(*batch, *tensor.shape[len(batch) :]) for tensor in inputs]
    Q, q, A, b, G, h = arguments.rebuild(tensors)[0]
    Q = 0.5 * (Q + Q.mT)
    _check_convex(Q)
    rows, sides = [v for v in (A, G) if v is not None], [v for v in (b, h) if v is not None]
    C = torch.cat(rows, -2) if rows else q.new_zeros(*batch, 0, q.shape[-1])
    c = torch.cat(sides, -1) if sides else q.new_zeros(*batch, 0)
    return Program(Q, q, C, c, 0 if b is None else b.shape[-1])


def _check_convex(Q: Tensor) -> None:
    if Q.numel() == 0:
        return
    scale = Q.abs().amax((-1, -2))
    shift = torch.finfo(Q.dtype).eps ** 0.5 * torch.where(scale > 0, scale, 1)
    failed = torch.linalg.cholesky_ex(Q + shift[..., None, None] * torch.eye(Q.shape[-1]).to(Q))[1] > 0
    failed = failed & Q.isfinite().all(-1).all(-1)
    if bool(failed.any()):
        least = float(torch.linalg.eigvalsh(Q[failed])[..., 0].min())
        which = f" in {int(failed.sum())} of {failed.numel()} problems" if failed.ndim else ""
        raise ImplicitDiffError(
            f"Q must be positive semidefinite, but its smallest eigenvalue is {least:.3g}{which}: the problem is not "
            f"convex. Add a multiple of the identity, or factor Q = L Lᵀ."
        )


def _residual_norm(program: Program, optimum: Optimum) -> Tensor:
    """‖(Qx + q + Cᵀy, Ax − b, min(μ, h − Gx))‖₂"""
    Q, q, C, c, p = program
    dual, slack = times(Q, optimum.x) + q + times(C.mT, optimum.y), c - times(C, optimum.x)
    return vector_norm(torch.cat([dual, slack[..., :p], torch.minimum(optimum.y, slack)[..., p:]], -1))


# -------------------------------------------------------------------------------------------------------- shapes

_RANKS = {"Q": 2, "q": 1, "A": 2, "b": 1, "G": 2, "h": 1}


def _checked(data: dict[str, Tensor | None]) -> torch.Size:
    """The common batch shape, or an error that names what does not fit."""
    for name, other in (("A", "b"), ("G", "h")):
        if (data[name] is None) != (data[other] is None):
            given, absent = (name, other) if data[other] is None else (other, name)
            raise ImplicitDiffError(f"{given} was given without {absent}: {name} and {other} come together.")
    for name, value in data.items():
        if value is None and name not in ("Q", "q"):
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            given = f"a {value.dtype} tensor" if isinstance(value, Tensor) else repr(value)
            raise ImplicitDiffError(f"{name} must be a floating-point tensor, but it is {given}.")
        q = data["q"]
        if isinstance(q, Tensor) and (value.dtype, value.device) != (q.dtype, q.device):
            raise ImplicitDiffError(
                f"{name} is {value.dtype} on {value.device} and q is {q.dtype} on {q.device}: convert one of them."
            )
    given_shapes = {name: tuple(v.shape) for name, v in data.items() if v is not None}
    n = given_shapes["q"][-1:]
    sizes = {"Q": 2 * n, "q": n}
    for name, other in (("A", "b"), ("G", "h")):
        if name in given_shapes:
            rows = given_shapes[other][-1:]
            sizes |= {name: rows + n, other: rows}
    if any(given_shapes[k][-_RANKS[k] :] != size or len(size) != _RANKS[k] for k, size in sizes.items()):
        raise ImplicitDiffError(
            f"the shapes must be Q (*batch, n, n), q (*batch, n), A (*batch, p, n), b (*batch, p), G (*batch, m, n) "
            f"and h (*batch, m), but they are {', '.join(f'{k} {v}' for k, v in given_shapes.items())}."
        )
    leading = {k: v[: len(v) - _RANKS[k]] for k, v in given_shapes.items()}
    try:
        return torch.broadcast_shapes(*leading.values())
    except RuntimeError:
        raise ImplicitDiffError(
            f"the batch dimensions do not broadcast: {', '.join(f'{k} {v}' for k, v in leading.items())}."
        ) from None


def _aligned(batch: torch.Size, data: dict[str, Any]) -> tuple[dict[str, Any], tuple[tuple[int | None, ...], ...]]:
    """The tensors without the batch dimensions along which they are constant, and for each dimension who has it."""
    tensors, having = {}, []
    for name, tensor in data.items():
        lead = tensor.ndim - _RANKS[name]
        sizes = [None] * (len(batch) - lead) + list(tensor.shape[:lead])
        has = [size == wanted for size, wanted in zip(sizes, batch, strict=True)]
        kept = [size for size, there in zip(batch, has, strict=True) if there]
        tensors[name] = tensor.reshape(kept + list(tensor.shape[lead:]))
        having.append([0 if there else None for there in has])
    return tensors, tuple(zip(*having, strict=True))
