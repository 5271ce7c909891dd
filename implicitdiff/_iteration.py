"""The loop that iterative linear solvers and inner solvers share: a state, a step, and a stop for each system."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._captures import transform_level
from .info import RUNNING, Status

State = TypeVar("State", bound=Any)
"""A NamedTuple of tensors with at least ``x`` and ``residual_norm``."""


class Ended(NamedTuple):
    """How the loop left the systems; ``iterations`` and ``status`` have the shape (*batch,)."""

    state: Any
    iterations: Tensor
    status: Tensor


def iterate(step: Callable[[State], State], state: State, threshold: Tensor, max_iterations: int) -> Ended:
    """Apply ``step`` until ``state.residual_norm`` ≤ ``threshold``, system by system.

    A system that has ended is frozen: later steps leave its part of the state alone, so a step may divide by zero
    there. A step that makes a system's residual non-finite is not taken. A state may have a field ``status`` in which
    a method says of a system that it has ended otherwise (:data:`RUNNING` where it has not).
    """
    if state.residual_norm.ndim == 0 and not transform_level():
        return _iterate_one(step, state, threshold, max_iterations)
    return _iterate_many(step, state, threshold, max_iterations)


def _iterate_one(step: Callable[[State], State], state: State, threshold: Tensor, max_iterations: int) -> Ended:
    """One system needs no masks."""
    limit, status, count = float(threshold), RUNNING, 0
    norm = float(state.residual_norm.detach())
    while True:
        if norm <= limit:
            status = Status.CONVERGED
        elif norm != norm or norm == float("inf"):
            status = Status.NON_FINITE
        elif hasattr(state, "status"):
            status = int(state.status)
        if status != RUNNING:
            break
        if count == max_iterations:
            status = Status.MAX_ITERATIONS
            break
        new = step(state)
        norm = float(new.residual_norm.detach())
        count += 1
        if norm != norm or norm == float("inf"):
            status = Status.NON_FINITE
            break
        state = new
    device = state.residual_norm.device
    return Ended(state, torch.tensor(count, device=device), torch.tensor(int(status), device=device))


def _iterate_many(step: Callable[[State], State], state: State, threshold: Tensor, max_iterations: int) -> Ended:
    active = _is_running(state, threshold) & state.residual_norm.detach().isfinite()
    iterations = torch.zeros_like(active, dtype=torch.int64)
    for _ in range(max_iterations):
        if not any_of(active):
            break
        new = step(state)
        iterations = iterations + active
        taken = active & new.residual_norm.detach().isfinite()
        state = select(taken, new, state)
        active = taken & _is_running(state, threshold)
    # Who is not there and has not said why made a step that was not finite.
    status = torch.where(active, int(Status.MAX_ITERATIONS), int(Status.NON_FINITE))
    if hasattr(state, "status"):
        status = torch.where(state.status != RUNNING, state.status, status)
    converged = state.residual_norm.detach() <= threshold
    return Ended(state, iterations, torch.where(converged, int(Status.CONVERGED), status))


def _is_running(state: Any, threshold: Tensor) -> Tensor:
    running = state.residual_norm.detach() > threshold
    return running & (state.status == RUNNING) if hasattr(state, "status") else running


def select(mask: Tensor, new: State, old: State) -> State:
    """The new state where the mask (*batch,) holds, the old one elsewhere, field by field."""
    if not any_of(~mask):  # the usual case, and a pass over all memory less
        return new
    column = mask.unsqueeze(-1)
    return type(new)(*(_where(mask, column, n, o) for n, o in zip(new, old, strict=True)))


def _where(mask: Tensor, column: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, tuple):
        parts = [_where(mask, column, n, o) for n, o in zip(new, old, strict=True)] if old is not None else new
        return type(new)(*parts) if hasattr(new, "_fields") else tuple(parts)
    if new is old or old is None or not isinstance(new, Tensor):
        return new
    if new.ndim > column.ndim:
        mask = mask.reshape(mask.shape + (1,) * (new.ndim - mask.ndim))
    elif new.ndim == column.ndim:
        mask = column
    return torch.where(mask, new, old)


def any_of(mask: Tensor) -> bool:
    """Whether the mask holds anywhere, over all samples of the vmaps around."""
    return bool(_Any.apply(mask)) if transform_level() else bool(mask.any())


class _Any(torch.autograd.Function):
    """``mask.any()`` over a vmapped dimension too, so that a loop inside vmap can stop early."""

    @staticmethod
    def forward(mask: Tensor) -> Tensor:
        return mask.any()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        return None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, mask: Tensor) -> tuple[Tensor, None]:
        return _Any.apply(mask.any() if in_dims[0] is not None else mask), None
