"""Checkpoints that survive a crash: written to a temporary file, synced and renamed; the one before is kept."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import write_atomically

NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
FORMAT = "imaml checkpoint 1"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says why and what can be done."""


def save(run: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings and containers of them), keeping the checkpoint before it."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    current = run / NAME
    if current.exists():
        write_atomically(run / PREVIOUS, current.read_bytes())
    write_atomically(current, buffer.getvalue())


def load(run: Path) -> dict[str, Any]:
    """The state of a run, on the CPU. Raises CheckpointError for a missing, truncated or foreign file."""
    try:
        return _read(run / NAME)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_offer(run)}") from error


def fit(run: Path, state: dict[str, Any], learner: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put a checkpoint's state into a learner and its optimizer. Raises CheckpointError where it is that of others."""
    try:
        learner.load_state_dict(state["learner"])
        if optimizer is not None:
            groups = zip(state["optimizer"]["param_groups"], optimizer.param_groups, strict=True)
            if any(stored.keys() != own.keys() for stored, own in groups):
                raise ValueError(f"its optimizer was another one than {type(optimizer).__name__}.")
            optimizer.load_state_dict(state["optimizer"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{run / NAME} does not fit the settings in {run / 'config.json'}: {' '.join(str(error).split())}"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint in {path.parent}: is it a run folder?")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({type(error).__name__}).") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of imaml.")
    return state


def _offer(run: Path) -> str:
    """What can be said of the checkpoint before; offered where it can be read."""
    previous = run / PREVIOUS
    if not previous.exists():
        return ""
    try:
        state = _read(previous)
    except CheckpointError:
        return f" The one before, {previous}, cannot be read either: start anew with another --out."
    step = f", of step {state['step']}," if "step" in state else ""
    return f" The one before is {previous}{step} and can be read: rename it to {NAME} to go on from there."
