"""The exceptions and the warning that implicitdiff raises by itself."""


class ImplicitDiffError(Exception):
    """Base class of the library's own errors.

    Raised where a problem cannot be differentiated as it stands (a condition of the wrong shape, a captured tensor
    that cannot be followed, an unsupported kind of tensor). Errors in the type or range of a setting are plain
    ``TypeError`` and ``ValueError``.
    """


class ConvergenceError(ImplicitDiffError, RuntimeError):
    """A solve failed and its solver was told ``on_failure="raise"``. The message names solver, numbers and remedies."""


class ConvergenceWarning(UserWarning):
    """A solve failed and its solver was told ``on_failure="warn"`` (the default): its result is not to be trusted."""
