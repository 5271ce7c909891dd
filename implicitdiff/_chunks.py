"""An objective over data as a sum of terms over slices of the data."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ._vectors import GOLDEN, probe
from .errors import ImplicitDiffError

Objective = Callable[[Tensor], Tensor]


def terms_on_slices(
    on_slice: Callable[[int, int], Objective], size: int, k: int, x: Tensor
) -> list[tuple[float, Objective]]:
    """Weights and objectives on slices of the data whose sum is the objective on all ``size`` of them.

    A mean over the data is the mean of its slices. A sum with terms r that the data do not enter is Σ fᵢ − (k − 1) r,
    and r is f on an empty slice. Which one it is, the values near x tell; ImplicitDiffError where it is neither.
    """
    # Not at x itself: where a fit is perfect, all values are 0 there.
    near = x + 1e-3 * (1 + x.abs()) * probe(x, GOLDEN)
    bounds = list(itertools.pairwise(i * size // k for i in range(k + 1)))
    whole, parts = on_slice(0, size)(near), [on_slice(*bound) for bound in bounds]
    values = torch.stack([part(near) for part in parts])
    shares = values.new_tensor([(stop - start) / size for start, stop in bounds])

    def is_whole(terms: Tensor) -> bool:
        rounding = 1e3 * torch.finfo(x.dtype).eps * terms.abs().sum(0)
        return bool(((terms.sum(0) - whole).abs() <= rounding).all())

    if is_whole(shares.reshape(-1, *(1 for _ in whole.shape)) * values):
        return list(zip(shares.tolist(), parts, strict=True))
    rest = on_slice(0, 0)
    if is_whole(torch.cat([values, (1 - k) * rest(near).unsqueeze(0)])):
        return [*((1.0, part) for part in parts), (1.0 - k, rest)]
    raise ImplicitDiffError(
        f"the objective is asked for in {k} chunks, but it is neither a mean nor a sum over that data: "
        f"{whole.tolist()} on all of it, {values.tolist()} on its slices."
    )
