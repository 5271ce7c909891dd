"""Linear solvers: A u = b for operators on plain tensors of shape (*batch, n)."""

from .auto import Auto
from .base import LinearSolver
from .bicgstab import BiCGStab
from .cg import CG
from .dense import Dense
from .gmres import GMRES
from .iterative import IterativeLinearSolver
from .jacobian_free import JacobianFree
from .lsmr import LSMR
from .minres import MINRES
from .mixed_precision import MixedPrecision
from .neumann import Neumann
from .normal_cg import NormalCG
from .one_step import OneStep
from .scipy_solver import SciPy
from .system import System

__all__ = [
    "CG",
    "GMRES",
    "LSMR",
    "MINRES",
    "Auto",
    "BiCGStab",
    "Dense",
    "IterativeLinearSolver",
    "JacobianFree",
    "LinearSolver",
    "MixedPrecision",
    "Neumann",
    "NormalCG",
    "OneStep",
    "SciPy",
    "System",
]
