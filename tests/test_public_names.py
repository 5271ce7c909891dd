"""The names that users call: exactly those, each documented and annotated."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest

import imaml
import implicitdiff as idf

ROOT_NAMES = {
    *("ArgminLayer", "RootLayer", "FixedPointLayer", "UnrolledLayer", "implicit", "attach", "check", "record"),
    *("Root", "FixedPoint", "Stationary", "KKT", "KKTPoint", "LeastSquares"),
    *("LinearOperator", "LinearSolver", "IterativeLinearSolver"),
    *("CG", "MINRES", "GMRES", "Neumann", "Dense", "Auto"),
    *("SolveInfo", "Solution", "LinearSolution", "Status"),
    *("BiCGStab", "LSMR", "MixedPrecision", "NormalCG", "SciPy", "OneStep", "JacobianFree"),
    *("DEQ", "LeastSquaresLayer", "QPLayer", "SinkhornLayer", "SemidualNewton"),
    *("bilevel", "cones", "projections", "prox"),
    *("ConvergenceError", "ConvergenceWarning", "ImplicitDiffError"),
    *("conditions", "inner_solvers", "linear_solvers", "operators", "preconditioners", "profile", "testing"),
}
INNER_SOLVERS = {
    *("GradientDescent", "LBFGS", "NewtonCG", "Newton", "FixedPointIteration", "Anderson"),
    *("GaussNewton", "LevenbergMarquardt"),
    *("NonlinearCG", "NelderMead", "ProximalGradient", "ProjectedGradient", "MirrorDescent", "BlockCoordinateDescent"),
    *("Bisection", "Broyden", "SciPyMinimize", "SciPyRoot", "TorchOptimizer"),
    *("InnerSolver", "InnerProblem"),
}


def test_the_root_exports_exactly_these() -> None:
    assert set(idf.__all__) == ROOT_NAMES
    assert set(idf.inner_solvers.__all__) == INNER_SOLVERS
    assert set(imaml.__all__) == {"IMAML", "MAML", "Reptile", "Learner", "LearnedRegularization", "MetaLoss", "tasks"}


def public_objects() -> list[tuple[str, Any]]:
    found = [(f"idf.{n}", getattr(idf, n)) for n in idf.__all__]
    found += [(f"inner_solvers.{n}", getattr(idf.inner_solvers, n)) for n in sorted(INNER_SOLVERS)]
    found += [(f"operators.{n}", getattr(idf.operators, n)) for n in ("DenseOperator", "FunctionOperator")]
    found += [("preconditioners.Jacobi", idf.preconditioners.Jacobi)]
    for module in (idf.conditions, idf.projections, idf.prox):
        found += [(f"{module.__name__}.{n}", getattr(module, n)) for n in module.__all__ if n != "Tree"]
    found += [(f"imaml.{n}", getattr(imaml, n)) for n in imaml.__all__]
    return found + [(f"imaml.tasks.{n}", getattr(imaml.tasks, n)) for n in imaml.tasks.__all__]


@pytest.mark.parametrize(("name", "thing"), public_objects(), ids=lambda v: v if isinstance(v, str) else "")
def test_every_public_name_is_documented_and_annotated(name: str, thing: Any) -> None:
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if isinstance(thing, ModuleType):
        return
    functions = [thing] if inspect.isfunction(thing) else []
    if inspect.isclass(thing):
        own = {k: v for k, v in vars(thing).items() if not k.startswith("_")}
        functions += [f for f in own.values() if inspect.isfunction(f)]
    for function in functions:
        assert "return" in function.__annotations__, f"{name}.{function.__name__} does not say what it returns"
        assert (
            function.__doc__
            or function.__name__ in ("start", "step", "solve", "finish", "sample")
            or any(getattr(getattr(base, function.__name__, None), "__doc__", None) for base in thing.__mro__[1:])
        ), f"{name}.{function.__name__} has no docstring"
