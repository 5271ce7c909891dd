"""Linear solvers: A u = b for operators on plain tensors of shape (*batch, n)."""

from .auto import Auto
from .base import LinearSolver
from .bicgstab import BiCGStab
from .cg import CG
from .dense import Dense
from .gmres import GMRES
from .iterative import IterativeLinearSolver
from .lsmr import LSMR
from .minres import MINRES
from .neumann import Neumann
from .normal_cg import NormalCG
from .scipy_solver import SciPy

__all__ = [
    "CG",
    "GMRES",
    "LSMR",
    "MINRES",
    "Auto",
    "BiCGStab",
    "Dense",
    "IterativeLinearSolver",
    "LinearSolver",
    "Neumann",
    "NormalCG",
    "SciPy",
]
