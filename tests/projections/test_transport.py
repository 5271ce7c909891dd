"""The transport polytope: optimality certified by linear programs, closed forms, every transform, odd shapes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.projections.transport import birkhoff_polytope, transport_polytope

from ..problems import random, vector

D = torch.float64


def linear_maximum(G: Tensor, r: Tensor, c: Tensor) -> float:
    """max ⟨G, S⟩ over the polytope, by SciPy's HiGHS."""
    m, n = G.shape
    rows, columns = np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))
    found = scipy.optimize.linprog(
        -G.numpy().ravel(), A_eq=np.vstack([rows, columns])[:-1], b_eq=torch.cat([r, c]).numpy()[:-1]
    )
    assert found.success, found.message
    return -found.fun


def marginals(seed: int, m: int, n: int, power: float = 1.0) -> tuple[Tensor, Tensor]:
    r, c = random(seed, m).abs() ** power, random(seed + 1, n).abs() ** power
    return r, c * (r.sum() / c.sum())


def balanced(seed: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """A direction that keeps the totals equal."""
    dr, dc = random(seed, m), random(seed + 1, n)
    return dr, dc + (dr.sum() - dc.sum()) / n


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(1, 7),
    n=st.integers(1, 7),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    power=st.sampled_from([0.0, 1.0, 6.0]),
    kind=st.sampled_from(["plain", "ties", "zeros"]),
)
def test_is_the_nearest_plan(seed: int, m: int, n: int, scale: float, power: float, kind: str) -> None:
    """T is the projection of V iff ⟨V − T, S − T⟩ ≤ 0 for all plans S: the largest is a linear program's."""
    V, (r, c) = scale * random(seed, m, n), marginals(seed + 1, m, n, power)
    if kind == "ties":
        V = scale * (V / scale).round()
    elif kind == "zeros" and min(m, n) > 1:
        r[0] = c[0] = 0
        c = c * (r.sum() / c.sum())
    T = transport_polytope(V, r, c)
    size = scale + float(r.sum())
    assert float(T.min()) >= 0
    torch.testing.assert_close(T.sum(-1), r, rtol=0, atol=1e-13 * size)
    torch.testing.assert_close(T.sum(-2), c, rtol=0, atol=1e-13 * size)
    # HiGHS keeps its constraints to 1e-7 of the sums.
    excess = linear_maximum(V - T, r, c) - float(((V - T) * T).sum())
    assert excess <= 1e-6 * size * (1 + float(r.sum()))


def test_closed_forms() -> None:
    """2×2 plans have one degree of freedom; V = 0 and positive: V + f + g with the means of the sums."""
    V, half = vector(0.4, 0.1, -0.1, 0.2).reshape(2, 2), vector(0.5, 0.5)
    a = (V[0, 0] + V[1, 1] - V[0, 1] - V[1, 0] + 1.0) / 4
    torch.testing.assert_close(transport_polytope(V, half, half), torch.stack([a, 0.5 - a, 0.5 - a, a]).reshape(2, 2))
    r, c = vector(1.0, 2.0), vector(1.2, 0.8, 1.0)
    expected = r.unsqueeze(-1) / 3 + c / 2 - 3 / 6
    torch.testing.assert_close(transport_polytope(torch.zeros(2, 3, dtype=D), r, c), expected)
    permutation = torch.eye(4, dtype=D)[[2, 0, 3, 1]]
    torch.testing.assert_close(birkhoff_polytope(7 * permutation), permutation)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_sums_that_stay_balanced(seed: int) -> None:
    """Central differences; the sums move along directions that keep their totals equal."""
    V, (r, c) = random(seed, 3, 4), marginals(seed + 5, 3, 4)
    dr, dc = balanced(seed + 9, 3, 4)

    def moved(V: Tensor, t: Tensor) -> Tensor:
        return transport_polytope(V, r + t * dr, c + t * dc)

    args = (V.requires_grad_(), torch.zeros((), dtype=D, requires_grad=True))
    assert gradcheck(moved, args, check_forward_ad=True, check_batched_grad=True)
    T = transport_polytope(V, r, c)
    assert int((T == 0).sum()) > 0  # a derivative on a part of the entries only


