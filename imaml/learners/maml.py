"""MAML."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import implicitdiff as idf
from implicitdiff.inner_solvers import GradientDescent

from .learner import Examples, Learner, Loss, Parameters


class MAML(Learner):
    """MAML (Finn et al. 2017): φ(θ) is the result of ``steps`` gradient steps from θ, differentiated through.

    * ``stepsize``: of the steps, which ``nesterov=True`` takes with Nesterov momentum 0.9;
    * ``truncate=K`` differentiates through the last K steps only, ``first_order=True`` through none (FOMAML);
    * ``checkpoint=True`` keeps a few vectors like θ of each step instead of all that the model computed in it, and
      computes that again in the backward pass: a fraction of the memory for about two fifths more time;
    * ``body``, ``task_chunk``: as in :class:`~imaml.Learner`.

    Shapes and other errors are those of :class:`~imaml.Learner`. Raises ValueError for ``first_order`` together with
    ``truncate``.

    >>> from torch import nn
    >>> from imaml.models import MLP
    >>> from imaml.tasks import Sinusoids
    >>> learner = MAML(MLP([1, 8, 1]), nn.functional.mse_loss, steps=2, stepsize=0.01)
    >>> learner.meta_loss(Sinusoids(shots=5).sample(2, "train", 0, 0)).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        steps: int,
        stepsize: float,
        nesterov: bool = False,
        truncate: int | None = None,
        first_order: bool = False,
        checkpoint: bool = False,
        body: nn.Module | None = None,
        task_chunk: int | None = None,
    ) -> None:
        super().__init__(model, loss, body=body, task_chunk=task_chunk)
        if first_order and truncate is not None:
            raise ValueError("first_order=True is truncate=0: give one of the two.")
        descent = GradientDescent(
            stepsize=stepsize,
            momentum=0.9 if nesterov else 0.0,
            nesterov=nesterov,
            max_iterations=steps,
            tol=0.0,
            on_failure="ignore",
        )
        self.layer = idf.UnrolledLayer(
            self._loss_at, descent, truncate=0 if first_order else truncate, checkpoint=checkpoint
        )

    def adapted(self, support: Examples) -> Parameters:
        # The unknown is the way from θ, as the start of an unrolled layer gets no gradient and θ must.
        theta = self.meta_parameters()
        way = self.layer({name: torch.zeros_like(p) for name, p in theta.items()}, theta, support)
        return {name: p + way[name] for name, p in theta.items()}

    def _loss_at(self, way: Parameters, theta: Parameters, support: Examples) -> Tensor:
        return self._support_loss({name: p + way[name] for name, p in theta.items()}, support)
