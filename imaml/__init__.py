"""Implicit MAML (Rajeswaran et al. 2019) on implicitdiff, beside the algorithms that the paper compares it with.

>>> import imaml, torch
>>> from imaml.models import MLP
>>> learner = imaml.IMAML(MLP([1, 8, 1]), torch.nn.functional.mse_loss, regularization=1.0)
"""

from . import tasks
from .learners import IMAML, MAML, LearnedRegularization, Learner, MetaLoss, Reptile

__all__ = ["IMAML", "MAML", "LearnedRegularization", "Learner", "MetaLoss", "Reptile", "tasks"]
