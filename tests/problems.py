"""A bank of problems with known answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.operators import DenseOperator, Structure


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def rotated(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with the given eigenvalues, (*batch, n) → (*batch, n, n)."""
    Q = torch.linalg.qr(random(seed, *eigenvalues.shape, eigenvalues.shape[-1]))[0]
    A = Q @ torch.diag_embed(eigenvalues) @ Q.mT
    return (A + A.mT) / 2


def second_difference(n: int) -> Tensor:
    """tridiag(−1, 2, −1)"""
    return 2 * torch.eye(n, dtype=torch.float64) - sum(
        torch.diag(torch.ones(n - 1, dtype=torch.float64), k) for k in (-1, 1)
    )


@dataclass(frozen=True)
class System:
    name: str
    matrix: Tensor
    b: Tensor
    structure: Structure

    def operator(self, dtype: torch.dtype = torch.float64) -> DenseOperator:
        return DenseOperator(self.matrix.to(dtype), self.structure)


def systems() -> list[System]:
    log = lambda low, high, n: torch.logspace(low, high, n, dtype=torch.float64)  # noqa: E731
    repeated = torch.tensor([1.0] * 10 + [2.0] * 5 + [30.0], dtype=torch.float64)
    indefinite = torch.cat([-log(0, 1, 10), log(0, 1, 20)])
    T = second_difference(50)
    ones = torch.ones(50, dtype=torch.float64)
    poisson = torch.arange(1, 101, dtype=torch.float64)
    assert torch.equal(second_difference(100) @ (poisson * (101 - poisson) / 2), torch.ones(100, dtype=torch.float64))
    singular = rotated(torch.cat([torch.zeros(3, dtype=torch.float64), log(0, 1, 12)]), 5)
    return [
        System("definite", rotated(log(0, 2, 30), 1), random(2, 30), "positive_definite"),
        System("repeated eigenvalues", rotated(repeated, 3), random(4, 16), "positive_definite"),
        System("poisson", second_difference(100), torch.ones(100, dtype=torch.float64), "positive_definite"),
        System(
            "scalar",
            torch.tensor([[3.0]], dtype=torch.float64),
            torch.tensor([6.0], dtype=torch.float64),
            "positive_definite",
        ),
        System("indefinite", rotated(indefinite, 6), random(7, 30), "symmetric"),
        System("T² − √3 I", T @ T - math.sqrt(3) * torch.eye(50, dtype=torch.float64), ones, "symmetric"),
        System("singular, consistent", singular, singular @ random(8, 15), "symmetric"),
        System("general", torch.eye(30, dtype=torch.float64) + 0.1 * random(9, 30, 30), random(10, 30), "general"),
        System("contraction", torch.eye(12, dtype=torch.float64) - 0.1 * random(11, 12, 12), random(12, 12), "general"),
        System("cyclic shift", torch.eye(12, dtype=torch.float64).roll(1, 0), random(13, 12), "general"),
    ]


SYSTEMS = {system.name: system for system in systems()}
