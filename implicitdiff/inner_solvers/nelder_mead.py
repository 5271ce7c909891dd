"""The simplex search of Nelder and Mead: for a few unknowns, by values of the objective alone."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .._iteration import any_of
from .._vectors import vector_norm
from ..info import FailurePolicy, SolveInfo, Status
from ._unfollowed import refuse_to_be_unrolled
from .base import InnerProblem, InnerSolver

FIRST_EDGE = 0.05
"""The edges of the first simplex, relative to the entries of x0."""


class NelderMeadState(NamedTuple):
    x: Tensor  # the best vertex
    residual_norm: Tensor  # the size of the simplex, relative to x
    vertices: Tensor  # (*batch, n + 1, n), the best first
    values: Tensor  # (*batch, n + 1)
    scale: Tensor  # (*batch,), ‖x0‖∞, or 1 for x0 = 0


class NelderMead(InnerSolver):
    """Nelder and Mead's simplex search with the adaptive parameters of Gao and Han (2012).

    It asks for values of the objective only, about two in an iteration: for objectives whose gradient is wrong,
    expensive or rough on the way, in up to about ten unknowns. The layer's derivative is still by its gradient.
    Each system of a batch has its own simplex.

    ``tol`` means another thing than elsewhere, as values cannot tell x to better than about √ε: the search ends where
    no vertex differs from the best one, x, in any entry by more than tol · max(‖x‖∞, ‖x₀‖∞), or tol · max(‖x‖∞, 1) for
    x₀ = 0. None means 10 √ε: 1.5e-7 for float64 and 3.5e-3 for float32. As a simplex may collapse before it is at a
    minimum, ‖F(x)‖₂ is measured then, by one gradient: the report has it as ``residual_norm``, and a system has
    converged only if it is at most √tol · max(1, ‖F(x₀)‖₂); otherwise it has STAGNATED.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. It needs an
    objective. Raises ValueError for a tol of 0.05, the relative size of the first simplex, or more, and
    :class:`~implicitdiff.ImplicitDiffError` when unrolled, as its steps have no derivative.

    >>> import implicitdiff as idf
    >>> layer = idf.ArgminLayer(lambda x, t: torch.cosh(x - t).sum(), inner_solver=NelderMead())
    >>> layer(torch.zeros(2), torch.tensor([1.0, 2.0])).round(decimals=1)
    tensor([1., 2.])
    """

    def __init__(
        self, *, tol: float | None = None, max_iterations: int = 2000, on_failure: FailurePolicy = "warn"
    ) -> None:
        super().__init__(tol=tol, max_iterations=max_iterations, on_failure=on_failure)
        if tol is not None and tol >= FIRST_EDGE:
            raise ValueError(f"tol is {tol!r}, but it must be below {FIRST_EDGE}, the size of the first simplex.")

    def start(self, problem: InnerProblem, x0: Tensor) -> NelderMeadState:
        largest = _largest(x0)
        scale = torch.where(largest > 0, largest, 1)
        edges = FIRST_EDGE * torch.where(x0 == 0, scale.unsqueeze(-1), x0)
        vertices = x0.unsqueeze(-2) + torch.cat([torch.zeros_like(x0).unsqueeze(-2), torch.diag_embed(edges)], -2)
        values = _values(problem, vertices)
        refuse_to_be_unrolled(self, values)
        return _state(vertices, values, scale)

    def step(self, problem: InnerProblem, state: NelderMeadState) -> NelderMeadState:
        vertices, values = state.vertices, state.values
        n = max(vertices.shape[-1], 2)  # from where on the parameters make sense: there they are Nelder and Mead's
        expansion, contraction, shrinkage = 1 + 2 / n, 0.75 - 1 / (2 * n), 1 - 1 / n
        centre = vertices[..., :-1, :].mean(-2)
        along = centre - vertices[..., -1, :]
        best, second_worst, worst = values[..., 0], values[..., -2], values[..., -1]

        reflected = _value(problem, centre + along)
        is_best, is_good = reflected < best, reflected < second_worst
        factor = torch.where(is_best, expansion, torch.where(reflected < worst, contraction, -contraction))
        factor = torch.where(is_good & ~is_best, 1.0, factor).unsqueeze(-1)
        second = _value(problem, centre + factor * along) if any_of(is_best | ~is_good) else reflected
        better = second < torch.minimum(reflected, worst)
        vertex = centre + torch.where(better.unsqueeze(-1), factor, 1.0) * along
        vertices = torch.cat([vertices[..., :-1, :], vertex.unsqueeze(-2)], -2)
        values = torch.cat([values[..., :-1], torch.where(better, second, reflected).unsqueeze(-1)], -1)
        shrinks = ~(is_good | better)
        if any_of(shrinks):
            old = state.vertices
            shrunk = old[..., :1, :] + shrinkage * (old[..., 1:, :] - old[..., :1, :])
            small = torch.cat([old[..., :1, :], shrunk], -2)
            known = torch.cat([state.values[..., :1], _values(problem, shrunk)], -1)
            vertices = torch.where(shrinks[..., None, None], small, vertices)
            values = torch.where(shrinks.unsqueeze(-1), known, values)
        return _state(vertices, values, state.scale)

    def solve(self, problem: InnerProblem, x0: Tensor) -> tuple[Tensor, SolveInfo]:
        x, info = super().solve(problem, x0)
        norm, first = (vector_norm(problem.residual(at)).detach() for at in (x, x0))
        least = self._threshold(first) ** 0.5 * first.clamp(min=1).nan_to_num(1.0)
        converged = info.converged & (norm <= least)
        lost = torch.where(norm.isfinite(), int(Status.STAGNATED), int(Status.NON_FINITE))
        status = torch.where(converged | ~info.converged & norm.isfinite(), info.status, lost)
        return x, replace(info, residual_norm=norm, converged=converged, status=status)

    def _threshold(self, initial: Tensor) -> Tensor:
        tol = 10 * torch.finfo(initial.dtype).eps ** 0.5 if self.tol is None else self.tol
        return torch.full_like(initial, tol)


def _state(vertices: Tensor, values: Tensor, scale: Tensor) -> NelderMeadState:
    """The state of a simplex, sorted."""
    order = values.argsort(dim=-1, stable=True)
    values = values.gather(-1, order)
    vertices = vertices.gather(-2, order.unsqueeze(-1).expand_as(vertices))
    x = vertices[..., 0, :]
    extent = _largest((vertices - x.unsqueeze(-2)).flatten(-2))
    return NelderMeadState(x, extent / torch.maximum(_largest(x), scale), vertices, values, scale)


def _largest(v: Tensor) -> Tensor:
    """‖v‖∞, 0 without entries."""
    return v.abs().amax(-1) if v.shape[-1] else torch.zeros_like(v).sum(-1)


def _values(problem: InnerProblem, vertices: Tensor) -> Tensor:
    return torch.stack([_value(problem, v) for v in vertices.unbind(-2)], -1)


def _value(problem: InnerProblem, x: Tensor) -> Tensor:
    """The objective, a NaN as the worst of all values."""
    return problem.objective(x).nan_to_num(torch.inf, posinf=torch.inf, neginf=-torch.inf)
