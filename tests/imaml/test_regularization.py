"""The gradient in λ, one or many, against dense algebra: φ* of a linear model is a formula in λ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import implicitdiff as idf
from imaml import IMAML, LearnedRegularization
from imaml.tasks import LinearRegression, Task
from implicitdiff.inner_solvers import NewtonCG

D = torch.float64
mse = nn.functional.mse_loss


class Two(nn.Module):
    """Two layers side by side: linear in its parameters, which have more than one owner."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 1, dtype=D), nn.Linear(3, 1, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x[:, :2]) + self.right(x[:, 2:])


def design(x: Tensor) -> Tensor:
    one = torch.ones(len(x), 1, dtype=D)
    return torch.cat([x[:, :2], one, x[:, 2:], one], 1)


def model_and_tasks() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    tasks = LinearRegression(dimension=5, shots=4).sample(3, "train", 0, 0)
    return Two(), Task(*(tuple(t.double() for t in part) for part in tasks))


def exact_loss(theta: Tensor, lam: Tensor, tasks: Task) -> Tensor:
    """The meta-loss with φ* = (2SᵀS/n + Λ)⁻¹ (2Sᵀy/n + Λθ)."""
    losses = []
    for xs, ys, xq, yq in zip(*tasks.support, *tasks.query, strict=True):
        S = design(xs)
        A = 2 * S.T @ S / len(S) + torch.diag(lam)
        phi = torch.linalg.solve(A, 2 * S.T @ ys.flatten() / len(S) + lam * theta)
        losses.append(((design(xq) @ phi - yq.flatten()) ** 2).mean())
    return torch.stack(losses).mean()


def learner(model: nn.Module, regularization: Any) -> IMAML:
    return IMAML(
        model, mse, inner_solver=NewtonCG(tol=1e-12), linear_solver=idf.Dense(rtol=1e-12), regularization=regularization
    )


GROUPS = {
    "model": {"model": range(7)},
    "layer": {"left": range(3), "right": range(3, 7)},
    "parameter": {"left.weight": [0, 1], "left.bias": [2], "right.weight": [3, 4, 5], "right.bias": [6]},
}


@pytest.mark.parametrize("per", GROUPS)
def test_the_gradient_in_log_lambda_is_that_of_the_formula(per: Any) -> None:
    model, tasks = model_and_tasks()
    regularization = LearnedRegularization(model, 0.5, per=per)
    torch.manual_seed(1)
    for p in regularization.logarithms:
        nn.init.normal_(p)
    learner(model, regularization).meta_loss(tasks).backward()
    logs = torch.zeros(7, dtype=D)
    for places, p in zip(GROUPS[per].values(), regularization.logarithms, strict=True):
        logs[list(places)] = p.detach().flatten()
    logs.requires_grad_()
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    (want,) = torch.autograd.grad(exact_loss(theta, logs.exp(), tasks), logs)
    for places, p in zip(GROUPS[per].values(), regularization.logarithms, strict=True):
        expected = want[list(places)] if per == "parameter" else want[list(places)].sum()
        torch.testing.assert_close(p.grad.reshape(expected.shape), expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("per", GROUPS)
def test_it_starts_at_the_initial_value_and_names_what_it_has(per: Any) -> None:
    model, _ = model_and_tasks()
    regularization = LearnedRegularization(model, 2.0, per=per)
    strengths = regularization.strengths()
    assert list(strengths) == list(GROUPS[per])
    for value in strengths.values():
        torch.testing.assert_close(value, torch.full_like(value, 2.0))
        assert not value.requires_grad
    assert regularization().keys() == dict(model.named_parameters()).keys()
    assert len(list(learner(model, regularization).parameters())) == 4 + len(strengths)
    assert LearnedRegularization(nn.Linear(2, 1), 1.0, per="layer").strengths().keys() == {"model"}


def test_it_stays_positive_where_a_raw_parameter_is_found_out() -> None:
    model, tasks = model_and_tasks()
    regularization = LearnedRegularization(model, 1e-3)
    safe, raw = learner(model, regularization), learner(model, nn.Parameter(torch.tensor(1e-3, dtype=D)))
    for one in (safe, raw):
        one.meta_loss(tasks).backward()
        for p in one.regularization.parameters():
            p.data -= 0.5
    assert 0 < float(safe.regularization.strengths()["model"]) < 1e-3
    safe.meta_loss(tasks)
    assert set(raw.regularization.strengths()) == {"model"}
    with pytest.raises(ValueError, match=r"must be positive, but for left.weight it is -0.499.*LearnedRegularization"):
        raw.meta_loss(tasks)


def test_any_module_that_returns_lambda_will_do() -> None:
    """λ = |a| + 0.1, learned in a form of the user's own."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(-0.4, dtype=D))

        def forward(self) -> Tensor:
            return self.a.abs() + 0.1

    model, tasks = model_and_tasks()
    own = Own()
    learner(model, own).meta_loss(tasks).backward()
    lam = torch.tensor(0.5, dtype=D, requires_grad=True)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    (want,) = torch.autograd.grad(exact_loss(theta, lam.expand(7), tasks), lam)
    torch.testing.assert_close(own.a.grad, -want, rtol=1e-8, atol=1e-11)


def test_a_dict_may_mix_learned_and_given() -> None:
    model, tasks = model_and_tasks()
    given = {n: 0.5 for n, _ in model.named_parameters()} | {"right.bias": nn.Parameter(torch.tensor([2.0], dtype=D))}
    meta = learner(model, given)
    meta.meta_loss(tasks).backward()
    lam = torch.tensor([0.5] * 6 + [2.0], dtype=D, requires_grad=True)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    (want,) = torch.autograd.grad(exact_loss(theta, lam, tasks), lam)
    torch.testing.assert_close(given["right.bias"].grad, want[6:], rtol=1e-8, atol=1e-11)
    assert meta.regularization.strengths().keys() == {"right.bias"}


def test_mistakes_are_named() -> None:
    model, _ = model_and_tasks()
    with pytest.raises(ValueError, match="initial is 0"):
        LearnedRegularization(model, 0.0)
    with pytest.raises(ValueError, match="per is 'entry', but it must be one of 'model', 'layer', 'parameter'"):
        LearnedRegularization(model, 1.0, per="entry")
    with pytest.raises(TypeError, match=r"regularization is \[1.0\], but it must be a number"):
        learner(model, [1.0])
    with pytest.raises(ValueError, match=r"regularization has the names \['left.bias', 'left.weight'"):
        learner(nn.Linear(2, 1), LearnedRegularization(model, 1.0))
    with pytest.raises(ValueError, match=r"of left.weight has the shape \(2,\)"):
        learner(model, torch.ones(2))
