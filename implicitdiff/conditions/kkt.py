"""The conditions of Karush, Kuhn and Tucker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._names import call_of
from ..errors import ImplicitDiffError
from ..operators import Structure
from .base import Tree, checked_callable


class KKTPoint(NamedTuple):
    """A solution with its multipliers; None where there are no constraints of that kind.

    Each part is a tree of tensors of any shapes. It is the unknown of :class:`~implicitdiff.KKT`, which raises
    :class:`~implicitdiff.ImplicitDiffError` where a part is missing or too many. Minimise ½‖x‖² subject to x₁ + x₂ = b:
    x = b/2 and ν = −b/2.

    >>> import implicitdiff as idf
    >>> @idf.implicit(idf.KKT(lambda x, b: 0.5 * (x**2).sum(), equality=lambda x, b: x.sum() - b))
    ... def shortest(init: None, b: torch.Tensor) -> KKTPoint:
    ...     return KKTPoint(torch.stack([b / 2, b / 2]), dual_equality=-b / 2)
    >>> b = torch.tensor(3.0, requires_grad=True)
    >>> point = shortest(None, b)
    >>> torch.autograd.grad(point.primal[0], b)[0], point.dual_inequality is None
    (tensor(0.5000), True)
    """

    primal: Tree
    dual_equality: Tree | None = None
    """ν, a tree like what ``equality`` returns."""
    dual_inequality: Tree | None = None
    """μ ≥ 0, a tree like what ``inequality`` returns."""


class KKT:
    """x minimises ``objective(x, *args)`` subject to ``equality(x, *args) = 0`` and ``inequality(x, *args) ≤ 0``.

    The unknown is a :class:`KKTPoint` (x, ν, μ), and the residual

        (∇f + νᵀ∂h + μᵀ∂g,  h(x),  min(μ, −g(x))),

    whose last part says g ≤ 0, μ ≥ 0 and μᵀg = 0 at once (the natural residual of Facchinei and Pang 2003). Its
    derivative exists where every constraint is either active with μ > 0 or inactive (strict complementarity); a point
    where one is active with μ = 0 is reported as :attr:`~implicitdiff.Status.NOT_SMOOTH`. Without inequalities the
    structure is "symmetric" (and indefinite).

    Each of x, ν and μ is a tensor or a tree of any shapes. Raises TypeError for a function that is not callable, and in
    use :class:`~implicitdiff.ImplicitDiffError` where a multiplier is missing or has no constraint, or is not a tree
    like what the constraint returns.

    >>> condition = KKT(lambda x, c: 0.5 * (x**2).sum() - c @ x, inequality=lambda x, c: -x)
    >>> point = KKTPoint(torch.tensor([1.0, 0.0]), dual_inequality=torch.tensor([0.0, 2.0]))
    >>> condition.residual(point, torch.tensor([1.0, -2.0])).primal
    tensor([0., 0.])
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        equality: Callable[..., Tree] | None = None,
        inequality: Callable[..., Tree] | None = None,
    ) -> None:
        self._objective = checked_callable(objective, "objective")
        self._equality = None if equality is None else checked_callable(equality, "equality")
        self._inequality = None if inequality is None else checked_callable(inequality, "inequality")
        self.structure: Structure = "symmetric" if inequality is None else "general"
        self.smooth = inequality is None

    def residual(self, x: KKTPoint, *args: Any, **kwargs: Any) -> KKTPoint:
        """The residual, a :class:`KKTPoint` too."""
        x = self._checked(x)

        def lagrangian(primal: Tree) -> tuple[Tensor, dict[str, Tree]]:
            value, constraints = self._objective(primal, *args, **kwargs), {}
            for name, (function, dual) in self._constraints(x).items():
                constraints[name] = function(primal, *args, **kwargs)
                value = value + _dot(dual, constraints[name], name)
            return value, constraints

        gradient, constraints = torch.func.grad(lagrangian, has_aux=True)(x.primal)
        complementarity = None
        if self._inequality is not None:
            complementarity = pytree.tree_map(_natural, x.dual_inequality, constraints["inequality"])
        return KKTPoint(gradient, constraints.get("equality"), complementarity)

    def __repr__(self) -> str:
        functions = {"objective": self._objective, "equality": self._equality, "inequality": self._inequality}
        return call_of(type(self).__name__, functions)

    def _constraints(self, x: KKTPoint) -> dict[str, tuple[Callable[..., Tree], Tree]]:
        """The constraints that there are, each with its multiplier."""
        both = {"equality": (self._equality, x.dual_equality), "inequality": (self._inequality, x.dual_inequality)}
        return {name: (function, dual) for name, (function, dual) in both.items() if function is not None}

    def _checked(self, x: Any) -> KKTPoint:
        if not isinstance(x, tuple) or len(x) != 3:
            raise ImplicitDiffError(f"x must be a KKTPoint(primal, dual_equality, dual_inequality), but it is {x!r}.")
        point = KKTPoint(*x)
        for name, function, dual in (
            ("equality", self._equality, point.dual_equality),
            ("inequality", self._inequality, point.dual_inequality),
        ):
            if (function is None) != (dual is None):
                given, wanted = ("no", "an") if dual is None else ("a", "no")
                raise ImplicitDiffError(
                    f"x has {given} dual_{name}, but the condition has {wanted} {name} constraint: they come together."
                )
        return point


def _natural(mu: Tensor, g: Tensor) -> Tensor:
    return torch.minimum(mu, -g)


def _dot(dual: Tree, value: Tree, name: str) -> Tensor:
    """⟨dual, value⟩ over trees of the same structure."""
    duals, spec = pytree.tree_flatten(dual)
    values, other = pytree.tree_flatten(value)
    if spec != other or any(d.shape != v.shape for d, v in zip(duals, values, strict=True)):
        raise ImplicitDiffError(
            f"dual_{name} must be a tree like what {name}(x, *args) returns, with shapes "
            f"{[tuple(v.shape) for v in values]}, but it has {[tuple(d.shape) for d in duals]}."
        )
    return torch.stack([(d * v).sum() for d, v in zip(duals, values, strict=True)]).sum()
