"""A function whose derivative evaluates it again, so that nothing of the evaluation is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from ._iteration import any_of
from ._tree import is_differentiable
from .errors import ImplicitDiffError


class Recomputation(torch.autograd.Function):
    """``apply(function, *inputs)`` is ``function(*inputs)``, a tuple of tensors; only the inputs are kept.

    ``torch.utils.checkpoint`` does so for plain backward alone, and is silently wrong around ``functional_call``.
    """

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        return function(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(output[-1], *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        before, *inputs = map(_functorch.unwrap_if_dead, ctx.saved_tensors)
        wanted = [i for i, t in enumerate(inputs) if ctx.needs_input_grad[i + 1] and is_differentiable(t)]

        def function(*chosen: Tensor) -> tuple[Tensor, ...]:
            given = list(inputs)
            for i, value in zip(wanted, chosen, strict=True):
                given[i] = value
            return ctx.function(*given)

        again, pullback = torch.func.vjp(function, *(inputs[i] for i in wanted))[:2]
        tolerance = torch.finfo(before.dtype).eps ** 0.5
        if any_of(~torch.isclose(again[-1].detach(), before.detach(), rtol=tolerance, equal_nan=True)):
            raise ImplicitDiffError(
                "the objective gave another value when backward evaluated it again: it is random (dropout?), or "
                "something that it uses was changed in place. Give checkpoint=False, or make it deterministic."
            )
        found: list[Tensor | None] = [None] * len(inputs)
        for i, cotangent in zip(wanted, pullback(cotangents), strict=True):
            found[i] = cotangent
        return None, *found

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise ImplicitDiffError("checkpoint=True has no forward-mode derivative: give checkpoint=False for jvp.")

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Any, *inputs: Tensor) -> tuple[tuple[Tensor, ...], int]:
        return Recomputation.apply(torch.func.vmap(function, in_dims=in_dims[1:]), *inputs), 0
