"""Bisection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._captures import is_transformed
from .._vectors import vector_norm
from ..errors import ImplicitDiffError
from ..info import RUNNING, FailurePolicy, Status
from ._unfollowed import refuse_to_be_unrolled
from .base import InnerProblem, InnerSolver


class BisectionState(NamedTuple):
    x: Tensor
    residual: Tensor
    residual_norm: Tensor
    status: Tensor
    lower: Tensor
    upper: Tensor
    sign: Tensor  # of F at the lower ends


class Bisection(InnerSolver):
    """Bisection of the interval from ``lower`` to ``upper``, each component of x in its own.

    For F whose i-th component depends on the i-th component of x only: any function of one unknown, or many of them
    side by side. Each component must change its sign between ``lower`` and ``upper``, which are numbers or tensors that
    broadcast to x as a vector, (*batch, n); init gives only the shape.

    A system ends as ``BREAKDOWN`` where some component has no change of sign, as ``NON_FINITE`` where F is NaN (an
    infinite F has a sign, and is fine), and as ``STAGNATED`` where the interval has shrunk to neighbouring numbers and
    ‖F‖ is still above ``tol``: a pole or a jump, no root.

    Each step halves the interval and costs one evaluation of F (Burden and Faires 2011, Algorithm 2.1). Further
    settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`.

    Raises ValueError where ``lower`` is not below ``upper`` or one of them is not finite, and
    :class:`~implicitdiff.ImplicitDiffError` where they do not broadcast to x.

    >>> import implicitdiff as idf
    >>> layer = idf.RootLayer(lambda x, y: x**3 - y, inner_solver=Bisection(0.0, 10.0))
    >>> y = torch.tensor([8.0, 27.0], dtype=torch.float64, requires_grad=True)
    >>> x = layer(torch.zeros_like(y), y)
    >>> x.detach().round(decimals=6), torch.autograd.grad(x.sum(), y)[0].round(decimals=6)  # 1 / (3 x²)
    (tensor([2., 3.], dtype=torch.float64), tensor([0.0833, 0.0370], dtype=torch.float64))
    """

    def __init__(
        self,
        lower: float | Tensor,
        upper: float | Tensor,
        *,
        tol: float | None = None,
        max_iterations: int = 200,
        on_failure: FailurePolicy = "warn",
    ) -> None:
        super().__init__(tol=tol, max_iterations=max_iterations, on_failure=on_failure)
        low, high = torch.as_tensor(lower), torch.as_tensor(upper)
        if is_transformed(low) or is_transformed(high):
            raise ImplicitDiffError(
                "lower or upper belongs to a torch.func transform, but brackets are settings: give one that holds for "
                "all samples, and make the solver outside of vmap."
            )
        if not bool(low.isfinite().all() & high.isfinite().all() & (low < high).all()):
            raise ValueError(
                f"lower is {lower!r} and upper is {upper!r}, but both must be finite, and lower below upper."
            )
        self.lower, self.upper = lower, upper

    def start(self, problem: InnerProblem, x0: Tensor) -> BisectionState:
        lower, upper = self._end("lower", x0), self._end("upper", x0)
        at_lower, at_upper = problem.residual(lower), problem.residual(upper)
        refuse_to_be_unrolled(self, at_lower)
        sign = at_lower.sign()
        # A root at an end closes the interval there.
        lower, upper = torch.where(at_upper == 0, upper, lower), torch.where(at_lower == 0, lower, upper)
        unbracketed = (sign * at_upper.sign() > 0).any(-1)
        nan = (at_lower.isnan() | at_upper.isnan()).any(-1)
        status = torch.where(unbracketed, int(Status.BREAKDOWN), RUNNING)
        status = torch.where(nan, int(Status.NON_FINITE), status)
        return self._state(problem, lower, upper, sign, status)

    def step(self, problem: InnerProblem, state: BisectionState) -> BisectionState:
        sign = state.residual.sign()
        left, right = sign != state.sign, (sign == state.sign) | (sign == 0)
        lower, upper = torch.where(right, state.x, state.lower), torch.where(left, state.x, state.upper)
        return self._state(problem, lower, upper, state.sign, state.status)

    def _state(
        self, problem: InnerProblem, lower: Tensor, upper: Tensor, sign: Tensor, status: Tensor
    ) -> BisectionState:
        x = 0.5 * lower + 0.5 * upper
        residual = problem.residual(x)
        norm = vector_norm(residual)
        norm = torch.where(norm.isinf(), torch.finfo(norm.dtype).max, norm)  # a sign is all that is needed
        closed = ((x == lower) | (x == upper)).all(-1) & (status == RUNNING)
        status = torch.where(closed, int(Status.STAGNATED), status)
        return BisectionState(x, residual, norm, status, lower, upper, sign)

    def _end(self, name: str, x0: Tensor) -> Tensor:
        end = torch.as_tensor(getattr(self, name), dtype=x0.dtype, device=x0.device)
        try:
            return end.expand(x0.shape)
        except RuntimeError:
            raise ImplicitDiffError(
                f"{name} has the shape {tuple(end.shape)}, but it must broadcast to x as a vector, {tuple(x0.shape)}."
            ) from None

    def _threshold(self, initial: Tensor) -> Tensor:
        # Where F is infinite at first, it has no scale to be judged by.
        return super()._threshold(torch.where(initial < torch.finfo(initial.dtype).max, initial, 1))
