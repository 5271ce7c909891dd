"""Inner solvers: they find x* with F(x*, *args) = 0, on plain tensors of shape (*batch, n)."""

from .anderson import Anderson
from .base import InnerProblem, InnerSolver
from .fixed_point_iteration import FixedPointIteration
from .gradient_descent import GradientDescent
from .lbfgs import LBFGS
from .newton import Newton
from .newton_cg import NewtonCG

__all__ = [
    "LBFGS",
    "Anderson",
    "FixedPointIteration",
    "GradientDescent",
    "InnerProblem",
    "InnerSolver",
    "Newton",
    "NewtonCG",
]
