"""``check``: what a layer promises, tried out at one point."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._equations import Equations
from ._jacobian import JacobianOperator
from ._names import text_of
from ._problem import ConditionProblem, InnerProblem
from ._tree import is_differentiable
from .api import check_condition
from .info import RecordedSolve, Solution, record
from .linear_solvers import MINRES, Auto

EXACT_UP_TO = 64
"""Up to this n all eigenvalues are computed, above it the extreme ones are estimated."""


@dataclass
class CheckReport:
    """What :func:`~implicitdiff.check` found; ``print`` it.

    A condition that promises a symmetric ∂F/∂x without having one:

    >>> import implicitdiff as idf
    >>> class Rotated(idf.Root):
    ...     structure = "symmetric"
    >>> R = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    >>> @idf.implicit(Rotated(lambda x, y: R @ x - y), linear_solver=idf.Auto(on_failure="ignore"))
    ... def rotated(init: None, y: torch.Tensor) -> torch.Tensor:
    ...     return torch.linalg.solve(R, y)
    >>> report = idf.check(rotated, None, torch.ones(2, dtype=torch.float64))
    >>> report.ok, report.structure
    (False, False)
    >>> print(report.problems[0])
    structure is 'symmetric', but ∂F/∂x is not symmetric: declare it 'general'
    """

    structure: bool = True
    """The declared structure holds: symmetric as a random vector sees it, definite by the smallest eigenvalue."""
    deterministic: bool = True
    """Two evaluations of the residual agree."""
    distance: float = 0.0
    """‖A⁻¹F(x*)‖₂ / max(1, ‖x*‖₂): the estimated relative distance of the solution found from the exact one."""
    gradient_error: float = 0.0
    """Relative difference between the gradient and central differences, along a random direction of the args."""
    problems: list[str] = field(default_factory=list)
    """One line for each thing that is wrong."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        head = "ok" if self.ok else "\n".join(f"wrong: {problem}" for problem in self.problems)
        return f"{head}\n(distance {self.distance:.1e}, gradient error {self.gradient_error:.1e})"


def check(layer: Callable[..., Any], init: Any, *args: Any, **kwargs: Any) -> CheckReport:
    """Try out a layer, or a solver wrapped by :func:`implicitdiff.implicit`, at one init and args.

    It looks at the declared structure of ∂F/∂x (a wrong one gives wrong gradients), at determinism (dropout in a
    condition does too), at the residual of the solution, and at the gradient in all tensors of the args against central
    differences along one random direction. It costs three solves; use it in float64.

    ``init`` and ``args`` are trees of the shapes that the layer takes. It returns a
    :class:`~implicitdiff.checks.CheckReport`. Raises TypeError for what is neither a layer nor wrapped, and what the
    layer itself raises.

    >>> import implicitdiff as idf
    >>> layer = idf.RootLayer(lambda x, y: x**2 - y)
    >>> check(layer, torch.ones(2).double(), torch.tensor([4.0, 9.0]).double()).ok
    True
    """
    condition = getattr(layer, "condition", None)
    if condition is None:
        raise TypeError(
            f"check takes an ArgminLayer, RootLayer, FixedPointLayer or a function wrapped by implicit(...), but it "
            f"was given {text_of(layer)}. Of a DEQ, check its .layer with one sample; QPLayer, SinkhornLayer and "
            f"UnrolledLayer have no condition of yours that could be wrong."
        )
    check_condition(condition)
    report = CheckReport()
    with record() as history, torch.enable_grad():
        solution = layer(init, *args, **kwargs)
    failed = _failed(history, getattr(layer, "inner_solver", None))
    report.problems += [f"the inner solve failed: {solve.info.summary()}" for solve in failed]
    equations = Equations.of(condition, solution, args, kwargs, "the solution", getattr(layer, "objective", None))
    x = equations.vectorizer.ravel(solution, "the solution").detach()
    if not bool(x.isfinite().all()):
        report.problems.append("the solution is not finite: look for overflow, a division by zero or a log of zero")
        return report
    tensors = [t.detach() for t in equations.arguments.tensors]
    unsolved = Solution(None, None)  # type: ignore[arg-type]
    problem = InnerProblem(ConditionProblem(equations, None, None, weakref.ref(unsolved)), tensors)
    generator = torch.Generator(device=x.device).manual_seed(0)
    loose = torch.finfo(x.dtype).eps ** 0.5

    with torch.no_grad():
        _check_determinism(report, problem, x, loose)
        _check_structure(report, problem, x, condition.structure, generator, loose)
        if report.deterministic:
            _check_residual(report, problem, x, loose)
    if report.deterministic:
        _check_gradient(report, layer, init, equations, generator)
    return report


def _failed(history: list[RecordedSolve], solver: Any) -> list[RecordedSolve]:
    """The solves that failed; none where the user wants failures ignored, as in a fixed number of steps."""
    if getattr(solver, "on_failure", "warn") == "ignore":
        return []
    return [solve for solve in history if not bool(solve.info.converged.all())]


