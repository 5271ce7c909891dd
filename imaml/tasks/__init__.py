"""Tasks to meta-learn from."""

from .cifar_fs import CIFARFS
from .image_folder import ImageFolder
from .linear_regression import LinearRegression
from .mini_imagenet import MiniImageNet
from .omniglot import Omniglot
from .sinusoids import Sinusoids
from .task import Task, TaskSource

__all__ = [
    "CIFARFS",
    "ImageFolder",
    "LinearRegression",
    "MiniImageNet",
    "Omniglot",
    "Sinusoids",
    "Task",
    "TaskSource",
]
