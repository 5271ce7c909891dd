"""A = ∂F/∂x at one point as an operator: the graph of F is built once and every product reuses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ._timing import timed
from .operators import LinearOperator, Structure

_run_backward = torch.autograd.Variable._execution_engine.run_backward

TALL = 4
"""With so many times more rows than columns, columns cost less than rows, although they need one graph more."""


class JacobianOperator(LinearOperator):
    """The Jacobian of ``residual`` at x of shape (*batch, n), block by block; (m, n) for a residual of (*batch, m).

    For code on plain tensors only: it differentiates by torch.autograd, which torch.func's transforms do not follow.
    """

    @timed("building A")
    def __init__(
        self,
        residual: Callable[[Tensor], Tensor],
        x: Tensor,
        structure: Structure,
        matrices: Callable[[Tensor], Tensor] | None = None,
        without_graph: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``matrices``: the dense Jacobians (*batch, m, n) at x, where there is a shorter way than by products.
        ``without_graph``: the same residual of constants; by default it is the residual.
        """
        self._matrices, self._without_graph = matrices, without_graph or residual
        self._function = residual
        with torch.enable_grad():
            self._x = x.detach().requires_grad_()
            self._residual = residual(self._x)
        shape, batch_shape = (self._residual.shape[-1], x.shape[-1]), tuple(x.shape[:-1])
        super().__init__(shape, structure=structure, batch_shape=batch_shape, dtype=x.dtype, device=x.device)

    @property
    def value(self) -> Tensor:
        """F(x), of shape (*batch, n)."""
        return self._residual.detach()

    @property
    def value_depends_on_x(self) -> bool:
        """Whether the graph leads from the value to x, or to something else."""
        return self._residual.requires_grad

    @timed("products")
    def rmatvec(self, v: Tensor) -> Tensor:
        return self._grad(self._residual, self._x, v)

    @timed("products")
    def matvec(self, v: Tensor) -> Tensor:
        if self.is_symmetric:
            return self.rmatvec(v)
        cotangent, pulled = self._pullback
        return self._grad(pulled, cotangent, v)

    @cached_property
    def _pullback(self) -> tuple[Tensor, Tensor]:
        """The linear map u ↦ Aᵀ u as a graph of its own, whose derivative is A (double reverse mode)."""
        with torch.enable_grad():
            cotangent = torch.zeros_like(self._residual, requires_grad=True)
            if not self._residual.requires_grad:
                return cotangent, torch.zeros_like(self._x)
            (pulled,) = torch.autograd.grad(
                self._residual, self._x, cotangent, retain_graph=True, create_graph=True, materialize_grads=True
            )
            return cotangent, pulled

    @staticmethod
    def _grad(out: Tensor, of: Tensor, v: Tensor) -> Tensor:
        if not out.requires_grad:  # F does not depend on x there
            return torch.zeros_like(of)
        # What torch.autograd.grad calls after checks that take a quarter of a small product's time.
        (product,) = _run_backward((out,), (v,), True, False, (of,), True, accumulate_grad=False)
        return torch.zeros_like(of) if product is None else product

    @timed("args product")
    def pull_to(self, tensors: list[Tensor], u: Tensor) -> list[Tensor]:
        """(∂F/∂t)ᵀ u for tensors t that the residual was computed from; the last product of this graph."""
        if not tensors or not self._residual.requires_grad:
            return [torch.zeros_like(t) for t in tensors]
        return list(torch.autograd.grad(self._residual, tensors, u, allow_unused=True, materialize_grads=True))

    def traceable(self) -> LinearOperator:
        return TraceableJacobian(self._without_graph, self._x.detach(), self)

    def in_precision(self, dtype: torch.dtype) -> LinearOperator:
        """By a second graph, recorded under autocast: what F keeps for the products is then in that dtype already."""

        def residual(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype):
                return self._function(x).to(x.dtype)

        operator = JacobianOperator(residual, self._x, self.structure)
        operator.origin = self.origin
        return operator

    @timed("matrix of A")
    def to_dense(self) -> Tensor:
        m, n = self.shape
        if 0 in self.shape:
            return torch.zeros(*self.batch_shape, m, n, dtype=self.dtype, device=self.device)
        if self.batch_shape and self._matrices is not None:
            return self._matrices(self._x.detach())
        if m > TALL * n:
            _ = self._pullback  # outside of vmap, as it builds a graph
            return torch.func.vmap(self.matvec)(self._basis()).movedim(0, -1)
        # Rows of A by Aᵀ eᵢ: one graph less than columns by A eᵢ.
        rows = torch.eye(m, dtype=self.dtype, device=self.device)
        rows = rows.reshape(m, *(1 for _ in self.batch_shape), m).expand(m, *self.batch_shape, m)
        return torch.func.vmap(self.rmatvec)(rows).movedim(0, -2).conj().resolve_conj()

    def diagonal(self) -> Tensor:
        return self.to_dense().diagonal(dim1=-2, dim2=-1)


