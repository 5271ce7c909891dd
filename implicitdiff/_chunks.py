"""An objective over data as a sum of terms over slices of the data."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import ImplicitDiffError

Objective = Callable[[Tensor], Tensor]


def terms_on_slices(
    on_slice: Callable[[int, int], Objective], size: int, k: int, x: Tensor
) -> list[tuple[float, Objective]]:
    """Weights and objectives on slices of the data whose sum is the objective on all ``size`` of them.

    A mean over the data is the mean of its slices. A sum with terms r that the data do not enter is Σ fᵢ − (k − 1) r,
    and r is f on an empty slice. Which one it is, the values at x tell; ImplicitDiffError where it is neither.
    """
    bounds = list(itertools.pairwise(i * size // k for i in range(k + 1)))
    whole, parts = on_slice(0, size)(x), [on_slice(*bound) for bound in bounds]
    values = torch.stack([part(x) for part in parts])
    shares = [(stop - start) / size for start, stop in bounds]
    rtol = 1e3 * torch.finfo(x.dtype).eps

    if torch.allclose(whole, torch.tensordot(values.new_tensor(shares), values, 1), rtol=rtol):
        return list(zip(shares, parts, strict=True))
    rest = on_slice(0, 0)
    if torch.allclose(whole, values.sum(0) - (k - 1) * rest(x), rtol=rtol):
        return [*((1.0, part) for part in parts), (1.0 - k, rest)]
    raise ImplicitDiffError(
        f"the objective is asked for in {k} chunks, but it is neither a mean nor a sum over that data: "
        f"{whole.tolist()} on all of it, {values.tolist()} on its slices."
    )
