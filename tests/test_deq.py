"""Deep equilibrium models: sample by sample, gradients of parameters and inputs, the Jacobian penalty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import implicitdiff as idf
from implicitdiff.inner_solvers import Anderson, Broyden, FixedPointIteration

from .problems import random
from .test_transforms import close

D = torch.float64


class Cell(nn.Module):
    def __init__(self, n: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n, dtype=D)
        nn.init.orthogonal_(self.linear.weight, gain=0.6)

    def forward(self, z: Tensor, u: Tensor, scale: float = 1.0) -> Tensor:
        assert z.ndim == 1  # one sample
        return torch.tanh(self.linear(z) + scale * u)

    def jacobian(self, z: Tensor, u: Tensor, scale: float = 1.0) -> Tensor:
        slope = 1 - torch.tanh(self.linear(z) + scale * u) ** 2
        return slope.unsqueeze(-1) * self.linear.weight


@pytest.fixture
def cell() -> Cell:
    torch.manual_seed(0)
    return Cell()


@pytest.mark.parametrize("solver", [None, Anderson(tol=1e-12), Broyden(tol=1e-12), FixedPointIteration(tol=1e-12)])
def test_gradients_are_those_of_the_theorem(cell: Cell, solver: Any) -> None:
    """In parameters, inputs and through a keyword, against dense algebra per sample."""
    layer = idf.DEQ(cell, inner_solver=solver, linear_solver=idf.Dense())
    u = random(1, 7, 5).requires_grad_()
    z = layer(torch.zeros(7, 5, dtype=D), u, scale=0.5)
    g = random(2, 7, 5)
    in_u, in_weight, in_bias = torch.autograd.grad(z, (u, cell.linear.weight, cell.linear.bias), g)
    rtol = 1e-9 if solver is not None else 1e-6  # the default tolerance is 1.5e-8
    want_weight, want_bias = torch.zeros(5, 5, dtype=D), torch.zeros(5, dtype=D)
    for i in range(7):
        z_i, u_i = z[i].detach(), u[i].detach()
        J = cell.jacobian(z_i, u_i, 0.5).detach()
        cotangent = torch.linalg.inv(torch.eye(5, dtype=D) - J).T @ g[i]
        slope = 1 - z_i**2
        close(in_u[i], 0.5 * slope * cotangent, rtol)
        want_weight += torch.outer(slope * cotangent, z_i)
        want_bias += slope * cotangent
    close(in_weight, want_weight, rtol)
    close(in_bias, want_bias, rtol)
    assert {id(p) for p in layer.parameters()} == {id(p) for p in cell.parameters()}


def test_each_sample_stops_by_itself() -> None:
    """Contraction rates from 0.05 to 0.95; a divergent sample spoils itself only."""
    rates = torch.tensor([0.05, 0.5, 0.95, 3.0], dtype=D).unsqueeze(-1)
    layer = idf.DEQ(
        lambda z, rate: rate * z + 1,
        inner_solver=FixedPointIteration(tol=1e-10, max_iterations=500, on_failure="ignore"),
    )
    solution = layer.solve(torch.zeros(4, 1, dtype=D), rates)
    assert solution.forward.converged.tolist() == [True, True, True, False]
    iterations = solution.forward.iterations.tolist()
    assert iterations[0] < 10 < iterations[1] < 40 < iterations[2]
    close(solution.value[:3], 1 / (1 - rates[:3]), 1e-8)


def test_trees_and_images() -> None:
    """A state of two leaves, one an image; the convolution is shared by the samples."""
    torch.manual_seed(1)
    convolution = nn.Conv2d(2, 2, 3, padding=1, dtype=D)
    nn.init.orthogonal_(convolution.weight, gain=0.3)

    def update(z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        image = torch.tanh(convolution(z["image"]) + x)
        return {"image": image, "mean": 0.5 * z["mean"] + image.mean()}

    init = {"image": torch.zeros(3, 2, 4, 4, dtype=D), "mean": torch.zeros(3, dtype=D)}
    x = random(3, 3, 2, 4, 4)
    z = idf.DEQ(update)(init, x)
    assert z["image"].shape == (3, 2, 4, 4)
    close(z["mean"], 2 * z["image"].flatten(1).mean(-1), 1e-6)
    alone = idf.FixedPointLayer(update)({k: v[0] for k, v in init.items()}, x[0])
    close(alone["image"], z["image"][0], 1e-6)


def test_the_penalty_is_the_squared_norm_of_the_jacobian_on_average(cell: Cell) -> None:
    layer, u = idf.DEQ(cell), random(4, 6, 5)
    z = layer(torch.zeros(6, 5, dtype=D), u).detach()
    exact = torch.stack([cell.jacobian(z[i], u[i]).square().sum() for i in range(6)]).sum() / z.numel()
    torch.manual_seed(2)
    draws = torch.stack([layer.jacobian_penalty(z, u).detach() for _ in range(2000)])
    assert abs(float(draws.mean() - exact)) < 4 * float(draws.std() / 2000**0.5)
    # For the same draws, its gradient is that of the exact penalty on average, too.
    (want,) = torch.autograd.grad(exact, cell.linear.weight)
    gradients = [torch.autograd.grad(layer.jacobian_penalty(z, u), cell.linear.weight)[0] for _ in range(1000)]
    mean, error = torch.stack(gradients).mean(0), torch.stack(gradients).std(0) / 1000**0.5
    assert bool(((mean - want).abs() < 5 * error).all())


def test_the_penalty_lowers_the_jacobian_in_training(cell: Cell) -> None:
    layer, u = idf.DEQ(cell), random(5, 6, 5)
    z = layer(torch.zeros(6, 5, dtype=D), u)
    before = float(cell.jacobian(z[0], u[0]).norm())
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        layer.jacobian_penalty(z, u).backward()
        optimizer.step()
    assert float(cell.jacobian(z[0], u[0]).norm()) < 0.8 * before


def test_jacobian_free_is_the_derivative_of_one_step(cell: Cell) -> None:
    layer = idf.DEQ(cell, linear_solver=idf.JacobianFree())
    u = random(6, 3, 5).requires_grad_()
    z = layer(torch.zeros(3, 5, dtype=D), u)
    (got,) = torch.autograd.grad(z.sum(), cell.linear.weight, retain_graph=True)
    one_step = torch.stack([cell(z_i, u_i) for z_i, u_i in zip(z.detach(), u.detach(), strict=True)])
    close(got, torch.autograd.grad(one_step.sum(), cell.linear.weight)[0], 1e-12)


def test_batches_that_differ_are_refused(cell: Cell) -> None:
    for u in (torch.zeros(2, 5, dtype=D), torch.zeros((), dtype=D)):
        with pytest.raises(idf.ImplicitDiffError, match=r"shapes \[\(3, 5\), .*same leading"):
            idf.DEQ(cell)(torch.zeros(3, 5, dtype=D), u)