class TraceableJacobian(LinearOperator):
    """The same by torch.func, which torch.compile follows; products are those of :meth:`opened`."""

    def __init__(self, residual: Callable[[Tensor], Tensor], x: Tensor, like: LinearOperator) -> None:
        super().__init__(
            like.shape, structure=like.structure, batch_shape=like.batch_shape, dtype=like.dtype, device=like.device
        )
        self._residual, self._x = residual, x
        self._pullback: Callable[[Tensor], Any] | None = None
        self._like: Tensor | None = None

    def opened(self) -> LinearOperator:
        opened = TraceableJacobian(self._residual, self._x, self)
        opened._like, opened._pullback = torch.func.vjp(self._residual, self._x)[:2]
        return opened

    def rmatvec(self, v: Tensor) -> Tensor:
        assert self._pullback is not None
        return self._pullback(v)[0]

    def matvec(self, v: Tensor) -> Tensor:
        if self.is_symmetric:
            return self.rmatvec(v)
        assert self._like is not None
        return torch.func.vjp(self.rmatvec, torch.zeros_like(self._like))[1](v)[0]


class ChunkedJacobian(LinearOperator):
    """Σ weightᵢ · ∂residualᵢ/∂x, symmetric, the graph of one part at a time: built, used and freed in each product."""

    def __init__(self, parts: Sequence[tuple[float, Callable[[Tensor], Tensor]]], x: Tensor) -> None:
        n, batch_shape = x.shape[-1], tuple(x.shape[:-1])
        super().__init__(n, structure="symmetric", batch_shape=batch_shape, dtype=x.dtype, device=x.device)
        self._parts, self._x = parts, x

    @timed("products")
    def matvec(self, v: Tensor) -> Tensor:
        # By torch.func, which also works inside a vmap over several right-hand sides.
        return self._summed(lambda part: torch.func.vjp(part, self._x)[1](v)[0])

    rmatvec = matvec

    @timed("matrix of A")
    def to_dense(self) -> Tensor:
        return self._summed(lambda part: self._at(part).to_dense())

    def diagonal(self) -> Tensor:
        return self.to_dense().diagonal(dim1=-2, dim2=-1)

    @timed("args product")
    def pull_to(self, tensors: list[Tensor], u: Tensor) -> list[Tensor]:
        """(∂F/∂t)ᵀ u for tensors t that the residuals are computed from."""
        totals = [torch.zeros_like(t) for t in tensors]
        for weight, part in self._parts:
            for total, pulled in zip(totals, self._at(part).pull_to(tensors, u), strict=True):
                total.add_(pulled, alpha=weight)
        return totals

    def _at(self, part: Callable[[Tensor], Tensor]) -> JacobianOperator:
        return JacobianOperator(part, self._x, "symmetric")

    def _summed(self, of: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        total = None
        for weight, part in self._parts:
            term = weight * of(part)
            total = term if total is None else total.add_(term)
        assert total is not None
        return total
