"""The paper's table 1 and figure 2 in small: what is measured is right, the claims hold, mistakes make them fail."""

from __future__ import annotations

import csv
import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import implicitdiff as idf
from imaml import IMAML
from imaml.reproduce import ClaimError, figure2a, figure2b, table1
from imaml.reproduce.fits import Fit, line
from imaml.reproduce.measure import flops, peak_memory
from imaml.reproduce.regression import (
    Unrolled,
    exact_meta_gradient,
    gradient,
    hessian,
    meta_gradient,
    model_at,
    mse,
    solution,
)
from implicitdiff.inner_solvers import GradientDescent, NewtonCG

LAM = table1.REGULARIZATION


def test_gradients_and_products_cost_two_products_of_the_data_each() -> None:
    task, theta, _ = table1.problem(10.0, 0)
    X, y = task.support
    product = 2 * X.numel()
    model = model_at(theta)
    (slope,) = torch.autograd.grad(mse(model(X), y), model.weight, create_graph=True)
    assert flops(lambda: torch.autograd.grad(mse(model(X), y), model.weight)) == 2 * product
    assert flops(lambda: torch.autograd.grad(slope, model.weight, slope.detach(), retain_graph=True)) == 2 * product


def test_the_peak_counts_what_is_alive_at_one_time() -> None:
    def use() -> None:
        for _ in range(3):
            torch.zeros(1000)  # each is given back before the next
        keep = [torch.zeros(1000) for _ in range(5)]
        del keep

    assert peak_memory(use) == 5 * 4000


def test_the_peak_is_not_lowered_by_what_is_collected_meanwhile() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself, self.tensor = self, torch.zeros(3000)

    collects = iter([False, True])  # a first call is not measured

    def use() -> None:
        if next(collects):
            gc.collect()
        torch.zeros(1000)

    gc.disable()  # so that only the line above collects
    try:
        assert peak_memory(Cycle) == 12000
        assert peak_memory(use) == 4000
    finally:
        gc.enable()


def test_the_interval_of_a_slope() -> None:
    x, y = [0.0, 1.0, 2.0, 3.0], [0.1, 0.9, 2.2, 2.9]
    fit = line(x, y)
    slope, covariance = np.polyfit(x, y, 1, cov=True)
    assert fit.slope == pytest.approx(slope[0])
    assert fit.half_width == pytest.approx(stats.t.ppf(0.975, 2) * covariance[0, 0] ** 0.5)


@pytest.mark.parametrize("kappa", [10.0, 1000.0])
def test_problems_are_what_they_are_said_to_be(kappa: float) -> None:
    task, theta, _ = table1.problem(kappa, 3)
    eigenvalues = torch.linalg.eigvalsh(hessian(task.support[0])) + LAM
    assert eigenvalues[[0, -1]].tolist() == pytest.approx([1.0, kappa], rel=1e-10)
    phi = solution(task, theta, LAM)
    for value in ((phi - theta).norm(), gradient(phi, task.query).norm()):
        assert float(value) == pytest.approx(1.0, rel=1e-9)
    assert float((gradient(phi, task.support) + LAM * (phi - theta)).norm()) < 1e-9


def test_the_exact_meta_gradient_by_central_differences_and_by_the_learner() -> None:
    (task,) = figure2a.draw_tasks(1)
    theta = torch.linspace(-1, 1, figure2a.UNKNOWNS, dtype=torch.float64)

    def query_loss(theta: Tensor) -> Tensor:
        inputs, targets = task.query
        return mse(inputs @ solution(task, theta, LAM), targets.flatten())

    exact = exact_meta_gradient(task, theta, LAM)
    # The loss is quadratic in θ: the differences are exact but for rounding.
    around = [(query_loss(theta + e) - query_loss(theta - e)) / 2 for e in torch.eye(len(theta), dtype=torch.float64)]
    torch.testing.assert_close(torch.stack(around), exact, rtol=1e-9, atol=1e-9)
    learner = IMAML(
        model_at(theta), mse, inner_solver=NewtonCG(tol=1e-12), linear_solver=idf.CG(rtol=1e-13), regularization=LAM
    )
    torch.testing.assert_close(meta_gradient(learner, task), exact, rtol=1e-9, atol=1e-10)


