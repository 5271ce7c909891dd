"""The derivative of one step."""

from __future__ import annotations

from torch import Tensor

from ..info import FailurePolicy, LinearSolution
from ..operators import LinearOperator
from ._scaled_identity import ScaledIdentity


class OneStep(ScaledIdentity):
    """u = stepsize · b: the derivative of the last step of an iteration, x* taken for a constant before it (Bolte,
    Pauwels and Vaiter 2023, one-step differentiation). **Inexact by design.**

    For a fixed point, whose A is I − ∂T/∂x, it is with ``stepsize=1.0`` the derivative of T(x*, θ) in θ alone; for an
    objective, that of one gradient step of length ``stepsize``. Its relative error is at most ‖∂T/∂x‖, the rate at
    which that iteration T converges: small where it is fast, and zero for Newton's, where ∂T/∂x = 0 at the solution.

    The true residual is reported, and converged is said only where it is so; as that is not what one asks for here,
    ``on_failure`` is "ignore" by default.

    Shapes, further settings and errors are those of :class:`~implicitdiff.LinearSolver`; a ``stepsize`` that is not
    positive raises ValueError. One product, for the residual.

    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[2.0, 0.5], [0.5, 2.0]]))
    >>> solution = OneStep(0.5)(A, torch.tensor([2.0, 0.0]))
    >>> solution.value, solution.info.residual_norm, solution.info.method
    (tensor([1., 0.]), tensor(0.2500), 'OneStep, inexact by design')
    """

    def __init__(
        self, stepsize: float = 1.0, *, rtol: float = 1e-6, atol: float = 0.0, on_failure: FailurePolicy = "ignore"
    ) -> None:
        super().__init__(rtol=rtol, atol=atol, on_failure=on_failure)
        if not stepsize > 0:
            raise ValueError(f"stepsize is {stepsize!r}, but it must be a positive number.")
        self.stepsize = stepsize

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        return self._solve(A, b, self.stepsize)
