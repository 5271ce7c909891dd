"""A few steps of a solver in one compiled function: for problems so small that calling torch costs more than they."""

from __future__ import annotations

import types
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from ._iteration import Marched, masked_step
from .info import level_of_the_caller

STEPS = 4
"""Steps in a compiled function: more would ask less often whether all systems have ended, take longer to compile, and
make more steps in vain after the last one that counts."""


def masked_steps(
    method: Any, problem: Any, state: Any, iterations: Tensor, active: Tensor, threshold: Tensor, limit: Tensor
) -> tuple[Marched, Any]:
    """``STEPS`` masked steps ``method.step(problem, state)``, none beyond the ``limit`` of iterations.

    With what the problem has counted in them.
    """
    problem = problem.opened()
    for _ in range(STEPS):
        allowed = active & (iterations < limit)
        state, iterations, moved = masked_step(
            lambda state: method.step(problem, state), state, iterations, allowed, threshold, look=False
        )
        active = moved | (active & ~allowed)
    return (state, iterations, active), problem.tallies


class CompiledSteps:
    """The steps of one solver. torch compiles them at the first call, and again for another function or other shapes.

    The user's function is guarded by torch: where it, or what it closes over, is replaced by something that computes
    otherwise, the steps are compiled anew.
    """

    def __init__(self) -> None:
        # A code object of its own, as torch keeps a limited number of compilations for each.
        own = types.FunctionType(masked_steps.__code__.replace(), masked_steps.__globals__)
        self._compiled = torch.compile(own, fullgraph=True, backend=_inductor_with_blas)
        self.has_failed = False

    def __call__(self, method: Any, problem: Any, *rest: Any) -> tuple[Marched, Any]:
        """:func:`masked_steps`, uncompiled after one warning where torch.compile fails."""
        if not self.has_failed:
            try:
                return self._compiled(method, problem, *rest)
            except Exception as error:
                # Whatever it is: the same steps run uncompiled now, and an error of the user's function comes up there.
                self.give_up(method, f"torch.compile failed with {_reason(error)}")
        return masked_steps(method, problem, *rest)

    def give_up(self, method: Any, why: str) -> None:
        """Say once that the solver goes on uncompiled."""
        self.has_failed = True
        warnings.warn(
            f"{type(method).__name__}(compile=True) goes on uncompiled, here and later: {why}. Leave compile=True "
            f"away, or give the solver a function that torch.compile can follow.",
            UserWarning,
            stacklevel=level_of_the_caller(),
        )


def _inductor_with_blas(graph: Any, inputs: Any) -> Any:
    """torch.compile's own backend, but for products of a matrix and a vector, which it writes out as slower loops."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import lowerings, make_fallback

    by_blas = (torch.ops.aten.mv.default, torch.ops.aten.addmv.default)
    for op in by_blas:
        if op not in lowerings:  # said aloud: where the variable CI is set, torch takes an implicit one for a mistake
            make_fallback(op, override_decomp=True)
    rules = {op: rule for op, rule in select_decomp_table().items() if op not in by_blas}
    return compile_fx(graph, inputs, decompositions=rules)


_known: weakref.WeakKeyDictionary[Any, CompiledSteps] = weakref.WeakKeyDictionary()


def compiled_steps(method: Any) -> CompiledSteps | None:
    """The compiled steps of a solver, which outlive a solve; None where they are known to fail."""
    steps = _known.get(method)
    if steps is None:
        steps = _known[method] = CompiledSteps()
        if method.uncompilable is not None:
            steps.give_up(method, method.uncompilable)
    return None if steps.has_failed else steps


def _reason(error: BaseException) -> str:
    """The first line that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}".rstrip(".")
