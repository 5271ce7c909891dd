"""Several processes that train one model: started by torchrun, each takes its share of the tasks, one sum a step.

Alone, without torchrun, everything here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=5)
"""How long ranks wait for one that neither answers nor is known to be dead; a dead one is noticed at once."""

T = TypeVar("T")


class LostRankError(ConnectionError):
    """Another rank has died, or does not answer any more.

    :func:`imaml.training.train` raises it after a checkpoint of the last step that all ranks have done. Here a source
    of tasks raises it in the place of a death:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from imaml import MAML, checkpoint
    >>> from imaml.models import MLP
    >>> from imaml.tasks import Sinusoids
    >>> from imaml.training import train
    >>> class Mortal(Sinusoids):
    ...     def sample(self, count, split, seed, index):
    ...         if index == 2:
    ...             raise LostRankError("rank 1 has died")
    ...         return super().sample(count, split, seed, index)
    >>> learner = MAML(MLP([1, 8, 1]), torch.nn.functional.mse_loss, steps=1, stepsize=0.01)
    >>> optimizer = torch.optim.Adam(learner.parameters())
    >>> settings = {"steps": 9, "minutes": None, "tasks_per_step": 4, "seed": 0}
    >>> with tempfile.TemporaryDirectory() as run:
    ...     try:
    ...         train(learner, Mortal(), optimizer, Path(run), **settings)
    ...     except LostRankError as error:
    ...         print(error, "after step", checkpoint.load(Path(run))["step"])
    step 2 ...
    rank 1 has died after step 2
    """


@contextmanager
def started() -> Iterator[None]:
    """Join the processes that torchrun has started, for the length of the block: gloo on the CPU, NCCL on GPUs."""
    if not dist.is_torchelastic_launched():
        yield
        return
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 writes the files and tells the user."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(count: int) -> tuple[slice, float]:
    """The part of ``count`` tasks that this rank takes, and its weight in a mean over all of them.

    A rank that is left without a task repeats one with weight 0, so that all have the same numbers to add up.

    >>> share(16)
    (slice(0, 16, None), 1.0)
    """
    first, end = (count * r // world_size() for r in (rank(), rank() + 1))
    return slice(first, max(end, first + 1)), (end - first) / count


def sum_(tensors: Sequence[Tensor], weight: float = 1.0, flag: bool = False) -> bool:
    """Replace each tensor by Σ weight · tensor over all ranks, in one all-reduce; whether any rank raised its flag.

    The sum is taken in float64 and is the same on every rank, bit for bit. Raises LostRankError.
    """
    if world_size() == 1:
        return flag
    device = tensors[0].device
    parts = [weight * t.detach().to(device, torch.float64).flatten() for t in tensors]
    total = torch.cat([*parts, torch.tensor([flag], dtype=torch.float64, device=device)])
    _together(lambda: dist.all_reduce(total))
    *sums, flags = total.split([*(t.numel() for t in tensors), 1])
    for tensor, value in zip(tensors, sums, strict=True):
        tensor.copy_(value.view_as(tensor))
    return bool(flags > 0)


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` returns on rank 0, on every rank. Raises LostRankError."""
    if world_size() == 1:
        return make()
    made = [make() if rank() == 0 else None]
    _together(lambda: dist.broadcast_object_list(made, device=torch.device("cpu")))
    return made[0]  # type: ignore[return-value]


def _together(collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        raise LostRankError(
            f"rank {rank()} of {world_size()} has lost another one, which died or did not answer for {TIMEOUT}. The "
            f"last completed step of a training is in its checkpoint: go on with --resume, on any number of ranks."
        ) from error
