"""δ and δ′ (Definitions 1 and 2) against exact solutions: the true errors are below the bounds, the bounds below δ."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import implicitdiff as idf
from imaml import IMAML, LearnedRegularization
from imaml.tasks import LinearRegression, Task
from implicitdiff.inner_solvers import LBFGS, GradientDescent, NewtonCG

D = torch.float64
DIMENSION = 40


def regression(count: int) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    tasks = LinearRegression(dimension=DIMENSION, shots=40).sample(count, "train", 0, 0)
    return nn.Linear(DIMENSION, 1, dtype=D), Task(*(tuple(t.double() for t in part) for part in tasks))


def flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters.values()])


def dense(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Hessian and negative gradient at 0 of the mean squared error of weights and bias."""
    S = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=D)], 1)
    return 2 * S.T @ S / len(S), 2 * S.T @ targets.flatten() / len(S)


def exact(theta: Tensor, lam: Tensor, support: Any, query: Any, phi: Tensor) -> tuple[Tensor, Tensor]:
    """φ*, and the g that belongs to v at the φ that was found."""
    (H, b), (Q, c) = dense(*support), dense(*query)
    A = H + torch.diag(lam)
    return torch.linalg.solve(A, b + lam * theta), lam * torch.linalg.solve(A, Q @ phi - c)


class Watched(idf.LinearSolver):
    """Keeps what it is asked and what it answers; the learner copies it, and a copy shares the list."""

    def __init__(self, solver: idf.LinearSolver) -> None:
        super().__init__(rtol=solver.rtol, atol=solver.atol, on_failure=solver.on_failure)
        self.solver, self.answers = solver, []

    def solve(self, A: idf.LinearOperator, b: Tensor, x0: Tensor | None = None) -> idf.LinearSolution:
        solver = copy.copy(self.solver)
        solver.rtol, solver.atol = self.rtol, self.atol
        solution = solver.solve(A, b, x0)
        self.answers.append(solution)
        return solution


def errors(
    learner: IMAML, tasks: Task, lam: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, dict[str, float], Any]:
    """True errors of φ and g of each task, the report, and the inner and linear iterations."""
    count = len(tasks.query[0])
    learner.zero_grad()
    with idf.record() as history:
        (scale * learner.meta_loss(tasks)).backward()
    report = learner.report()
    theta = flat(learner.meta_parameters())
    got = flat({n: p.grad for n, p in learner.meta_parameters().items()}) / scale
    of_phi, mean = [], torch.zeros_like(got)
    for i in range(count):
        support, query = (tuple(t[i] for t in part) for part in tasks)
        phi = flat(learner.adapt(support))
        phi_star, g = exact(theta, lam, support, query, phi)
        of_phi.append((phi - phi_star).norm())
        mean += g / count
    steps = {k: int(sum(s.iterations.sum() for s in history if s.kind == k)) for k in ("forward", "backward")}
    return torch.stack(of_phi), (got - mean).norm(), report, steps


LAMBDAS = {
    "scalar": torch.ones(DIMENSION + 1, dtype=D),
    "entries": torch.linspace(0.5, 5.0, DIMENSION + 1, dtype=D),
}


def given(lam: Tensor) -> Any:
    return {"weight": lam[:-1].reshape(1, -1), "bias": lam[-1:]}


@pytest.mark.parametrize("kind", LAMBDAS)
@pytest.mark.parametrize(("count", "chunk"), [(1, None), (4, None), (4, 3)])
def test_true_errors_are_below_the_bounds_and_the_bounds_below_the_thresholds(
    kind: str, count: int, chunk: int | None
) -> None:
    model, tasks = regression(count)
    lam, before = LAMBDAS[kind], None
    for delta in (1e-1, 1e-4, 1e-8):
        learner = IMAML(
            model,
            nn.functional.mse_loss,
            inner_solver=GradientDescent(0.1),
            linear_solver=idf.CG(),
            regularization=given(lam),
            delta=delta,
            delta_prime=delta,
            task_chunk=chunk,
        )
        of_phi, of_g, report, steps = errors(learner, tasks, lam)
        assert float(of_phi.max()) <= delta
        assert float(of_phi.mean()) <= report["delta"] <= delta
        assert float(of_g) <= report["delta_prime"] <= delta
        assert report["delta_missed"] == report["delta_prime_missed"] == 0
        # They are met by doing more, not by a tolerance that is always as small.
        assert before is None or all(steps[k] > before[k] for k in steps), delta
        before = steps


