"""The strength λ of iMAML's regularisation: given, or learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .learner import Parameters

Per = Literal["model", "layer", "parameter"]


class LearnedRegularization(nn.Module):
    """A λ that is learned with the meta-parameters, by its logarithm, so that it stays positive.

    * ``model``: the model that is adapted, as it is given to :class:`~imaml.IMAML`;
    * ``initial``: λ to start from;
    * ``per``: ``"model"``: one λ; ``"layer"``: one for each module that owns parameters, such as a convolution with its
      bias; ``"parameter"``: one for each entry of each parameter.

    Called, it gives a dict with the names of the parameters, of scalars or, for "parameter", of their shapes. An
    optimiser of ``learner.parameters()`` learns it too; its gradient is that in log λ.

    Raises ValueError where ``initial`` is not positive, or ``per`` is none of the three.

    >>> from imaml.models import MLP
    >>> strengths = LearnedRegularization(MLP([1, 8, 1]), 2.0, per="layer").strengths()
    >>> {name: round(float(value), 4) for name, value in strengths.items()}
    {'0': 2.0, '2': 2.0}
    """

    def __init__(self, model: nn.Module, initial: float, per: Per = "model") -> None:
        super().__init__()
        if not initial > 0:
            raise ValueError(f"initial is {initial!r}, but λ must be positive.")
        if per not in get_args(Per):
            raise ValueError(f"per is {per!r}, but it must be one of {', '.join(map(repr, get_args(Per)))}.")
        parameters = dict(model.named_parameters())
        groups = {name: _group(name, per) for name in parameters}
        shape = {groups[name]: p.shape if per == "parameter" else () for name, p in parameters.items()}
        like = {groups[name]: p for name, p in parameters.items()}
        self._names = list(shape)
        self._places = {name: self._names.index(group) for name, group in groups.items()}
        logarithm = torch.tensor(float(initial), dtype=torch.float64).log()
        # ParameterDict takes no dots in names, so the order identifies them.
        self.logarithms = nn.ParameterList(
            nn.Parameter(logarithm.to(like[name]).expand(shape[name]).clone()) for name in self._names
        )

    def forward(self) -> Parameters:
        """λ by the names of the model's parameters."""
        return {name: self.logarithms[place].exp() for name, place in self._places.items()}

    def strengths(self) -> Parameters:
        """λ as it is now, by model, layer or parameter, without a graph."""
        return {name: p.detach().exp() for name, p in zip(self._names, self.logarithms, strict=True)}


class GivenRegularization(nn.Module):
    """λ as a number, a tensor, or a dict of them by parameter; what of it is an ``nn.Parameter`` is learned as such."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self._values = dict(given) if isinstance(given, Mapping) else {"": given}
        for value in self._values.values():
            if not isinstance(value, (int, float, Tensor)):
                raise TypeError(
                    f"regularization is {given!r}, but it must be a number, a tensor, a dict of them with the names of "
                    f"the model's parameters, or an nn.Module such as LearnedRegularization(model, initial)."
                )
        self.learned = nn.ParameterList(v for v in self._values.values() if isinstance(v, nn.Parameter))

    def forward(self) -> Any:
        """What was given."""
        learned = iter(self.learned)
        values = {name: next(learned) if isinstance(v, nn.Parameter) else v for name, v in self._values.items()}
        return values.get("", values)

    def strengths(self) -> Parameters:
        """What of it is learned, as it is now."""
        names = [name or "model" for name, value in self._values.items() if isinstance(value, nn.Parameter)]
        return {name: p.detach().clone() for name, p in zip(names, self.learned, strict=True)}


def per_parameter(given: Any, parameters: Parameters) -> Parameters:
    """λ for each parameter, of its dtype and on its device, a scalar or of its shape.

    Raises ValueError where names or shapes are not those of the parameters, or λ is not positive.
    """
    if isinstance(given, Mapping) and given.keys() != parameters.keys():
        raise ValueError(f"regularization has the names {sorted(given)}, but the parameters are {sorted(parameters)}.")
    if not isinstance(given, Mapping):
        first = next(iter(parameters.values()))
        given = dict.fromkeys(parameters, torch.as_tensor(given, dtype=first.dtype, device=first.device))
    strengths = {name: torch.as_tensor(given[name], dtype=p.dtype, device=p.device) for name, p in parameters.items()}
    for name, value in strengths.items():
        if value.ndim and value.shape != parameters[name].shape:
            raise ValueError(
                f"regularization of {name} has the shape {tuple(value.shape)}, but it must be a scalar or have the "
                f"shape of the parameter, {tuple(parameters[name].shape)}."
            )
        if not bool((value > 0).all()):
            raise ValueError(
                f"regularization must be positive, but for {name} it is {float(value.detach().min()):.4g}. Where it is "
                f"learned, LearnedRegularization(model, initial) keeps it so: what is learned is then log λ."
            )
    return strengths


def _group(name: str, per: Per) -> str:
    if per == "model":
        return "model"
    return name if per == "parameter" else name.rpartition(".")[0] or "model"
