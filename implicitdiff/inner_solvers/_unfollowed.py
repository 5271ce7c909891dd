"""Inner solvers whose steps a derivative cannot follow say so."""

from __future__ import annotations

from torch import Tensor

from .._captures import transform_level
from ..errors import ImplicitDiffError
from .base import InnerSolver


def refuse_to_be_unrolled(solver: InnerSolver, residual: Tensor) -> None:
    """Raise where a derivative is taken through the steps: it would be wrong without a word."""
    if residual.requires_grad or transform_level():
        raise not_unrolled(solver)


def not_unrolled(solver: InnerSolver) -> ImplicitDiffError:
    """The error."""
    return ImplicitDiffError(
        f"{type(solver).__name__} cannot be unrolled, as its steps are not followed: unroll a first-order inner solver "
        f"of this library (GradientDescent, LBFGS), or use an implicit layer."
    )