def test_the_bound_of_each_task_holds_for_its_own_gradient() -> None:
    """One by one, as a mean over tasks may hide one: g of each task, and the residual that its bound is made of."""
    model, tasks = regression(2)
    for kind, lam in LAMBDAS.items():
        for i in range(2):
            one = Task(*(tuple(t[i : i + 1] for t in part) for part in tasks))
            for delta_prime in (1e-1, 1e-4):
                learner = IMAML(
                    model,
                    nn.functional.mse_loss,
                    inner_solver=NewtonCG(tol=1e-12),
                    linear_solver=idf.CG(),
                    regularization=given(lam),
                    delta_prime=delta_prime,
                )
                _, of_g, report, _ = errors(learner, one, lam)
                assert float(of_g) <= report["delta_prime"] <= delta_prime, kind


@pytest.mark.parametrize("scale", [1e-6, -3.0])
def test_the_threshold_is_that_of_the_tasks_own_gradient_however_the_loss_is_weighted(scale: float) -> None:
    model, tasks = regression(4)
    lam = LAMBDAS["scalar"]
    results = []
    for count, weight in ((4, 1.0), (4, scale), (1, 1.0)):
        watched = Watched(idf.CG())
        learner = IMAML(
            model, nn.functional.mse_loss, linear_solver=watched, regularization=1.0, delta=1e-9, delta_prime=1e-3
        )
        few = Task(*(tuple(t[:count] for t in part) for part in tasks))
        _, of_g, report, steps = errors(learner, few, lam, weight)
        assert float(of_g) <= report["delta_prime"] <= 1e-3
        results.append((report["delta_prime"], steps["backward"], watched.answers[0].info.residual_norm.reshape(-1)[0]))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-6, atol=0.0)
    # The first task is solved alike alone and among four.
    torch.testing.assert_close(results[0][2], results[2][2], rtol=1e-6, atol=0.0)


def test_the_bound_is_tight_where_the_curvature_of_the_loss_is_small() -> None:
    """‖v − (I + H/λ) g‖ is the error itself where H = 0, up to H/λ: a bound that is not is one too many."""
    model, tasks = regression(1)
    flat_tasks = Task((1e-4 * tasks.support[0], tasks.support[1]), tasks.query)
    with torch.no_grad():
        model.bias.zero_()
    lam = torch.full((DIMENSION + 1,), 1e4, dtype=D)
    learner = IMAML(
        model,
        nn.functional.mse_loss,
        inner_solver=NewtonCG(tol=1e-9),
        linear_solver=lambda A, b: 0.9 * b / 1e4,
        regularization=1e4,
        delta_prime=1e-9,
    )
    with pytest.warns(idf.ConvergenceWarning):
        _, of_g, report, _ = errors(learner, flat_tasks, lam)
    assert float(of_g) == pytest.approx(report["delta_prime"], rel=1e-3)
    assert report["delta_prime_missed"] == 1


class UsesItsToleranceUp(idf.LinearSolver):
    """Leaves a residual of just the norm that it may, along a given direction."""

    def __init__(self, direction: Tensor) -> None:
        super().__init__()
        self.direction = direction

    def solve(self, A: idf.LinearOperator, b: Tensor, x0: Tensor | None = None) -> idf.LinearSolution:
        left = 0.999 * max(self.atol, self.rtol * float(b.norm())) * self.direction
        solution = idf.Dense(rtol=1e-12).solve(A, b - left)
        norm = left.norm() / b.norm()
        info = replace(solution.info, residual_norm=norm, converged=norm < 1, status=torch.tensor(0))
        return idf.LinearSolution(solution.value, info)


def test_the_threshold_holds_where_unequal_strengths_enlarge_the_residual() -> None:
    """‖Λ (H + Λ)⁻¹ t‖ is (1 + ε) / 2√ε for Λ = diag(ε, 1), t = (1, √ε) and a large H across t (Kantorovich)."""
    epsilon, delta_prime = 1e-2, 1e-3
    across, t = torch.tensor([0.1, -1.0], dtype=D), torch.tensor([1.0, 0.1], dtype=D) / 1.01**0.5
    torch.manual_seed(0)
    model, lam = nn.Linear(2, 1, bias=False, dtype=D), torch.tensor([epsilon, 1.0], dtype=D)
    support, query = (1e3 * across.reshape(1, 2), torch.ones(1, 1, dtype=D)), (torch.eye(2, dtype=D), torch.zeros(2, 1))
    learner = IMAML(
        model,
        nn.functional.mse_loss,
        inner_solver=NewtonCG(tol=1e-9),
        linear_solver=UsesItsToleranceUp(t),
        regularization={"weight": lam.reshape(1, 2)},
        delta_prime=delta_prime,
    )
    task = Task(support, (query[0], query[1].double()))
    learner.meta_loss([task]).backward()
    phi = flat(learner.adapt(support))
    H = 2e6 * torch.outer(across, across)
    g = lam * torch.linalg.solve(H + torch.diag(lam), phi)  # v = φ for these queries
    error = float((model.weight.grad.flatten() - g).norm())
    assert 0.4 * delta_prime < error <= learner.report()["delta_prime"] <= delta_prime


