"""Tensors that a function closes over, found and made ordinary inputs.

A custom autograd Function knows only the tensors it is given. Tensors that reach the user's function another way
(a closure, a module's parameters) are found by running it once under a mode that sees every torch operation, and are
later replaced, operation by operation, by the values that the Function was given for them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode

from ._tree import is_differentiable
from .errors import ImplicitDiffError


def transform_level() -> int:
    """How many torch.func transforms are live around the caller."""
    return _functorch.maybe_current_level() or 0


def is_transformed(tensor: Tensor) -> bool:
    """Whether a torch.func transform wraps the tensor."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def is_differentiated(tensor: Tensor) -> bool:
    """Whether a derivative of any kind is taken in the tensor, below whatever vmaps."""
    while not tensor.requires_grad:
        if is_transformed(tensor):
            if not _functorch.is_batchedtensor(tensor) and is_dual(tensor):  # a batched one cannot be asked
                return True
            tensor = _functorch.get_unwrapped(tensor)
        else:
            return is_dual(tensor)
    return True


def plain_value(tensor: Tensor) -> Tensor:
    """The value below all transforms, the dimensions of the vmaps in front, the outermost first."""
    with temporarily_clear_interpreter_stack():
        dims: list[int] = []
        while is_transformed(tensor):
            if _functorch.is_batchedtensor(tensor):
                dims.append(_functorch.maybe_get_bdim(tensor))
            tensor = _functorch.get_unwrapped(tensor)
        for place, dim in enumerate(reversed(dims)):  # each counts without those of the vmaps outside of it
            tensor = tensor.movedim(dim + place, place)
        return (forward_ad.unpack_dual(tensor).primal if dual_level_is_open() else tensor).detach()


def dual_level_is_open() -> bool:
    """Whether a ``forward_ad.dual_level()`` is open around the caller."""
    return forward_ad._current_level >= 0


def is_dual(tensor: Tensor) -> bool:
    """Whether the tensor carries a forward-mode tangent."""
    if not dual_level_is_open():
        return False
    if is_transformed(tensor):
        return forward_ad.unpack_dual(tensor).tangent is not None
    with temporarily_clear_interpreter_stack():  # transforms around, that do not wrap it, would hide it
        return forward_ad.unpack_dual(tensor).tangent is not None


@dataclass(frozen=True)
class Capture:
    """One captured tensor, by weak reference, and the module entry that holds it, where there is one.

    The entry matters where ``torch.func.functional_call`` puts tensors into a module for the time of one call: a
    derivative that is taken later meets the module's own parameter again, at the same place.
    """

    tensor: weakref.ref[Tensor]
    owner: tuple[weakref.ref[nn.Module], str] | None
    is_dual: bool

    def current(self) -> Iterator[Tensor]:
        """The tensors that stand for this capture now."""
        tensor = self.tensor()
        if tensor is not None:
            yield tensor
        if self.owner is not None:
            module, name = self.owner[0](), self.owner[1]
            held = getattr(module, name, None)
            if isinstance(held, Tensor) and held is not tensor:
                yield held


def find_captures(
    function: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor], roots: Iterable[Any]
) -> tuple[list[Tensor], list[Capture]]:
    """The tensors that ``function(x, *tensors)`` depends on besides its arguments, in the order it meets them.

    ``roots`` are the user's callables, in which modules that own captured tensors are looked for.

    Raises :class:`ImplicitDiffError` for a tensor of a transform that has ended, and for one that reaches the result
    only through a user's own ``autograd.Function``, where it cannot be followed.
    """
    torch.clear_autocast_cache()  # what it has converted before would look like tensors from outside
    recorder = _Recorder(tensors)
    if transform_level() or dual_level_is_open():
        # One more level: whatever is computed from the arguments, even out of the mode's sight, now lives on it.
        lifted = [i for i, t in enumerate(tensors) if is_differentiable(t)]

        def run(x: Tensor, *values: Tensor) -> Tensor:
            inputs = [x, *tensors]
            for i, value in zip(lifted, values, strict=True):
                inputs[i + 1] = value
            return recorder.run(function, inputs)

        torch.func.vjp(run, x, *(tensors[i] for i in lifted))
    else:
        with torch.enable_grad():
            out = recorder.run(function, (x, *tensors))
        if not torch._C._is_torch_function_mode_enabled():  # a mode around may have put other tensors in
            recorder.check_all_seen(out)
    found = list(recorder.captures.values())
    owners = _owners(found, roots) if found else {}
    return found, [Capture(weakref.ref(t), owners.get(id(t)), is_dual(t)) for t in found]


class Substituted:
    """``function(x, *tensors, *values)``: the function with ``values`` in the places of its captures.

    A ``part`` of the function that the captures were found in need not meet all of them.
    """

    def __init__(self, function: Callable[..., Tensor], captures: Sequence[Capture], part: bool = False) -> None:
        self.function, self.captures, self.part = function, tuple(captures), part

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not self.captures:
            return self.function(*inputs)
        split = len(inputs) - len(self.captures)
        mode = _Substitution(self.captures, inputs[split:])
        with mode:
            out = self.function(*inputs[:split])
        if not self.part:
            mode.check_all_met()
        return out


