"""Length and direction of vectors, at every scale and with finite derivatives at zero."""

from __future__ import annotations

import torch
from torch import Tensor


def polar(v: Tensor) -> tuple[Tensor, Tensor]:
    """‖v‖₂, with its dimension kept, and v / ‖v‖₂; at v = 0 both are 0, and so are their derivatives.

    Squares are taken of v / max |v|, so that they neither overflow nor underflow. That scale cancels, so it may be
    held fixed in derivatives of any order. No division here can give ∞, so neither function leaves a NaN where it is
    the branch that is not taken.
    """
    if v.shape[-1] == 0:
        return v.sum(-1, keepdim=True), v
    scale = v.detach().abs().amax(-1, keepdim=True)
    zero = scale < torch.finfo(v.dtype).tiny
    scale = torch.where(zero, 1, scale)
    scaled = torch.where(zero, 1, v / scale)
    length = scaled.square().sum(-1, keepdim=True).sqrt()
    return torch.where(zero, 0, scale * length), torch.where(zero, 0, scaled / length)
