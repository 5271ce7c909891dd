"""Meta-gradients against dense algebra: Lemma 1 for iMAML, the unrolled chain rule for MAML."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian

import implicitdiff as idf
from imaml import IMAML, MAML, Reptile
from imaml.learners.accuracy import InUnitsOfG
from imaml.models import MLP
from imaml.tasks import LinearRegression, Sinusoids, Task
from implicitdiff.inner_solvers import LBFGS, NewtonCG

D = torch.float64


def double(task: Task) -> Task:
    return Task(*(tuple(t.double() for t in part) for part in task))


def flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parameters.values()])


def exact(**settings: object) -> dict[str, object]:
    return {"inner_solver": NewtonCG(tol=1e-12), "linear_solver": idf.CG(rtol=1e-13, max_iterations=2000), **settings}


def gradients(learner: nn.Module, tasks: object) -> Tensor:
    learner.zero_grad()
    learner.meta_loss(tasks).backward()
    return flat({n: p.grad for n, p in learner.model.named_parameters()})


def lemma_1(model: nn.Module, phi: dict[str, Tensor], support: object, query: object, strengths: Tensor) -> Tensor:
    """(I + H/λ)⁻¹ v with the exact Hessian H at φ, by dense algebra; λ per parameter."""
    shapes = {n: p.shape for n, p in phi.items()}

    def loss(vector: Tensor, examples: tuple[Tensor, Tensor]) -> Tensor:
        parts = vector.split([s.numel() for s in shapes.values()])
        parameters = {n: part.reshape(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}
        return nn.functional.mse_loss(functional_call(model, parameters, (examples[0],)), examples[1])

    at = flat(phi)
    H, v = hessian(loss)(at, support), grad(loss)(at, query)
    return strengths * torch.linalg.solve(H + torch.diag(strengths), v)


def model_and_tasks(kind: str) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    if kind == "linear regression":
        return nn.Linear(4, 1, dtype=D), double(LinearRegression(dimension=4, shots=6).sample(3, "train", 0, 0))
    return MLP([1, 5, 1]).double(), double(Sinusoids(shots=5).sample(3, "train", 0, 0))


@pytest.mark.parametrize("per_parameter", [False, True], ids=["scalar", "per parameter"])
@pytest.mark.parametrize("kind", ["linear regression", "mlp"])
def test_the_meta_gradient_is_lemma_1(kind: str, per_parameter: bool) -> None:
    model, tasks = model_and_tasks(kind)
    strengths = {n: 0.5 + torch.rand_like(p) for n, p in model.named_parameters()} if per_parameter else 0.7
    learner = IMAML(model, nn.functional.mse_loss, **exact(regularization=strengths))
    got = gradients(learner, tasks)
    size = len(got)
    lam = flat(strengths) if per_parameter else torch.full((size,), 0.7, dtype=D)
    want = torch.zeros(size, dtype=D)
    for i in range(3):
        support, query = (tuple(t[i] for t in part) for part in tasks)
        want += lemma_1(model, learner.adapt(support), support, query, lam) / 3
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", ["scalar tensor", "by name", "by entry"])
def test_one_strength_may_be_given_in_every_form(form: str) -> None:
    model, tasks = model_and_tasks("mlp")
    parameters = dict(model.named_parameters())
    strengths = {
        "scalar tensor": torch.tensor(0.7, dtype=D),
        "by name": dict.fromkeys(parameters, 0.7),
        "by entry": {n: torch.full_like(p, 0.7) for n, p in parameters.items()},
    }[form]
    want = gradients(IMAML(model, nn.functional.mse_loss, **exact(regularization=0.7)), tasks)
    got = gradients(IMAML(model, nn.functional.mse_loss, **exact(regularization=strengths)), tasks)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_without_delta_prime_the_linear_solver_makes_its_own_products_only() -> None:
    products = 0

    def product(v: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return v * torch.arange(1.0, 6.0, dtype=D)

    A = idf.operators.FunctionOperator(product, 5, structure="positive_definite")
    solver = InUnitsOfG(idf.CG(rtol=0.0, max_iterations=2, on_failure="ignore"), 1.0)
    solver.solve(A, torch.ones(5, dtype=D))
    assert products == 2


def test_closed_form_of_linear_regression() -> None:
    """φ* = (2XᵀX/n + λI)⁻¹ (2Xᵀy/n + λθ), so the meta-gradient needs no Hessian of torch's either."""
    model, tasks = model_and_tasks("linear regression")
    lam = 1.3
    got = gradients(IMAML(model, nn.functional.mse_loss, **exact(regularization=lam)), tasks)
    theta = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    want = torch.zeros(5, dtype=D)
    for i in range(3):
        (xs, ys), (xq, yq) = (tuple(t[i] for t in part) for part in tasks)
        S, Q = (torch.cat([x, torch.ones(len(x), 1, dtype=D)], 1) for x in (xs, xq))
        A = 2 * S.T @ S / len(S) + lam * torch.eye(5, dtype=D)
        phi = torch.linalg.solve(A, 2 * S.T @ ys.flatten() / len(S) + lam * theta)
        want += lam * torch.linalg.solve(A, 2 * Q.T @ (Q @ phi - yq.flatten()) / len(Q)) / 3
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_a_learned_regularization_gets_its_gradient() -> None:
    model, tasks = model_and_tasks("mlp")
    for value in (torch.tensor(0.7, dtype=D), torch.tensor(1.9, dtype=D)):
        learner = IMAML(model, nn.functional.mse_loss, **exact(regularization=nn.Parameter(value)))
        gradients(learner, tasks)
        (parameter,) = learner.regularization.learned
        step = 1e-5
        around = [
            float(IMAML(model, nn.functional.mse_loss, **exact(regularization=value + s)).meta_loss(tasks).detach())
            for s in (step, -step)
        ]
        # Central differences: their error is about step² and ε/step.
        torch.testing.assert_close(float(parameter.grad), (around[0] - around[1]) / (2 * step), rtol=1e-6, atol=1e-9)
    per_parameter = {n: nn.Parameter(torch.ones_like(p)) for n, p in model.named_parameters()}
    learner = IMAML(model, nn.functional.mse_loss, **exact(regularization=per_parameter))
    learner.meta_loss(tasks).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in learner.regularization.learned)