class _Recorder(TorchFunctionMode):
    """Notes each tensor that an operation meets, that a transform or the graph follows, and that came from outside."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = {id(t): t for t in given}
        self.level = transform_level()
        self.captures: dict[int, Tensor] = {}
        self.produced: dict[int, Tensor] = {}
        self.entry: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]

    def run(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        self.given.update((id(t), t) for t in inputs)
        with self:
            return function(*inputs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Where the graph is off (no_grad, the inside of a custom Function) nothing depends on what is met.
        followed = self.level or torch.is_grad_enabled()
        for tensor in _tensors((args, kwargs)) if followed else ():
            if id(tensor) not in self.produced and id(tensor) not in self.given and self._is_capture(tensor):
                self.captures[id(tensor)] = tensor
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            if id(tensor) not in self.captures and id(tensor) not in self.given:
                self.produced[id(tensor)] = tensor
        return out

    def _is_capture(self, tensor: Tensor) -> bool:
        if is_transformed(tensor):
            if not _is_live(tensor):
                raise ImplicitDiffError(
                    "the function uses a tensor of a torch.func transform that has already ended (it leaked out of a "
                    "vmap, grad or jvp through a closure or an attribute). Pass the tensor as an argument instead."
                )
            return _functorch.maybe_get_level(tensor) <= self.level
        if not tensor.requires_grad:
            return is_dual(tensor)
        return tensor.grad_fn is None or tensor.grad_fn._sequence_nr() < self.entry

    def check_all_seen(self, out: Tensor) -> None:
        """Every path of the result's graph that leaves the function must end at a tensor that was seen."""
        seen = [*self.given.values(), *self.captures.values()]
        leaves = {id(t) for t in seen if t.grad_fn is None}
        nodes = {t.grad_fn for t in seen if t.grad_fn is not None}
        stack, visited = [out.grad_fn], set()
        while stack:
            node = stack.pop()
            if node is None or node in visited or node in nodes:
                continue
            visited.add(node)
            variable = getattr(node, "variable", None)
            outside = id(variable) not in leaves if variable is not None else node._sequence_nr() < self.entry
            if outside:
                what = "a tensor" if variable is None else f"a tensor of shape {tuple(variable.shape)}"
                raise ImplicitDiffError(
                    f"the function depends on {what} that reaches it only inside a custom autograd.Function, where it "
                    f"cannot be followed: its gradient would be lost. Pass the tensor as an argument of the layer."
                )
            stack.extend(parent for parent, _ in node.next_functions)


class _Substitution(TorchFunctionMode):
    def __init__(self, captures: Sequence[Capture], values: Sequence[Tensor]) -> None:
        super().__init__()
        self.values: dict[int, tuple[Tensor, int]] = {}
        self.keep: list[Tensor] = []  # alive while their ids are keys
        for index, (capture, value) in enumerate(zip(captures, values, strict=True)):
            for tensor in capture.current():
                self.values[id(tensor)] = (value, index)
                self.keep.append(tensor)
        self.missing = set(range(len(captures)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._swap(args), **(self._swap(kwargs) if kwargs else {}))

    def _swap(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            found = self.values.get(id(value))
            if found is None:
                return value
            self.missing.discard(found[1])
            return found[0]
        kind = type(value)
        if kind is tuple or kind is list:
            return kind([self._swap(v) for v in value])
        if kind is dict:
            return {k: self._swap(v) for k, v in value.items()}
        return value

    def check_all_met(self) -> None:
        if self.missing:
            raise ImplicitDiffError(
                f"of the tensors that the function captured when the layer was called, {len(self.missing)} did not "
                f"appear when its derivative was taken: the closure, an attribute or a module's parameter was replaced "
                f"in between, or the function takes another branch. Pass such tensors as arguments of the layer."
            )


def _is_live(tensor: Tensor) -> bool:
    """Whether the transform that wraps a tensor is one of those around the caller."""
    kinds = {i.level(): i.key() for i in _functorch.get_interpreter_stack() or ()}
    kind = kinds.get(_functorch.maybe_get_level(tensor))
    return kind is not None and _functorch.is_batchedtensor(tensor) == (kind == _functorch.TransformType.Vmap)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _owners(tensors: Sequence[Tensor], roots: Iterable[Any]) -> dict[int, tuple[weakref.ref[nn.Module], str]]:
    wanted = {id(t) for t in tensors}
    owners: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
    for module in reachable_modules(roots):
        for child in module.modules():
            for entries in (child._parameters, child._buffers):
                for name, tensor in entries.items():
                    if tensor is not None and id(tensor) in wanted:
                        owners.setdefault(id(tensor), (weakref.ref(child), name))
    return owners


def reachable_modules(roots: Iterable[Any], depth: int = 3) -> Iterator[nn.Module]:
    """The modules that a callable is, is bound to, or closes over (a few steps deep)."""
    for root in roots:
        if isinstance(root, nn.Module):
            yield root
        elif depth:
            yield from reachable_modules(_held_by(root), depth - 1)


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    held = [getattr(value, "__self__", None), getattr(value, "__func__", None), getattr(value, "__wrapped__", None)]
    for cell in getattr(value, "__closure__", None) or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # a cell that is not filled yet
            continue
    if not isinstance(value, (type, Tensor)) and hasattr(value, "__dict__"):
        held.extend(vars(value).values())
    return [item for item in held if item is not None]