def test_unrolled_steps_have_the_derivative_of_the_steps() -> None:
    """dφ_K/dθ = λA⁻¹ + (I − A/κ)ᴷ (I − λA⁻¹)."""
    task, theta, kappa = table1.problem(10.0, 1)
    learner = Unrolled(model_at(theta), GradientDescent(1 / kappa, max_iterations=7, tol=0.0, on_failure="ignore"), LAM)
    eye = torch.eye(len(theta), dtype=torch.float64)
    A = hessian(task.support[0]) + LAM * eye
    rest, limit = torch.linalg.matrix_power(eye - A / kappa, 7), LAM * torch.linalg.inv(A)
    phi = solution(task, theta, LAM) + rest @ (theta - solution(task, theta, LAM))
    want = (limit + rest @ (eye - limit)) @ gradient(phi, task.query)
    torch.testing.assert_close(meta_gradient(learner, task), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(table1.derivative_of_steps(table1.problem(10.0, 1), "MAML, GD", 7), want)


@pytest.fixture(scope="module")
def measurements() -> list[table1.Measurement]:
    return table1.sweep([10.0, 20.0, 30.0], [1e-3, 1e-5], seeds=1)


def test_table_1(measurements: list[table1.Measurement], tmp_path: Path) -> None:
    table1.report(measurements, tmp_path)  # checks the claims
    assert (tmp_path / "table1.png").stat().st_size > 10_000
    fits = json.loads((tmp_path / "table1.json").read_text())
    assert fits["MAML, GD"]["compute"]["slope"] == pytest.approx(1, abs=0.1)
    assert fits["iMAML"]["compute"]["slope"] == pytest.approx(0.5, abs=0.1)
    assert fits["MAML, GD"]["memory"]["slope"] == pytest.approx(1, abs=0.1)
    assert fits["iMAML"]["memory"]["slope"] == pytest.approx(0, abs=0.02)
    assert fits["iMAML"]["error"]["slope"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("name", "mistake", "words"),
    [
        ("MAML, Nesterov", "no momentum", r"MAML, Nesterov: compute ∝ κ\^0.5: κ\^\(0.9"),
        ("iMAML", "no momentum", r"iMAML: compute ∝ κ\^0.5"),
        ("iMAML", "three CG steps", r"iMAML: error ≤ 1.5 δ: .*; iMAML: error ∝ δ"),
    ],
)
def test_table_1_finds_mistakes(
    measurements: list[table1.Measurement],
    name: str,
    mistake: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if mistake == "no momentum":
        monkeypatch.setattr(table1, "accelerated", table1.descent)
    else:
        few = idf.CG(max_iterations=3, on_failure="ignore")
        monkeypatch.setattr(idf, "CG", lambda **settings: few)
    with pytest.raises(ClaimError, match=words):
        table1.report([remeasured(m) if m.algorithm == name else m for m in measurements], tmp_path)


def remeasured(old: table1.Measurement) -> table1.Measurement:
    """With the memory it had."""
    (algorithm,) = (a for a in table1.ALGORITHMS if a.name == old.algorithm)
    problem = table1.problem(old.kappa, old.seed)
    new = table1.measure(algorithm, problem, old.delta, old.seed, with_memory=False)
    return replace(new, memory=old.memory)


def test_table_1_finds_backpropagation_that_stops_early(measurements: list[table1.Measurement], tmp_path: Path) -> None:
    first, *others = measurements
    assert first.algorithm == "MAML, GD"
    early = table1.ALGORITHMS[0]._replace(learner=table1.truncated)
    wrong = table1.measure(early, table1.problem(first.kappa, first.seed), first.delta, first.seed, with_memory=False)
    with pytest.raises(ClaimError, match="MAML, GD: the exact derivative of its steps"):
        table1.report([replace(wrong, memory=first.memory), *others], tmp_path)


def test_figure_2a(tmp_path: Path) -> None:
    figure2a.run(tmp_path, quick=True)
    assert (tmp_path / "figure2a.png").stat().st_size > 10_000
    with (tmp_path / "figure2a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 7 * 10
    # The floor of two CG steps is that of the system, which dense algebra says as well.
    last = [r for r in rows if r["algorithm"] == "iMAML, 2 CG steps" and r["inner steps"] == "64"]
    got = [float(r["relative error"]) for r in last]
    want = []
    for task in figure2a.draw_tasks(10):
        theta = torch.zeros(figure2a.UNKNOWNS, dtype=torch.float64)
        g = exact_meta_gradient(task, theta, figure2a.REGULARIZATION)
        A = hessian(task.support[0]) / figure2a.REGULARIZATION + torch.eye(len(g), dtype=torch.float64)
        v = A @ g
        krylov = torch.stack([v, A @ v], 1)  # CG's second iterate is the Galerkin solution here
        best = krylov @ torch.linalg.solve(krylov.mT @ A @ krylov, krylov.mT @ v)
        want.append(float((best - g).norm() / g.norm()))
    assert got == pytest.approx(want, rel=1e-4)  # the inner solution is accurate to about 1e-7 after 64 steps


@pytest.mark.parametrize("mistake", ["5 CG steps are 2", "iMAML is MAML", "iMAML does not converge"])
def test_figure_2a_finds_mistakes(mistake: str) -> None:
    steps = np.arange(1, 65)
    falling, floor = 0.7 ** steps[:, None], np.full((64, 1), 0.1)
    errors = {"MAML": falling, "two": 0.5 * falling + floor, "five": 0.5 * falling, "ten": 0.5 * falling}
    assert all(claim.holds for claim in figure2a.claims(errors))
    wrong = {
        "5 CG steps are 2": {"five": errors["two"]},
        "iMAML is MAML": {"five": falling, "ten": falling},
        "iMAML does not converge": {"five": 0.5 * falling + 1e-4, "ten": 0.5 * falling + 1e-4},
    }
    assert not all(claim.holds for claim in figure2a.claims(errors | wrong[mistake]))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> figure2b.Size:
    size = figure2b.Size([1, 2, 4], shots=1, queries=1, filters=8, repeats=1)
    monkeypatch.setattr(figure2b, "QUICK", size)
    return size


def test_figure_2b_is_resumed_cell_by_cell(
    small: figure2b.Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, measured = figure2b.measure, []

    def interrupted(size: figure2b.Size, steps: int) -> figure2b.Cell:
        if steps == 4 and len(measured) == 2:
            measured.append(0)
            raise KeyboardInterrupt
        measured.append(steps)
        return measure(size, steps)

    monkeypatch.setattr(figure2b, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        figure2b.run(tmp_path, quick=True)
    figure2b.run(tmp_path, quick=True)  # checks the claims on memory
    figure2b.run(tmp_path, quick=True)
    assert measured == [1, 2, 0, 4]
    assert (tmp_path / "figure2b.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "figure2b.json").read_text())
    assert set(content["cells"]) == {"1", "2", "4"}
    assert set(content["cells"]["4"]) == set(figure2b.ALGORITHMS)
    monkeypatch.setattr(figure2b, "QUICK", small._replace(repeats=2))
    with pytest.raises(ValueError, match="choose another --out"):
        figure2b.run(tmp_path, quick=True)


def cells(**bytes_of: tuple[float, float]) -> dict[int, figure2b.Cell]:
    """Memory and time a + b · steps for each algorithm, which takes (a, b)."""
    lines = {"iMAML": (80, 0.0), "MAML": (40, 25.0), "MAML, checkpointed": (40, 1.0), "first-order MAML": (30, 0.0)}
    lines |= {name.replace("_", " "): value for name, value in bytes_of.items()}
    return {
        k: {
            n: {"bytes": figure2b.MIB * (a + b * k), "seconds": [(a + b * k + k) / 10], "cg_steps": 5}
            for n, (a, b) in lines.items()
        }
        for k in (1, 2, 4, 8, 16)
    }


def failed(measured: dict[int, figure2b.Cell]) -> list[str]:
    growths = {name: figure2b.growth(measured, name) for name in figure2b.ALGORITHMS}
    return [claim.sentence for claim in figure2b.claims(measured, growths) if not claim.holds]


def test_figure_2b_finds_mistakes() -> None:
    assert failed(cells()) == []
    assert failed(cells(iMAML=(80, 1.0))) == ["iMAML: memory is flat"]
    assert failed(cells(iMAML=(1000, 0.0))) == ["iMAML needs less memory than MAML"]
    flat = failed(cells(MAML=(80, 0.1)))
    assert "iMAML's time grows slower than MAML's" in flat
    assert "checkpointing saves memory of MAML" in flat


def test_lines_cross_where_they_do() -> None:
    ours, theirs = (Fit(slope, 0.0, intercept, 1.0) for slope, intercept in ((1.0, 10.0), (3.0, 2.0)))
    assert figure2b.crossing(ours, theirs) == 4.0
    assert figure2b.crossing(theirs, ours) == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("command", [table1, figure2a, figure2b], ids=lambda m: m.__name__.rpartition(".")[2])
def test_quick_runs(command: object, tmp_path: Path) -> None:
    command.run(tmp_path, quick=True)  # type: ignore[attr-defined]
