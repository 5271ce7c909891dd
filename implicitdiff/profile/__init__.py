"""Where implicit layers spend their time: ``with Profile() as profile: ...; print(profile)``, or, for a whole program,
``python -m implicitdiff.profile script.py`` (or ``-m module``) with the arguments of the script after it.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from time import perf_counter

import torch

from .._timing import Part, watchers
from ..info import RecordedSolve, histories

KINDS = ("forward", "backward", "tangent", "linear", "unfinished")
WHOLE: tuple[Part, ...] = ("layer", "derivative", "linear solve")
MADE_OF_PARTS: tuple[Part, ...] = (*WHOLE, "inner solver", "linear solver")
TITLES: dict[Part, str] = {
    "captured tensors": "finding captured tensors",
    "evaluations": "evaluations of the function and its gradient",
    "building A": "building A (the graph of F)",
    "products": "products with A",
    "matrix of A": "A as a matrix, by products",
    "preconditioner": "preconditioner",
    "args product": "args product (Bᵀu)",
    "linear solver": "linear solver (vectors, factors)",
    "inner solver": "inner solver (steps)",
}
"""What the table calls the parts; of those that are made of others, it is what the others leave."""


@dataclass
class Timed:
    """A part of the solves of one kind: how often it ran, and for how many seconds.

    >>> part = Timed()
    >>> part.add(calls=2, seconds=0.5, longest=0.375)
    >>> part.add(calls=1, seconds=0.25, longest=0.25)
    >>> part
    Timed(calls=3, seconds=0.75, longest=0.375)
    """

    calls: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    """The seconds of the longest call: the first one, where torch loads code of its own for it."""

    def add(self, calls: int, seconds: float, longest: float) -> None:
        """Count further calls."""
        self.calls += calls
        self.seconds += seconds
        self.longest = max(self.longest, longest)


@dataclass
class Solves:
    """All solves of one kind by one method; their ``parts`` do not overlap, and add up to ``seconds``.

    >>> import implicitdiff as idf
    >>> with Profile() as profile:
    ...     x = idf.RootLayer(lambda x, y: x * x - y)(torch.ones(2), torch.tensor([4.0, 9.0]))
    >>> solves = profile.solves[0]
    >>> solves.kind, solves.method, solves.count
    ('forward', 'Newton', 1)
    >>> "evaluations" in solves.parts, solves.seconds > 0
    (True, True)
    """

    kind: str = "unfinished"
    """As in :func:`implicitdiff.record`; "unfinished" where an error came before the report."""
    method: str = ""
    """The solver, without the reasons that a report gives for it."""
    count: int = 0
    iterations: int = 0
    """Of each solve, those of the system of its batch that took most."""
    parts: dict[str, Timed] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """What they took, without layers in their functions."""
        return sum(part.seconds for part in self.parts.values())


class Profile:
    """A block of code in which the time inside of implicit layers, and of their derivatives, is measured.

    Printed, it is a table: for each kind of solve and each method, what its parts took. What happens outside of layers
    is not looked at, nor is :class:`~implicitdiff.UnrolledLayer`, whose derivative is torch's own. Times are seconds of
    the wall clock.

    * Times do not overlap, so that they add up: a layer in the function of another one has rows of its own, and its
      time is not in those of the outer one. Times of several threads are added.
    * A solve that is compiled, or a linear solver's steps that are, is one piece: its products are in the row of the
      solver.
    * Each part costs a few microseconds more than without the profile. On a GPU it also waits until its work is done,
      in the place of running ahead. As autograd has threads of its own there, the derivative of a layer in the function
      of another one counts in both.

    >>> import implicitdiff as idf
    >>> square_root = idf.RootLayer(lambda x, y: x * x - y)
    >>> y = torch.tensor([4.0, 9.0], requires_grad=True)
    >>> with Profile() as profile:
    ...     square_root(torch.ones(2), y).sum().backward()
    >>> [(solves.kind, solves.method, solves.count) for solves in profile.solves]
    [('forward', 'Newton', 1), ('backward', 'Auto: Dense', 1)]
    >>> print(profile)
    implicit layers: ... s, ... % of ... s
    ...
    """

    def __init__(self) -> None:
        self.solves: list[Solves] = []
        """By kind, then in the order in which they came."""
        self.wall_seconds = 0.0
        """The time between the beginning of the block and its end."""
        self._began = 0.0
        self._open = _Open()
        self._lock = threading.Lock()  # autograd runs the backward pass of CUDA tensors on threads of its own

    def __enter__(self) -> Profile:
        watchers.append(self)
        histories.append(self)
        self._began = _now()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall_seconds += _now() - self._began
        watchers.remove(self)
        histories.remove(self)

    @property
    def seconds(self) -> float:
        """The time inside of layers."""
        return sum(solves.seconds for solves in self.solves)

    def begin(self, part: Part) -> _Block | None:
        """Called where a part begins."""
        stack = self._open.stack
        around = stack[-1] if stack else None
        if part not in WHOLE and (around is None or around.part not in MADE_OF_PARTS):
            return None  # outside of layers, or a detail of a part that is measured
        solves = Solves() if around is None or part in WHOLE else around.solves
        block = _Block(part, solves, _now())
        stack.append(block)
        return block

    def end(self, begun: _Block | None) -> None:
        """Called where it ends."""
        if begun is None:
            return
        seconds = _now() - begun.began
        stack = self._open.stack
        stack.pop()
        if stack:
            stack[-1].inside += seconds
        own = seconds - begun.inside
        begun.solves.parts.setdefault(begun.part, Timed()).add(1, own, own)
        if begun.part in WHOLE:
            self._add(begun.solves)

    def append(self, solve: RecordedSolve) -> None:
        """Called with the report of a solve, while that is still open."""
        if self._open.stack:
            solves = self._open.stack[-1].solves
            # The last report counts: polish, for one, reports a linear solve first.
            solves.kind, solves.method = solve.kind, re.split(r",| \(", solve.info.method)[0]
            solves.count, iterations = 1, solve.info.iterations
            solves.iterations = int(iterations.max()) if iterations.numel() else 0

    def _add(self, new: Solves) -> None:
        with self._lock:
            for solves in self.solves:
                if (solves.kind, solves.method) == (new.kind, new.method):
                    break
            else:
                solves = Solves(new.kind, new.method)
                self.solves.append(solves)
                self.solves.sort(key=lambda solves: KINDS.index(solves.kind))
            solves.count += new.count
            solves.iterations += new.iterations
            for part, more in new.parts.items():
                solves.parts.setdefault(part, Timed()).add(more.calls, more.seconds, more.longest)

    def __str__(self) -> str:
        total, wall = self.seconds, self.wall_seconds
        head = f"implicit layers: {total:.4f} s, {_percent(total, wall)} of {wall:.4f} s"
        if not self.solves:
            return f"{head}: none was called"
        lines = [head, "", f"{'':46}{'calls':>8}{'µs each':>11}{'longest':>11}{'seconds':>11}{'share':>8}"]
        for solves in self.solves:
            name = f"{solves.kind}: {solves.method}, " if solves.method else f"{solves.kind}, "
            name += f"{_counted(solves.count, 'solve')}, {_counted(solves.iterations, 'iteration')}"
            lines.append(f"{name:76}{_seconds(solves.seconds, total)}")
            for part, title in TITLES.items():
                if part in solves.parts:
                    lines.append(_row(title, solves.parts[part], total, counted=part not in MADE_OF_PARTS))
            rest = sum(timed.seconds for part, timed in solves.parts.items() if part in WHOLE)
            lines.append(_row("the rest", Timed(seconds=rest), total, counted=False))
        return "\n".join(lines)


@dataclass
class _Block:
    """A part that runs."""

    part: Part
    solves: Solves
    began: float
    inside: float = 0.0
    """The seconds of the parts in it."""


class _Open(threading.local):
    """The parts that run on this thread, the outermost first."""

    def __init__(self) -> None:
        self.stack: list[_Block] = []


def _now() -> float:
    """The time at which a GPU, too, is done with what it was given."""
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()
    return perf_counter()


def _row(title: str, timed: Timed, total: float, counted: bool) -> str:
    calls = f"{timed.calls:8}{1e6 * timed.seconds / timed.calls:11.1f}{1e6 * timed.longest:11.1f}" if counted else ""
    return f"  {title:44}{calls:30}{_seconds(timed.seconds, total)}"


def _seconds(seconds: float, total: float) -> str:
    return f"{seconds:11.4f}{_percent(seconds, total):>8}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole > 0 else "0.0 %"


__all__ = ["Profile", "Solves", "Timed"]
__dir__ = __all__.copy  # for tab completion
