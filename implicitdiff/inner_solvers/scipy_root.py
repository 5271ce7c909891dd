"""The root finders of SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.optimize

from .._vectors import vector_norm
from ..info import Status
from ._scipy import OneSystem, SciPySolver

WITH_JACOBIAN = {"hybr": "maxfev", "lm": "maxiter"}
"""The methods that take the Jacobian, and what they call their limit of evaluations."""


class SciPyRoot(SciPySolver):
    """A root finder of :func:`scipy.optimize.root` by its name.

    One system of a batch after the other, in float64 on the CPU; "hybr" and "lm" get the Jacobian. SciPy's own
    tolerances are set to zero, and the first point with ‖F(x)‖₂ ≤ ``tol`` ends the solve; where there is none, x is the
    best point that was met. ``iterations`` and ``max_iterations`` count evaluations of F. A method that ends by itself
    before that is ``STAGNATED``, one that fails in its arithmetic is ``BREAKDOWN``. It cannot be unrolled.

    Shapes, further settings and errors are those of :class:`~implicitdiff.inner_solvers.InnerSolver`. Raises ValueError
    for an unknown ``method``, which names those that there are, and :class:`~implicitdiff.ImplicitDiffError` for a
    complex x.

    >>> import implicitdiff as idf
    >>> layer = idf.RootLayer(lambda x, y: x**2 - y, inner_solver=SciPyRoot("hybr"))
    >>> layer(torch.ones(2), torch.tensor([4.0, 9.0])).round(decimals=3)
    tensor([2., 3.])
    """

    methods = (
        *WITH_JACOBIAN,
        "anderson",
        "broyden1",
        "broyden2",
        "df-sane",
        "diagbroyden",
        "excitingmixing",
        "krylov",
        "linearmixing",
    )

    def search(self, system: OneSystem) -> Status:
        best = [np.inf]
        # The quasi-Newton methods start from −1/α · I as the Jacobian, made for update(x) − x = −F(x).
        sign = 1.0 if self.method in (*WITH_JACOBIAN, "df-sane") else -1.0

        def function(x: np.ndarray) -> np.ndarray:
            residual = system.evaluate(system.problem.residual, x)
            system.judge(x, residual)
            norm = float(vector_norm(residual))
            if norm < best[0]:
                best[0], system.x = norm, np.array(x)
            system.count(system.x)
            return sign * system.array(residual)

        limit = self.max_iterations + 1
        settings: dict[str, Any]
        if self.method in WITH_JACOBIAN:
            settings = {"jac": lambda x: system.array(system.evaluate(system.problem.jacobian, x).to_dense())}
            options = {"xtol": 0.0, WITH_JACOBIAN[self.method]: limit} | ({"ftol": 0.0} if self.method == "lm" else {})
        elif self.method == "df-sane":
            settings, options = {}, {"ftol": 0.0, "fatol": 0.0, "maxfev": limit}
        else:
            settings, options = {}, {"fatol": 0.0, "maxiter": limit}
        scipy.optimize.root(function, system.x, method=self.method, options=options, **settings)
        return Status.STAGNATED
