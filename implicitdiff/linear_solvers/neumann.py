"""The truncated Neumann series."""

from __future__ import annotations

import torch
from torch import Tensor

from .._vectors import scaled_norm, vector_norm
from ..info import FailurePolicy, LinearSolution, Status
from ..operators import LinearOperator
from .base import LinearSolver, check_count
from .system import System

POWER_ITERATIONS = 8


class Neumann(LinearSolver):
    """u = scale · Σ_{k<terms} (I − scale·A)ᵏ b (Lorraine, Vicol and Duvenaud 2020, Algorithm 3).

    It converges where the spectral radius of I − scale·A is below 1, and sums exactly ``terms`` terms: an
    approximation by design, whose true residual is reported and judged like every other solver's. Where that is above
    the tolerance, its status is ``MAX_ITERATIONS``. Two vectors of n are held.

    * ``terms``: at least 1; each but the first takes one product;
    * ``scale``: a positive number. None means 1 for the operator of a fixed point, A = I − ∂T/∂x, where the series is
      that of the iteration itself; otherwise about 1/‖A‖₂, by eight steps of power iteration (16 products).

    Shapes, further settings and errors are those of :class:`~implicitdiff.LinearSolver`; ``terms`` or ``scale`` out of
    range raise ValueError.

    >>> from implicitdiff.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    >>> Neumann(terms=2, scale=1.0)(A, torch.tensor([1.0, 1.0])).value  # exact: (I − A)² = 0
    tensor([0.5000, 1.0000])
    """

    def __init__(
        self,
        terms: int,
        scale: float | None = None,
        *,
        rtol: float = 1e-6,
        atol: float = 0.0,
        on_failure: FailurePolicy = "warn",
    ) -> None:
        super().__init__(rtol=rtol, atol=atol, on_failure=on_failure)
        if scale is not None and not scale > 0:
            raise ValueError(f"scale is {scale!r}, but it must be a positive number, or None.")
        self.terms, self.scale = check_count(terms, "terms"), scale

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        system = System(A, b)
        norm = scaled_norm(b).unsqueeze(-1)
        unit = b / torch.where((norm > 0) & norm.isfinite(), norm, 1)
        scale = self._scale(system, unit)
        term = scale * unit
        x = term
        for _ in range(self.terms - 1):
            term = term - scale * system(term)
            x = x + term
        x = torch.where(norm > 0, x * torch.where(norm > 0, norm, 1), x * 0)
        used = torch.where(norm.squeeze(-1) > 0, self.terms, 0)
        return LinearSolution(x, self._info(system, b, x, used, torch.full_like(used, int(Status.MAX_ITERATIONS))))

    @property
    def solves_on_support(self) -> bool:
        return False  # the series is that of A

    def _scale(self, system: System, b: Tensor) -> float | Tensor:
        if self.scale is not None:
            return self.scale
        if system.A.origin.of_fixed_point:
            return 1.0
        # ‖A‖₂ by power iteration on AᵀA, from below: a small margin keeps I − scale·A a contraction.
        generator = torch.Generator(device=b.device).manual_seed(0)
        v = torch.randn(b.shape, dtype=b.dtype, device=b.device, generator=generator)
        norm = torch.ones_like(v[..., :1])
        for _ in range(POWER_ITERATIONS):
            v = system.rmatvec(system(v / vector_norm(v).unsqueeze(-1)))
            norm = vector_norm(v).unsqueeze(-1).sqrt()
        return 1 / torch.where(norm > 0, 1.1 * norm, 1)
