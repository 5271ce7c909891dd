"""Proximal operators: ``prox(v, stepsize, *parameters)`` = argmin over x of ½‖x − v‖² + stepsize · g(x; parameters).

Plain functions of tensors, differentiable in v, in the stepsize and in every parameter that is a tensor, to every order
and under every transform. They act on the last dimension, the nuclear norm on the last two; dimensions before it are a
batch. The stepsize is a number or a tensor of the batch's shape, and so is a penalty on a norm; a penalty on entries
broadcasts against v, so that each entry may have its own. Numbers that are negative raise ValueError; values inside
tensors are not looked at. At a kink the derivative is that of one side, and finite.

Conditions and inner solvers call ``prox(v, stepsize, *args)`` with all args of the layer. Where the prox needs only
some of them, say which:

>>> X, y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([1.0, 2.0, 0.5])
>>> def prox_of_lasso(v, stepsize, X, y, penalty):
...     return lasso(v, stepsize, penalty)
>>> def step(w, X, y, penalty, stepsize=0.2):
...     return prox_of_lasso(w - stepsize * X.mT @ (X @ w - y), stepsize, X, y, penalty)
>>> import implicitdiff as idf
>>> idf.FixedPointLayer(step)(torch.zeros(2), X, y, torch.tensor(0.5)).round(decimals=3)
tensor([0.1110, 0.7780])

Sources: Parikh and Boyd 2014 (Proximal Algorithms, Chapter 6); Beck 2017 (First-Order Methods, Section 6.9).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._cone_projections import positive_semidefinite_cone
from ._norms import polar
from ._parameters import Parameter, check_matrix, check_non_negative, check_vector, per_system

__all__ = [
    "elastic_net",
    "from_projection",
    "group_lasso",
    "huber",
    "lasso",
    "log_barrier",
    "non_negative_lasso",
    "non_negative_ridge",
    "none",
    "nuclear_norm",
    "ridge",
]
__dir__ = __all__.copy  # for tab completion


def none(v: Tensor, stepsize: Parameter, *parameters: Any) -> Tensor:
    """g = 0, whatever the parameters: x = v.

    ``v`` of any shape; it raises nothing.

    >>> none(torch.tensor([1.0, -2.0]), 0.5)
    tensor([ 1., -2.])
    """
    return v


def from_projection(projection: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """g = 0 on a set and ∞ off it: the projection, whatever the stepsize.

    What it returns is called as ``prox(v, stepsize, *parameters)``; shapes and errors are those of the projection.

    >>> from implicitdiff.projections import l2_ball
    >>> from_projection(l2_ball)(torch.tensor([3.0, 4.0]), 0.5, 1.0)
    tensor([0.6000, 0.8000])
    """

    def prox(v: Tensor, stepsize: Parameter, *parameters: Any) -> Tensor:
        return projection(v, *parameters)

    return prox


def lasso(v: Tensor, stepsize: Parameter, penalty: Parameter = 1.0) -> Tensor:
    """g(x) = Σ penaltyᵢ |xᵢ|: the soft threshold, x = sign(v) (|v| − stepsize · penalty)₊.

    An entry without penalty is left as it is.

    ``v`` of any shape, ``penalty`` a number or a tensor that broadcasts against it; ``stepsize`` a number or one for
    each system, (*batch,). Negative numbers raise ValueError.

    >>> lasso(torch.tensor([2.0, -0.25, 0.25]), 0.5, torch.tensor([1.0, 1.0, 0.0]))
    tensor([1.5000, 0.0000, 0.2500])
    """
    threshold = _scaled(stepsize, penalty=penalty)
    return torch.where(_is_zeroed(v.abs(), threshold), 0, v - threshold * v.sign())


def non_negative_lasso(v: Tensor, stepsize: Parameter, penalty: Parameter = 1.0) -> Tensor:
    """g(x) = Σ penaltyᵢ xᵢ for x ≥ 0, otherwise ∞: x = (v − stepsize · penalty)₊.

    ``v`` of any shape, ``penalty`` a number or a tensor that broadcasts against it; ``stepsize`` a number or one for
    each system, (*batch,). Negative numbers raise ValueError.

    >>> non_negative_lasso(torch.tensor([2.0, -3.0]), 0.5)
    tensor([1.5000, 0.0000])
    """
    return torch.relu(v - _scaled(stepsize, penalty=penalty))


def ridge(v: Tensor, stepsize: Parameter, penalty: Parameter = 1.0) -> Tensor:
    """g(x) = ½ Σ penaltyᵢ xᵢ²: x = v / (1 + stepsize · penalty).

    ``v`` of any shape, ``penalty`` a number or a tensor that broadcasts against it; ``stepsize`` a number or one for
    each system, (*batch,). Negative numbers raise ValueError.

    >>> ridge(torch.tensor([3.0, -3.0]), 0.5)
    tensor([ 2., -2.])
    """
    return v / (1 + _scaled(stepsize, penalty=penalty))


def non_negative_ridge(v: Tensor, stepsize: Parameter, penalty: Parameter = 1.0) -> Tensor:
    """g(x) = ½ Σ penaltyᵢ xᵢ² for x ≥ 0, otherwise ∞: x = v₊ / (1 + stepsize · penalty).

    ``v`` of any shape, ``penalty`` a number or a tensor that broadcasts against it; ``stepsize`` a number or one for
    each system, (*batch,). Negative numbers raise ValueError.

    >>> non_negative_ridge(torch.tensor([3.0, -3.0]), 0.5)
    tensor([2., 0.])
    """
    return torch.relu(v) / (1 + _scaled(stepsize, penalty=penalty))


def elastic_net(v: Tensor, stepsize: Parameter, penalty: Parameter = 1.0, ridge: Parameter = 1.0) -> Tensor:
    """g(x) = Σ penaltyᵢ |xᵢ| + ½ Σ ridgeᵢ xᵢ²: the soft threshold over 1 + stepsize · ridge.

    Both weights stand by themselves: scikit-learn's ``ElasticNet(alpha, l1_ratio)`` is penalty = alpha · l1_ratio and
    ridge = alpha · (1 − l1_ratio).

    ``v`` of any shape, ``penalty`` and ``ridge`` numbers or tensors that broadcast against it; ``stepsize`` a number
    or one for each system, (*batch,). Negative numbers raise ValueError.

    >>> elastic_net(torch.tensor([2.0, -0.25]), 0.5, 1.0, 1.0)
    tensor([1., 0.])
    """
    return lasso(v, stepsize, penalty) / (1 + _scaled(stepsize, ridge=ridge))


def group_lasso(v: Tensor, stepsize: Parameter, penalty: Parameter = 1.0) -> Tensor:
    """g(x) = penalty · ‖x‖₂, the last dimension being the group: x = (1 − stepsize · penalty / ‖v‖₂)₊ v.

    ``v`` is (*batch, n); ``stepsize`` and ``penalty`` are numbers or (*batch,). Negative numbers, and a v of no
    dimension, raise ValueError (Yuan and Lin 2006 for the penalty).

    >>> group_lasso(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 0.5, torch.tensor([5.0, 2.0]))
    tensor([[1.5000, 2.0000],
            [0.0000, 0.0000]])
    """
    check_vector(v)
    threshold = _scaled(stepsize, penalty=per_system(penalty))
    length, unit = polar(v)
    return torch.where(_is_zeroed(length, threshold), 0, v - threshold * unit)


def nuclear_norm(V: Tensor, stepsize: Parameter, penalty: Parameter = 1.0) -> Tensor:
    """g(X) = penalty · Σ σᵢ(X), V of shape (*batch, m, n): the soft threshold of the singular values.

    The symmetric matrix S = [0 V; Vᵀ 0] has the eigenvalues ±σᵢ and 0 (Jordan and Wielandt), its soft threshold is
    (S − t)₊ − (−S − t)₊, and the upper right block of that is twice that of (S − t)₊. So derivatives are those of
    :func:`~implicitdiff.projections.positive_semidefinite_cone`: right for repeated singular values and for those of 0.
    One eigendecomposition of size m + n.

    ``stepsize`` and ``penalty`` are numbers or (*batch,). Negative numbers, and a V that is no matrix, raise ValueError
    (Cai, Candès and Shen 2010, Theorem 2.1).

    >>> nuclear_norm(torch.diag(torch.tensor([3.0, 0.25])), 0.5).round(decimals=4).abs()
    tensor([[2.5000, 0.0000],
            [0.0000, 0.0000]])
    """
    check_matrix(V)
    m, n = V.shape[-2:]
    threshold = _scaled(stepsize, 2, penalty=per_system(penalty, 2))
    identity = torch.eye(m + n, dtype=V.dtype, device=V.device)
    upper = torch.nn.functional.pad(V, (m, 0, 0, n))
    X = 2 * positive_semidefinite_cone(upper + upper.mT - threshold * identity)[..., :m, m:]
    return torch.where(torch.as_tensor(threshold > 0, device=V.device), X, V)


def huber(v: Tensor, stepsize: Parameter, penalty: Parameter = 1.0, delta: Parameter = 1.0) -> Tensor:
    """g(x) = Σ penaltyᵢ h(xᵢ), h(x) = ½x² for |x| ≤ delta, otherwise delta · (|x| − ½delta).

    With w = stepsize · penalty, x = v / (1 + w) where that is at most delta in size, otherwise v − w · delta · sign(v).

    ``v`` of any shape, ``penalty`` and ``delta`` numbers or tensors that broadcast against it; ``stepsize`` a number
    or one for each system, (*batch,). Negative numbers raise ValueError.

    >>> huber(torch.tensor([3.0, 0.75]), 0.5)
    tensor([2.5000, 0.5000])
    """
    check_non_negative(delta=delta)
    weight = _scaled(stepsize, penalty=penalty)
    inner = v / (1 + weight)
    return torch.where(inner.abs() <= delta, inner, v - weight * delta * v.sign())


def log_barrier(v: Tensor, stepsize: Parameter, penalty: Parameter = 1.0) -> Tensor:
    """g(x) = −Σ penaltyᵢ log xᵢ: the positive root of x² − vx = stepsize · penalty.

    ``v`` of any shape, ``penalty`` a number or a tensor that broadcasts against it; ``stepsize`` a number or one for
    each system, (*batch,). Negative numbers raise ValueError.

    >>> log_barrier(torch.tensor([0.0, 3.0]), 4.0).round(decimals=3)
    tensor([2., 4.])
    """
    weight = torch.as_tensor(_scaled(stepsize, penalty=penalty), dtype=v.dtype, device=v.device)
    # With all lengths in units of the largest, a scale that cancels, squares neither overflow nor underflow.
    scale = torch.maximum(v.detach().abs(), weight.detach().sqrt())
    zero = scale == 0
    scale = torch.where(zero, 1, scale)
    u, w = v / scale, weight / scale / scale
    size = torch.where(v < 0, -u, u)
    larger = (size + torch.where(zero, 1, size.square() + 4 * w).sqrt()) / 2  # of the roots, in size
    return torch.where(zero, 0, torch.where(v < 0, weight / scale / larger, scale * larger))


def _scaled(stepsize: Parameter, dims: int = 1, **weight: Parameter) -> Any:
    """stepsize · weight, for weights that have a system's own dimensions."""
    check_non_negative(stepsize=stepsize, **weight)
    (value,) = weight.values()
    return per_system(stepsize, dims) * value


def _is_zeroed(size: Tensor, threshold: Any) -> Tensor:
    """Where a soft threshold gives 0. Nowhere without a penalty: there it is the identity, at 0 too."""
    return (size <= threshold) & (threshold > 0)
