"""The table of projections and proxes: each with parameters, smooth points and an answer from another way of solving.

The answers take one system, NumPy arrays of float64, and know nothing of the closed forms: they bisect, minimise in one
variable, enumerate faces, or hand the problem to SciPy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from implicitdiff import prox
from implicitdiff.projections import (
    affine_set,
    box,
    half_space,
    hypercube,
    hyperplane,
    l1_ball,
    l1_sphere,
    l2_ball,
    l2_sphere,
    linf_ball,
    non_negative,
    positive_semidefinite_cone,
    second_order_cone,
    simplex,
    sparse_simplex,
)

from ..problems import random, rotated, vector

Array = Any
Constraints = Callable[..., list[tuple[str, Callable[[Array], Array]]]]


@dataclass(frozen=True)
class Entry:
    function: Callable[..., Tensor]
    """(v, *parameters); a prox has its stepsize first among them."""
    v: Tensor
    """Of shape (batch, n) or (batch, m, n), nowhere at a kink, on both sides of each."""
    parameters: tuple[Tensor, ...]
    """One for each system of the batch."""
    reference: Callable[..., Array]
    """(v, *parameters) ↦ x for one system."""
    convex: bool = True
    kept: tuple[int, ...] = ()
    """Parameters that stay as they are where v grows: the set {x : a·x ≤ b} has a normal of any length."""
    accuracy: float = 1e-6
    """Of the reference: SciPy's SLSQP and a minimum found by values both end near the root of rounding."""


# ------------------------------------------------------------------------------------------- other ways of solving


def nearest(constraints: Constraints, v: Array, *parameters: Array) -> Array:
    """The programme min ½‖x − v‖² by SLSQP; "ineq" means ≥ 0."""
    found = scipy.optimize.minimize(
        lambda x: 0.5 * np.sum((x - v) ** 2),
        v,
        jac=lambda x: x - v,
        constraints=[{"type": kind, "fun": f} for kind, f in constraints(*parameters)],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return found.x


def within(constraints: Constraints) -> Callable[..., Array]:
    return partial(nearest, constraints)


def simplex_by_bisection(v: Array, total: Array) -> Array:
    def mass(threshold: float) -> float:
        return np.maximum(v - threshold, 0).sum() - total

    return np.maximum(v - scipy.optimize.brentq(mass, v.min() - total - 1, v.max(), xtol=1e-15), 0)


def l1_ball_by_bisection(v: Array, radius: Array) -> Array:
    if np.abs(v).sum() <= radius:
        return v

    def soft(threshold: float) -> Array:
        return np.sign(v) * np.maximum(np.abs(v) - threshold, 0)

    return soft(scipy.optimize.brentq(lambda t: np.abs(soft(t)).sum() - radius, 0, np.abs(v).max(), xtol=1e-15))


def nearest_of(candidates: Sequence[Array], v: Array) -> Array:
    return min(candidates, key=lambda x: float(((x - v) ** 2).sum()))


def l1_sphere_by_faces(v: Array, radius: Array) -> Array:
    faces = [np.array(signs) for signs in itertools.product([-1.0, 1.0], repeat=len(v))]
    return nearest_of([s * simplex_by_bisection(s * v, radius) for s in faces], v)


def sparse_simplex_by_supports(v: Array, total: Array) -> Array:
    candidates = []
    for support in itertools.combinations(range(len(v)), 2):
        x = np.zeros_like(v)
        x[list(support)] = simplex_by_bisection(v[list(support)], total)
        candidates.append(x)
    return nearest_of(candidates, v)


def second_order_cone_by_its_section(v: Array) -> Array:
    """The nearest point lies in the plane of the axis and v, where the cone is {(t, r) : 0 ≤ r ≤ t}."""
    size = np.linalg.norm(v[1:])
    section = lambda: [("ineq", lambda x: x[0] - x[1]), ("ineq", lambda x: x[1])]  # noqa: E731
    t, r = nearest(section, np.array([v[0], size]))
    return np.concatenate([[t], r * v[1:] / size])


def psd_by_factor(V: Array) -> Array:
    """X = LLᵀ with a free L: no minimum of ‖LLᵀ − V‖² but the least."""
    n = len(V)

    def value(flat: Array) -> tuple[float, Array]:
        L = flat.reshape(n, n)
        gap = L @ L.T - (V + V.T) / 2
        return 0.5 * np.sum(gap**2), (2 * gap @ L).ravel()

    start = np.random.default_rng(0).normal(size=n * n)
    found = scipy.optimize.minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-12, "maxiter": 2000})
    L = found.x.reshape(n, n)
    return L @ L.T


