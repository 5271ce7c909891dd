"""Linear solvers: A u = b for operators on plain tensors of shape (*batch, n)."""

from .auto import Auto
from .base import IterativeLinearSolver, LinearSolver
from .cg import CG
from .dense import Dense
from .gmres import GMRES
from .minres import MINRES
from .neumann import Neumann

__all__ = ["CG", "GMRES", "MINRES", "Auto", "Dense", "IterativeLinearSolver", "LinearSolver", "Neumann"]
