"""Cones and the projections onto them: Moreau's decomposition, independent references, derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from implicitdiff import cones
from implicitdiff.projections import exponential_cone

from .problems import random, vector
from .test_transforms import close

D = torch.float64
CONES = {
    "zero": cones.Zero(3),
    "non-negative": cones.NonNegative(4),
    "second-order": cones.SecondOrder(4),
    "exponential": cones.Exponential(),
    "semidefinite": cones.PositiveSemidefinite(3),
}


def members(name: str, count: int) -> Tensor:
    """Points of the cone, made without projecting."""
    v = random(1, count, CONES[name].size)
    if name == "zero":
        return 0 * v
    if name == "non-negative":
        return v.abs()
    if name == "second-order":
        return torch.cat([v[:, 1:].norm(dim=-1, keepdim=True) + v[:, :1].abs(), v[:, 1:]], -1)
    if name == "exponential":
        x, y = v[:, 0], v[:, 1].abs()
        return torch.stack([x, y, y * (x / y).clamp(max=20).exp() * (1 + v[:, 2].abs())], -1)[x / y < 20]
    L = random(2, count, 3, 3)
    return CONES[name].vector(L @ L.mT)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CONES)
def test_moreaus_decomposition_characterises_the_projection(name: str) -> None:
    """v = p + d with p in K, d in the polar cone and p ⊥ d: that is the projection and nothing else is."""
    cone, v = CONES[name], random(3, 300, CONES[name].size)
    p = cone.project(v)
    d = v - p
    scale = v.norm(dim=-1)
    assert float(((p * d).sum(-1).abs() / scale**2).max()) < 1e-12
    close(cone.project(p), p, 1e-12)  # p is a member, as its distance from the cone is 0
    k = members(name, 300)
    k = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    assert float(((d @ k.mT) / scale.unsqueeze(-1)).max()) < 1e-12
    close(cone.project_dual(v), v + cone.project(-v), 1e-14)
    close(cone.project(k), k, 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    v=st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_the_exponential_cone_at_odd_points(v: list[float], scale: float, dtype: torch.dtype) -> None:
    """Faces, the axis, the origin, steep and flat parts; the projection scales with v and has finite derivatives."""
    v = torch.tensor(v, dtype=dtype)
    p = exponential_cone(v)
    loose = 1e-12 if dtype is D else 1e-4
    size = float(v.abs().max())
    assert abs(float((p * (v - p)).sum())) <= loose * max(size**2, 1e-30)
    assert float((exponential_cone(p) - p).abs().max()) <= loose * size
    assert float((exponential_cone(v * scale) / scale - p).abs().max()) <= loose * size + 1e-37 / scale
    assert bool(torch.func.jacrev(exponential_cone)(v).isfinite().all())


@pytest.mark.parametrize("name", CONES)
def test_derivatives_at_generic_points(name: str) -> None:
    cone = CONES[name]
    v = random(5, 6, cone.size).requires_grad_()
    assert torch.autograd.gradcheck(cone.project, v, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(cone.project, v, check_fwd_over_rev=True)
    for i, row in enumerate(torch.func.vmap(torch.func.jacrev(cone.project))(v.detach())):
        close(row, torch.func.jacfwd(cone.project)(v[i].detach()), 1e-9, least=1.0)


def test_the_exponential_cone_to_third_order() -> None:
    """Each order by differences of the one below; the Newton steps from a fixed root carry seven."""
    v = vector(0.4, 0.6, -0.8)
    second = torch.func.jacrev(torch.func.jacrev(exponential_cone))
    third = torch.func.jacfwd(second)(v)
    for i in range(3):
        e = torch.zeros(3, dtype=D)
        e[i] = 1e-5
        close(third[..., i], (second(v + e) - second(v - e)) / 2e-5, 1e-6)


def test_semidefinite_vectors_are_those_of_clarabel() -> None:
    """Columns of the upper triangle, times √2 off the diagonal: inner products are those of matrices."""
    cone = cones.PositiveSemidefinite(3)
    V = random(6, 3, 3)
    V = V + V.mT
    v, r = cone.vector(V), 2**0.5
    close(v, torch.stack([V[0, 0], r * V[0, 1], V[1, 1], r * V[0, 2], r * V[1, 2], V[2, 2]]), 1e-15)
    close(cone.matrix(v), V, 1e-15)
    close((v * v).sum(), (V * V).sum(), 1e-14)


def test_nan_stays_in_its_system() -> None:
    v = torch.stack([torch.full((3,), torch.nan, dtype=D), vector(0.4, 0.6, -0.8)]).requires_grad_()
    p = exponential_cone(v)
    assert bool(p[0].isnan().any())
    close(p[1], exponential_cone(v[1]), 1e-15)
    assert bool(torch.autograd.grad(p[1].sum(), v)[0].isfinite().all())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cones.NonNegative(-1), "n is -1"),
        (lambda: cones.SecondOrder(2.0), "n is 2.0"),
        (lambda: exponential_cone(torch.zeros(4)), "has 3 entries"),
    ],
)
def test_mistakes_are_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