def entrywise(g: Callable[..., float], lower: float = -20.0) -> Callable[..., Array]:
    """Each entry by a search for the minimum of ½(x − v)² + stepsize · g(x), which is convex in x."""

    def minimise(v: Array, stepsize: Array, *parameters: Array) -> Array:
        weights = [np.broadcast_to(p, v.shape) for p in parameters]
        return np.array(
            [
                scipy.optimize.minimize_scalar(
                    lambda x, i=i: 0.5 * (x - v[i]) ** 2 + float(stepsize) * g(x, *(w[i] for w in weights)),
                    bounds=(lower, 20.0),
                    method="bounded",
                    options={"xatol": 1e-12},
                ).x
                for i in range(len(v))
            ]
        )

    return minimise


def group_lasso_by_length(v: Array, stepsize: Array, penalty: Array) -> Array:
    """The minimum lies on the ray of v, as rotations about it change nothing."""
    size = np.linalg.norm(v)
    found = entrywise(lambda r, p: p * abs(r), lower=0.0)(np.array([size]), stepsize, penalty)
    return found[0] * v / size


def nuclear_norm_by_factors(V: Array, stepsize: Array, penalty: Array) -> Array:
    """‖X‖ = min ½(‖U‖² + ‖W‖²) over X = UWᵀ (Srebro 2005)."""
    m, n = V.shape
    k, t = min(m, n), float(stepsize * penalty)

    def value(flat: Array) -> tuple[float, Array]:
        U, W = flat[: m * k].reshape(m, k), flat[m * k :].reshape(n, k)
        gap = U @ W.T - V
        return 0.5 * np.sum(gap**2) + t / 2 * np.sum(flat**2), np.concatenate(
            [(gap @ W + t * U).ravel(), (gap.T @ U + t * W).ravel()]
        )

    start = np.random.default_rng(0).normal(size=(m + n) * k)
    x = scipy.optimize.minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-11, "maxiter": 3000}).x
    return x[: m * k].reshape(m, k) @ x[m * k :].reshape(n, k).T


# -------------------------------------------------------------------------------------------------------- the table

V = torch.stack([vector(0.4, -1.3, 0.9, 0.2), vector(-0.12, 0.17, -0.05, 0.08), vector(3, 1.7, 2.6, -4)])
POSITIVE = vector(0.7, 1.2, 2.0)
WEIGHTS = torch.stack([vector(0.5, 1, 0.3, 2), vector(0.1, 0.2, 0.3, 0.1), vector(1, 0.5, 2, 1)])
STEPS = vector(0.5, 0.3, 0.8)
SYMMETRIC = rotated(torch.stack([vector(2, 2, -0.5), vector(1, -2, -2), vector(3, 2, 1)]), 5)
"""Eigenvalues of both signs, repeated ones, and a matrix of the cone."""

