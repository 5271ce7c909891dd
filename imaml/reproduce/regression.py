"""Linear regression without a constant, where everything is known: the solution, the meta-gradient, their errors.

G(φ) = ‖Xφ − y‖²/m + (λ/2)‖φ − θ‖² has the Hessian A = 2XᵀX/m + λI everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import implicitdiff as idf
from imaml.learners import Learner
from imaml.tasks import Task

mse = nn.functional.mse_loss


class Unrolled(Learner):
    """The meta-gradient through the steps that minimise iMAML's G from θ: what the paper compares with as MAML."""

    def __init__(self, model: nn.Module, inner_solver: Any, regularization: float, truncate: int | None = None) -> None:
        super().__init__(model, mse)
        self.regularization = regularization
        self.layer = idf.UnrolledLayer(self._regularized, inner_solver, truncate=truncate)

    def adapted(self, support: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """φ(θ); the unknown is the way from θ, as the start of an unrolled layer gets no gradient and θ must."""
        theta = self.meta_parameters()
        way = self.layer({name: torch.zeros_like(p) for name, p in theta.items()}, theta, support)
        return {name: p + way[name] for name, p in theta.items()}

    def _regularized(self, way: dict[str, Tensor], theta: dict[str, Tensor], support: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = support
        outputs = self.predict({name: p + way[name] for name, p in theta.items()}, inputs)
        return self.loss(outputs, targets) + 0.5 * self.regularization * sum((w**2).sum() for w in way.values())


def model_at(theta: Tensor) -> nn.Linear:
    """x ↦ θᵀx, from θ (n,)."""
    model = nn.Linear(len(theta), 1, bias=False, dtype=theta.dtype)
    with torch.no_grad():
        model.weight.copy_(theta)
    return model


def meta_gradient(learner: Learner, task: Task) -> Tensor:
    """By backpropagation from the learner's meta-loss, (n,)."""
    learner.zero_grad()
    # A batch of one by a view: a list of tasks would be copied, and counted as memory.
    learner.meta_loss(Task(*(tuple(t.unsqueeze(0) for t in part) for part in task))).backward()
    (gradient,) = (p.grad for p in learner.parameters())
    assert gradient is not None
    return gradient.flatten().clone()


def hessian(inputs: Tensor) -> Tensor:
    """Of the mean squared error, (n, n)."""
    return 2 * inputs.mT @ inputs / len(inputs)


def gradient(phi: Tensor, examples: tuple[Tensor, Tensor]) -> Tensor:
    """Of the mean squared error at φ, (n,)."""
    inputs, targets = examples
    return 2 * inputs.mT @ (inputs @ phi - targets.flatten()) / len(inputs)


def solution(task: Task, theta: Tensor, regularization: float) -> Tensor:
    """φ* = A⁻¹ (2Xᵀy/m + λθ), (n,)."""
    return theta - torch.linalg.solve(_regularized_hessian(task, regularization), gradient(theta, task.support))


def exact_meta_gradient(task: Task, theta: Tensor, regularization: float) -> Tensor:
    """λA⁻¹ ∇L(φ*), Lemma 1, (n,)."""
    v = gradient(solution(task, theta, regularization), task.query)
    return regularization * torch.linalg.solve(_regularized_hessian(task, regularization), v)


def _regularized_hessian(task: Task, regularization: float) -> Tensor:
    inputs = task.support[0]
    return hessian(inputs) + regularization * torch.eye(inputs.shape[-1], dtype=inputs.dtype)