@pytest.mark.parametrize("algorithm", ["imaml", "maml", "reptile"])
def test_chunks_lists_and_single_tasks_agree(algorithm: str) -> None:
    model, tasks = model_and_tasks("mlp")

    def learner(chunk: int | None) -> nn.Module:
        if algorithm == "imaml":
            return IMAML(model, nn.functional.mse_loss, **exact(regularization=1.0, task_chunk=chunk))
        kind = MAML if algorithm == "maml" else Reptile
        return kind(model, nn.functional.mse_loss, steps=3, stepsize=0.05, task_chunk=chunk)

    whole = gradients(learner(None), tasks)
    as_list = [Task(*(tuple(t[i] for t in part) for part in tasks)) for i in range(3)]
    for got in (gradients(learner(2), tasks), gradients(learner(None), as_list)):
        torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-12)
    one_by_one = sum(gradients(learner(None), [task]) for task in as_list) / 3
    torch.testing.assert_close(one_by_one, whole, rtol=1e-9, atol=1e-12)


def unrolled_by_hand(model: nn.Module, task: Task, steps: int, stepsize: float, keep: int) -> Tensor:
    """MAML with torch alone; the last ``keep`` steps are differentiated."""
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    phi = dict(theta)
    for k in range(steps):
        differentiated = k >= steps - keep
        loss = nn.functional.mse_loss(functional_call(model, phi, (task.support[0],)), task.support[1])
        gradient = torch.autograd.grad(loss, list(phi.values()), create_graph=differentiated)
        phi = {
            n: p - stepsize * (g if differentiated else g.detach())
            for (n, p), g in zip(phi.items(), gradient, strict=True)
        }
    nn.functional.mse_loss(functional_call(model, phi, (task.query[0],)), task.query[1]).backward()
    return flat({n: p.grad for n, p in theta.items()})


@pytest.mark.parametrize(("settings", "keep"), [({}, 4), ({"truncate": 2}, 2), ({"first_order": True}, 0)])
def test_maml_equals_the_chain_rule_by_hand(settings: dict[str, object], keep: int) -> None:
    model, tasks = model_and_tasks("mlp")
    got = gradients(MAML(model, nn.functional.mse_loss, steps=4, stepsize=0.05, **settings), tasks)
    want = sum(
        unrolled_by_hand(model, Task(*(tuple(t[i] for t in part) for part in tasks)), 4, 0.05, keep) for i in range(3)
    )
    torch.testing.assert_close(got, want / 3, rtol=1e-9, atol=1e-12)


def test_nesterov_takes_other_steps() -> None:
    model, tasks = model_and_tasks("linear regression")
    losses = [
        float(MAML(model, nn.functional.mse_loss, steps=5, stepsize=0.02, nesterov=n).meta_loss(tasks).detach())
        for n in (False, True)
    ]
    assert losses[1] < losses[0]


def test_reptile_leaves_theta_minus_phi() -> None:
    model, tasks = model_and_tasks("mlp")
    learner = Reptile(model, nn.functional.mse_loss, steps=3, stepsize=0.05)
    got = gradients(learner, tasks)
    theta = flat(learner.meta_parameters()).detach()
    phis = [flat(learner.adapt(tuple(t[i] for t in tasks.support))) for i in range(3)]
    torch.testing.assert_close(got, theta - torch.stack(phis).mean(0), rtol=1e-10, atol=1e-13)


def test_training_lowers_the_loss_on_new_tasks() -> None:
    torch.manual_seed(0)
    source = Sinusoids(shots=10)
    learner = IMAML(
        MLP([1, 20, 1]),
        nn.functional.mse_loss,
        inner_solver=LBFGS(max_iterations=8, tol=1e-3, on_failure="ignore"),
        linear_solver=idf.CG(max_iterations=5, on_failure="ignore"),
        regularization=1.0,
    )
    before = copy.deepcopy(learner)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    for step in range(40):
        optimizer.zero_grad()
        learner.meta_loss(source.sample(8, "train", 0, step)).backward()
        optimizer.step()
    test = source.sample(40, "test", 0, 0)
    with torch.no_grad():
        assert float(learner.meta_loss(test)) < 0.8 * float(before.meta_loss(test))


def test_mistakes_are_named() -> None:
    model = nn.Linear(2, 1)
    mse = nn.functional.mse_loss
    with pytest.raises(ValueError, match="regularization must be positive"):
        IMAML(model, mse, regularization=0.0)
    with pytest.raises(ValueError, match="regularization has the names"):
        IMAML(model, mse, regularization={"w": 1.0})
    with pytest.raises(ValueError, match="track_running_stats=False"):
        IMAML(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), mse)
    with pytest.raises(ValueError, match="task_chunk is 0"):
        MAML(model, mse, steps=1, stepsize=0.1, task_chunk=0)
    with pytest.raises(ValueError, match="truncate=0"):
        MAML(model, mse, steps=1, stepsize=0.1, truncate=1, first_order=True)
    with pytest.raises(ValueError, match="no task in the list"):
        MAML(model, mse, steps=1, stepsize=0.1).meta_loss([])
