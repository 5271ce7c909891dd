"""Projections in the sense of the Kullback–Leibler divergence, KL(x, y) = Σ x log(x / y) − x + y."""

from __future__ import annotations

import torch
from torch import Tensor

from .._parameters import check_non_negative, check_vector
from ..errors import ImplicitDiffError
from ..layers import SinkhornLayer


def kl_simplex(v: Tensor, total: Tensor | float = 1.0) -> Tensor:
    """argmin KL(x, exp(v)) over x ≥ 0 with Σ x = total, which is total · softmax(v).

    ``v`` is (*batch, n), ``total`` a number or (*batch,), positive. It is the map from the dual variables back to the
    simplex in mirror descent with the entropy (Beck and Teboulle 2003). Raises ValueError for a negative number and for
    a v without a last dimension.

    >>> kl_simplex(torch.tensor([0.0, 0.0]), 3.0)
    tensor([1.5000, 1.5000])
    """
    check_vector(v)
    check_non_negative(total=total)
    total = torch.as_tensor(total, dtype=v.dtype, device=v.device)
    return total.unsqueeze(-1) * torch.softmax(v, -1)


def kl_transport_polytope(V: Tensor, row_sums: Tensor, column_sums: Tensor) -> Tensor:
    """argmin KL(T, exp(V)) over T ≥ 0 with T 1 = row_sums and Tᵀ 1 = column_sums: the scaling of exp(V) to these sums.

    ``V`` is (*batch, m, n), −∞ where T is to be zero; ``row_sums`` (*batch, m) and ``column_sums`` (*batch, n) have
    equal totals. That is entropic transport with the cost −V and epsilon 1 (Benamou et al. 2015), so
    ``kl_transport_polytope(-C / epsilon, r, c)`` is what :class:`~implicitdiff.SinkhornLayer` gives. Errors,
    warnings and derivatives are those of it.

    >>> kl_transport_polytope(torch.zeros(2, 2), torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    tensor([[0.5000, 0.5000],
            [1.5000, 1.5000]])
    """
    return SinkhornLayer(1.0)(-V, row_sums, column_sums)


def kl_birkhoff_polytope(V: Tensor) -> Tensor:
    """argmin KL(T, exp(V)) over the doubly stochastic T, (*batch, n, n): Sinkhorn's normal form of exp(V).

    Warnings and derivatives are those of :func:`kl_transport_polytope`. Raises :class:`~implicitdiff.ImplicitDiffError`
    where V is not square (Sinkhorn 1964).

    >>> kl_birkhoff_polytope(torch.zeros(2, 2))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    if V.shape[-1] != V.shape[-2]:
        raise ImplicitDiffError(f"V has the shape {tuple(V.shape)}, but a doubly stochastic matrix is square.")
    return kl_transport_polytope(V, torch.ones_like(V[..., 0]), torch.ones_like(V[..., 0, :]))
