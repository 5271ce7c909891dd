"""Conditions: the equations F(x, *args) = 0 that characterise a solution.

A condition of your own is a small class with two members, ``residual(x, *args, **kwargs)``, a tree like x, and
``structure``, what is promised of ∂F/∂x: "general", "symmetric" or "positive_definite".
"""

from .base import Condition, Tree
from .conic import ConicPoint, ConicProgram
from .fixed_point import FixedPoint
from .kkt import KKT, KKTPoint
from .mirror_descent import MirrorDescent
from .newton import Newton
from .proximal_gradient import BlockProximalGradient, ProjectedGradient, ProximalGradient
from .root import Root
from .stationary import Stationary

__all__ = [
    "KKT",
    "BlockProximalGradient",
    "Condition",
    "ConicPoint",
    "ConicProgram",
    "FixedPoint",
    "KKTPoint",
    "MirrorDescent",
    "Newton",
    "ProjectedGradient",
    "ProximalGradient",
    "Root",
    "Stationary",
    "Tree",
]
