"""Euclidean projections onto the matrices with given row and column sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._iteration import iterate
from .._marginals import check_marginals
from .._vectors import vector_norm
from ..errors import ImplicitDiffError
from ..info import SolveInfo, Status, report

MAX_ITERATIONS = 500
MAX_HALVINGS = 30
LEVEL_TOLERANCE = 0.5
LEVEL_FACTOR = 4.0


def transport_polytope(V: Tensor, row_sums: Tensor, column_sums: Tensor) -> Tensor:
    """The T nearest to V (Frobenius norm) with T ≥ 0, T 1 = row_sums and Tᵀ 1 = column_sums.

    * ``V``: (*batch, m, n);
    * ``row_sums``, ``column_sums``: (*batch, m) and (*batch, n), or what broadcasts to them, with equal totals.

    T is the positive part of V + f 1ᵀ + 1 gᵀ, the potentials f and g being maximal for the smooth dual with quadratic
    regularisation (Blondel, Seguy and Rolet 2018, section 4); it is solved by a semismooth Newton method with block
    coordinate steps in between (Lorenz, Manns and Meyer 2021), which also finds the support of T. On the support the
    potentials have a closed form, by the pseudo-inverse of the Laplacian of a bipartite graph, and through it T is
    differentiable in all three arguments; it costs O((m + n)³).

    Where the totals change (the row sums alone are perturbed, say), the derivative is that of the sums shared out by
    least squares. A row or column whose sum is 0 stays 0.

    Raises :class:`~implicitdiff.ImplicitDiffError` for sums that no plan has; warns with
    :class:`~implicitdiff.ConvergenceWarning` where the dual was not solved.

    >>> V = torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    >>> transport_polytope(V, torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]))
    tensor([[0.3750, 0.1250],
            [0.1250, 0.3750]])
    """
    check_marginals(V, row_sums, column_sums)
    batch = torch.broadcast_shapes(V.shape[:-2], row_sums.shape[:-1], column_sums.shape[:-1])
    m, n = V.shape[-2:]
    V, r, c = V.expand(*batch, m, n), row_sums.expand(*batch, m), column_sums.expand(*batch, n)
    support, inverse = _Support.apply(V.detach(), r.detach(), c.detach())
    f, g = torch.zeros_like(r), torch.zeros_like(c)
    for _ in range(2):  # the second time refines
        T = support * (V + f.unsqueeze(-1) + g.unsqueeze(-2))
        missing = torch.cat([r - T.sum(-1), c - T.sum(-2)], -1)
        df, dg = (inverse @ missing.unsqueeze(-1)).squeeze(-1).split([m, n], -1)
        f, g = f + df, g + dg
    T = support * (V + f.unsqueeze(-1) + g.unsqueeze(-2))
    return T + (T.clamp(min=0) - T).detach()  # what rounding leaves below zero


def birkhoff_polytope(V: Tensor) -> Tensor:
    """The doubly stochastic matrix nearest to V, (*batch, n, n): :func:`transport_polytope` with sums of one.

    Warnings and derivatives are those there. Raises :class:`~implicitdiff.ImplicitDiffError` where V is not square.

    >>> birkhoff_polytope(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    if V.shape[-1] != V.shape[-2]:
        raise ImplicitDiffError(f"V has the shape {tuple(V.shape)}, but a doubly stochastic matrix is square.")
    return transport_polytope(V, torch.ones_like(V[..., 0]), torch.ones_like(V[..., 0, :]))


class _Support(torch.autograd.Function):
    """Where T is positive, as zeros and ones, and the pseudo-inverse of the Laplacian of that bipartite graph.

    Both are piecewise constant in the arguments; found on plain tensors, under whatever transforms.
    """

    @staticmethod
    def forward(V: Tensor, row_sums: Tensor, column_sums: Tensor) -> tuple[Tensor, Tensor]:
        # In double precision, as a wrong support is a large error; in units of the mean row sum; and with rows and
        # columns of sum 0 out of the way.
        dtype, unit = V.dtype, row_sums.double().mean(-1, keepdim=True)
        r, c, V = row_sums / unit, column_sums / unit, V / unit.unsqueeze(-1)
        rounding = torch.finfo(V.dtype).eps * V.abs().amax((-2, -1)).clamp(min=1)
        V = torch.where((r > 0).unsqueeze(-1) & (c > 0).unsqueeze(-2), V, -torch.inf)
        dual = _Dual(V, r, c * (r.sum(-1, keepdim=True) / c.sum(-1, keepdim=True)))
        threshold = 30 * (V.shape[-2] + V.shape[-1]) ** 0.5 * rounding
        ended = iterate(dual.step, dual.start(), threshold, MAX_ITERATIONS)
        converged = ended.status == Status.CONVERGED
        norm = ended.state.residual_norm
        info = SolveInfo(ended.iterations, norm, converged, ended.status, 0, "transport_polytope")
        if not bool(converged.all()):
            report("forward", info, "warn")
        support = (dual.slack(ended.state.f, ended.state.g) > 0).to(V.dtype)
        return support.to(dtype), torch.linalg.pinv(_laplacian(support), hermitian=True).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None, None]:
        return None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, None]:
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        moved = [
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(inputs, in_dims, strict=True)
        ]
        return _Support.apply(*moved), (0, 0)


