"""Jacobian-free backpropagation."""

from __future__ import annotations

from torch import Tensor

from ..info import FailurePolicy, LinearSolution
from ..operators import LinearOperator
from ._scaled_identity import ScaledIdentity


class JacobianFree(ScaledIdentity):
    """u = b: the Jacobian of a fixed point, A = I − ∂T/∂x, taken for I (Fung et al. 2022, JFB). **Inexact by design.**

    Where T is a contraction in x and ∂T/∂θ is well conditioned, what results is still a descent direction (their
    main theorem), at the price of a derivative of T(x*, θ) in θ alone. It is :class:`OneStep` of length one, under the
    name by which it is known for deep equilibrium models.

    The true residual is reported, and converged is said only where it is so; as that is not what one asks for here,
    ``on_failure`` is "ignore" by default.

    Shapes, settings and errors are those of :class:`~implicitdiff.LinearSolver`. One product, for the residual.

    >>> import implicitdiff as idf
    >>> layer = idf.FixedPointLayer(lambda x, t: 0.1 * torch.cos(x) + t, linear_solver=JacobianFree())
    >>> torch.func.grad(lambda t: layer(torch.zeros(()), t))(torch.tensor(1.0))  # exact: 1 / (1 + 0.1 sin x) = 0.9199
    tensor(1.)
    """

    def __init__(self, *, rtol: float = 1e-6, atol: float = 0.0, on_failure: FailurePolicy = "ignore") -> None:
        super().__init__(rtol=rtol, atol=atol, on_failure=on_failure)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        return self._solve(A, b, 1.0)
