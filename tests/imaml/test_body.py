"""A body that all tasks share and that is not adapted: ANIL, and iMAML on the head only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import implicitdiff as idf
from imaml import IMAML, MAML, Learner
from imaml.models import MLP, ConvNet
from imaml.tasks import Sinusoids, Task
from implicitdiff.inner_solvers import GradientDescent, NewtonCG

D = torch.float64
mse = nn.functional.mse_loss


def body_head_and_tasks() -> tuple[nn.Module, nn.Module, Task]:
    torch.manual_seed(0)
    tasks = Sinusoids(shots=5).sample(3, "train", 0, 0)
    body, head = nn.Sequential(MLP([1, 6, 4]), nn.Tanh()).double(), nn.Linear(4, 1).double()
    return body, head, Task(*(tuple(t.double() for t in part) for part in tasks))


def one(tasks: Task, i: int) -> Task:
    return Task(*(tuple(t[i] for t in part) for part in tasks))


def gradients(learner: Learner, tasks: Any) -> dict[str, Tensor | None]:
    learner.zero_grad()
    learner.meta_loss(tasks).backward()
    return {n: p.grad for n, p in learner.named_parameters()}


def imaml(head: nn.Module, body: nn.Module, **settings: Any) -> IMAML:
    return IMAML(
        head,
        mse,
        body=body,
        inner_solver=NewtonCG(tol=1e-12),
        linear_solver=idf.Dense(rtol=1e-11),
        regularization=0.7,
        **settings,
    )


def ridge_loss(body: nn.Module, theta: Tensor, task: Task) -> Tensor:
    """The query loss of the head that solves the ridge regression on the features, in one differentiable formula."""
    S, Q = (torch.cat([body(x), torch.ones(len(x), 1, dtype=D)], 1) for x, _ in task)
    A = 2 * S.T @ S / len(S) + 0.7 * torch.eye(S.shape[1], dtype=D)
    phi = torch.linalg.solve(A, 2 * S.T @ task.support[1].flatten() / len(S) + 0.7 * theta)
    return ((Q @ phi - task.query[1].flatten()) ** 2).mean()


@pytest.mark.parametrize("frozen", [False, True], ids=["head learned", "head frozen"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_gradient_of_imaml_in_the_body_is_that_of_the_whole_computation(frozen: bool, chunk: int | None) -> None:
    body, head, tasks = body_head_and_tasks()
    if frozen:
        head.requires_grad_(False)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    got = gradients(imaml(head, body, task_chunk=chunk), tasks)
    theta = torch.cat([head.weight.flatten(), head.bias]).detach().requires_grad_()
    total = torch.stack([ridge_loss(body, theta, one(tasks, i)) for i in range(3)]).mean()
    *want, of_theta = torch.autograd.grad(total, [*body.parameters(), theta])
    for (name, _), expected in zip(body.named_parameters(), want, strict=True):
        torch.testing.assert_close(got[f"body.{name}"], expected, rtol=1e-8, atol=1e-10)
    if frozen:
        assert got["model.weight"] is None
        assert got["model.bias"] is None
    else:
        of_head = torch.cat([got["model.weight"].flatten(), got["model.bias"]])
        torch.testing.assert_close(of_head, of_theta, rtol=1e-8, atol=1e-10)


def anil_by_hand(body: nn.Module, head: nn.Module, task: Task, steps: int) -> Tensor:
    phi = dict(head.named_parameters())
    for _ in range(steps):
        loss = mse(functional_call(head, phi, (body(task.support[0]),)), task.support[1])
        gradient = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        phi = {n: p - 0.1 * g for (n, p), g in zip(phi.items(), gradient, strict=True)}
    return mse(functional_call(head, phi, (body(task.query[0]),)), task.query[1])


@pytest.mark.parametrize("checkpoint", [False, True])
def test_anil_equals_the_chain_rule_by_hand(checkpoint: bool) -> None:
    body, head, tasks = body_head_and_tasks()
    got = gradients(MAML(head, mse, body=body, steps=4, stepsize=0.1, checkpoint=checkpoint), tasks)
    total = torch.stack([anil_by_hand(body, head, one(tasks, i), 4) for i in range(3)]).mean()
    want = torch.autograd.grad(total, [*head.parameters(), *body.parameters()])
    for found, expected in zip(got.values(), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_the_body_runs_once_a_set_and_not_at_every_step() -> None:
    body, head, tasks = body_head_and_tasks()
    calls: list[int] = []
    body.register_forward_hook(lambda *_: calls.append(1))
    MAML(head, mse, body=body, steps=7, stepsize=0.1).meta_loss(tasks).backward()
    assert len(calls) == 2
    imaml(head, body, task_chunk=1).meta_loss(tasks).backward()
    assert len(calls) == 2 + 2 * 3


def test_each_set_of_each_task_has_batch_statistics_of_its_own() -> None:
    torch.manual_seed(0)
    net = ConvNet(ways=3, filters=4).double()
    images, labels = torch.rand(4, 2, 6, 1, 16, 16, dtype=D), torch.arange(3).repeat(4, 2)
    tasks = Task((images[:, 0], labels), (images[:, 1] + 3, labels))
    descent = GradientDescent(max_iterations=5, tol=0.0, on_failure="ignore")
    learner = IMAML(net.head, nn.functional.cross_entropy, body=net.features, inner_solver=descent)
    result = learner.meta_step(tasks)
    result.loss.backward()
    together = [p.grad.clone() for p in net.features.parameters()]
    assert net.head.weight.grad is None
    learner.zero_grad()
    for i in range(4):
        task = one(tasks, i)
        phi = learner.adapt(task.support)
        assert phi.keys() == {"weight", "bias"}
        torch.testing.assert_close(learner.predict(phi, task.query[0]).detach(), result.outputs[i])
        (learner.meta_loss([task]) / 4).backward()
    for p, want in zip(net.features.parameters(), together, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-7, atol=1e-10)


def test_the_body_is_saved_and_learned_with_the_learner() -> None:
    body, head, _ = body_head_and_tasks()
    learner = imaml(head, body)
    assert {id(p) for p in learner.parameters()} == {id(p) for p in [*body.parameters(), *head.parameters()]}
    assert learner.meta_parameters().keys() == {"weight", "bias"}


def test_mistakes_are_named() -> None:
    body, head, _ = body_head_and_tasks()
    with pytest.raises(TypeError, match="body is <function"):
        IMAML(head, mse, body=lambda x: x)
    with pytest.raises(ValueError, match="the body has no parameters"):
        IMAML(head, mse, body=nn.Flatten())
    with pytest.raises(ValueError, match="the model has no parameters, so there is nothing to adapt"):
        IMAML(nn.Flatten(), mse)
    with pytest.raises(ValueError, match="the body has buffers"):
        IMAML(head, mse, body=nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"body and model share parameters, \['0.0.weight'"):
        IMAML(nn.Sequential(body, head), mse, body=body)