class _Potentials(NamedTuple):
    f: Tensor
    g: Tensor
    sharpness: Tensor  # (*batch,), the share of V that is solved for
    level_norm: Tensor  # (*batch,), the residual there
    residual_norm: Tensor  # (*batch,), how far the row and column sums of T are from what they should be


class _Dual(NamedTuple):
    """min over f and g of ½ ‖(V + f 1ᵀ + 1 gᵀ)₊‖² − rᵀf − cᵀg, whose gradient is the residual of the sums."""

    V: Tensor
    r: Tensor
    c: Tensor

    def slack(self, f: Tensor, g: Tensor) -> Tensor:
        """V + f 1ᵀ + 1 gᵀ, of which T is the positive part."""
        return self.V + f.unsqueeze(-1) + g.unsqueeze(-2)

    def value(self, f: Tensor, g: Tensor) -> Tensor:
        return 0.5 * self.slack(f, g).clamp(min=0).pow(2).sum((-2, -1)) - (self.r * f).sum(-1) - (self.c * g).sum(-1)

    def residual(self, f: Tensor, g: Tensor) -> Tensor:
        T = self.slack(f, g).clamp(min=0)
        return torch.cat([T.sum(-1) - self.r, T.sum(-2) - self.c], -1)

    def swept(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Minimised in f, then in g."""
        f = torch.where(self.r > 0, _level(self.V + g.unsqueeze(-2), self.r), 0)
        return f, torch.where(self.c > 0, _level((self.V + f.unsqueeze(-1)).mT, self.c), 0)

    def start(self) -> _Potentials:
        finite = torch.where(self.V.isfinite(), self.V, 0)
        spread = finite.amax((-2, -1)) - finite.amin((-2, -1))
        f, g = self.swept(torch.zeros_like(self.r), torch.zeros_like(self.c))
        norm = vector_norm(self.residual(f, g))
        return _Potentials(f, g, 1 / spread.clamp(min=1), norm.clamp(max=LEVEL_TOLERANCE), norm)

    def step(self, state: _Potentials) -> _Potentials:
        """A Newton step between two sweeps, at a share of V that grows as the residual falls."""
        next_level = (LEVEL_FACTOR * state.sharpness).clamp(max=1)
        s = torch.where(state.level_norm <= LEVEL_TOLERANCE, next_level, state.sharpness).unsqueeze(-1)
        here = _Dual(s.unsqueeze(-1) * self.V, self.r, self.c)
        f, g = here.swept(s * state.f, s * state.g)
        f, g = here.swept(*here.newton_step(f, g))
        level_norm, f, g = vector_norm(here.residual(f, g)), f / s, g / s
        return _Potentials(f, g, s.squeeze(-1), level_norm, vector_norm(self.residual(f, g)))

    def newton_step(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """A semismooth Newton step, regularised by a part of the residual, shortened until it descends."""
        residual = self.residual(f, g)
        support = (self.slack(f, g) > 0).to(f.dtype)
        shift = (1e-6 * vector_norm(residual)).clamp(1e-10, 1e-6)[..., None, None]
        hessian = _laplacian(support) + shift * torch.eye(residual.shape[-1]).to(residual)
        factor, _ = torch.linalg.cholesky_ex(hessian)
        direction = -torch.cholesky_solve(residual.unsqueeze(-1), factor).squeeze(-1)
        # Of a system that has ended, any: it is not taken.
        direction = torch.where(direction.isfinite().all(-1, keepdim=True), direction, 0)
        df, dg = direction.split([f.shape[-1], g.shape[-1]], -1)
        before, slope = self.value(f, g), (residual * direction).sum(-1)
        step = torch.ones_like(slope)
        for _ in range(MAX_HALVINGS):
            t = step.unsqueeze(-1)
            ok = ~(self.value(f + t * df, g + t * dg) > before + 1e-4 * step * slope)
            if bool(ok.all()):
                break
            step = torch.where(ok, step, 0.5 * step)
        t = torch.where(ok, step, 0).unsqueeze(-1)
        return f + t * df, g + t * dg


def _level(S: Tensor, total: Tensor) -> Tensor:
    """The τ with Σ (S + τ)₊ = total over the last dimension (Held, Wolfe and Crowder 1974)."""
    largest = S.sort(-1, descending=True).values
    count = torch.arange(1, S.shape[-1] + 1, device=S.device)
    level = (total.unsqueeze(-1) - largest.cumsum(-1)) / count
    size = (largest + level > 0).sum(-1, keepdim=True).clamp(min=1)
    return level.gather(-1, size - 1).squeeze(-1)


def _laplacian(support: Tensor) -> Tensor:
    """The Hessian of the dual, [[diag(M 1), M], [Mᵀ, diag(Mᵀ 1)]], M the support."""
    rows, columns = torch.diag_embed(support.sum(-1)), torch.diag_embed(support.sum(-2))
    return torch.cat([torch.cat([rows, support], -1), torch.cat([support.mT, columns], -1)], -2)
