"""A bank of conditions F(x, θ) = 0 with known x and ∂x/∂θ, beside the package's bank of linear systems.

All in float64; every answer is a closed form or was chosen first, so that nothing here comes out of a solver.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.operators import Structure
from implicitdiff.testing.systems import (
    SYSTEMS,
    System,
    orthogonal,
    random,
    rotated,
    second_difference,
    spread,
    vector,
    with_singular_values,
)

__all__ = [
    "KNOWN",
    "SYSTEMS",
    "Known",
    "System",
    "orthogonal",
    "random",
    "rotated",
    "second_difference",
    "spread",
    "vector",
    "with_singular_values",
]


# ------------------------------------------------------------------------------------- conditions F(x, θ) = 0


@dataclass(frozen=True)
class Known:
    """A condition, a parameter, the solution there and its Jacobian, of shape (n, number of parameters)."""

    name: str
    residual: Callable[[Tensor, Tensor], Tensor]
    theta: Tensor
    x: Tensor
    jacobian: Tensor
    structure: Structure


def _ridge() -> Known:
    X, y, penalty = random(20, 12, 5), random(21, 12), vector(0.5, 1, 2, 4, 8)
    inverse = torch.linalg.inv(X.mT @ X + torch.diag(penalty))
    w = inverse @ X.mT @ y
    return Known(
        "ridge",
        lambda w, penalty: X.mT @ (X @ w - y) + penalty * w,
        penalty,
        w,
        -inverse @ torch.diag(w),
        "positive_definite",
    )


def _lasso() -> Known:
    """The data are made for a chosen solution: y with Xᵀ(y − Xw) = λs, s = sign(w) on the support, |s| < 1 off it."""
    X, w, s, penalty = random(22, 12, 5), vector(1, 0, -2, 0, 0.5), vector(1, 0.3, -1, -0.6, 1), vector(0.7)
    G, S = X.mT @ X, vector(1, 0, 1, 0, 1).bool()
    y = X @ w + X @ torch.linalg.inv(G) @ (penalty * s)
    step = 1 / torch.linalg.eigvalsh(G).max()
    jacobian = torch.zeros(5, 1, dtype=torch.float64)
    jacobian[S, 0] = -torch.linalg.inv(G[S][:, S]) @ s[S]

    def residual(w: Tensor, penalty: Tensor) -> Tensor:
        v = w - step * (X.mT @ (X @ w - y))
        return w - torch.sign(v) * torch.relu(v.abs() - step * penalty)

    return Known("lasso", residual, penalty, w, jacobian, "general")


def _equality_constrained() -> Known:
    """min ½xᵀQx + cᵀx with x₁ + x₂ = 1 in (x, ν); its KKT matrix is indefinite; θ = c."""
    K = torch.tensor([[4.0, 1, 1], [1, 2, 1], [1, 1, 0]], dtype=torch.float64)

    def residual(z: Tensor, c: Tensor) -> Tensor:
        return K @ z + torch.cat([c, vector(-1)])

    jacobian = torch.tensor([[-0.25, 0.25], [0.25, -0.25], [-0.25, -0.75]], dtype=torch.float64)
    return Known("equality QP", residual, vector(1, 1), vector(0.25, 0.75, -2.75), jacobian, "symmetric")


def _imaml() -> Known:
    """The inner problem of implicit MAML on a quadratic loss: Lemma 1, ∂φ/∂θ = (I + H/λ)⁻¹."""
    H, a, theta, penalty = rotated(spread(50, 4), 23), random(24, 4), random(25, 4), 2.0
    jacobian = torch.linalg.inv(torch.eye(4, dtype=torch.float64) + H / penalty)
    return Known(
        "iMAML",
        lambda phi, theta: H @ (phi - a) + penalty * (phi - theta),
        theta,
        a + jacobian @ (theta - a),
        jacobian,
        "positive_definite",
    )


def _known() -> list[Known]:
    cosine = 0.7390851332151607  # x = cos x
    return [
        Known(
            "square root",
            lambda x, y: x * x - y,
            vector(4, 9),
            vector(2, 3),
            torch.diag(vector(1 / 4, 1 / 6)),
            "positive_definite",
        ),
        Known(
            "x = cos x + θ",
            lambda x, theta: x - torch.cos(x) - theta,
            vector(0),
            vector(cosine),
            vector(1 / (1 + math.sin(cosine))).unsqueeze(-1),
            "general",
        ),
        _ridge(),
        _lasso(),
        _equality_constrained(),
        _imaml(),
    ]


KNOWN = {problem.name: problem for problem in _known()}
