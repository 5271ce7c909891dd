"""The loop that iterative linear solvers and inner solvers share: a state, a step, and a stop for each system."""

from __future__ import annotations

import math
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


def iterate(
    step: Callable[[State], State], state: State, threshold: Tensor, max_iterations: int, check_every: int = 1
) -> Ended:
    """Apply ``step`` until ``state.residual_norm`` ≤ ``threshold``, system by system.

    A system that has ended is frozen: later steps leave its part of the state alone, so a step may divide by zero
    there. A step that makes a system's residual non-finite is not taken. A state may have a field ``status`` in which
    a method says of a system that it has ended otherwise (:data:`RUNNING` where it has not). Whether all systems have
    ended is asked after every ``check_every`` steps: on an accelerator each question waits for what is under way.
    """
    if is_of_one(state, check_every):
        return _iterate_one(step, state, threshold, max_iterations)

    def steps(state: State, iterations: Tensor, active: Tensor, left: int) -> Marched:
        for _ in range(min(check_every, left)):
            state, iterations, active = masked_step(step, state, iterations, active, threshold, check_every == 1)
        return state, iterations, active

    return march(steps, state, threshold, max_iterations, check_every)


def is_of_one(state: Any, check_every: int) -> bool:
    """Whether the loop follows a single system step by step, so that a step may write over the state."""
    return state.residual_norm.ndim == 0 and check_every == 1 and not transform_level()


def _iterate_one(step: Callable[[State], State], state: State, threshold: Tensor, max_iterations: int) -> Ended:
    """One system needs no masks, and its step may give Python's numbers for the norm and the status."""
    like, limit, status, count = state.residual_norm, float(threshold), RUNNING, 0
    norm = float(like.detach())
    while True:
        if norm <= limit:
            status = Status.CONVERGED
        elif norm != norm or norm == math.inf:
            status = Status.NON_FINITE
        elif hasattr(state, "status"):
            status = int(state.status)
        if status != RUNNING:
            break
        if count == max_iterations:
            status = Status.MAX_ITERATIONS
            break
        new = step(state)
        norm = new.residual_norm
        if not isinstance(norm, float):
            norm = float(norm.detach())
        count += 1
        if norm != norm or norm == math.inf:
            status = Status.NON_FINITE
            break
        state = new
    if isinstance(state.residual_norm, float):
        state = state._replace(residual_norm=like.new_tensor(state.residual_norm))
    return Ended(state, torch.tensor(count, device=like.device), torch.tensor(int(status), device=like.device))


def check_interval(check_every: int | None) -> int | None:
    """The setting ``check_every`` of a solver; raises ValueError where it is none."""
    if check_every is not None and (int(check_every) != check_every or check_every < 1):
        raise ValueError(f"check_every is {check_every!r}, but it must be a whole number of at least 1, or None.")
    return check_every


def every(device: torch.device | None) -> int:
    """The steps from one look to the next, where nothing else is asked."""
    return 1 if device is None or device.type == "cpu" else 4


Marched = tuple[Any, Tensor, Tensor]
"""The state, the iterations of each system, and which of them still run."""


def march(
    steps: Callable[[Any, Tensor, Tensor, int], Marched], state: Any, threshold: Tensor, max_iterations: int, each: int
) -> Ended:
    """The loop over masked steps, ``each`` of them in a call of ``steps(state, iterations, active, left)``."""
    active = _is_running(state, threshold) & state.residual_norm.detach().isfinite()
    iterations = torch.zeros_like(active, dtype=torch.int64)
    for done in range(0, max_iterations, each):
        if not any_of(active):
            break
        state, iterations, active = steps(state, iterations, active, max_iterations - done)
    # Who is not there and has not said why made a step that was not finite.
    status = torch.where(active, int(Status.MAX_ITERATIONS), int(Status.NON_FINITE))
    if hasattr(state, "status"):
        status = torch.where(state.status != RUNNING, state.status, status)
    converged = state.residual_norm.detach() <= threshold
    return Ended(state, iterations, torch.where(converged, int(Status.CONVERGED), status))


def masked_step(
    step: Callable[[Any], Any], state: Any, iterations: Tensor, active: Tensor, threshold: Tensor, look: bool
) -> Marched:
    """One step of the active systems. ``look``: see first whether all of them take it, which saves a pass."""
    new = step(state)
    iterations = iterations + active
    taken = active & new.residual_norm.detach().isfinite()
    state = select(taken, new, state) if look else _selected(taken, new, state)
    return state, iterations, taken & _is_running(state, threshold)


def _is_running(state: Any, threshold: Tensor) -> Tensor:
    running = state.residual_norm.detach() > threshold
    return running & (state.status == RUNNING) if hasattr(state, "status") else running


def select(mask: Tensor, new: State, old: State) -> State:
    """The new state where the mask (*batch,) holds, the old one elsewhere, field by field."""
    if not any_of(~mask):  # the usual case, and a pass over all memory less
        return new
    return _selected(mask, new, old)


def _selected(mask: Tensor, new: State, old: State) -> State:
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
