"""Checkpoints that survive a crash: written to a temporary file, synced and renamed."""

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
    """The state of a run. Raises CheckpointError for a missing, truncated or foreign file."""
    path = run / NAME
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint in {run}: is it a run folder?")
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}).{_offer(run)}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of imaml.{_offer(run)}")
    return state


def fit(run: Path, state: dict[str, Any], learner: nn.Module) -> None:
    """Put a checkpoint's parameters into a learner. Raises CheckpointError where they are of another model."""
    try:
        learner.load_state_dict(state["learner"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{run / NAME} does not fit the settings in {run / 'config.json'}: {' '.join(str(error).split())}"
        ) from error


def _offer(run: Path) -> str:
    return (
        f" The one before is {run / PREVIOUS}: rename it to {NAME} to go on from there."
        if (run / PREVIOUS).exists()
        else ""
    )
