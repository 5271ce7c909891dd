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
from ._problem import ConditionProblem, InnerProblem
from ._tree import is_differentiable
from .api import check_condition
from .info import Solution
from .linear_solvers import Auto


@dataclass
class CheckReport:
    """What :func:`check` found; ``print`` it."""

    structure: bool = True
    """The declared structure holds for random vectors."""
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

    >>> import implicitdiff as idf
    >>> layer = idf.RootLayer(lambda x, y: x**2 - y)
    >>> check(layer, torch.ones(2).double(), torch.tensor([4.0, 9.0]).double()).ok
    True
    """
    condition = getattr(layer, "condition", None)
    if condition is None:
        raise TypeError(f"check takes a layer or a function wrapped by implicit(...), but it was given {layer!r}.")
    check_condition(condition)
    with torch.enable_grad():
        solution = layer(init, *args, **kwargs)
    report = CheckReport()
    equations = Equations.of(condition, solution, args, kwargs, "the solution", getattr(layer, "objective", None))
    x = equations.vectorizer.ravel(solution, "the solution").detach()
    tensors = [t.detach() for t in equations.arguments.tensors]
    unsolved = Solution(None, None)  # type: ignore[arg-type]
    problem = InnerProblem(ConditionProblem(equations, None, None, weakref.ref(unsolved)), tensors)
    generator = torch.Generator(device=x.device).manual_seed(0)
    loose = torch.finfo(x.dtype).eps ** 0.5

    _check_determinism(report, problem, x, loose)
    _check_structure(report, problem, x, condition.structure, generator, loose)
    if report.deterministic:
        _check_residual(report, problem, x, loose)
        _check_gradient(report, layer, init, equations, generator)
    return report


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
    elif structure == "positive_definite" and not float(torch.vdot(v, Av).real) > 0:
        report.problems.append(
            "structure is 'positive_definite', but vᵀ(∂F/∂x)v ≤ 0 for some v: declare it 'symmetric'"
        )
    report.structure = not report.problems or "structure" not in report.problems[-1]


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
        gradients = torch.autograd.grad(value(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True)
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
