"""box_section against root finding on its multiplier, finite differences, and what must be NaN."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from implicitdiff.projections.box_section import box_section

from ..problems import random, vector

D = torch.float64


def by_root_finding(v: Tensor, lower: Tensor, upper: Tensor, weights: Tensor, total: float) -> np.ndarray:
    """The same x from SciPy's root of the multiplier."""
    v, lower, upper, weights = (t.numpy() for t in (v, lower, upper, weights))
    x = lambda t: np.clip(v + t * weights, lower, upper)  # noqa: E731
    reach = 1.0
    while weights @ x(-reach) > total or weights @ x(reach) < total:
        reach *= 2
    t = scipy.optimize.brentq(lambda t: weights @ x(t) - total, -reach, reach, xtol=1e-15, rtol=1e-15)
    return x(t)


def problem(seed: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A total in the middle of its reach; weights of both signs; an infinite bound on either side."""
    v, lower, weights = random(seed, n), random(seed + 1, n) - 1, random(seed + 2, n)
    upper = lower + 0.2 + random(seed + 3, n).abs()
    total = (weights * (0.3 * lower + 0.7 * upper)).sum()
    lower[0], upper[-1] = -torch.inf, torch.inf
    return v, lower, upper, weights, total


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), scale=st.sampled_from([2.0**-20, 1.0, 2.0**20]))
def test_is_the_root_in_the_multiplier(seed: int, n: int, scale: float) -> None:
    v, lower, upper, weights, total = problem(seed, n)
    x = box_section(scale * v, scale * lower, scale * upper, weights, scale * total) / scale
    assert bool(((lower <= x) & (x <= upper)).all())
    # A weight near zero with a coordinate that alone can move divides by it.
    least = float(weights.abs().min())
    torch.testing.assert_close((weights * x).sum(), total, rtol=1e-12, atol=1e-12 / min(least, 1))
    expected = torch.from_numpy(by_root_finding(v, lower, upper, weights, float(total)))
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-12 / least)


def test_ties_fixed_coordinates_and_no_weight() -> None:
    x = box_section(vector(1, 1, 1, 1, 5), vector(0, 0, 0, 0.5, 0), vector(1, 1, 1, 0.5, 2), vector(1, 1, 1, 2, 0), 1.6)
    torch.testing.assert_close(x, vector(0.2, 0.2, 0.2, 0.5, 2))


@pytest.mark.parametrize("total", [0.0, 3.0])
def test_a_total_at_the_end_of_its_reach_has_the_derivative_from_within(total: float) -> None:
    """All coordinates at one bound; the first to leave it takes what is added."""
    v, t = vector(0.3, 0.1, 0.2), vector(total)[0]
    torch.testing.assert_close(box_section(v, 0.0, 1.0, 1.0, t), torch.full((3,), total / 3, dtype=D))
    first = vector(1, 0, 0) if total == 0 else vector(0, 1, 0)
    torch.testing.assert_close(jacrev(lambda t: box_section(v, 0.0, 1.0, 1.0, t))(t), first)


@pytest.mark.parametrize("seed", range(4))
def test_derivatives_in_all_five(seed: int) -> None:
    args = tuple(t.requires_grad_() for t in problem(10 * seed, 5))
    finite = tuple(torch.where(t.isfinite(), t, 9.0 * t.sign()).detach().requires_grad_() for t in args)
    assert gradcheck(box_section, finite, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(box_section, finite)
    for J in jacfwd(box_section, (0, 1, 2, 3, 4))(*(t.detach() for t in args)):
        assert bool(J.isfinite().all())


def test_batches_and_transforms() -> None:
    args = [torch.stack(ts) for ts in zip(*(problem(s, 6) for s in (1, 11, 21)), strict=True)]
    together = box_section(*args)
    alone = torch.stack([box_section(*(t[i] for t in args)) for i in range(3)])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(vmap(box_section)(*args), alone)
    f = lambda v, *rest: (box_section(v, *rest) ** 3).sum()  # noqa: E731
    torch.testing.assert_close(vmap(grad(f))(*args)[1], grad(f)(*(t[1] for t in args)))
    torch.testing.assert_close(vmap(hessian(f))(*args)[1], hessian(f)(*(t[1] for t in args)))
    torch.testing.assert_close(vmap(jacfwd(jacrev(f)))(*args)[2], hessian(f)(*(t[2] for t in args)))


def test_is_the_simplex_projection() -> None:
    """J = diag(s) − ssᵀ/‖s‖₀ on the support s."""
    v = vector(0.9, 0.6, -3, 0.2)
    x = box_section(v, 0.0, torch.inf, 1.0, 1.0)
    torch.testing.assert_close(x, vector(0.65, 0.35, 0, 0))
    s = (x > 0).double()
    torch.testing.assert_close(
        jacrev(lambda v: box_section(v, 0.0, torch.inf, 1.0, 1.0))(v), torch.diag(s) - s.outer(s) / 2
    )


def test_what_no_x_satisfies_is_nan_with_its_derivatives_and_leaves_the_others_alone() -> None:
    v = random(5, 4, 3).requires_grad_()
    lower = torch.zeros(4, 3, dtype=D)
    lower[2, 1] = 2.0  # above the upper bound
    x = box_section(v, lower, 1.0, 1.0, vector(1.5, 3.1, 1.5, -0.1))
    assert x.isnan().all(-1).tolist() == [False, True, True, True]
    (g,) = torch.autograd.grad((x**2).sum(), v)
    assert g.isnan().any(-1).tolist() == [False, True, True, True]
    nan = box_section(vector(0.1, torch.nan, 0.2), 0.0, 1.0, 1.0, 1.5)
    assert bool(nan.isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_rounded_at_the_end_of_their_reach_count_as_in_reach(dtype: torch.dtype) -> None:
    upper = random(7, 1000, dtype=dtype).abs()
    x = box_section(torch.zeros(1000, dtype=dtype), 0.0, upper, 1.0, upper.flip(0).cumsum(0)[-1])
    torch.testing.assert_close(x, upper)


def test_nothing_to_project() -> None:
    assert box_section(torch.zeros(2, 0), 0.0, 1.0, 1.0, 0.0).shape == (2, 0)
