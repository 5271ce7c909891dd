"""The minimisers of SciPy."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import scipy.optimize

from ..info import Status
from ..operators import LinearOperator
from ._scipy import OneSystem, SciPySolver

WITHOUT_GRADIENT = ("Nelder-Mead", "Powell")
WITH_HESSIAN = ("dogleg", "trust-exact")
WITH_HESSIAN_PRODUCTS = ("Newton-CG", "trust-krylov", "trust-ncg")
EVALUATIONS = 1000
"""Evaluations an iteration that TNC, which has no other limit, is granted."""

HESSIAN_FAILED = 3
"""What the methods with a Hessian say where it could not be factorised."""
POWELL_XTOL = 1e-10
"""What Powell's line searches, which would not end at zero, resolve a hundredfold."""


class SciPyMinimize(SciPySolver):
    """A minimiser of :func:`scipy.optimize.minimize` by its name, the local ones without constraints.

    One system of a batch after the other, in float64 on the CPU, with the gradient, and the Hessian or its products
    where the method takes them. SciPy's own tolerances are set to zero, and the first point with ‖∇f‖₂ ≤ ``tol`` ends
    the solve (also for "Nelder-Mead" and "Powell", which do not see the gradient). ``iterations`` and
    ``max_iterations`` count SciPy's iterations. A method that ends by itself before that is ``STAGNATED``, one that
    fails in its linear algebra is ``BREAKDOWN``. It cannot be unrolled.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. It needs an
    objective. Raises ValueError for an unknown ``method``, which names those that there are, and
    :class:`~implicitdiff.ImplicitDiffError` for a complex x.

    >>> import implicitdiff as idf
    >>> layer = idf.ArgminLayer(lambda x, t: (torch.cosh(x - t) + x**2).sum(), inner_solver=SciPyMinimize("BFGS"))
    >>> bool(layer.solve(torch.zeros(3, dtype=torch.float64), 1.0).forward.converged)
    True
    """

    methods = ("BFGS", "CG", "L-BFGS-B", "TNC", *WITHOUT_GRADIENT, *WITH_HESSIAN_PRODUCTS, *WITH_HESSIAN)

    def search(self, system: OneSystem) -> Status:
        has_gradient = self.method not in WITHOUT_GRADIENT

        def function(x: np.ndarray) -> Any:
            value, gradient = system.evaluate(system.problem.value_and_gradient, x)
            system.judge(x, gradient)
            return (float(value), system.array(gradient)) if has_gradient else float(value)

        @lru_cache(maxsize=1)
        def hessian_at(x: bytes) -> LinearOperator:
            return system.evaluate(system.problem.hessian, np.frombuffer(x))

        settings: dict[str, Any] = {"jac": has_gradient or None}
        if self.method in WITH_HESSIAN:
            settings["hess"] = lambda x: system.array(hessian_at(x.tobytes()).to_dense())
        if self.method in WITH_HESSIAN_PRODUCTS:
            settings["hessp"] = lambda x, p: system.array(hessian_at(x.tobytes())(system.tensor(p)))
        options: dict[str, float] = {"maxiter": self.max_iterations}
        if self.method == "TNC":
            options = {"maxfun": EVALUATIONS * self.max_iterations}
        if self.method == "Powell":
            options["xtol"] = POWELL_XTOL
        settings["options"] = options
        result = scipy.optimize.minimize(
            function, system.x, method=self.method, tol=0.0, callback=system.count, **settings
        )
        failed = self.method in WITH_HESSIAN and result.status == HESSIAN_FAILED
        return Status.BREAKDOWN if failed else Status.STAGNATED
