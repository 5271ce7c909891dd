"""Definitions 1 and 2 of the paper: how accurate iMAML's two solves are to be, and what they reached.

Where L̂ is convex, G(φ) = L̂(φ) + ½ Σ λ (φ − θ)² is μ-strongly convex with μ = min λ, so

    ‖φ − φ*‖ ≤ ‖∇G(φ)‖ / μ                                            (Definition 1)

and where u solves (H + Λ) u = v up to the residual r = v − (H + Λ) u, H = ∇²L̂(φ), the meta-gradient g = Λu has

    ‖g − (I + HΛ⁻¹)⁻¹ v‖ = ‖Λ (H + Λ)⁻¹ r‖ ≤ √(max λ / min λ) ‖r‖     (Definition 2)

as Λ (H + Λ)⁻¹ = Λ^½ (I + Λ^-½ H Λ^-½)⁻¹ Λ^-½, whose middle factor is at most 1. The right-hand sides can be measured.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.inner_solvers import InnerSolver

from .learner import Parameters


def check_delta(delta: float | None, inner_solver: Any) -> float | None:
    """δ, or an error where it cannot be asked for."""
    _check_positive("delta", delta)
    if delta is not None and not isinstance(inner_solver, InnerSolver):
        raise ValueError(
            "delta needs an inner solver with a tolerance, such as LBFGS(), as a callable has a stopping rule of its "
            "own. Leave it out: report() tells what was reached."
        )
    return delta


def with_delta_prime(solver: idf.LinearSolver, delta_prime: float | None) -> idf.LinearSolver:
    """A copy of the solver that stops at a residual norm of δ′."""
    _check_positive("delta_prime", delta_prime)
    solver = copy.copy(solver)
    if delta_prime is not None:
        solver.rtol, solver.atol = 0.0, delta_prime
    return solver


class Solves:
    """The inner and the linear solves of tasks that are solved together, at one λ."""

    def __init__(
        self, strengths: Parameters, inner_solver: Any, linear_solver: idf.LinearSolver, delta: float | None
    ) -> None:
        given = torch.cat([value.detach().reshape(-1) for value in strengths.values()])
        least, most = float(given.min()), float(given.max())
        self.convexity = least
        self.inner_solver = copy.copy(inner_solver)
        if delta is not None:
            self.inner_solver.tol = delta * least
        self.linear_solver = InUnitsOfG(linear_solver, (most / least) ** 0.5)
        self.forward: idf.SolveInfo | None = None

    def reached(self) -> dict[str, Tensor]:
        """What is known by now, task by task: the bounds, and whether a solver's tolerance was missed."""
        assert self.forward is not None
        missed = ~self.forward.converged.reshape(-1)
        known = {"delta": self.forward.residual_norm.reshape(-1) / self.convexity, "delta_missed": missed}
        info = self.linear_solver.info
        if info is not None and self.linear_solver.bound is not None:
            bent = _met_negative_curvature(info).reshape(-1)
            known["delta_missed"] = missed | bent if bent.shape == missed.shape else missed
            known["delta_prime"] = self.linear_solver.bound.reshape(-1)
            known["delta_prime_missed"] = ~info.converged.reshape(-1) | bent
        return known


class InUnitsOfG(idf.LinearSolver):
    """Hands on A u = b in units in which the norm of the residual is the bound of the error of a task's g.

    The gradient of a mean over M tasks brings each task v/M. So b is scaled back to v, and by √(max λ / min λ) on.
    """

    def __init__(self, solver: idf.LinearSolver, stretch: float) -> None:
        super().__init__(rtol=solver.rtol, atol=solver.atol, on_failure=solver.on_failure)
        self.solver, self.stretch = solver, stretch
        self.weight = 1.0
        """Of the loss of one task in the total."""
        self.info: idf.SolveInfo | None = None
        self.bound: Tensor | None = None

    def solve(self, A: idf.LinearOperator, b: Tensor, x0: Tensor | None = None) -> idf.LinearSolution:
        scale = self.stretch / (self.weight or 1.0)
        solution = self.solver.solve(A, scale * b, None if x0 is None else scale * x0)
        self.info = info = solution.info
        self.bound = info.residual_norm * torch.linalg.vector_norm(scale * b, dim=-1)
        if self.rtol == 0 < self.atol and not bool(info.converged.all()):
            # Under δ′. What a solve that was stopped reports may be the residual of a recursion.
            true = torch.linalg.vector_norm(scale * b - A(solution.value), dim=-1)
            self.bound = torch.where(info.converged, self.bound, true)
        if info.scale is not None:
            info = replace(info, scale=info.scale / abs(scale))
        return idf.LinearSolution(solution.value / scale, info)


def _met_negative_curvature(info: idf.SolveInfo) -> Tensor:
    negative = info.status == idf.Status.INDEFINITE
    return negative if info.eigenvalue_range is None else negative | (info.eigenvalue_range[0] < 0)


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{name} is {value!r}, but it must be a positive number, or None.")
