"""The optimality of conic programmes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .._names import call_of
from ..cones import Cone, project_onto_product, size_of
from ..errors import ImplicitDiffError
from ..operators import Structure


class ConicPoint(NamedTuple):
    """A solution of a conic programme; its slack is s = b − A x.

    The unknown of :class:`ConicProgram`, which raises :class:`~implicitdiff.ImplicitDiffError` where shapes do not fit.
    For x₁ of least value with x₁ ≥ 1, so A = [−1], b = [−1] and c = [1]:

    >>> from implicitdiff.cones import NonNegative
    >>> point = ConicPoint(primal=torch.tensor([1.0]), dual=torch.tensor([1.0]))
    >>> condition = ConicProgram([NonNegative(1)])
    >>> condition.residual(point, torch.tensor([[-1.0]]), torch.tensor([-1.0]), torch.tensor([1.0]))
    ConicPoint(primal=tensor([0.]), dual=tensor([0.]))
    """

    primal: Tensor
    """x, of shape (n,)."""
    dual: Tensor
    """y, of shape (m,): ``z`` of Clarabel, ``y`` of SCS."""


class ConicProgram:
    """x minimises ½ xᵀP x + cᵀx subject to A x + s = b, with s in the cone K = K₁ × K₂ × … .

    The args are ``A`` (m, n), ``b`` (m,), ``c`` (n,) and, for a quadratic objective, ``P`` (n, n); the rows of A and b
    are those of the cones (:mod:`implicitdiff.cones`), one after the other. The unknown is a :class:`ConicPoint` (x, y)
    as solvers return it, and the residual

        (P x + Aᵀy + c,  s − Π_K(s − y)),    s = b − A x.

    Its second part says s ∈ K, y ∈ K* and sᵀy = 0 at once. These are the equations of the homogeneous self-dual
    residual map normalised to w = 1 (Busseti, Moursi and Boyd 2019; Agrawal et al. 2019, Section 3), with v = y − s
    and s eliminated: of n + m equations, and regular where those are. Homogeneous in w, theirs are always singular.

    The derivative exists where the solution is unique and strictly complementary; a solution at a kink of Π_K (an
    inequality active with y = 0) is reported as :attr:`~implicitdiff.Status.NOT_SMOOTH`.

    Raises:
        TypeError: something in ``cones`` is not a cone.
        ImplicitDiffError: x is not a ConicPoint, or shapes do not fit.

    Minimise x₁ + 2x₂ subject to x₁ + x₂ = b, x ≥ 0, by SciPy, whose multipliers are the negative ones:

    >>> import implicitdiff as idf, scipy.optimize
    >>> from implicitdiff.cones import NonNegative, Zero
    >>> @idf.implicit(ConicProgram([Zero(1), NonNegative(2)]))
    ... def linear_program(init, A, b, c):
    ...     G, h = A.numpy(), b.numpy()
    ...     found = scipy.optimize.linprog(c.numpy(), G[1:], h[1:], G[:1], h[:1], bounds=(None, None))
    ...     return ConicPoint(torch.tensor(found.x), -torch.tensor([*found.eqlin.marginals, *found.ineqlin.marginals]))
    >>> A = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    >>> b = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    >>> x = linear_program(None, A, b, torch.tensor([1.0, 2.0], dtype=torch.float64)).primal
    >>> [round(g, 6) + 0.0 for g in torch.autograd.grad(x[0], b)[0].tolist()]
    [1.0, 0.0, 1.0]
    """

    structure: Structure = "general"
    smooth = False

    def __init__(self, cones: Sequence[Cone]) -> None:
        self.cones = tuple(cones)
        for cone in self.cones:
            if not isinstance(cone, Cone):
                raise TypeError(f"cones has {cone!r}, but each must be a cone such as NonNegative(3) or Exponential().")

    def residual(self, x: ConicPoint, A: Tensor, b: Tensor, c: Tensor, P: Tensor | None = None) -> ConicPoint:
        """The residual, a :class:`ConicPoint` too."""
        primal, dual = self._checked(x, A, b, c, P)
        gradient = A.mT @ dual + c
        if P is not None:
            gradient = gradient + (P @ primal + P.mT @ primal) / 2
        slack = b - A @ primal
        return ConicPoint(gradient, slack - project_onto_product(self.cones, slack - dual))

    def __repr__(self) -> str:
        return call_of(type(self).__name__, vars(self))

    def _checked(self, x: Any, A: Tensor, b: Tensor, c: Tensor, P: Tensor | None) -> ConicPoint:
        if not isinstance(x, tuple) or len(x) != 2:
            raise ImplicitDiffError(f"x must be a ConicPoint(primal, dual), but it is {x!r}.")
        point, m, n = ConicPoint(*x), size_of(self.cones), c.shape[-1]
        tensors = {"A": A, "b": b, "c": c, "P": P} | point._asdict()
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
        wanted = {"A": (m, n), "b": (m,), "c": (n,), "P": (n, n), "primal": (n,), "dual": (m,)}
        if any(given[name] != wanted[name] for name in given):
            raise ImplicitDiffError(
                f"with cones of {m} entries in all and c of {n}, the shapes must be {wanted}, but they are {given}. "
                f"Batches go through torch.func.vmap."
            )
        return point
