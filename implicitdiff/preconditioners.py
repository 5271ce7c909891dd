"""Preconditioners: callables ``A -> (v -> M⁻¹ v)`` with M ≈ A, for the ``preconditioner`` setting of linear solvers.

Any such callable serves. It is given the operator that is solved with, which in a backward pass is Aᵀ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import ImplicitDiffError
from .operators import LinearOperator

Preconditioner = Callable[[LinearOperator], Callable[[Tensor], Tensor]]
"""From the operator A to v ↦ M⁻¹ v, M ≈ A. It is given the operator that is solved with, so Aᵀ in a backward pass."""

__all__ = ["InverseLBFGS", "Jacobi", "Nystrom"]
__dir__ = __all__.copy  # for tab completion

EXACT_UP_TO = 64
"""Up to this n the diagonal is taken exactly, by n products, where the operator does not know it."""


class Jacobi:
    """The diagonal of A as a preconditioner, with 1 in the place of zeros.

    Exact where the operator knows its diagonal or is small; otherwise estimated with ``probes`` products (Bekas,
    Kokiopoulou and Saad 2007: Σ z ∘ A z / Σ z ∘ z over random signs z).

    ``Jacobi()(A)`` is a function of v of shape (*batch, n), M⁻¹ v. Raises ValueError for ``probes`` below 1. Where A is
    symmetric the diagonal is taken without its sign, as M must be positive definite.

    >>> from implicitdiff.operators import DenseOperator
    >>> apply = Jacobi()(DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 4.0]])))
    >>> apply(torch.tensor([2.0, 4.0]))
    tensor([1., 1.])
    """

    def __init__(self, probes: int = 32) -> None:
        if int(probes) != probes or probes < 1:
            raise ValueError(f"probes is {probes!r}, but it must be a whole number of at least 1.")
        self.probes = probes

    def __call__(self, A: LinearOperator) -> Callable[[Tensor], Tensor]:
        exact = A.diagonal_is_cheap or A.shape[0] <= EXACT_UP_TO
        diagonal = A.diagonal() if exact else self._estimated(A)
        if A.is_symmetric:
            diagonal = diagonal.abs()  # M must be positive definite for CG and MINRES
        diagonal = torch.where(diagonal == 0, 1, diagonal)
        return lambda v: v / diagonal

    def _estimated(self, A: LinearOperator) -> Tensor:
        signs = _random(A, self.probes).real.sign()
        return torch.stack([z * A(z.to(A.dtype)) for z in signs]).mean(0)

    def __repr__(self) -> str:
        return f"Jacobi(probes={self.probes})"


class Nystrom:
    """The randomised Nyström preconditioner, for a positive definite A with few large eigenvalues.

    It is that of Frangella, Tropp and Udell (2021, Algorithm 2.1 and Eq. 1.3), for A = H + μI, H positive
    semidefinite: from ``rank`` products it finds the leading eigenvectors U and eigenvalues Λ of A, and
    M⁻¹ = λ_min(Λ) U Λ⁻¹ Uᵀ + (I − U Uᵀ), so that A's eigenvalues beyond the rank are what CG is left with. (The paper
    builds it from H and adds μ; as U Λ Uᵀ is taken of A here, μ is not asked for.)

    ``Nystrom(rank)(A)`` is a function of v of shape (*batch, n), M⁻¹ v, that holds ``rank`` vectors a system; the
    identity where A turns out not to be positive semidefinite. Raises ValueError for a ``rank`` below 1.

    >>> from implicitdiff import CG
    >>> from implicitdiff.operators import DiagonalOperator
    >>> eigenvalues = torch.cat([torch.logspace(2, 6, 20), torch.linspace(1, 2, 80)]).double()
    >>> A = DiagonalOperator(eigenvalues, "positive_definite")
    >>> b = torch.ones(100).double()
    >>> [int(solver(A, b).info.iterations) for solver in (CG(), CG(preconditioner=Nystrom(rank=20)))]
    [101, 19]
    """

    def __init__(self, rank: int) -> None:
        if int(rank) != rank or rank < 1:
            raise ValueError(f"rank is {rank!r}, but it must be a whole number of at least 1.")
        self.rank = rank

    def __call__(self, A: LinearOperator) -> Callable[[Tensor], Tensor]:
        rank = min(self.rank, A.shape[0])
        if rank == 0:
            return lambda v: v
        test = torch.linalg.qr(_random(A, rank).movedim(0, -1))[0]  # (*batch, n, rank)
        sketch = torch.stack([A(column) for column in test.movedim(-1, 0).contiguous()], dim=-1)
        # A small shift, taken off again below, makes the factorisation below safe.
        shift = torch.finfo(sketch.dtype).eps * torch.linalg.matrix_norm(sketch)[..., None, None]
        shifted = sketch + shift * test
        core = test.mH @ shifted
        factor, failed = torch.linalg.cholesky_ex((core + core.mH) / 2)
        if bool(failed.any()):
            return lambda v: v  # A is not positive semidefinite: nothing that this method could do
        half = torch.linalg.solve_triangular(factor, shifted.mH, upper=False).mH
        U, singular, _ = torch.linalg.svd(half, full_matrices=False)
        values = (singular**2 - shift.squeeze(-1)).clamp(min=0)
        least = values[..., -1:]
        kept = values > 0
        ratio = torch.where(kept & (least > 0), least / torch.where(kept, values, 1), 1)

        def apply(v: Tensor) -> Tensor:
            coordinates = (U.mH @ v.unsqueeze(-1)).squeeze(-1)
            return v + (U @ ((ratio - 1) * coordinates).unsqueeze(-1)).squeeze(-1)

        return apply

    def __repr__(self) -> str:
        return f"Nystrom(rank={self.rank})"


class InverseLBFGS:
    """The inverse Hessian that :class:`~implicitdiff.inner_solvers.LBFGS` has built in the forward pass.

    It costs no product. As a preconditioner it leaves CG exact; used in the place of a solve,
    ``linear_solver=lambda A, b: InverseLBFGS()(A)(b)``, it is SHINE (Ramzi et al. 2022), a rough estimate whose true
    residual is reported as that of any solver. It is of use where the history covers most of the way and the tolerance
    of the inner solver is not at the limit of rounding, where steps say nothing of the curvature.

    ``InverseLBFGS()(A)`` is a function of v of shape (*batch, n). Raises :class:`~implicitdiff.ImplicitDiffError` where
    the inner solver was another one.

    >>> import implicitdiff as idf
    >>> cg, lbfgs = idf.CG(preconditioner=InverseLBFGS()), idf.inner_solvers.LBFGS()
    >>> layer = idf.ArgminLayer(lambda x, t: ((x - t) ** 2).sum(), inner_solver=lbfgs, linear_solver=cg)
    >>> torch.func.grad(lambda t: layer(torch.zeros(2), t).sum())(torch.ones(2)).round(decimals=3)
    tensor([1., 1.])
    """

    def __call__(self, A: LinearOperator) -> Callable[[Tensor], Tensor]:
        if A.origin.estimated_inverse is None:
            raise ImplicitDiffError(
                "InverseLBFGS() needs the steps of an ArgminLayer's inner solver LBFGS(), but the operator comes from "
                "elsewhere: give the layer inner_solver=LBFGS(), or take Jacobi() or Nystrom(rank)."
            )
        return A.origin.estimated_inverse

    def __repr__(self) -> str:
        return "InverseLBFGS()"


def _random(A: LinearOperator, count: int) -> Tensor:
    """Normal vectors (count, *batch, n), the same ones in every run."""
    generator = torch.Generator(device=A.device or "cpu").manual_seed(0)
    shape = (count, *A.batch_shape, A.shape[1])
    return torch.randn(shape, dtype=A.dtype, device=A.device, generator=generator)
