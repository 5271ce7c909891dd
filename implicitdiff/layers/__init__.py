"""Layers: modules whose output is the solution of a problem."""

from .deq import DEQ
from .implicit_layers import ArgminLayer, FixedPointLayer, ImplicitLayer, RootLayer
from .least_squares import LeastSquaresLayer
from .quadratic_program import QPLayer
from .sinkhorn import SemidualNewton, SinkhornLayer
from .unrolled import UnrolledLayer

__all__ = [
    "DEQ",
    "ArgminLayer",
    "FixedPointLayer",
    "ImplicitLayer",
    "LeastSquaresLayer",
    "QPLayer",
    "RootLayer",
    "SemidualNewton",
    "SinkhornLayer",
    "UnrolledLayer",
]
