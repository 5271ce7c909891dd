"""Several ways to the same numbers: first they have to agree, then they are timed in turns.

The times are those of the clock, or with ``--cpu-time`` of the processor, for a machine that others use too.
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

CPU_TIME = "--cpu-time" in sys.argv
clock = time.process_time if CPU_TIME else time.perf_counter

Way = Callable[[], Callable[[], Any]]
"""Prepares, and returns what is timed; that returns the gradients, or None where it computes none."""


@dataclass(frozen=True)
class Row:
    workload: str
    way: str
    seconds: float | None
    """None for a way that does not agree, which is not timed."""
    ratio: float | None
    """To the workload's first way."""
    error: float | None
    """‖g − reference‖ / ‖reference‖, the largest over the gradients."""

    def __str__(self) -> str:
        error = "" if self.error is None else f"{self.error:.0e}"
        time = f"{'wrong':>23}" if self.seconds is None else f"{self.ratio:8.2f} {1e3 * self.seconds:11.3f} ms"
        return f"{self.workload:34} {self.way:44} {time} {error:>9}"


def one_thread() -> None:
    """One thread for everybody, on one core; XLA is told before JAX is imported."""
    torch.set_num_threads(1)
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def ready(work: Callable[..., Any]) -> Way:
    """A way that has nothing to prepare."""
    return lambda: work


def importable(*names: str) -> bool:
    """Whether all these modules can be imported; says so where not."""
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
        except ImportError as error:
            print(f"left out: {name} ({error})", flush=True)
            return False
    return True


def compare(
    workload: str,
    ways: dict[str, Way],
    reference: Sequence[Any],
    tolerance: float,
    seconds: float = 10.0,
) -> list[Row]:
    """The rows of a workload, the first way being the 1.0, each with its share of so many seconds.

    A way whose gradients are further than ``tolerance`` from the reference is not timed. Raises AssertionError where
    that is the first way, or ours.
    """
    errors = {}
    for name, way in ways.items():
        found = way()()  # not timed, as what is compiled is compiled here
        errors[name] = None if found is None else relative_error(found, reference)
    agree = [name for name, error in errors.items() if error is None or error <= tolerance]
    for name in ways:
        must = name == next(iter(ways)) or name.startswith("implicitdiff")
        assert name in agree or not must, f"{workload}, {name}: off by {errors[name]:.1e}"
    times: dict[str, list[float]] = {name: [] for name in agree}
    left = list(agree)
    while left:
        for name in tuple(left):
            work = ways[name]()
            start = clock()
            work()
            times[name].append(clock() - start)
            if len(times[name]) >= 3 and sum(times[name]) > seconds / len(agree):
                left.remove(name)
    medians = {name: statistics.median(t) for name, t in times.items()}
    base = medians[agree[0]]
    rows = [
        Row(workload, name, medians[name], medians[name] / base, errors[name])
        if name in medians
        else Row(workload, name, None, None, errors[name])
        for name in ways
    ]
    print(*rows, sep="\n", flush=True)
    return rows


def relative_error(found: Sequence[Any], reference: Sequence[Any]) -> float:
    pairs = zip(map(numpy, found), map(numpy, reference), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def numpy(array: Any) -> np.ndarray:
    """A tensor of torch or an array of JAX, in double precision."""
    array = array.detach() if isinstance(array, torch.Tensor) else array
    return np.asarray(array).astype(np.float64)


def jax_arrays(*tensors: torch.Tensor) -> list[Any]:
    """The same numbers as arrays of JAX, which also works in their precision from here on."""
    import jax

    jax.config.update("jax_enable_x64", tensors[0].dtype == torch.float64)
    return [jax.numpy.asarray(t.detach().numpy()) for t in tensors]
