"""Reptile."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..tasks import Task
from .learner import Loss, each
from .maml import MAML


class Reptile(MAML):
    """Reptile (Nichol et al. 2018): the meta-gradient is θ − φ(θ), averaged over tasks.

    * ``steps``, ``stepsize``: of the gradient steps from θ to φ(θ), on the support set;
    * ``task_chunk``: as in :class:`~imaml.Learner`.

    Shapes and errors are those of :class:`~imaml.Learner`.

    >>> from torch import nn
    >>> from imaml.models import MLP
    >>> from imaml.tasks import Sinusoids
    >>> learner = Reptile(MLP([1, 8, 1]), nn.functional.mse_loss, steps=2, stepsize=0.01)
    >>> learner.meta_loss(Sinusoids(shots=5).sample(2, "train", 0, 0)).backward()
    """

    def __init__(
        self, model: nn.Module, loss: Loss, *, steps: int, stepsize: float, task_chunk: int | None = None
    ) -> None:
        super().__init__(model, loss, steps=steps, stepsize=stepsize, first_order=True, task_chunk=task_chunk)

    def _chunk_step(self, chunk: Task) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            phi = each(self.adapted)(chunk.support)
            losses, outputs = self._query(phi, chunk)
        # A term of value 0 whose gradient in θ is θ − φ, task by task.
        pull = sum((p * (p.detach() - phi[name])).flatten(1).sum(1) for name, p in self.meta_parameters().items())
        return losses + (pull - pull.detach()), outputs
