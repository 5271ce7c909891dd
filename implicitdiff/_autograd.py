"""The implicit function theorem as one autograd Function.

    F(x*(θ), θ) = 0   ⇒   ∂x*/∂θ = −A⁻¹ B,   A = ∂F/∂x,  B = ∂F/∂θ

so a cotangent g of x* gives  θ̄ = −Bᵀ u  with  Aᵀ u = g,  and a tangent θ̇ gives  ẋ = −A⁻¹ (B θ̇).
The vector u is itself the solution of a problem, the linear one  Aᵀ u − g = 0  in the inputs (g, x*, θ). So the same
Function is applied to it, and with that every order of derivative and every transform follows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch
from torch.overrides import handle_torch_function

from ._captures import transform_level
from ._timing import timed
from ._tree import is_differentiable
from .errors import ImplicitDiffError


class Problem(ABC):
    """Equations F(x, *inputs) = 0 between vectors, x of shape (*batch, n), and a way to solve them."""

    @abstractmethod
    def solve(self, x0: Tensor | None, *inputs: Tensor) -> Tensor:
        """A solution; every tensor here is plain (no transform, no graph), so that any code may compute it."""

    @abstractmethod
    def residual(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """F(x, *inputs), in operations that every transform can follow."""

    @abstractmethod
    def linearized(self, x: Tensor, rhs: Tensor, inputs: Sequence[Tensor], *, adjoint: bool) -> tuple[Problem, Any]:
        """The problem A u = rhs (Aᵀ u = rhs for the adjoint) at a solution x, and its inputs."""

    def plain_pullback(self, x: Tensor, g: Tensor, inputs: Sequence[Tensor], wanted: Sequence[int]) -> list[Any] | None:
        """Bᵀ u with Aᵀ u = g for the wanted inputs, where nobody follows: F is then evaluated once for A and B.

        None means that the problem has no shorter way than the general one.
        """
        return None

    @abstractmethod
    def batched(self, size: int, dims: Sequence[int | None], inputs: Sequence[Tensor]) -> tuple[Problem, Any]:
        """The problem with one more batch dimension in front, and its inputs; ``dims`` says which of them have it."""


def solution_of(problem: Problem, x0: Tensor | None, *inputs: Tensor) -> Tensor:
    """The solution of a problem, differentiable in the inputs.

    An operation like torch's own: modes see it, so that a layer inside the function of another layer is followed.
    """
    if torch._C._is_torch_function_mode_enabled():
        return handle_torch_function(solution_of, inputs, problem, x0, *inputs)
    return Implicit.apply(problem, x0, *inputs)


class Implicit(torch.autograd.Function):
    """The rule of each transform for the solution of a problem."""

    @staticmethod
    def forward(problem: Problem, x0: Tensor | None, *inputs: Tensor) -> Tensor:
        if any(map(_functorch.is_legacy_batchedtensor, inputs)):
            return _forward_under_legacy_vmap(problem, x0, inputs)
        return problem.solve(x0, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        problem, _, *tensors = inputs
        ctx.problem = problem
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    @timed("derivative")
    def backward(ctx: Any, g: Tensor) -> Any:
        # The pullback of torch.func.vjp may be called when its level has ended: what it wrapped is then dead.
        x, *inputs = map(_functorch.unwrap_if_dead, ctx.saved_tensors)
        wanted = [i for i, t in enumerate(inputs) if ctx.needs_input_grad[i + 2] and is_differentiable(t)]
        cotangents = None
        if not (torch.is_grad_enabled() or transform_level() or _functorch.is_legacy_batchedtensor(g)):
            cotangents = ctx.problem.plain_pullback(x, g, inputs, wanted)
        if cotangents is None:
            adjoint, point = ctx.problem.linearized(x, g, inputs, adjoint=True)
            u = solution_of(adjoint, None, *point)
            cotangents = _pull(
                lambda *chosen: ctx.problem.residual(x, *_replaced(inputs, wanted, chosen)), inputs, wanted, u
            )
        return None, None, *_replaced([None] * len(inputs), wanted, [-c for c in cotangents])

    @staticmethod
    @timed("derivative")
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        # Forward AD is off inside this rule, and dual levels do not nest: without both lines jacfwd∘jacfwd is wrong.
        with forward_ad._set_fwd_grad_enabled(True):
            x, *inputs = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
            wanted = [i for i, tangent in enumerate(tangents[2:]) if tangent is not None]
            given = [tangent for tangent in tangents[2:] if tangent is not None]
            rhs = -_push(
                lambda *chosen: ctx.problem.residual(x, *_replaced(inputs, wanted, chosen)),
                [inputs[i] for i in wanted],
                given,
            )
            tangent, point = ctx.problem.linearized(x, rhs, inputs, adjoint=False)
            return solution_of(tangent, None, *point)

    @staticmethod
    def vmap(info: Any, in_dims: Any, problem: Problem, x0: Tensor | None, *inputs: Tensor) -> tuple[Tensor, int]:
        return _batched_apply(problem, info.batch_size, in_dims[1:], x0, inputs), 0


def _batched_apply(
    problem: Problem, size: int, dims: Sequence[int | None], x0: Tensor | None, inputs: Sequence[Tensor]
) -> Tensor:
    moved = [t if d is None else t.movedim(d, 0) for t, d in zip(inputs, dims[1:], strict=True)]
    batched, moved = problem.batched(size, [None if d is None else 0 for d in dims[1:]], moved)
    if x0 is not None:
        x0 = x0.expand(size, *x0.shape) if dims[0] is None else x0.movedim(dims[0], 0)
    return solution_of(batched, x0, *moved)


@timed("args product")
def _pull(function: Any, inputs: Sequence[Tensor], wanted: Sequence[int], u: Tensor) -> Sequence[Tensor]:
    """Bᵀ u for the wanted inputs."""
    if not wanted:
        return ()
    return torch.func.vjp(function, *(inputs[i] for i in wanted))[1](u)


@timed("args product")
def _push(function: Any, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """B θ̇ as the derivative of the linear map u ↦ Bᵀ u, so by reverse mode alone: forward mode cannot nest here."""
    out, pullback = torch.func.vjp(function, *primals)[:2]
    pullback_of_pullback = torch.func.vjp(pullback, torch.zeros_like(out))[1]
    return pullback_of_pullback(tuple(tangents))[0]


def _replaced(inputs: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    new = list(inputs)
    for place, value in zip(places, values, strict=True):
        new[place] = value
    return new


def _forward_under_legacy_vmap(problem: Problem, x0: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
    """``is_grads_batched`` and ``vectorize=True`` use torch's old vmap, which asks for no vmap rule of a Function."""
    level = 1  # of the old vmap; it does not nest in torch's own uses
    sizes: set[int] = set()
    plain: list[Tensor] = []
    dims: list[int | None] = []
    for tensor in inputs:
        if not _functorch.is_legacy_batchedtensor(tensor):
            plain.append(tensor)
            dims.append(None)
            continue
        # The size is not asked for where the tensor is batched on that level.
        unwrapped = torch._remove_batch_dim(tensor, level, 1, 0)
        if _functorch.is_legacy_batchedtensor(unwrapped):
            raise ImplicitDiffError(
                "nested is_grads_batched / vectorize=True is not supported: use torch.func.vmap, jacrev or jacfwd."
            )
        plain.append(unwrapped)
        dims.append(0)
        sizes.add(unwrapped.shape[0])
    out = _batched_apply(problem, sizes.pop(), [None, *dims], x0, plain)
    return torch._add_batch_dim(out, 0, level)