PROJECTIONS = {
    "non_negative": Entry(non_negative, V, (), within(lambda: [("ineq", lambda x: x)])),
    "box": Entry(
        box, V, (-WEIGHTS, 0.5 * WEIGHTS), within(lambda l, u: [("ineq", lambda x: x - l), ("ineq", lambda x: u - x)])
    ),
    "hypercube": Entry(
        lambda v, unit: unit.unsqueeze(-1) * hypercube(v / unit.unsqueeze(-1)),  # in units, so that it scales too
        V,
        (POSITIVE,),
        within(lambda unit: [("ineq", lambda x: x), ("ineq", lambda x: unit - x)]),
    ),
    "linf_ball": Entry(
        linf_ball, V, (POSITIVE,), within(lambda r: [("ineq", lambda x: r - x), ("ineq", lambda x: r + x)])
    ),
    "simplex": Entry(simplex, V, (POSITIVE,), simplex_by_bisection, accuracy=1e-13),
    "sparse_simplex": Entry(
        lambda v, total: sparse_simplex(v, 2, total), V, (POSITIVE,), sparse_simplex_by_supports, False, accuracy=1e-13
    ),
    "l1_ball": Entry(l1_ball, V, (POSITIVE,), l1_ball_by_bisection, accuracy=1e-13),
    "l1_sphere": Entry(l1_sphere, V, (POSITIVE,), l1_sphere_by_faces, False, accuracy=1e-13),
    "l2_ball": Entry(l2_ball, V, (POSITIVE,), within(lambda r: [("ineq", lambda x: r**2 - x @ x)])),
    "l2_sphere": Entry(l2_sphere, V, (POSITIVE,), within(lambda r: [("eq", lambda x: r**2 - x @ x)]), False),
    "hyperplane": Entry(
        hyperplane, V, (WEIGHTS, POSITIVE), within(lambda a, b: [("eq", lambda x: a @ x - b)]), kept=(0,)
    ),
    "half_space": Entry(
        half_space, V, (WEIGHTS, POSITIVE), within(lambda a, b: [("ineq", lambda x: b - a @ x)]), kept=(0,)
    ),
    "affine_set": Entry(
        affine_set,
        V,
        (random(3, 3, 2, 4), random(4, 3, 2)),
        within(lambda A, b: [("eq", lambda x: A @ x - b)]),
        kept=(0,),
    ),
    "second_order_cone": Entry(
        second_order_cone,
        torch.cat([V, vector(5, 1, 2, -1)[None], vector(-5, 1, 2, -1)[None]]),
        (),
        second_order_cone_by_its_section,
    ),
    "positive_semidefinite_cone": Entry(positive_semidefinite_cone, SYMMETRIC, (), psd_by_factor),
}
PROXES = {
    "none": Entry(prox.none, V, (STEPS,), entrywise(lambda x: 0.0)),
    "from_projection": Entry(
        prox.from_projection(l1_ball), V, (STEPS, POSITIVE), lambda v, s, r: l1_ball_by_bisection(v, r)
    ),
    "lasso": Entry(prox.lasso, V, (STEPS, WEIGHTS), entrywise(lambda x, p: p * abs(x))),
    "non_negative_lasso": Entry(
        prox.non_negative_lasso, V, (STEPS, WEIGHTS), entrywise(lambda x, p: p * x, lower=0.0)
    ),
    "ridge": Entry(prox.ridge, V, (STEPS, WEIGHTS), entrywise(lambda x, p: p * x * x / 2)),
    "non_negative_ridge": Entry(
        prox.non_negative_ridge, V, (STEPS, WEIGHTS), entrywise(lambda x, p: p * x * x / 2, lower=0.0)
    ),
    "elastic_net": Entry(
        prox.elastic_net,
        V,
        (STEPS, WEIGHTS, WEIGHTS.flip(-1)),
        entrywise(lambda x, p, r: p * abs(x) + r * x * x / 2),
    ),
    "group_lasso": Entry(prox.group_lasso, V, (STEPS, POSITIVE), group_lasso_by_length),
    "huber": Entry(
        prox.huber,
        V,
        (STEPS, WEIGHTS, 0.3 + WEIGHTS.flip(0)),
        entrywise(lambda x, p, d: p * (x * x / 2 if abs(x) <= d else d * (abs(x) - d / 2))),
    ),
    "log_barrier": Entry(prox.log_barrier, V, (STEPS, WEIGHTS), entrywise(lambda x, p: -p * np.log(x), lower=0.0)),
    "nuclear_norm": Entry(
        prox.nuclear_norm,
        # Singular values on both sides of the threshold, equal ones, and one of 0.
        torch.stack(
            [
                torch.nn.functional.pad(rotated(values, 6), (0, 1))
                for values in (vector(3, 0.1), vector(2, 2), vector(3, 0))
            ]
        ),
        (STEPS, POSITIVE),
        nuclear_norm_by_factors,
    ),
}
TABLE = PROJECTIONS | PROXES
