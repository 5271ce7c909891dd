"""A bank of linear systems A x = b with known answers.

All in float64; every answer is a closed form or was chosen first, so that nothing here comes out of a solver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators import DenseOperator, Structure


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same in every run."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def vector(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


def orthogonal(seed: int, *shape: int) -> Tensor:
    """Orthogonal matrices of shape (*batch, n, n)."""
    return torch.linalg.qr(random(seed, *shape))[0]


def rotated(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with the given eigenvalues, (*batch, n) → (*batch, n, n)."""
    Q = orthogonal(seed, *eigenvalues.shape, eigenvalues.shape[-1])
    A = Q @ torch.diag_embed(eigenvalues) @ Q.mT
    return (A + A.mT) / 2


def with_singular_values(values: Tensor, seed: int = 0) -> Tensor:
    """A nonsymmetric matrix with the given singular values, (*batch, n) → (*batch, n, n)."""
    shape = (*values.shape, values.shape[-1])
    return orthogonal(seed, *shape) @ torch.diag_embed(values) @ orthogonal(seed + 1, *shape)


def spread(condition_number: float, n: int) -> Tensor:
    """n eigenvalues from 1 to the condition number, evenly on a logarithmic scale."""
    return torch.logspace(0, math.log10(condition_number), n, dtype=torch.float64)


def second_difference(n: int) -> Tensor:
    """T = tridiag(−1, 2, −1), with eigenvalues 2 − 2 cos(kπ/(n+1))."""
    return 2 * torch.eye(n, dtype=torch.float64) - sum(
        torch.diag(torch.ones(n - 1, dtype=torch.float64), k) for k in (-1, 1)
    )


@dataclass(frozen=True)
class System:
    """A x = b. Of a singular system, x is the solution of minimum norm and ``condition`` that of its range."""

    name: str
    matrix: Tensor
    x: Tensor
    b: Tensor
    condition: float
    structure: Structure

    def operator(self, dtype: torch.dtype = torch.float64) -> DenseOperator:
        return DenseOperator(self.matrix.to(dtype), self.structure)


def _poisson() -> System:
    i = torch.arange(1, 101, dtype=torch.float64)
    return System(
        "Poisson",
        second_difference(100),
        i * (101 - i) / 2,
        torch.ones_like(i),
        1 / math.tan(math.pi / 202) ** 2,
        "positive_definite",
    )


def _indefinite_tridiagonal() -> System:
    """T² − √3·I, n = 50, b = 1: T's eigenvectors are sines, so x is a sine series."""
    n = 50
    T, b = second_difference(n), torch.ones(n, dtype=torch.float64)
    k = torch.arange(1, n + 1, dtype=torch.float64)
    sines = math.sqrt(2 / (n + 1)) * torch.sin(k.unsqueeze(-1) * k * math.pi / (n + 1))
    eigenvalues = (2 - 2 * torch.cos(k * math.pi / (n + 1))) ** 2 - math.sqrt(3)
    condition = float(eigenvalues.abs().max() / eigenvalues.abs().min())
    A = T @ T - math.sqrt(3) * torch.eye(n, dtype=torch.float64)
    return System("T² − √3·I", A, sines @ (sines @ b / eigenvalues), b, condition, "symmetric")


def _systems() -> list[System]:
    def chosen(name: str, A: Tensor, condition: float, structure: Structure, seed: int) -> System:
        x = random(seed, A.shape[-1])
        return System(name, A, x, A @ x, condition, structure)

    eye = torch.eye(12, dtype=torch.float64)
    n0 = torch.zeros(0, dtype=torch.float64)
    clusters = torch.cat([vector(1.0).expand(10), vector(2.0).expand(5), vector(10.0), 5 + 1e-9 * spread(10, 4)])
    singular = rotated(torch.cat([vector(0, 0, 0), spread(10, 12)]), 5)
    in_range = singular @ random(8, 15)
    ill = torch.stack([vector(3.9, 1.65), vector(6.845, 2.9)])
    general = with_singular_values(1 + torch.linspace(0, 1, 30, dtype=torch.float64), 9) * 0.3
    general = general + torch.eye(30, dtype=torch.float64)
    contraction = eye - 0.3 * with_singular_values(torch.linspace(0.1, 1, 12, dtype=torch.float64), 11)
    return [
        chosen("definite", rotated(spread(100, 30), 1), 100, "positive_definite", 2),
        chosen("clustered", rotated(clusters, 3), 10, "positive_definite", 4),
        _poisson(),
        System("scalar", vector(3).unsqueeze(-1), vector(2), vector(6), 1, "positive_definite"),
        System("empty", torch.zeros(0, 0, dtype=torch.float64), n0, n0, 1, "positive_definite"),
        chosen("indefinite", rotated(torch.cat([-spread(10, 10), spread(10, 20)]), 6), 10, "symmetric", 7),
        _indefinite_tridiagonal(),
        System("singular", singular, in_range, singular @ in_range, 10, "symmetric"),
        chosen("general", general, 4, "general", 10),
        chosen("contraction", contraction, 2, "general", 12),
        chosen("cyclic shift", eye.roll(1, 0), 1, "general", 13),
        chosen("2 by 2", ill, float(torch.linalg.cond(ill)), "general", 14),
    ]


SYSTEMS = {system.name: system for system in _systems()}
