"""Projections in the Kullback–Leibler divergence: SciPy's minimum of the divergence itself, and scalings."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacrev, vmap

import implicitdiff as idf
from implicitdiff.projections.kl import kl_birkhoff_polytope, kl_simplex, kl_transport_polytope

from ..problems import random, vector

D = torch.float64


def least_divergence(v: Tensor, A: np.ndarray, b: np.ndarray) -> Tensor:
    """argmin KL(x, exp(v)) subject to A x = b, by SciPy's trust-constr."""
    v = v.numpy().ravel()
    found = scipy.optimize.minimize(
        lambda x: float(np.sum(x * (np.log(x) - v) - x)),
        np.full(len(v), b.max() / len(v)),
        jac=lambda x: np.log(x) - v,
        hess=lambda x: np.diag(1 / x),
        method="trust-constr",
        constraints=scipy.optimize.LinearConstraint(A, b, b),
        bounds=[(1e-9, None)] * len(v),
        options={"gtol": 1e-10, "xtol": 1e-12, "barrier_tol": 1e-12, "maxiter": 3000},
    )
    return torch.from_numpy(found.x)


def test_simplex_is_the_least_divergence() -> None:
    v = random(1, 4)
    x = least_divergence(v, np.ones((1, 4)), np.array([2.5]))
    torch.testing.assert_close(kl_simplex(v, 2.5), x, rtol=1e-5, atol=1e-6)  # the interior method's own accuracy


def test_transport_polytope_is_the_least_divergence() -> None:
    V, r, c = random(1, 2, 3), vector(1.0, 2.0), vector(0.5, 1.0, 1.5)
    A = np.vstack([np.kron(np.eye(2), np.ones(3)), np.kron(np.ones(2), np.eye(3))])[:-1]
    T = least_divergence(V, A, torch.cat([r, c]).numpy()[:-1]).reshape(2, 3)
    torch.testing.assert_close(kl_transport_polytope(V, r, c), T, rtol=1e-5, atol=1e-6)


def test_simplex_derivatives_in_both() -> None:
    v, total = random(1, 3, 4).requires_grad_(), vector(0.5, 1, 2).requires_grad_()
    assert gradcheck(kl_simplex, (v, total), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(kl_simplex, (v, total))
    torch.testing.assert_close(kl_simplex(v, total).sum(-1), total)
    torch.testing.assert_close(vmap(kl_simplex)(v, total), kl_simplex(v, total))


def test_birkhoff_polytope_scales_rows_and_columns() -> None:
    """T is doubly stochastic, and log T − V is a sum of a row and a column potential: second differences vanish."""
    V = random(1, 2, 4, 4)
    T = kl_birkhoff_polytope(V)
    one = torch.ones(2, 4, dtype=D)
    torch.testing.assert_close(T.sum(-1), one)
    torch.testing.assert_close(T.sum(-2), one)
    S = T.log() - V
    torch.testing.assert_close(S - S[:, :1] - S[:, :, :1] + S[:, :1, :1], torch.zeros_like(S), rtol=0, atol=1e-10)
    shift = random(2, 4)
    torch.testing.assert_close(kl_birkhoff_polytope(V + shift), T)
    # So the derivative ends at what the shift leaves alone.
    J = jacrev(kl_birkhoff_polytope)(V[0])
    torch.testing.assert_close(torch.einsum("abij,j->ab", J, shift), torch.zeros(4, 4, dtype=D), rtol=0, atol=1e-7)


def test_what_is_not_possible() -> None:
    with pytest.raises(idf.ImplicitDiffError, match="square"):
        kl_birkhoff_polytope(torch.zeros(2, 3))
    with pytest.raises(idf.ImplicitDiffError, match="adds up to 2 and column_sums to 3"):
        kl_transport_polytope(torch.zeros(2, 3), torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"total is -1\.0, but it must be at least 0"):
        kl_simplex(torch.zeros(3), -1.0)
    with pytest.raises(ValueError, match="v is 0-d"):
        kl_simplex(torch.tensor(1.0))
