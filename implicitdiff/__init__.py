"""Implicit differentiation for PyTorch: the derivative of a solution, under every transform.

>>> import implicitdiff as idf
>>> layer = idf.RootLayer(lambda x, y: x**2 - y)
>>> import torch
>>> torch.func.grad(lambda y: layer(torch.ones(()), y))(torch.tensor(4.0))
tensor(0.2500)
"""

from importlib import metadata as _metadata

from . import (
    bilevel,
    conditions,
    cones,
    inner_solvers,
    linear_solvers,
    operators,
    preconditioners,
    profile,
    projections,
    prox,
    testing,
)
from .api import attach, implicit
from .checks import check
from .conditions import KKT, FixedPoint, KKTPoint, Root, Stationary
from .errors import ConvergenceError, ConvergenceWarning, ImplicitDiffError
from .info import LinearSolution, Solution, SolveInfo, Status, record
from .layers import (
    DEQ,
    ArgminLayer,
    FixedPointLayer,
    LeastSquaresLayer,
    QPLayer,
    RootLayer,
    SemidualNewton,
    SinkhornLayer,
    UnrolledLayer,
)
from .least_squares import LeastSquares
from .linear_solvers import (
    CG,
    GMRES,
    LSMR,
    MINRES,
    Auto,
    BiCGStab,
    Dense,
    IterativeLinearSolver,
    JacobianFree,
    LinearSolver,
    MixedPrecision,
    Neumann,
    NormalCG,
    OneStep,
    SciPy,
)
from .operators import LinearOperator

try:
    __version__ = _metadata.version("implicitdiff")
except _metadata.PackageNotFoundError:  # run from a folder of its source
    __version__ = "unknown"

__all__ = [
    "CG",
    "DEQ",
    "GMRES",
    "KKT",
    "LSMR",
    "MINRES",
    "ArgminLayer",
    "Auto",
    "BiCGStab",
    "ConvergenceError",
    "ConvergenceWarning",
    "Dense",
    "FixedPoint",
    "FixedPointLayer",
    "ImplicitDiffError",
    "IterativeLinearSolver",
    "JacobianFree",
    "KKTPoint",
    "LeastSquares",
    "LeastSquaresLayer",
    "LinearOperator",
    "LinearSolution",
    "LinearSolver",
    "MixedPrecision",
    "Neumann",
    "NormalCG",
    "OneStep",
    "QPLayer",
    "Root",
    "RootLayer",
    "SciPy",
    "SemidualNewton",
    "SinkhornLayer",
    "Solution",
    "SolveInfo",
    "Stationary",
    "Status",
    "UnrolledLayer",
    "attach",
    "bilevel",
    "check",
    "conditions",
    "cones",
    "implicit",
    "inner_solvers",
    "linear_solvers",
    "operators",
    "preconditioners",
    "profile",
    "projections",
    "prox",
    "record",
    "testing",
]
