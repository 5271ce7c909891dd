"""What row and column sums of a transport plan must satisfy."""

from __future__ import annotations

import torch
from torch import Tensor

from ._captures import plain_value
from .errors import ImplicitDiffError


def check_marginals(plan: Tensor, row_sums: Tensor, column_sums: Tensor) -> None:
    """Raise ImplicitDiffError where no plan of the shape (*batch, m, n) has these sums.

    That their totals agree is asked for to half of the digits: what rounding leaves, the caller shares out.
    """
    for name, sums, size in (("row_sums", row_sums, plan.shape[-2]), ("column_sums", column_sums, plan.shape[-1])):
        if sums.ndim == 0 or sums.shape[-1] != size:
            raise ImplicitDiffError(
                f"{name} has the shape {tuple(sums.shape)}, but for a plan of shape {tuple(plan.shape)} its last "
                f"dimension must be {size}."
            )
        least = plain_value(sums.amin(-1)).amin()
        if bool(least < 0):
            raise ImplicitDiffError(f"{name} has a negative entry, {float(least):.3g}: no plan T ≥ 0 has such sums.")
    # One tensor, so that the dimensions of all vmaps around stay in line.
    totals = plain_value(torch.stack(torch.broadcast_tensors(row_sums.sum(-1), column_sums.sum(-1)), -1))
    rows, columns = totals.reshape(-1, 2).unbind(-1)
    if bool((rows == 0).any()):
        raise ImplicitDiffError("row_sums adds up to 0: a plan must have something to transport.")
    differ = (rows - columns).abs() > torch.finfo(totals.dtype).eps ** 0.5 * rows
    if bool(differ.any()):
        worst = int((rows - columns).abs().argmax())
        raise ImplicitDiffError(
            f"row_sums adds up to {float(rows[worst]):.6g} and column_sums to {float(columns[worst]):.6g}, but a plan "
            f"has one total: rescale one of them."
        )
