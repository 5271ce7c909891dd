"""The exceptions and the warning that implicitdiff raises by itself."""


class ImplicitDiffError(Exception):
    """Base class of the library's own errors.

    Raised where a problem cannot be differentiated as it stands (a condition of the wrong shape, a captured tensor
    that cannot be followed, an unsupported kind of tensor). Errors in the type or range of a setting are plain
    ``TypeError`` and ``ValueError``.

    >>> import implicitdiff as idf
    >>> try:
    ...     idf.ArgminLayer(lambda x, y: (x - y) ** 2)(torch.zeros(2), torch.ones(2))
    ... except ImplicitDiffError as error:
    ...     print(error)
    the objective returned ... of shape (2,), but it must return a scalar tensor...
    """


class ConvergenceError(ImplicitDiffError, RuntimeError):
    """A solve failed and its solver was told ``on_failure="raise"``. The message names solver, numbers and remedies.

    >>> import implicitdiff as idf
    >>> singular = idf.operators.DenseOperator(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    >>> try:
    ...     idf.Dense(on_failure="raise")(singular, torch.tensor([1.0, 0.0]))
    ... except ConvergenceError as error:
    ...     print(error)
    Dense (minimum norm, as A is singular) did not solve the linear system: BREAKDOWN ... What to try: ...
    """


class ConvergenceWarning(UserWarning):
    """A solve failed and its solver was told ``on_failure="warn"`` (the default): its result is not to be trusted.

    ``warnings.simplefilter("error", ConvergenceWarning)`` makes all of them errors.

    >>> import warnings, implicitdiff as idf
    >>> gradient_descent = idf.inner_solvers.GradientDescent(stepsize=0.1, max_iterations=3)
    >>> layer = idf.ArgminLayer(lambda x, y: ((x - y) ** 2).sum(), inner_solver=gradient_descent)
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     x = layer(torch.zeros(2), torch.ones(2))
    >>> print(caught[0].category.__name__, caught[0].message)
    ConvergenceWarning GradientDescent did not solve the inner problem: MAX_ITERATIONS after at most 3 iterations, ...
    """
