"""A data-parallel problem: the function is the sum over the ranks of a process group of what each of them computes.

Think of one tensor t as the tuple of its values on the ranks, and of a derivative as one of the mean of the ranks'
outer losses. Every operation is then an ordinary linear or nonlinear map of tuples, and two of them communicate:

    sum:   t ↦ (Σ tᵣ, …, Σ tᵣ)          mean:  t ↦ (Σ tᵣ / N, …, Σ tᵣ / N)

Both are symmetric, so each is its own pullback. The mean is the identity where all values are equal, and there nothing
is sent: not for x on its way into the user's function (but for its cotangent), not for the cotangent of a sum. Hence

    θ ─ mean ─▸ problem ─▸ x* ─ mean ─▸                  in it:   x ─ mean ─▸ user's function ─ sum ─▸

and a product with A costs one message, Bᵀu one, whatever the order of the derivative and the transform.

Ranks must send the same messages in the same order, also where one rank's function does not depend on x or on θ: there
the graph would end, and with it the messages of the backward pass. :func:`nothing` ties the ends together.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import handle_torch_function
from torch.utils import _pytree as pytree

from ._autograd import solution_of
from ._captures import Capture, is_differentiated, is_transformed, plain_value
from ._names import name_of
from ._problem import ConditionProblem
from ._tree import is_differentiable
from .conditions import Condition
from .conditions.base import checked_callable
from .errors import ImplicitDiffError
from .least_squares import LeastSquares

_alone: contextvars.ContextVar[Ranks | None] = contextvars.ContextVar("alone", default=None)


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of a process group, which call the same layer at the same time; one object for each layer."""

    group: Any

    @classmethod
    def of(cls, process_group: Any) -> Ranks | None:
        """The ranks of the group that a layer was given; raises where it is none."""
        if process_group is None:
            return None
        if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
            raise TypeError(
                f"process_group is {process_group!r}, but it must be a torch.distributed.ProcessGroup of which this "
                f"process is a member, such as torch.distributed.group.WORLD once torch.distributed is initialised."
            )
        ranks = cls(process_group)
        ranks.check_initialized()
        return ranks

    def check_initialized(self) -> None:
        """Raise where the processes are not connected (any more)."""
        if not dist.is_initialized():
            raise ImplicitDiffError(
                "the layer has a process_group, but torch.distributed is not initialised: call "
                "torch.distributed.init_process_group(...) first, under torchrun, and make the layer after it."
            )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """In here the layer's function is that of this rank, and nothing is sent: to look at how it is computed."""
        token = _alone.set(self)
        try:
            yield
        finally:
            _alone.reset(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a group cannot be copied, and the copy of a layer works on the same one

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group)

    def all_reduced(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Σ over the ranks of each tensor, by one message."""
        flat = torch.cat([t.reshape(-1).to(self._device(tensors)) for t in tensors])
        if flat.numel():
            dist.all_reduce(flat, group=self.group)
        parts = flat.split([t.numel() for t in tensors])
        return [part.reshape(t.shape).to(t) for part, t in zip(parts, tensors, strict=True)]

    def check_shared(self, named: Iterable[tuple[str, Tensor]], tensors: Sequence[Tensor]) -> None:
        """Raise on all ranks where named tensors, or the transforms that ``tensors`` are in, differ between them."""
        transforms, values = _transforms(tensors), [(name, plain_value(t)) for name, t in named]
        with temporarily_clear_interpreter_stack():
            shared = {name: (tuple(v.shape), str(v.dtype), _checksum(v)) for name, v in values}
            here = (shared, transforms, torch.is_grad_enabled())
            digest = hashlib.blake2b(repr(here).encode(), digest_size=7).digest()
            mine = torch.tensor([int.from_bytes(digest, "big")], device=self._device([v for _, v in values]))
            digests = [torch.empty_like(mine) for _ in range(self.count)]
            dist.all_gather(digests, mine, group=self.group)
            if len(set(map(int, digests))) > 1:
                everywhere: list[Any] = [None] * self.count
                dist.all_gather_object(everywhere, here, group=self.group)
                raise ImplicitDiffError(_difference(everywhere))

    def _device(self, tensors: Sequence[Tensor]) -> torch.device:
        """Where a message with these tensors is put together: not on the CPU if one is elsewhere, or NCCL sends it."""
        for tensor in tensors:
            if tensor.device.type != "cpu":
                return tensor.device
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")


# ------------------------------------------------------------------------------------------------ the two operations


class _OverRanks(torch.autograd.Function):
    """The sum or the mean over the ranks of several tensors at once: where one is asked for, all are."""

    @staticmethod
    def forward(ranks: Ranks, mean: bool, differ: bool, pulled_differ: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """``differ`` says whether the values may differ between the ranks, ``pulled_differ`` the same of cotangents."""
        if not differ:
            return tuple(t.clone() if mean else t * ranks.count for t in tensors)
        legacy = [_functorch.is_legacy_batchedtensor(t) for t in tensors]
        pairs = list(zip(tensors, legacy, strict=True))
        # torch's old vmap, of is_grads_batched, asks for no vmap rule.
        reduced = ranks.all_reduced([torch._remove_batch_dim(t, 1, 1, 0) if old else t for t, old in pairs])
        if mean:
            reduced = [t / ranks.count for t in reduced]
        return tuple(torch._add_batch_dim(t, 0, 1) if old else t for t, old in zip(reduced, legacy, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.settings, ctx.like = inputs[:4], [(t.shape, t.dtype, t.device) for t in inputs[4:]]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        ranks, mean, differ, pulled_differ = ctx.settings
        return None, None, None, None, *_over_ranks(_OverRanks, ranks, mean, pulled_differ, differ, *cotangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        given = [
            torch.zeros(shape, dtype=dtype, device=device) if tangent is None else tangent
            for tangent, (shape, dtype, device) in zip(tangents[4:], ctx.like, strict=True)
        ]
        with forward_ad._set_fwd_grad_enabled(True):  # off inside this rule
            return _over_ranks(_OverRanks, *ctx.settings, *given)

    @staticmethod
    def vmap(info: Any, in_dims: Any, ranks: Ranks, mean: bool, differ: bool, pulled: bool, *tensors: Tensor) -> Any:
        moved, dims = _batch_first(info.batch_size, in_dims[4:], tensors, expand=differ)
        return _over_ranks(_OverRanks, ranks, mean, differ, pulled, *moved), dims


class _Checked(torch.autograd.Function):
    """The mean over the ranks of tensors that were found to be equal there; tangents and cotangents may differ."""

    @staticmethod
    def forward(ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _OverRanks.setup_context(ctx, (inputs[0], True, True, True, *inputs[1:]), output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return _OverRanks.backward(ctx, *cotangents)[3:]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _OverRanks.jvp(ctx, None, None, None, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, ranks: Ranks, *tensors: Tensor) -> Any:
        moved, dims = _batch_first(info.batch_size, in_dims[1:], tensors, expand=False)
        return _over_ranks(_Checked, ranks, *moved), dims


def _over_ranks(function: Any, *inputs: Any) -> tuple[Tensor, ...]:
    """An operation like torch's own: modes see it."""
    if torch._C._is_torch_function_mode_enabled():
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        return handle_torch_function(_over_ranks, tensors, function, *inputs)
    return function.apply(*inputs)


def _batch_first(size: int, dims: Sequence[int | None], tensors: Sequence[Tensor], expand: bool) -> Any:
    """The tensors with their batch dimension in front; all of them, if ``expand``, so that every rank's message has
    the same length."""
    moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
    if expand:
        moved = [t.expand(size, *t.shape) if d is None else t for t, d in zip(moved, dims, strict=True)]
    return moved, tuple(None if d is None and not expand else 0 for d in dims)


def nothing(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """0, whose derivatives of every order are 0 but have a path to every tensor and to the cotangent."""
    like = like.real
    total = sum((t.real.sum().to(like) for t in tensors), torch.zeros((), dtype=like.dtype, device=like.device))
    # No NaN or infinity passes: not a value's, by the sine's argument, nor a cotangent's, by the choice of 0.
    return torch.where(torch.zeros_like(total, dtype=torch.bool), torch.sin(torch.nan_to_num(total)), 0)


# ------------------------------------------------------------------------------------------ the function, the problem


class Summed:
    """``function(x, *args)``, a scalar or a tree, summed over the ranks, each with data of its own."""

    def __init__(self, function: Callable[..., Any], ranks: Ranks) -> None:
        self.ranks, self.__wrapped__, self.__name__ = ranks, function, name_of(function)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if _alone.get() is self.ranks:
            return self.__wrapped__(x, *args, **kwargs)
        leaves, spec = pytree.tree_flatten(x)
        places = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf)]
        entered = _over_ranks(_OverRanks, self.ranks, True, False, True, *(leaves[i] for i in places))
        for place, leaf in zip(places, entered, strict=True):
            leaves[place] = leaf
        value = self.__wrapped__(pytree.tree_unflatten(leaves, spec), *args, **kwargs)
        out, spec = pytree.tree_flatten(value)
        if not out or not all(map(is_differentiable, out)):
            return value  # which the layer will refuse
        out[0] = out[0] + nothing(entered, out[0])
        return pytree.tree_unflatten(list(_over_ranks(_OverRanks, self.ranks, False, True, False, *out)), spec)


