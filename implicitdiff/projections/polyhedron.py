"""The projection onto a polyhedron."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import QPLayer


def polyhedron(
    v: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
) -> Tensor:
    """The x nearest to v with A x = b and G x ≤ h, by :class:`~implicitdiff.QPLayer`.

    ``v`` is (*batch, n), A (p, n), b (p,), G (m, n), h (m,), each with or without batch dimensions in front. A and b,
    or G and h, may be absent. An empty polyhedron is reported as ``INFEASIBLE`` by a
    :class:`~implicitdiff.ConvergenceWarning`, and its projection is NaN. Shapes that do not fit raise
    :class:`~implicitdiff.ImplicitDiffError`. For other settings, call :class:`~implicitdiff.QPLayer` with Q = I and
    q = −v.

    >>> polyhedron(torch.tensor([2.0, 2.0]), G=torch.ones(1, 2), h=torch.tensor([1.0]))
    tensor([0.5000, 0.5000])
    """
    return QPLayer()(torch.eye(v.shape[-1]).to(v), -v, A, b, G, h)
