"""Tasks to meta-learn from."""

from .linear_regression import LinearRegression
from .omniglot import Omniglot
from .sinusoids import Sinusoids
from .task import Task, TaskSource

__all__ = ["LinearRegression", "Omniglot", "Sinusoids", "Task", "TaskSource"]