@dataclass(frozen=True)
class DataParallelProblem(ConditionProblem):
    """The problem of a condition whose function is :class:`Summed`."""

    ranks: Ranks = field(kw_only=True)

    def lifted(
        self, primitive: Callable[..., Tensor], substituted: bool, part: bool = False, numbers: int = 0
    ) -> Callable[..., Tensor]:
        function = super().lifted(primitive, substituted, part, numbers)

        def tied(x: Tensor, *inputs: Tensor) -> Tensor:
            followed = [t for t in inputs if _is_followed(t)]
            return function(x + nothing(followed, x) if followed else x, *inputs)

        return tied

    def shared_solution(self, x0: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """The solution, differentiable in inputs that are the same on all ranks: of the mean of their outer losses."""
        entered = list(inputs)
        places = [i for i, t in enumerate(inputs) if _is_followed(t)]
        if places:
            shared = _over_ranks(_Checked, self.ranks, *(inputs[i] for i in places))
            for place, tensor in zip(places, shared, strict=True):
                entered[place] = tensor
        return _over_ranks(_OverRanks, self.ranks, True, False, True, solution_of(self, x0, *entered))[0]

    def check_arguments(self, x0: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise on all ranks where init or an argument that is differentiated is not the same on all of them."""
        self.ranks.check_initialized()
        named = [("init", x0)]
        for name, tree in (("args", args), ("kwargs", kwargs)):
            for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
                if _is_followed(leaf):
                    named.append((f"{name}{pytree.keystr(path)}", leaf))
        self.ranks.check_shared(named, [x0, *self.equations.arguments.tensors])

    def check_captures(self, x: Tensor, tensors: Sequence[Tensor], captures: Sequence[Capture]) -> None:
        """Raise on all ranks where x or a captured tensor that is differentiated is not the same on all of them."""
        named = [("the solution", x)]
        for i, (tensor, capture) in enumerate(zip(tensors, captures, strict=True)):
            if _is_followed(tensor):
                name = f"captured tensor {len(named)}"
                if capture.owner is not None:
                    name += f" ({type(capture.owner[0]()).__name__}.{capture.owner[1]})"
                named.append((name, tensors[i]))
        self.ranks.check_shared(named, tensors)


def summed(function: Callable[..., Any], name: str, ranks: Ranks | None) -> Callable[..., Any]:
    """The function of a layer, checked, and summed over the ranks where there are any."""
    function = checked_callable(function, name)
    if ranks is None:
        return function
    if isinstance(function, LeastSquares):
        raise ImplicitDiffError(
            "LeastSquares with a process_group is not supported, as an inner solver would see the residuals of its own "
            "rank only: give 0.5 * residual(x, *args).square().sum() as the objective."
        )
    return Summed(function, ranks)


def summed_condition(condition: Condition, ranks: Ranks | None) -> Condition:
    """The condition, with its objective summed over the ranks; raises where it has none that could be."""
    if ranks is None:
        return condition
    if not hasattr(condition, "objective"):
        raise ImplicitDiffError(
            f"process_group sums the condition's objective over the ranks, but {type(condition).__name__} has none: "
            f"leave condition out, or give one with an objective, such as Stationary or ProximalGradient."
        )
    if getattr(condition, "chunks", None) is not None:
        raise ImplicitDiffError(
            "Stationary(chunks=...) slices the data of one process, which a process_group has sliced already: leave "
            "chunks out, and use more ranks where memory is short."
        )
    condition = copy.copy(condition)
    condition.objective = Summed(condition.objective, ranks)
    return condition


# --------------------------------------------------------------------------------------------- what ranks must share


def _is_followed(leaf: Any) -> bool:
    """Whether it is a tensor that a derivative of any kind is taken in."""
    return is_differentiable(leaf) and is_differentiated(leaf)


def _checksum(tensor: Tensor) -> int:
    """A number that tells tensors of different values apart, bit by bit."""
    tensor = tensor.resolve_conj().resolve_neg()
    tensor = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous() + 0  # −0 is 0
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.view(width).reshape(-1).to(torch.int64)
    # By the mixer of splitmix64, in numbers modulo 2⁶⁴, of each entry with its place.
    mixed = bits + torch.arange(1, len(bits) + 1, device=bits.device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return int((mixed ^ (mixed >> 31)).sum())


def _transforms(tensors: Iterable[Tensor]) -> list[tuple[str, int, bool]]:
    """The transforms around the caller: which, the size of a batch, and whether it batches any of the tensors."""
    batched = set()
    for tensor in tensors:
        while is_transformed(tensor):
            if _functorch.is_batchedtensor(tensor):
                batched.add(_functorch.maybe_get_level(tensor))
            tensor = _functorch.get_unwrapped(tensor)
    found = []
    for transform in _functorch.get_interpreter_stack() or ():
        is_vmap = transform.key() == _functorch.TransformType.Vmap
        size = int(_functorch.CVmapInterpreterPtr(transform).batchSize()) if is_vmap else 0
        found.append((transform.key().name, size, transform.level() in batched))
    return found


def _difference(everywhere: Sequence[Any]) -> str:
    """What is wrong where the ranks hold different things."""
    for name in dict.fromkeys(name for shared, *_ in everywhere for name in shared):
        held = [shared.get(name) for shared, *_ in everywhere]
        if len(set(held)) == 1:
            continue
        if None in held:
            ranks = [rank for rank, value in enumerate(held) if value is not None]
            what = f"{name} takes part in the derivative on the ranks {ranks} only"
        elif len({value[:2] for value in held}) > 1:
            what = f"{name} has different shapes or dtypes on the ranks: {[value[:2] for value in held]}"
        else:
            what = f"{name} has different values on the ranks"
        return (
            f"{what}. With a process_group, init and each tensor that is differentiated must be the same on all ranks. "
            f"Give all ranks the same one (torch.distributed.broadcast); pass captured tensors as arguments; detach() "
            f"data that are a rank's own."
        )
    return (
        f"the ranks call the layer under different transforms (transform, batch size, whether an argument is batched; "
        f"grad mode): {[rest for _, *rest in everywhere]}. With a process_group they must be the same on all ranks."
    )