def test_a_support_in_two_parts() -> None:
    """Two blocks with equal totals of their own: the Laplacian has two null vectors, and the derivative is finite."""
    V = torch.block_diag(*(5.0 + random(s, 2, 2) for s in (1, 2)))
    V = V - 10.0 * (V == 0)
    J = jacrev(birkhoff_polytope)(V)
    torch.testing.assert_close(J, jacfwd(birkhoff_polytope)(V))
    block = jacrev(birkhoff_polytope)(V[:2, :2])
    torch.testing.assert_close(J[:2, :2, :2, :2], block)
    torch.testing.assert_close(J[:2, :2, 2:, 2:], torch.zeros(2, 2, 2, 2, dtype=D))


def test_the_derivative_is_the_projection_on_the_face() -> None:
    """dT/dV is symmetric and idempotent: onto the matrices of the support whose rows and columns add up to zero."""
    V, (r, c) = random(3, 5, 4), marginals(4, 5, 4)
    J = jacrev(transport_polytope)(V, r, c).reshape(20, 20)
    torch.testing.assert_close(J, J.mT)
    torch.testing.assert_close(J @ J, J)
    support = int((transport_polytope(V, r, c) > 0).sum())
    torch.testing.assert_close(J.trace(), torch.tensor(support - 5.0 - 4.0 + 1.0, dtype=D))  # a connected one


def test_batches_and_transforms() -> None:
    V, (r, c) = random(1, 2, 3, 4, 5), marginals(2, 4, 5)
    r = torch.stack([r, r.flip(0), r])  # batch dimensions that broadcast
    together = transport_polytope(V, r, c)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], transport_polytope(V[i, j], r[j], c))
    nested = vmap(vmap(transport_polytope, in_dims=(0, 0, None)), in_dims=(0, None, None))
    torch.testing.assert_close(nested(V, r, c), together)
    f = lambda V, r, c: (transport_polytope(V, r, c) ** 3).sum()  # noqa: E731
    W = V[:, 0]
    for transform in (grad, hessian, lambda f: jacfwd(jacrev(f))):
        many = vmap(transform(f), in_dims=(0, None, None))(W, r[0], c)
        torch.testing.assert_close(many[1], transform(f)(W[1], r[0], c))
    leaf = W[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(f(leaf, r[0], c), leaf, create_graph=True)
    (twice,) = torch.autograd.grad((g**2).sum(), leaf)
    torch.testing.assert_close(twice, 2 * torch.einsum("ijkl,ij->kl", hessian(f)(leaf.detach(), r[0], c), g.detach()))


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_float32_finds_the_support_of_float64(scale: float) -> None:
    V, (r, c) = scale * random(1, 12, 9), marginals(2, 12, 9)
    single = transport_polytope(V.float(), r.float(), c.float())
    assert single.dtype is torch.float32
    torch.testing.assert_close(single.double(), transport_polytope(V, r, c), rtol=1e-5, atol=3e-7 * scale * 12)


def test_one_that_is_not_finite_is_reported_and_leaves_the_others_alone() -> None:
    V = random(1, 3, 4, 4)
    expected = birkhoff_polytope(V)
    V[1, 0, 0] = torch.nan
    with pytest.warns(idf.ConvergenceWarning, match="NON_FINITE"):
        T = birkhoff_polytope(V)
    assert bool(T[1].isnan().any())
    torch.testing.assert_close(T[[0, 2]], expected[[0, 2]])


def test_sums_that_no_plan_has() -> None:
    V = torch.zeros(2, 3)
    with pytest.raises(idf.ImplicitDiffError, match=r"row_sums adds up to 2 and column_sums to 3"):
        transport_polytope(V, torch.ones(2), torch.ones(3))
    with pytest.raises(idf.ImplicitDiffError, match=r"row_sums adds up to 2 and column_sums to 3"):
        vmap(transport_polytope, in_dims=(None, 0, None))(V, torch.ones(4, 2), torch.ones(3))
    with pytest.raises(idf.ImplicitDiffError, match="column_sums has a negative entry, -1"):
        transport_polytope(V, torch.ones(2), torch.tensor([-1.0, 1.0, 2.0]))
    with pytest.raises(idf.ImplicitDiffError, match=r"row_sums has the shape \(3,\)"):
        transport_polytope(V, torch.ones(3), torch.ones(3))
    with pytest.raises(idf.ImplicitDiffError, match="adds up to 0"):
        transport_polytope(V, torch.zeros(2), torch.zeros(3))
    with pytest.raises(idf.ImplicitDiffError, match="square"):
        birkhoff_polytope(V)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transport_polytope(V, torch.full((2,), 1 / 2), torch.full((3,), 1 / 3))  # equal up to rounding
