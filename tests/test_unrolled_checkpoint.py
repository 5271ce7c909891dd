"""UnrolledLayer(checkpoint=True): the derivatives of the steps, without their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

import implicitdiff as idf
from implicitdiff.inner_solvers import LBFGS, GradientDescent, InnerSolver, NonlinearCG, ProximalGradient

D = torch.float64
STEPS: dict[str, Any] = {"max_iterations": 5, "tol": 0.0, "on_failure": "ignore"}
SOLVERS: dict[str, InnerSolver] = {
    "fixed step": GradientDescent(0.1, **STEPS),
    "line search": GradientDescent(**STEPS),
    "nesterov": GradientDescent(0.05, 0.9, True, **STEPS),
    "lbfgs": LBFGS(**STEPS),
    "bounds": LBFGS(lower=-0.1, upper=0.3, **STEPS),
    "nonlinear cg": NonlinearCG(**STEPS),
    "proximal gradient": ProximalGradient(
        lambda v, s, *args: torch.sign(v) * (v.abs() - 0.05 * s).clamp(min=0), **STEPS
    ),
}


def objective(w: Tensor, t: Tensor, X: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    assert not labels.is_floating_point()  # a tensor that has no derivative goes through
    return (torch.tanh(X @ w) - y).square().mean() + 0.1 * ((w - t) ** 2).sum() + 0 * labels.sum()


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=D)  # noqa: E731
    return draw(4), draw(3, 8, 4), draw(3, 8), torch.arange(3)


def layers(
    function: Callable[..., Tensor], solver: InnerSolver, truncate: int | None = None
) -> list[idf.UnrolledLayer]:
    return [idf.UnrolledLayer(function, solver, truncate, checkpoint=c) for c in (False, True)]


def batched(layer: idf.UnrolledLayer, t: Tensor, X: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    return torch.func.vmap(lambda *each: layer(torch.zeros(4, dtype=D), t, *each))(X, y, labels)


def close(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("truncate", [None, 2])
@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_equal_those_without(name: str, truncate: int | None) -> None:
    t, X, y, labels = data()
    found = []
    for layer in layers(objective, SOLVERS[name], truncate):
        inputs = [v.clone().requires_grad_() for v in (t, X, y)]
        alone = layer(torch.zeros(4, dtype=D), inputs[0], inputs[1][0], inputs[2][0], labels[0])
        together = batched(layer, *inputs, labels)
        found.append([torch.autograd.grad(v.sin().sum(), inputs) for v in (alone, together)])
    close(found[1], found[0])


def test_early_stopping_and_reports_are_the_same() -> None:
    t, X, y, labels = data()
    reports, values = [], []
    for layer in layers(objective, GradientDescent(tol=1e-4)):
        solution = layer.solve(torch.zeros(4, dtype=D), t.requires_grad_(), X[0], y[0], labels[0])
        reports.append((solution.forward.iterations, solution.forward.residual_norm))
        values.append(torch.autograd.grad(solution.value.sum(), t)[0])
    close(reports[1], reports[0])
    close(values[1], values[0])


TRANSFORMS: dict[str, Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Any]] = {
    "grad": lambda f, t, X: torch.func.grad(f, (0, 1))(t, X),
    "jacrev": lambda f, t, X: torch.func.jacrev(lambda t, X: f(t, X) * torch.ones(2, dtype=D), (0, 1))(t, X),
    "vmap of grad": lambda f, t, X: torch.func.vmap(torch.func.grad(f, (0, 1)), (None, 0))(t, torch.stack([X, 2 * X])),
    "grad of grad": lambda f, t, X: torch.func.grad(lambda t: torch.func.grad(f, 1)(t, X).sin().sum())(t),
    "jacrev of jacrev": lambda f, t, X: torch.func.jacrev(torch.func.jacrev(f))(t, X),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name: str) -> None:
    t, X, y, labels = data()
    found = [
        TRANSFORMS[name](lambda t, X, layer=layer: batched(layer, t, X, y, labels).sin().sum(), t, X)
        for layer in layers(objective, SOLVERS["nesterov"])
    ]
    close(found[1], found[0])


def test_double_backward_is_right() -> None:
    t, X, y, labels = data()
    found = []
    for layer in layers(objective, SOLVERS["nesterov"]):
        inputs = [v.clone().requires_grad_() for v in (t, X)]
        first = torch.autograd.grad(batched(layer, *inputs, y, labels).sin().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.sin().sum() for g in first), inputs))
    close(found[1], found[0])


def test_captured_tensors_and_the_parameters_of_modules_get_gradients() -> None:
    t, X, y, _ = data()
    torch.manual_seed(0)
    scale, net = torch.tensor(1.3, dtype=D, requires_grad=True), nn.Linear(4, 4, dtype=D)

    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, w: Tensor, X: Tensor, y: Tensor) -> Tensor:
            return (torch.tanh(self.net(X) @ w) - scale * y).square().mean()

    wanted = [scale, *net.parameters()]
    found = []
    for layer in layers(Objective(), SOLVERS["line search"]):
        together = torch.func.vmap(lambda X, y, layer=layer: layer(t, X, y))(X, y)
        alone = layer(t, X[0], y[0])
        first = [torch.autograd.grad(v.sin().sum(), wanted, create_graph=True) for v in (together, alone)]
        second = torch.autograd.grad(sum(g.sin().sum() for g in first[0]), wanted)
        found.append([*first, second])
    close(found[1], found[0])


def test_a_branch_that_meets_other_tensors_on_the_way_is_refused() -> None:
    late = torch.tensor(2.0, dtype=D, requires_grad=True)
    layer = layers(
        lambda w, t: ((w - t) ** 2).sum() * (late if float(w.detach().sum()) > 0 else 1), SOLVERS["fixed step"]
    )[1]
    with pytest.raises(idf.ImplicitDiffError, match="uses other tensors at the end of the steps"):
        layer(torch.zeros(2, dtype=D), torch.ones(2, dtype=D, requires_grad=True))


def test_a_random_objective_is_found_out() -> None:
    layer = layers(lambda w, t: (nn.functional.dropout(w - t) ** 2).sum(), SOLVERS["fixed step"])[1]
    t = torch.ones(50, dtype=D, requires_grad=True)
    with pytest.raises(idf.ImplicitDiffError, match="another value when backward evaluated it again"):
        layer(torch.zeros(50, dtype=D), t).sum().backward()


def test_forward_mode_is_refused() -> None:
    layer = layers(lambda w, t: ((w - t) ** 2).sum(), SOLVERS["fixed step"])[1]
    t, init = torch.ones(2, dtype=D), torch.zeros(2, dtype=D)
    with pytest.raises(idf.ImplicitDiffError, match="no forward-mode derivative"):
        torch.func.jvp(lambda t: layer(init, t), (t,), (t,))
    with forward_ad.dual_level(), pytest.raises(idf.ImplicitDiffError, match="no forward-mode derivative"):
        layer(init, forward_ad.make_dual(t, t))


def bytes_of_graph(layer: idf.UnrolledLayer, n: int, m: int) -> int:
    """What torch's allocator has handed out in the forward pass and the graph still holds."""
    X, t, init = torch.randn(m, n, dtype=D), torch.ones(n, dtype=D, requires_grad=True), torch.zeros(n, dtype=D)
    layer(init, t, X)  # what is set up once is not counted
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        value = layer(init, t, X)
    assert value.requires_grad
    return sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")


def test_it_keeps_a_vector_a_step_and_nothing_of_the_evaluation() -> None:
    n, m, steps = 10, 1000, 20
    descent = GradientDescent(0.1, max_iterations=steps, tol=0.0, on_failure="ignore")
    objective = lambda w, t, X: torch.tanh(X @ w).square().mean() + ((w - t) ** 2).mean()  # noqa: E731
    plain, checkpointed = (bytes_of_graph(layer, n, m) for layer in layers(objective, descent))
    assert plain > steps * m * 8
    # A few vectors and numbers a step, each in a block of at least 64 bytes, are less than one vector of the data.
    assert checkpointed < steps * 5 * 128 < plain / 10
