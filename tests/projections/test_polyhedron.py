"""The projection onto a polyhedron: an independent solver, known polyhedra, derivatives, an empty one."""

from __future__ import annotations

import pytest
import scipy.optimize
import torch
from torch.autograd import gradcheck
from torch.func import jacrev, vmap

import implicitdiff as idf
from implicitdiff.projections.polyhedron import polyhedron

from ..problems import random, vector

D = torch.float64


def data(seed: int) -> tuple[torch.Tensor, ...]:
    """v outside; one equality and six inequalities that hold at a random point."""
    v, inside, A, G = 3 * random(seed, 4), random(seed + 1, 4), random(seed + 2, 1, 4), random(seed + 3, 6, 4)
    return v, A, A @ inside, G, G @ inside + random(seed + 4, 6).abs()


@pytest.mark.parametrize("seed", [10, 20, 30])
def test_against_slsqp_and_central_differences(seed: int) -> None:
    args = data(seed)
    v, A, b, G, h = (t.numpy() for t in args)
    found = scipy.optimize.minimize(
        lambda x: 0.5 * ((x - v) ** 2).sum(),
        v,
        jac=lambda x: x - v,
        constraints=[
            {"type": "eq", "fun": lambda x: A @ x - b, "jac": lambda x: A},
            {"type": "ineq", "fun": lambda x: h - G @ x, "jac": lambda x: -G},
        ],
        options={"ftol": 1e-15},
    )
    # SLSQP's own accuracy
    torch.testing.assert_close(polyhedron(*args), torch.from_numpy(found.x), rtol=1e-6, atol=1e-6)
    assert gradcheck(polyhedron, tuple(t.requires_grad_() for t in args), atol=1e-6)


def test_the_simplex_and_a_batch() -> None:
    v = torch.stack([vector(0.9, 0.6, -3, 0.2), vector(0, 0, 0, 0)])
    eye, zero, one = torch.eye(4, dtype=D), torch.zeros(4, dtype=D), torch.ones(1, dtype=D)
    project = lambda v: polyhedron(v, one.expand(1, 4), one, -eye, zero)  # noqa: E731
    expected = torch.stack([vector(0.65, 0.35, 0, 0), vector(0.25, 0.25, 0.25, 0.25)])
    torch.testing.assert_close(project(v), expected)
    torch.testing.assert_close(vmap(project)(v), expected)
    s = vector(1, 1, 0, 0)
    torch.testing.assert_close(jacrev(project)(v[0]), torch.diag(s) - s.outer(s) / 2)


def test_an_empty_one_is_reported() -> None:
    with pytest.warns(idf.ConvergenceWarning, match="INFEASIBLE"):
        x = polyhedron(vector(1, 2), G=torch.stack([vector(1, 0), vector(-1, 0)]), h=vector(-1, -1))
    assert bool(x.isnan().all())
