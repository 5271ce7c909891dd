"""What the coefficients of a Lanczos process tell of the spectrum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

Notes = list[tuple[Tensor | float, Tensor | float]]
"""Two numbers per step, each with one entry per system."""


def _stacked(notes: Notes) -> tuple[Tensor, Tensor]:
    """Each of the numbers, of shape (steps, *batch)."""
    first, second = (torch.stack(list(map(_double, numbers))) for numbers in zip(*notes, strict=True))
    return first, second


def _double(number: Tensor | float) -> Tensor:
    return number.real.double() if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float64)


class Lanczos(ABC):
    """The tridiagonal matrices that a method builds, one per system; their eigenvalues are the Ritz values.

    Of each system, the notes of its first ``steps`` steps count. Computed only where somebody asks.
    """

    def __init__(self, notes: Notes, steps: Tensor) -> None:
        self.notes, self.steps = notes, steps

    @abstractmethod
    def tridiagonal(self) -> tuple[Tensor, Tensor]:
        """The diagonal and the off-diagonal, each of shape (steps, *batch)."""

    @cached_property
    def extremes(self) -> tuple[Tensor, Tensor, Tensor]:
        """The smallest and the largest Ritz value, and the smallest modulus of all; NaN for a system without steps."""
        entries = [t.detach().double().cpu().reshape(len(t), -1).numpy() for t in self.tridiagonal()]
        found = np.full((3, self.steps.numel()), np.nan)
        for i, used in enumerate(self.steps.flatten().tolist()):
            diagonal, off_diagonal = (entry[: used - j, i] for j, entry in enumerate(entries))
            if used and np.isfinite(diagonal).all() and np.isfinite(off_diagonal).all():
                values = scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal, eigvals_only=True)
                found[:, i] = values[0], values[-1], np.abs(values).min()
        low, high, least = torch.as_tensor(found).to(self.steps.device).reshape(3, *self.steps.shape)
        return low, high, least


class LanczosOfCG(Lanczos):
    """From the step lengths α and the ratios β of CG (Saad 2003, section 6.7.3)."""

    def tridiagonal(self) -> tuple[Tensor, Tensor]:
        alpha, beta = _stacked(self.notes)
        before = torch.cat([torch.zeros_like(alpha[:1]), beta[:-1] / alpha[:-1]])
        return 1 / alpha + before, beta.sqrt() / alpha


class LanczosOfMINRES(Lanczos):
    """From the entries themselves, as Paige and Saunders' MINRES computes them."""

    def tridiagonal(self) -> tuple[Tensor, Tensor]:
        return _stacked(self.notes)
