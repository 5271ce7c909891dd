"""Inner solvers: they find x* with F(x*, *args) = 0, on plain tensors of shape (*batch, n)."""

from .anderson import Anderson
from .base import InnerProblem, InnerSolver
from .bisection import Bisection
from .broyden import Broyden
from .fixed_point_iteration import FixedPointIteration
from .gradient_descent import GradientDescent
from .lbfgs import LBFGS
from .nelder_mead import NelderMead
from .newton import Newton
from .newton_cg import NewtonCG
from .nonlinear_cg import NonlinearCG
from .scipy_minimize import SciPyMinimize
from .scipy_root import SciPyRoot
from .torch_optimizer import TorchOptimizer

__all__ = [
    "LBFGS",
    "Anderson",
    "Bisection",
    "Broyden",
    "FixedPointIteration",
    "GradientDescent",
    "InnerProblem",
    "InnerSolver",
    "NelderMead",
    "Newton",
    "NewtonCG",
    "NonlinearCG",
    "SciPyMinimize",
    "SciPyRoot",
    "TorchOptimizer",
]
