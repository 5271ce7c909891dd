"""Trees of tensors as flat vectors: the one file that knows about trees.

Everything below the layers (operators, linear solvers, inner solvers) sees plain tensors of shape (*batch, n).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import ImplicitDiffError


def is_differentiable(leaf: Any) -> bool:
    """Whether a leaf can carry a derivative: a floating-point or complex tensor."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


@dataclass(frozen=True)
class Vectorizer:
    """The two-way street between a tree of tensors and one vector of shape (n,)."""

    spec: pytree.TreeSpec
    places: tuple[int, ...]
    """Which leaves are tensors; the others are None, as torch takes None for a leaf."""
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device | None
    """None for a tree without tensors."""

    @classmethod
    def of(cls, tree: Any, what: str) -> Vectorizer:
        found, spec = pytree.tree_flatten(tree)
        places = tuple(i for i, leaf in enumerate(found) if leaf is not None) or tuple(range(len(found)))
        leaves = [found[i] for i in places]
        for leaf in leaves:
            if not is_differentiable(leaf):
                given = (
                    f"a {leaf.dtype} tensor" if isinstance(leaf, Tensor) else f"{leaf!r} of type {type(leaf).__name__}"
                )
                raise ImplicitDiffError(
                    f"{what} must be a tree (tensor, dict, list, tuple, namedtuple) of floating-point or complex "
                    f"tensors, but it holds {given}. Pass a tensor such as torch.zeros(n), and move anything that is "
                    f"not part of the unknown to the args."
                )
        devices = {leaf.device for leaf in leaves}
        if len(devices) > 1:
            raise ImplicitDiffError(
                f"{what} has tensors on several devices ({', '.join(sorted(map(str, devices)))}): move them to one."
            )
        dtype = torch.get_default_dtype() if not leaves else leaves[0].dtype
        for leaf in leaves[1:]:
            dtype = torch.promote_types(dtype, leaf.dtype)
        return cls(
            spec,
            places,
            tuple(leaf.shape for leaf in leaves),
            tuple(leaf.dtype for leaf in leaves),
            dtype,
            next(iter(devices), None),
        )

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes))

    def ravel(self, tree: Any, what: str) -> Tensor:
        """The tree as a vector (n,); raises where its structure or shapes are not this vectorizer's."""
        if isinstance(tree, Tensor) and self.spec.is_leaf() and (tree.shape,) == self.shapes:
            return _reshaped(tree, torch.Size((tree.numel(),))).to(self.dtype)
        found, spec = pytree.tree_flatten(tree)
        if spec != self.spec:
            raise ImplicitDiffError(f"{what} must be a tree like init, {self.spec}, but it is {spec}.")
        leaves = [found[i] for i in self.places]
        if any(leaf is not None for i, leaf in enumerate(found) if i not in self.places):
            raise ImplicitDiffError(f"{what} must be None where init is None, but it has a value there.")
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            if not isinstance(leaf, Tensor):
                raise ImplicitDiffError(f"{what} must hold tensors like init, but it holds {type(leaf).__name__}.")
            if leaf.shape != shape:
                raise ImplicitDiffError(
                    f"{what} must have the shapes of init, {_shapes(self.shapes)}, "
                    f"but it has {_shapes([leaf.shape for leaf in leaves])}."
                )
        if len(leaves) == 1:
            return leaves[0].reshape(-1).to(self.dtype)
        if not leaves:
            return torch.zeros(0, dtype=self.dtype)
        return torch.cat([leaf.reshape(-1).to(self.dtype) for leaf in leaves])

    def unravel(self, vector: Tensor) -> Any:
        """The vector (n,) as a tree."""
        if self.spec.is_leaf():
            return _reshaped(vector, self.shapes[0]).to(self.dtypes[0])
        if len(self.shapes) == 1:
            leaves = [vector.reshape(self.shapes[0]).to(self.dtypes[0])]
        else:
            parts = vector.split([math.prod(shape) for shape in self.shapes]) if self.shapes else ()
            leaves = [
                part.reshape(shape).to(dtype)
                for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
            ]
        whole: list[Tensor | None] = [None] * self.spec.num_leaves
        for place, leaf in zip(self.places, leaves, strict=True):
            whole[place] = leaf
        return pytree.tree_unflatten(whole, self.spec)


def _reshaped(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The tensor in a shape, without a node in the graph where it has it: every product would go through that node."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def _shapes(shapes: Sequence[torch.Size]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)


@dataclass(frozen=True)
class Arguments:
    """args and kwargs taken apart: the tensors (integer ones too, as vmap may batch them), and the rest."""

    tensors: tuple[Tensor, ...]
    _leaves: tuple[Any, ...]
    _positions: tuple[int, ...]
    _spec: pytree.TreeSpec
    _are_flat: bool
    """Whether the leaves are the args: then there is nothing to unflatten in each evaluation."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for leaf in leaves:
            if isinstance(leaf, Tensor) and type(leaf).__module__.startswith("torch.distributed"):
                raise ImplicitDiffError(
                    f"an argument is a {type(leaf).__name__}, which implicit layers do not support: pass its local "
                    f"tensor (.to_local() or .full_tensor())."
                )
        positions = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        tensors = tuple(leaves[i] for i in positions)
        rest = tuple(None if i in set(positions) else leaf for i, leaf in enumerate(leaves))
        are_flat = not kwargs and len(leaves) == len(args) and all(map(operator.is_, leaves, args))
        return cls(tensors, rest, positions, spec, are_flat)

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs with other tensors in the places of these."""
        leaves = list(self._leaves)
        for position, tensor in zip(self._positions, tensors, strict=True):
            leaves[position] = tensor
        if self._are_flat:
            return tuple(leaves), {}
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs

    def places_of(self, argument: int | str) -> tuple[int, ...]:
        """Which of the tensors belong to one argument, given by its place in args or its keyword."""
        markers: list[Any] = [object() for _ in self.tensors]
        args, kwargs = self.rebuild(markers)
        try:
            tree = args[argument] if isinstance(argument, int) else kwargs[argument]
        except (IndexError, KeyError):
            raise ImplicitDiffError(
                f"there is no argument {argument!r}: the call has {len(args)} args and the keywords {list(kwargs)}."
            ) from None
        inside = {id(leaf) for leaf in pytree.tree_leaves(tree)}
        return tuple(i for i, marker in enumerate(markers) if id(marker) in inside)
