"""Implicit MAML."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import implicitdiff as idf

from ..tasks import Task
from .accuracy import Solves, check_delta, with_delta_prime
from .learner import Examples, Learner, Loss, MetaLoss, Parameters, as_parameters, as_vector
from .regularization import GivenRegularization, per_parameter


class IMAML(Learner):
    """Implicit MAML (Rajeswaran et al. 2019, Algorithms 1 and 2).

    φ(θ) minimises G(φ) = loss(model(x; φ), y) + ½ Σ λ (φ − θ)² (Eq. 4); its derivative is (I + ∇²L/λ)⁻¹ (Lemma 1), so
    the meta-gradient takes one linear solve per task and no memory for the inner steps.

    * ``inner_solver``, ``linear_solver``: as in :class:`implicitdiff.ArgminLayer`;
    * ``regularization``: λ > 0, a number, a tensor, or a dict of them with the names of the model's parameters; or an
      ``nn.Module`` that returns one of these, such as :class:`~imaml.LearnedRegularization`. An ``nn.Parameter`` gets
      a gradient too, but nothing keeps it positive;
    * ``delta``: δ of Definition 1. The inner solver stops where ‖φ − φ*‖ ≤ δ, in the place of its own tolerance;
    * ``delta_prime``: δ′ of Definition 2. The linear solver stops where ‖g − (I + ∇²L/λ)⁻¹ v‖ ≤ δ′, g the meta-gradient
      of one task and v the gradient of its query loss at φ, in the place of its own tolerances;
    * ``body``, ``task_chunk``: as in :class:`~imaml.Learner`.

    Both thresholds are met by bounds, ‖∇G(φ)‖ / min λ and √(max λ / min λ) ‖v − (I + ∇²L/λ) g‖, that hold where the
    support loss L is convex. ``max_iterations`` of the solvers stays a limit; :meth:`report` tells whom it stopped.

    Shapes and other errors are those of :class:`~imaml.Learner`. Raises ValueError where λ is not positive, at the
    start or after an outer step, or does not fit the model, and where δ is asked of an inner solver without a
    tolerance.

    >>> from torch import nn
    >>> from imaml.models import MLP
    >>> from imaml.tasks import Sinusoids
    >>> learner = IMAML(MLP([1, 8, 1]), nn.functional.mse_loss, regularization=1.0, delta=1e-2, delta_prime=1e-3)
    >>> learner.meta_loss(Sinusoids(shots=5).sample(2, "train", 0, 0)).backward()
    >>> all(p.grad is not None for p in learner.parameters())
    True
    >>> report = learner.report()
    >>> report["delta"] <= 1e-2, report["delta_missed"], report["delta_prime"] <= 1e-3
    (True, 0.0, True)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        inner_solver: Any = None,
        linear_solver: Any = None,
        regularization: float | Tensor | dict[str, Any] | nn.Module = 1.0,
        delta: float | None = None,
        delta_prime: float | None = None,
        body: nn.Module | None = None,
        task_chunk: int | None = None,
    ) -> None:
        super().__init__(model, loss, body=body, task_chunk=task_chunk)
        if not isinstance(regularization, nn.Module):
            regularization = GivenRegularization(regularization)
        self.regularization: nn.Module = regularization
        self._strengths()  # so that mistakes are found here
        self.layer = idf.ArgminLayer(self._regularized_loss, inner_solver=inner_solver, linear_solver=linear_solver)
        self._inner_solver = self.layer.inner_solver
        self._linear_solver = with_delta_prime(self.layer.linear_solver, delta_prime)
        self.delta, self.delta_prime = check_delta(delta, self._inner_solver), delta_prime
        self._latest: Solves | None = None
        self._theta: Parameters = {}
        self._solves: list[Solves] = []

    def adapted(self, support: Examples) -> Parameters:
        theta, strengths = self.meta_parameters(), self._strengths()
        solves = self._latest = Solves(strengths, self._inner_solver, self._linear_solver, self.delta)
        self.layer.inner_solver, self.layer.linear_solver = solves.inner_solver, solves.linear_solver
        # As vectors, since the terms of each parameter on its own cost as much as the network.
        start, self._theta = as_vector(theta), theta
        solution = self.layer.solve(start, start, _as_one(strengths, theta), support)
        solves.forward = solution.forward
        return as_parameters(solution.value, theta)

    def meta_step(self, tasks: Task | list[Task]) -> MetaLoss:
        self._solves = []
        result = super().meta_step(tasks)
        linear_solvers, share = [s.linear_solver for s in self._solves], 1 / len(result.outputs)

        def weigh(gradient: Tensor | float) -> None:
            """Note what the gradient of each task's loss arrives with."""
            for solver in linear_solvers:
                solver.weight = share * float(gradient)

        if result.loss.requires_grad:
            result.loss.register_hook(weigh)
        return result

    def report(self) -> dict[str, float]:
        """The accuracy of the last :meth:`~imaml.Learner.meta_step`, as means over its tasks.

        * ``"delta"``: the bound ‖∇G(φ)‖ / min λ of ‖φ − φ*‖, and ``"delta_missed"``, where δ was asked for: the share
          of tasks that did not reach it;
        * ``"delta_prime"`` and ``"delta_prime_missed"``: the same of δ′, once ``backward()`` has run.

        The bounds assume that the support loss is convex. A task whose linear solve met negative curvature, where
        they are not valid, counts as missed. Without δ′, the residual of a linear solve that was stopped by its
        iterations is the one that the solver itself reports.
        """
        reached = [s.reached() for s in self._solves]
        names = set.intersection(*map(set, reached)) if reached else set()
        asked = {"delta": self.delta, "delta_prime": self.delta_prime}
        report = {}
        for name, threshold in asked.items():
            if name in names:
                report[name] = float(torch.cat([r[name] for r in reached]).double().mean())
            if name in names and threshold is not None:
                report[f"{name}_missed"] = float(torch.cat([r[f"{name}_missed"] for r in reached]).double().mean())
        return report

    def _chunk_step(self, chunk: Task) -> tuple[Tensor, Tensor]:
        result = super()._chunk_step(chunk)
        assert self._latest is not None
        self._solves.append(self._latest)
        return result

    def _strengths(self) -> Parameters:
        """λ by parameter."""
        return per_parameter(self.regularization(), self.meta_parameters())

    def _regularized_loss(self, phi: Tensor, theta: Tensor, strengths: Tensor, support: Examples) -> Tensor:
        loss = self._support_loss(as_parameters(phi, self._theta), support)
        # Unlike a power, mse_loss has derivatives of one pass each.
        if strengths.ndim:
            return loss + 0.5 * (strengths * nn.functional.mse_loss(phi, theta, reduction="none")).sum()
        return loss + 0.5 * strengths * nn.functional.mse_loss(phi, theta, reduction="sum")


def _as_one(strengths: Parameters, parameters: Parameters) -> Tensor:
    """λ as a scalar where it is the same one for all parameters, otherwise as a vector like theirs."""
    first, *others = strengths.values()
    if not first.ndim and all(value is first for value in others):
        return first
    return as_vector({name: value.expand_as(parameters[name]) for name, value in strengths.items()})
