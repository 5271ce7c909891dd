"""What a computation costs: its peak memory and the work in its products."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def peak_memory(function: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had handed out at one time, above what there was before.

    >>> peak_memory(lambda: torch.zeros(1000))
    4000
    """
    function()  # what is set up once is not counted
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    # What earlier calls have left to the collector, freed in this one, would be taken off its peak.
    with _no_garbage_collection(), profiler as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(alive, default=0)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def flops(function: Callable[[], object]) -> int:
    """The floating-point operations in its matrix products and convolutions, forward and backward.

    >>> flops(lambda: torch.zeros(2, 3) @ torch.zeros(3, 5))
    60
    """
    with _Counter() as counter:
        function()
    return counter.total


class _Counter(TorchDispatchMode):
    """By torch's formulas; its own FlopCounterMode follows modules too, and takes twice as long for small products."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
