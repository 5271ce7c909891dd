"""The exponential cone's projection to rounding, in both precisions, near faces and where exp(ρ) overflows."""

from __future__ import annotations

import pytest
import torch

from implicitdiff.projections import exponential_cone

from .problems import random


@pytest.mark.parametrize("decades", [0, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_moreaus_decomposition_to_rounding(dtype: torch.dtype, decades: int) -> None:
    """p in K, v − p in the polar cone, p ⊥ v − p: membership by an inequality, not by projecting again."""
    spread = 10.0 ** (-decades * random(2, 20_000, 3).abs().clamp(max=1))
    v = (random(1, 20_000, 3) * spread).to(dtype)
    p = exponential_cone(v).double()
    d = v.double() - p
    size, rounding = v.double().norm(dim=-1), 8 * torch.finfo(dtype).eps
    assert float(((p * d).sum(-1).abs() / size**2).max()) <= rounding
    assert bool((p[:, 1] >= 0).all())
    steep = p[:, 1] > 1e-30
    x, y, z = p[steep].unbind(-1)
    # |p| bounds how far rounding of x / y moves y exp(x / y).
    assert bool((y * (x / y).exp() - z <= rounding * (1 + (x / y).abs()) * size[steep]).all())
    assert float((exponential_cone(d.to(dtype)).double().norm(dim=-1) / size).max()) <= rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("y", [-9.0, -29.0, -100.0, -1000.0, -1e30])
def test_far_along_the_curve_the_point_is_on_the_face(dtype: torch.dtype, y: float) -> None:
    v = torch.tensor([1.0, y, 5.0], dtype=dtype)
    p = exponential_cone(v)
    assert abs(float(p[2]) - 5) <= 5 * (torch.finfo(dtype).eps + float(torch.tensor(y / 2).exp()))
    jacobian = torch.func.jacrev(exponential_cone)(v)
    assert bool(jacobian.isfinite().all())
    assert float((jacobian - jacobian.T).abs().max()) <= 1e-5 if dtype == torch.float32 else 1e-13
