"""Inner solvers: they find x* with F(x*, *args) = 0, on plain tensors of shape (*batch, n)."""

from .anderson import Anderson
from .base import InnerProblem, InnerSolver
from .bisection import Bisection
from .block_coordinate_descent import BlockCoordinateDescent
from .broyden import Broyden
from .fixed_point_iteration import FixedPointIteration
from .gauss_newton import GaussNewton
from .gradient_descent import GradientDescent
from .lbfgs import LBFGS
from .levenberg_marquardt import LevenbergMarquardt
from .mirror_descent import MirrorDescent
from .nelder_mead import NelderMead
from .newton import Newton
from .newton_cg import NewtonCG
from .nonlinear_cg import NonlinearCG
from .projected_gradient import ProjectedGradient
from .proximal_gradient import ProximalGradient
from .scipy_minimize import SciPyMinimize
from .scipy_root import SciPyRoot
from .torch_optimizer import TorchOptimizer

__all__ = [
    "LBFGS",
    "Anderson",
    "Bisection",
    "BlockCoordinateDescent",
    "Broyden",
    "FixedPointIteration",
    "GaussNewton",
    "GradientDescent",
    "InnerProblem",
    "InnerSolver",
    "LevenbergMarquardt",
    "MirrorDescent",
    "NelderMead",
    "Newton",
    "NewtonCG",
    "NonlinearCG",
    "ProjectedGradient",
    "ProximalGradient",
    "SciPyMinimize",
    "SciPyRoot",
    "TorchOptimizer",
]