def _check_determinism(report: CheckReport, problem: InnerProblem, x: Tensor, loose: float) -> None:
    first, second = problem.residual(x), problem.residual(x)
    # At the solution the residual is near 0: what counts is the difference beside that of a neighbouring point.
    scale = float((_seeded(problem, x + loose * (1 + x.abs())) - _seeded(problem, x)).norm())
    if not float((second - first).norm()) <= max(0.1 * scale, torch.finfo(x.dtype).tiny):
        report.deterministic = False
        report.problems.append(
            "two evaluations of the condition differ: is there dropout or another random operation in it? Put modules "
            "into eval mode, or draw the random numbers outside and pass them as an argument"
        )


def _seeded(problem: InnerProblem, x: Tensor) -> Tensor:
    """The residual with the same random numbers each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return problem.residual(x)


def _check_structure(
    report: CheckReport, problem: InnerProblem, x: Tensor, structure: str, generator: torch.Generator, loose: float
) -> None:
    if structure == "general" or not x.numel():
        return
    A = JacobianOperator(problem.graph_residual, x, "general")
    v = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    Av, Atv = A(v), A.T(v)
    if not float((Av - Atv).norm()) <= 10 * loose * float(Av.norm()):
        report.problems.append(f"structure is {structure!r}, but ∂F/∂x is not symmetric: declare it 'general'")
    elif structure == "positive_definite" and (least := _negative_eigenvalue(A, v)) is not None:
        report.problems.append(
            f"structure is 'positive_definite', but ∂F/∂x has the eigenvalue {least:.3g}: declare it 'symmetric'"
        )
    report.structure = not report.problems or "structure" not in report.problems[-1]


def _negative_eigenvalue(A: JacobianOperator, v: Tensor) -> float | None:
    """The smallest eigenvalue of a symmetric A, where that is not positive up to rounding.

    Of a large A it is the smallest Ritz value of some steps from v. That lies above it, so that it is negative only
    where A is not definite; an isolated negative eigenvalue is found in a few steps.
    """
    n = len(v)
    if n <= EXACT_UP_TO:
        matrix = A.to_dense()
        values = torch.linalg.eigvalsh((matrix + matrix.mH) / 2)
        low, high = float(values[0]), float(values[-1])
    else:
        extremes = MINRES(max_iterations=100, on_failure="ignore").solve(A, v).info.eigenvalue_range
        assert extremes is not None
        low, high = (float(value) for value in extremes)
    rounding = 10 * n * torch.finfo(v.dtype).eps * max(abs(low), abs(high))
    return low if low < -rounding or high <= 0 else None


def _check_residual(report: CheckReport, problem: InnerProblem, x: Tensor, loose: float) -> None:
    correction = Auto(on_failure="ignore").solve(problem.jacobian(x), problem.residual(x)).value
    report.distance = float(correction.norm() / x.norm().clamp(min=1))
    if not report.distance <= loose**0.5:
        report.problems.append(
            f"the solution is about {report.distance:.1e} (relative) away from where the condition holds: tighten the "
            f"inner solver, or the condition does not describe what it solves"
        )


def _check_gradient(
    report: CheckReport, layer: Callable[..., Any], init: Any, equations: Equations, generator: torch.Generator
) -> None:
    tensors = [t.detach() for t in equations.arguments.tensors]
    floating = [i for i, t in enumerate(tensors) if is_differentiable(t) and t.numel()]
    if not floating:
        return
    draw = lambda t: torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=generator)  # noqa: E731
    directions = {i: draw(tensors[i]) * tensors[i].abs().mean().clamp(min=1e-3) for i in floating}
    weights: Tensor | None = None

    def value(moved: dict[int, Tensor]) -> Tensor:
        nonlocal weights
        args, kwargs = equations.arguments.rebuild([moved.get(i, t) for i, t in enumerate(tensors)])
        x = equations.vectorizer.ravel(layer(init, *args, **kwargs), "the solution")
        weights = draw(x) if weights is None else weights
        return (weights.conj() * x).sum().real

    with torch.enable_grad():
        leaves = {i: tensors[i].clone().requires_grad_() for i in floating}
        at_leaves = value(leaves)
        with record() as history:
            gradients = torch.autograd.grad(
                at_leaves, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
    failed = _failed(history, getattr(layer, "linear_solver", None))
    report.problems += [f"a linear solve failed: {solve.info.summary()}" for solve in failed]
    slope = sum(float((g.conj() * d).sum().real) for g, d in zip(gradients, directions.values(), strict=True))
    eps = torch.finfo(equations.vectorizer.dtype).eps ** (1 / 3)
    with torch.no_grad():
        ahead = value({i: tensors[i] + eps * d for i, d in directions.items()})
        behind = value({i: tensors[i] - eps * d for i, d in directions.items()})
    measured = float(ahead - behind) / (2 * eps)
    report.gradient_error = abs(slope - measured) / max(abs(measured), abs(slope), eps)
    if not report.gradient_error <= 100 * eps:
        report.problems.append(
            f"the gradient along a random direction is {slope:.6g}, but central differences give {measured:.6g}: the "
            f"condition does not describe the solution, the inner solver is too loose for the comparison, or the "
            f"solution is not differentiable there"
        )
