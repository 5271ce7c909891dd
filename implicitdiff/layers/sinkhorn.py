"""Entropic optimal transport as a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .._captures import plain_value
from .._marginals import check_marginals
from .._vectors import dot, vector_norm
from ..info import FailurePolicy, Solution
from ..inner_solvers.base import InnerSolver, InnerSolverLike
from ..linear_solvers.base import LinearSolverLike
from .implicit_layers import FixedPointLayer

LEVEL_TOLERANCE = 0.5
LEVEL_FACTOR = 4.0
SMALLEST_SHARE = 5.0
"""A column that receives less than exp(−this) of its sum is treated as if it received that."""
MAX_HALVINGS = 30
LARGEST_EXPONENT = 80.0


class SinkhornLayer(nn.Module):
    """``layer(cost, row_sums, column_sums)`` is the plan T that minimises ⟨cost, T⟩ − epsilon · H(T).

    T has the given row and column sums; H(T) = −Σ T (log T − 1) is its entropy (Cuturi 2013). ``cost`` is
    (*batch, m, n), infinite where nothing may be transported; ``row_sums`` (*batch, m) and ``column_sums`` (*batch, n)
    have equal totals, and may have zeros. Batch dimensions broadcast. The plan is (*batch, m, n), differentiable in all
    three and in ``epsilon``, to any order, at the cost of one linear solve with one unknown per column.

    The condition is the fixed point of Sinkhorn's iteration in the logarithm of the column scaling, with its free
    constant fixed; the rows of the plan add up exactly, the columns to the inner solver's tolerance. Where a derivative
    changes one of the totals alone, T keeps its row sums, and its column sums are proportional to ``column_sums``.

    * ``epsilon``: in the units of the cost; a number, or a tensor that broadcasts to (*batch,), such as a learned
      ``nn.Parameter``;
    * ``inner_solver``: :class:`SemidualNewton` by default. ``FixedPointIteration()`` is Sinkhorn's own iteration and
      ``Anderson()`` accelerates it: cheaper steps, for large plans that are not too sharp;
    * ``linear_solver``: for derivatives; :class:`~implicitdiff.Auto` by default. Its system gets harder as epsilon
      falls: at some 1e-4 times the range of the costs it may be beyond double precision, which a warning says.

    Raises ValueError where epsilon is not positive, and :class:`~implicitdiff.ImplicitDiffError` for sums that no plan
    has; warns with :class:`~implicitdiff.ConvergenceWarning` where a solve failed.

    >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    >>> plan = SinkhornLayer(1.0)(cost, torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]))
    >>> plan.detach()  # ½ σ(1) on the diagonal
    tensor([[0.3655, 0.1345],
            [0.1345, 0.3655]])
    >>> torch.autograd.grad(plan[0, 0], cost)[0]
    tensor([[-0.0492,  0.0492],
            [ 0.0492, -0.0492]])
    """

    def __init__(
        self,
        epsilon: float | Tensor,
        *,
        inner_solver: InnerSolverLike | None = None,
        linear_solver: LinearSolverLike | None = None,
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self._check_epsilon()
        inner_solver = SemidualNewton() if inner_solver is None else inner_solver
        self.potentials = FixedPointLayer(_sinkhorn_step, inner_solver=inner_solver, linear_solver=linear_solver)

    def forward(self, cost: Tensor, row_sums: Tensor, column_sums: Tensor) -> Tensor:
        """The plan, of shape (*batch, m, n)."""
        return self.solve(cost, row_sums, column_sums).value

    def solve(self, cost: Tensor, row_sums: Tensor, column_sums: Tensor) -> Solution:
        """The plan with its reports: ``.value``, ``.forward``, and ``.backward`` once a derivative was taken."""
        self._check_epsilon()
        check_marginals(cost, row_sums, column_sums)
        epsilon = torch.as_tensor(self.epsilon, dtype=cost.dtype, device=cost.device)
        K = -cost / epsilon[..., None, None]
        solutions = []

        def solve_one(K: Tensor, r: Tensor, c: Tensor) -> Tensor:
            solutions.append(self.potentials.solve(torch.zeros_like(c), K, r, c))
            return _plan(solutions[-1].value, K, r, c)

        batch = torch.broadcast_shapes(K.shape[:-2], row_sums.shape[:-1], column_sums.shape[:-1])
        solve = solve_one
        for _ in batch:
            solve = torch.func.vmap(solve)
        own = ((K, K.shape[-2:]), (row_sums, row_sums.shape[-1:]), (column_sums, column_sums.shape[-1:]))
        plan = solve(*(tensor.expand(*batch, *shape) for tensor, shape in own))
        solution = solutions[0]
        solution.value = plan
        return solution

    if TYPE_CHECKING:
        __call__ = forward

    def _check_epsilon(self) -> None:
        values = plain_value(self.epsilon) if isinstance(self.epsilon, Tensor) else torch.tensor(float(self.epsilon))
        if not bool(((values > 0) & values.isfinite()).all()):
            raise ValueError(f"epsilon is {self.epsilon!r}, but it must be positive and finite.")

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon!r}"


class SemidualState(NamedTuple):
    x: Tensor  # (*batch, n), the potential of the columns at K
    sharpness: Tensor  # (*batch,), the share of K that is solved for
    level_norm: Tensor  # (*batch,), ‖F‖ there
    residual_norm: Tensor  # (*batch,), ‖F‖ at K


class SemidualNewton(InnerSolver):
    """Newton's method on the semidual of entropic transport, while epsilon is lowered: for :class:`SinkhornLayer`.

    The semidual Σ rᵢ log Σⱼ cⱼ exp(Kᵢⱼ + hⱼ) − cᵀh, K = −cost / epsilon, is smooth and convex in h (Cuturi and Peyré
    2018). A step is a Newton step as long as it descends (Armijo), between two of Sinkhorn's; it costs O(m n² + n³). It
    begins at an epsilon of the size of the costs, and lowers it to a quarter whenever ‖F(h)‖ ≤ ½, so that the steps
    stay in the region of fast convergence (Schmitzer 2019 on scaling epsilon): some ten steps in all at an epsilon of
    1e-2 of the costs, some twenty at 1e-4.

    ``tol`` None means √ε, or what rounding allows; F is the logarithm of the column sums over what they should be.

    ``max_iterations`` is per plan. The unknown h is (*batch, n). Errors are those of
    :class:`~implicitdiff.inner_solvers.InnerSolver`; it solves for a :class:`SinkhornLayer` only.

    >>> SemidualNewton(tol=1e-12)
    SemidualNewton(tol=1e-12, max_iterations=200, on_failure='warn')
    """

    def __init__(
        self, *, tol: float | None = None, max_iterations: int = 200, on_failure: FailurePolicy = "warn"
    ) -> None:
        super().__init__(tol=tol, max_iterations=max_iterations, on_failure=on_failure)

    def start(self, problem: Any, x0: Tensor) -> SemidualState:
        K = problem.aligned_inputs[0]
        finite = torch.where(K.isfinite(), K, 0)
        spread = (finite.amax((-2, -1)) - finite.amin((-2, -1))).expand(x0.shape[:-1])
        norm = vector_norm(problem.residual(x0))
        return SemidualState(x0, 1 / spread.clamp(min=1), norm, norm)

    def step(self, problem: Any, state: SemidualState) -> SemidualState:
        K, r, c = problem.aligned_inputs[:3]
        next_level = (LEVEL_FACTOR * state.sharpness).clamp(max=1)
        sharpness = torch.where(state.level_norm <= LEVEL_TOLERANCE, next_level, state.sharpness).unsqueeze(-1)
        K_here = sharpness.unsqueeze(-1) * K
        h = _sinkhorn_step(sharpness * state.x, K_here, r, c)
        h = _sinkhorn_step(_newton_step(h, K_here, r, c), K_here, r, c)
        level_norm = vector_norm(h - _sinkhorn_step(h, K_here, r, c))
        x = h / sharpness
        return SemidualState(x, sharpness.squeeze(-1), level_norm, vector_norm(problem.residual(x)))

    def _threshold(self, initial: Tensor) -> Tensor:
        if self.tol is not None:
            return super()._threshold(initial)
        eps = torch.finfo(initial.dtype).eps
        return (10 * eps * initial).clamp(min=eps**0.5).nan_to_num(eps**0.5)


def _newton_step(h: Tensor, K: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """h after a Newton step on the semidual, shortened until it descends; h itself where none does."""
    f = _row_potential(h, K, c)
    by_row = c.unsqueeze(-2) * torch.exp(K + h.unsqueeze(-2) + f.unsqueeze(-1))
    new = _column_potential(f, K, r)
    by_column = r.unsqueeze(-1) * torch.exp(K + new.unsqueeze(-2) + f.unsqueeze(-1))
    shares = c / c.sum(-1, keepdim=True)
    residual = h - new + dot(shares, h).unsqueeze(-1)
    shift = torch.finfo(h.dtype).eps ** 0.5 * 1e-2
    jacobian = (1 + shift) * torch.eye(h.shape[-1]).to(h) - by_column.mT @ by_row + shares.unsqueeze(-2)
    rhs = torch.expm1(-residual.clamp(min=-SMALLEST_SHARE)).unsqueeze(-1)
    direction = torch.linalg.solve_ex(jacobian, rhs)[0].squeeze(-1)
    direction = torch.where(direction.isfinite().all(-1, keepdim=True), direction, 0)
    slope = dot((r.unsqueeze(-1) * by_row).sum(-2) - c, direction)

    def semidual(h: Tensor) -> Tensor:
        return -dot(r, _row_potential(h, K, c)) - dot(c, h)

    value, step = semidual(h), torch.ones_like(slope)
    slack = 10 * torch.finfo(h.dtype).eps * value.abs()
    for _ in range(MAX_HALVINGS):
        # Not "above" is also true of a NaN, whose system the loop around ends.
        ok = ~(semidual(h + step.unsqueeze(-1) * direction) > value + 1e-4 * step * slope + slack)
        if bool(ok.all()):
            break
        step = torch.where(ok, step, 0.5 * step)
    return h + torch.where(ok & (slope < 0), step, 0).unsqueeze(-1) * direction


def _sinkhorn_step(h: Tensor, K: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """The potential of the columns from that of the rows from that of the columns, of which one constant is free.

    T = r exp(f + K + h) c in its rows and columns. The last term makes the fixed point the one with cᵀh = 0, where the
    totals of r and c agree; it takes the unit eigenvalue out of the derivative, which is not singular then.
    """
    mean = dot(c, h) / c.sum(-1)
    return _column_potential(_row_potential(h, K, c), K, r) - mean.unsqueeze(-1)


def _row_potential(h: Tensor, K: Tensor, c: Tensor) -> Tensor:
    return -_log_sum(K + h.unsqueeze(-2), c.unsqueeze(-2), -1)


def _column_potential(f: Tensor, K: Tensor, r: Tensor) -> Tensor:
    return -_log_sum(K + f.unsqueeze(-1), r.unsqueeze(-1), -2)


def _log_sum(exponents: Tensor, weights: Tensor, dim: int) -> Tensor:
    """log Σ weights · exp(exponents), smooth in the weights where they are zero."""
    top = torch.where(weights > 0, exponents, -torch.inf).detach().amax(dim, keepdim=True)
    # What exceeds the top has no weight: it counts for the derivative in that weight only.
    terms = weights * torch.exp((exponents - top).clamp(max=LARGEST_EXPONENT))
    return (terms.sum(dim, keepdim=True).log() + top).squeeze(dim)


def _plan(h: Tensor, K: Tensor, r: Tensor, c: Tensor) -> Tensor:
    f = _row_potential(h, K, c)
    return r.unsqueeze(-1) * c.unsqueeze(-2) * torch.exp(K + f.unsqueeze(-1) + h.unsqueeze(-2))
