"""A user's condition with its trees flattened: functions of vectors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._tree import Arguments, Vectorizer
from .conditions import Condition, Stationary
from .errors import ImplicitDiffError
from .least_squares import LeastSquares


@dataclass(frozen=True)
class Equations:
    """A condition with its trees flattened: functions of one system's x of shape (n,) and the tensors of the args."""

    condition: Condition
    vectorizer: Vectorizer
    arguments: Arguments
    minimised: Callable[..., Any] | None
    """The objective, where there is one."""

    @classmethod
    def of(
        cls,
        condition: Condition,
        init: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        what: str = "init",
        objective: Callable[..., Any] | None = None,
    ) -> Equations:
        """The equations in the unknowns of ``init``; the objective is the condition's own where it has one."""
        minimised = getattr(condition, "objective", objective)
        return cls(condition, Vectorizer.of(init, what), Arguments.of(args, kwargs), minimised)

    @property
    def is_stationarity(self) -> bool:
        """Whether the equations are the gradient of a scalar, which the products can then be taken of directly."""
        return isinstance(self.condition, Stationary)

    def primitive(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """The user's own function: the objective of a stationarity condition, the residual of any other."""
        if self.is_stationarity:
            return self.objective(x, *tensors)
        return self.mapped(self.condition.residual)(x, *tensors)

    def objective(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """The objective, a scalar."""
        assert self.minimised is not None
        args, kwargs = self.arguments.rebuild(tensors)
        value = _called(self.minimised, "the objective", self.vectorizer.unravel(x), *args, **kwargs)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            is_tensor = isinstance(value, Tensor)
            given = f"a {value.dtype} tensor of shape {tuple(value.shape)}" if is_tensor else repr(value)
            raise ImplicitDiffError(
                f"the objective returned {given}, but it must return a scalar tensor of a real floating-point dtype: "
                f"sum or average, and take .real of a complex number."
            )
        # As residuals are: an argument may be of another precision.
        value = value.to(x.real.dtype if x.is_complex() else x.dtype)
        return value if value.ndim == 0 else value.reshape(())

    def mapped(self, function: Callable[..., Any], numbers: int = 0) -> Callable[..., Tensor]:
        """A function of the user's, ``(x, *numbers, *args, **kwargs) -> a tree like x``, as one of vectors."""

        def on_vectors(x: Tensor, *inputs: Tensor) -> Tensor:
            args, kwargs = self.arguments.rebuild(inputs[numbers:])
            name = getattr(function, "__name__", type(function).__name__)
            what = "the residual" if name == "residual" else f"what {name} returned"
            value = _called(function, name, self.vectorizer.unravel(x), *inputs[:numbers], *args, **kwargs)
            return self.vectorizer.ravel(value, what)

        return on_vectors

    def least_squares(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """The residual of a least-squares objective, as a vector (m,)."""
        assert isinstance(self.minimised, LeastSquares)
        args, kwargs = self.arguments.rebuild(tensors)
        tree = self.minimised.residual(self.vectorizer.unravel(x), *args, **kwargs)
        return Vectorizer.of(tree, "the residual").ravel(tree, "the residual")


def _called(function: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
    """The value of a user's function; an error that says how it was called where that is not what it takes."""
    try:
        return function(*args, **kwargs)
    except TypeError as error:
        try:
            signature = inspect.signature(function)
            signature.bind(*args, **kwargs)
        except TypeError:
            given = ", ".join([*(type(arg).__name__ for arg in args), *(f"{key}=…" for key in kwargs)])
            raise TypeError(
                f"{name} takes {signature}, but it was called with {len(args) + len(kwargs)} arguments, ({given}): x "
                f"first, for a prox the stepsize, then all args of the layer, which is called as layer(init, *args). "
                f"Accept what it does not need as *args."
            ) from error
        except ValueError:  # no signature to be had
            pass
        raise
