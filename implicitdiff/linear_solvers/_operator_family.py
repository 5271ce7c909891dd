"""A user's operator as a family of operators in the tensors that it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._captures import Capture, Substituted, dual_level_is_open, find_captures, is_transformed, transform_level
from .._timing import timed
from ..operators import FunctionOperator, LinearOperator


class OperatorWithCaptures:
    """A user's operator as a family: its parameters are the tensors that it holds."""

    def __init__(self, A: LinearOperator, captures: Sequence[Capture] = (), levels: tuple[Any, ...] = ()) -> None:
        self.A, self.captures, self.levels = A, tuple(captures), levels

    @timed("captured tensors")
    def find(self, b: Tensor) -> list[Tensor]:
        if not (transform_level() or dual_level_is_open() or torch.is_grad_enabled()):
            return []
        found, captures = find_captures(self.A.matvec, b.new_zeros(*b.shape[:-1], self.A.shape[1]), [], [self.A])
        self.captures = tuple(captures)
        return found

    def product(self, v: Tensor, *parameters: Tensor, transposed: bool) -> Tensor:
        return self._call(self.A.rmatvec if transposed else self.A.matvec)(v, *parameters)

    def operator(self, *parameters: Tensor) -> LinearOperator:
        plain = not any(c.is_dual or any(map(is_transformed, c.current())) for c in self.captures)
        if plain and not self.levels:
            return self.A
        A = self.A
        return FunctionOperator(
            lambda v: self.product(v, *parameters, transposed=False),
            A.shape,
            rmatvec=lambda v: self.product(v, *parameters, transposed=True),
            structure=A.structure,
            batch_shape=(*(size for size, _ in self.levels), *A.batch_shape),
            dtype=A.dtype,
            device=A.device,
        )

    def batched(self, size: int, dims: Sequence[int | None], parameters: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        levels = ((size, tuple(dims)), *self.levels)
        return OperatorWithCaptures(self.A, self.captures, levels), list(parameters)

    def _call(self, product: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = Substituted(product, self.captures)
        for _, dims in reversed(self.levels):
            function = torch.func.vmap(function, in_dims=(0, *dims))
        return function