def test_a_limit_of_iterations_stays_one_and_is_reported() -> None:
    model, tasks = regression(4)
    inner = GradientDescent(0.1, max_iterations=3, tol=1e9, on_failure="ignore")
    linear = idf.CG(rtol=1e9, max_iterations=2, on_failure="ignore")
    learner = IMAML(
        model,
        nn.functional.mse_loss,
        inner_solver=inner,
        linear_solver=linear,
        regularization=1.0,
        delta=1e-6,
        delta_prime=1e-6,
    )
    of_phi, of_g, report, steps = errors(learner, tasks, LAMBDAS["scalar"])
    assert steps == {"forward": 12, "backward": 8}
    assert report["delta_missed"] == report["delta_prime_missed"] == 1
    assert 1e-6 < float(of_phi.mean()) <= report["delta"]
    assert 1e-6 < float(of_g) <= report["delta_prime"]
    assert (inner.tol, linear.rtol, linear.atol) == (1e9, 1e9, 0.0)  # what the user gave is not touched


def test_without_thresholds_the_solvers_keep_theirs_and_the_accuracy_is_reported() -> None:
    model, tasks = regression(4)
    learner = IMAML(
        model,
        nn.functional.mse_loss,
        inner_solver=LBFGS(tol=1e-3),
        linear_solver=idf.CG(rtol=1e-2),
        regularization=1.0,
    )
    assert learner.report() == {}
    learner.meta_loss(tasks)
    assert learner.report().keys() == {"delta"}
    of_phi, of_g, report, _ = errors(learner, tasks, LAMBDAS["scalar"])
    assert report.keys() == {"delta", "delta_prime"}
    assert float(of_phi.mean()) <= report["delta"] <= 1e-3
    assert float(of_g) <= report["delta_prime"]


def test_a_learned_regularization_moves_the_tolerances_with_it() -> None:
    model, tasks = regression(3)
    regularization = LearnedRegularization(model, 1.0, per="parameter")
    learner = IMAML(
        model,
        nn.functional.mse_loss,
        regularization=regularization,
        linear_solver=idf.CG(),
        delta=1e-4,
        delta_prime=1e-4,
    )
    for logarithms in ((-1.0, 0.5), (1.5, -3.0)):
        for p, value in zip(regularization.logarithms, logarithms, strict=True):
            nn.init.constant_(p, value)
        of_phi, of_g, report, _ = errors(learner, tasks, flat(regularization()))
        assert float(of_phi.max()) <= 1e-4
        assert float(of_phi.mean()) <= report["delta"] <= 1e-4
        assert float(of_g) <= report["delta_prime"] <= 1e-4


@pytest.mark.parametrize("linear_solver", [idf.CG(on_failure="ignore"), idf.MINRES()], ids=repr)
def test_negative_curvature_counts_as_missed(linear_solver: idf.LinearSolver) -> None:
    """A loss that is concave where it is solved: the solves may end, the bounds are not valid."""
    model, tasks = regression(2)
    concave = lambda outputs, targets: -((outputs - targets) ** 2).mean()  # noqa: E731
    learner = IMAML(
        model,
        concave,
        inner_solver=lambda problem, x0: x0,
        linear_solver=linear_solver,
        regularization=1e-3,
        delta_prime=1e-6,
    )
    learner.meta_loss(tasks).backward()
    assert learner.report()["delta_prime_missed"] == 1


def test_under_a_transform_the_threshold_is_the_same() -> None:
    model, tasks = regression(4)
    learner = IMAML(
        model, nn.functional.mse_loss, linear_solver=idf.CG(), regularization=1.0, delta=1e-9, delta_prime=1e-3
    )
    learner.meta_loss(tasks).backward()
    want = learner.report()
    theta = {f"model.{n}": p.detach() for n, p in model.named_parameters()}

    def meta_loss(theta: dict[str, Tensor]) -> Tensor:
        return functional_call(Whole(learner), {f"learner.{n}": p for n, p in theta.items()}, (tasks,))

    found = torch.func.grad(meta_loss)(theta)
    torch.testing.assert_close(learner.report(), want, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(flat(found), flat({n: p.grad for n, p in model.named_parameters()}), rtol=1e-9, atol=0.0)


class Whole(nn.Module):
    def __init__(self, learner: IMAML) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, tasks: Task) -> Tensor:
        return self.learner.meta_loss(tasks)


def test_mistakes_are_named() -> None:
    model, mse = nn.Linear(2, 1), nn.functional.mse_loss
    with pytest.raises(ValueError, match="delta is 0"):
        IMAML(model, mse, delta=0.0)
    with pytest.raises(ValueError, match="delta_prime is -1"):
        IMAML(model, mse, delta_prime=-1.0)
    with pytest.raises(ValueError, match="delta needs an inner solver with a tolerance"):
        IMAML(model, mse, delta=1e-3, inner_solver=lambda problem, x0: x0)
