"""The workloads that the benchmarks share: an objective, a point near its minimum, and the args."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from imaml.models import MLP, ConvNet


@dataclass
class Workload:
    name: str
    objective: Callable[..., Tensor]
    x: Any
    """A tree at which the derivative is taken."""
    args: tuple[Tensor, ...]
    """The first one requires grad; the others are data."""


def logistic(m: int, n: int) -> Workload:
    """Logistic regression with one penalty per weight, near zero, in double precision.

    The features differ in size by a factor of ten, as those of real data do.
    """
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(m, n, dtype=torch.float64, generator=generator) * torch.logspace(0, -1, n, dtype=torch.float64)
    y = (X @ torch.randn(n, dtype=X.dtype, generator=generator) > 0).to(X.dtype)
    log_penalties = torch.full((n,), -7.0, dtype=torch.float64, requires_grad=True)

    def objective(w: Tensor, log_penalties: Tensor, X: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.binary_cross_entropy_with_logits(X @ w, y)
        return loss + 0.5 * (log_penalties.exp() * w * w).sum()

    w = 0.1 * torch.randn(n, dtype=X.dtype, generator=generator)
    return Workload(f"logistic ({m}, {n})", objective, w, (log_penalties, X, y))


def _network(name: str, model: nn.Module, inputs: Tensor, targets: Tensor, loss: Any, strength: float) -> Workload:
    """A network pulled towards meta-parameters, as in iMAML, with the strength λ that makes its Hessian definite."""
    theta = {k: v.detach().clone() for k, v in model.named_parameters()}
    flat = torch.cat([v.reshape(-1) for v in theta.values()]).requires_grad_()
    sizes = [v.numel() for v in theta.values()]

    def objective(phi: dict[str, Tensor], flat: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        parts = flat.split(sizes)
        pull = sum(((p.reshape(-1) - t) ** 2).sum() for p, t in zip(phi.values(), parts, strict=True))
        return loss(functional_call(model, phi, (inputs,)), targets) + 0.5 * strength * pull

    return Workload(name, objective, theta, (flat, inputs, targets))


def mlp() -> Workload:
    """An MLP of 27 thousand parameters on 512 points."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    inputs, targets = torch.randn(512, 32, generator=generator), torch.randn(512, 1, generator=generator)
    return _network("MLP (27k parameters)", MLP([32, 144, 144, 1]), inputs, targets, nn.functional.mse_loss, 1.0)


def omniglot_network() -> Workload:
    """The paper's convolutional network on one 5-way 5-shot support set."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    inputs = torch.rand(25, 1, 28, 28, generator=generator)
    targets = torch.arange(5).repeat_interleave(5)
    return _network("Omniglot network (112k)", ConvNet(ways=5), inputs, targets, nn.functional.cross_entropy, 20.0)


def workloads() -> list[Workload]:
    return [logistic(500, 50), logistic(5000, 1000), logistic(20000, 5000), mlp(), omniglot_network()]
