"""What is seen where conditions, solvers, layers and reports are printed."""

from __future__ import annotations

import functools
import json
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import implicitdiff as idf
from implicitdiff import conditions, inner_solvers
from implicitdiff.cones import NonNegative


def fit(x: Tensor, y: Tensor) -> Tensor:
    return ((x - y) ** 2).sum()


def difference(x: Tensor, y: Tensor) -> Tensor:
    return x - y


def shrink(v: Tensor, stepsize: float, y: Tensor) -> Tensor:
    return v / 2


class Clip:
    def __call__(self, v: Tensor, y: Tensor) -> Tensor:
        return v.clamp(min=0)


def with_buffers() -> nn.Module:
    return nn.BatchNorm1d(2)


CONDITIONS = {
    "Root(residual=difference)": idf.Root(difference),
    "FixedPoint(update=BatchNorm1d)": idf.FixedPoint(with_buffers()),
    "Stationary(objective=fit)": idf.Stationary(functools.partial(fit, y=torch.ones(2))),
    "Stationary(objective=fit, chunks=('y', 0, 2))": idf.Stationary(fit, chunks=("y", 0, 2)),
    "Stationary(objective=LeastSquares(residual=difference))": idf.Stationary(idf.LeastSquares(difference)),
    "KKT(objective=fit, inequality=difference)": idf.KKT(fit, inequality=difference),
    "KKT(objective=fit, equality=difference)": idf.KKT(fit, equality=difference),
    "Newton(residual=difference)": conditions.Newton(difference),
    "ProximalGradient(objective=fit, prox=shrink, stepsize=0.5)": conditions.ProximalGradient(fit, shrink, 0.5),
    "ProjectedGradient(objective=fit, projection=Clip, stepsize=1.0)": conditions.ProjectedGradient(fit, Clip()),
    "BlockProximalGradient(objective=fit, proxes={'a': shrink}, stepsizes={'a': 0.5})": (
        conditions.BlockProximalGradient(fit, {"a": shrink}, {"a": 0.5})
    ),
    "MirrorDescent(objective=fit, projection=Clip, mirror_map=log, stepsize=1.0)": (
        conditions.MirrorDescent(fit, Clip(), torch.log)
    ),
    "ConicProgram(cones=(NonNegative(n=2),))": conditions.ConicProgram([NonNegative(2)]),
}


@pytest.mark.parametrize("text", CONDITIONS)
def test_a_condition_shows_its_functions_by_name(text: str) -> None:
    assert repr(CONDITIONS[text]) == text


def by_division(A: idf.LinearOperator, b: Tensor) -> Tensor:
    return b / 2


def one_step(problem: inner_solvers.InnerProblem, x0: Tensor) -> Tensor:
    return x0 - problem.residual(x0)


NEWTON = "Newton(max_iterations=100, on_failure='warn', linear_solver=Auto(rtol=1e-06, atol=0.0, on_failure='warn'))"
AUTO = "Auto(rtol=1e-06, atol=0.0, on_failure='warn')"


def test_a_layer_shows_its_function_and_its_solvers() -> None:
    assert repr(idf.RootLayer(difference)) == f"RootLayer(difference, inner_solver={NEWTON}, linear_solver={AUTO})"
    layer = idf.FixedPointLayer(difference, inner_solver=one_step, linear_solver=by_division)
    assert repr(layer) == "FixedPointLayer(difference, inner_solver=one_step, linear_solver=by_division)"
    layer = idf.RootLayer(difference, inner_solver=one_step, linear_solver=by_division, polish=True)
    assert repr(layer) == "RootLayer(difference, inner_solver=one_step and a Newton step, linear_solver=by_division)"
    assert repr(idf.LeastSquaresLayer(difference)).startswith("LeastSquaresLayer(difference, inner_solver=Levenberg")


def test_a_layer_shows_a_condition_that_was_given() -> None:
    solvers = {"inner_solver": one_step, "linear_solver": by_division}
    text = "ArgminLayer(fit, inner_solver=one_step, linear_solver=by_division"
    assert repr(idf.ArgminLayer(fit, **solvers)) == f"{text})"
    assert repr(idf.ArgminLayer(fit, condition=idf.Root(difference), **solvers)) == (
        f"{text}, condition=Root(residual=difference))"
    )


def test_a_module_in_a_layer_is_shown_once_as_its_child() -> None:
    layer = idf.FixedPointLayer(nn.Linear(2, 2), inner_solver=one_step, linear_solver=by_division)
    assert repr(layer) == (
        "FixedPointLayer(\n  inner_solver=one_step, linear_solver=by_division\n"
        "  (function): Linear(in_features=2, out_features=2, bias=True)\n)"
    )


def test_an_unrolled_layer_shows_what_it_unrolls() -> None:
    steps = inner_solvers.GradientDescent(stepsize=0.25, max_iterations=3)
    text = f"fit, inner_solver={steps!r}, truncate=2, checkpoint=True"
    assert repr(idf.UnrolledLayer(fit, steps, truncate=2, checkpoint=True)) == f"UnrolledLayer({text})"


def test_a_solver_shows_functions_among_its_settings_by_name() -> None:
    assert "preconditioner=by_hand" in repr(idf.CG(preconditioner=by_hand))
    assert "preconditioner=Jacobi(probes=32)" in repr(idf.CG(preconditioner=idf.preconditioners.Jacobi()))
    assert "proxes=[shrink]" in repr(inner_solvers.BlockCoordinateDescent([shrink]))
    assert "projection=Clip" in repr(inner_solvers.ProjectedGradient(Clip()))


def by_hand(A: idf.LinearOperator) -> Clip:
    return Clip()


# ------------------------------------------------------------------------------------------------ reports


def reports() -> tuple[idf.Solution, list[idf.SolveInfo]]:
    y = torch.tensor([4.0, 9.0], requires_grad=True)
    layer = idf.RootLayer(lambda x, y: 2 * x - y)
    with idf.record() as history:
        solution = layer.solve(torch.zeros(2), y)
        solution.value.sum().backward()
    return solution, history


def test_reports_are_their_summary() -> None:
    solution, history = reports()
    forward, backward = solution.forward, solution.backward
    assert str(forward) == forward.summary() == "Newton: 1 of 1 converged, 1 iteration, residual at most 0.0e+00"
    assert repr(forward) == f"SolveInfo({forward.summary()})"
    assert f"forward={forward!r}, backward={backward!r})" in repr(solution)
    assert [str(solve) for solve in history] == [f"forward: {forward}", f"backward: {backward}"]
    assert repr(history[0]) == f"RecordedSolve(kind='forward', info={forward!r})"


def info(iterations: list[int], statuses: list[idf.Status], matvecs: int, **more: bool) -> idf.SolveInfo:
    status = torch.tensor(list(map(int, statuses)), dtype=torch.int64)
    norm = torch.full_like(status, 0.5, dtype=torch.float64)
    converged = status == idf.Status.CONVERGED
    return idf.SolveInfo(torch.tensor(iterations), norm, converged, status, matvecs, "M", **more)


def test_a_summary_counts_what_there_is() -> None:
    good, bad, nan = idf.Status.CONVERGED, idf.Status.MAX_ITERATIONS, idf.Status.NON_FINITE
    assert info([0], [good], 3).summary() == "M: 1 of 1 converged, residual at most 5.0e-01, 3 products"
    assert info([1], [good], 1).summary() == "M: 1 of 1 converged, 1 iteration, residual at most 5.0e-01, 1 product"
    assert info([7, 2], [good] * 2, 0).summary() == "M: 2 of 2 converged, 7 iterations, residual at most 5.0e-01"
    assert info([7, 2, 3, 4], [nan, good, bad, bad], 0).summary() == (
        "M: 1 of 4 converged (MAX_ITERATIONS, NON_FINITE), 7 iterations, residual at most 5.0e-01"
    )
    assert info([0], [good], 0, judged=False).summary() == "M: 1 of 1 finite, residual at most 5.0e-01"
    assert info([], [], 0).summary() == "M: 0 of 0 converged, residual at most 0.0e+00"


def test_a_direct_solve_has_no_iterations_to_tell() -> None:
    A = idf.operators.DenseOperator(torch.eye(2))
    assert "iteration" not in idf.Dense()(A, torch.ones(2)).info.summary()
    assert ", 1 iteration, " in idf.CG()(A, torch.ones(2)).info.summary()


def test_a_status_prints_its_name_and_stays_a_number() -> None:
    status = idf.Status.MAX_ITERATIONS
    assert (str(status), f"{status}", f"{status:>15}") == ("MAX_ITERATIONS", "MAX_ITERATIONS", " MAX_ITERATIONS")
    assert status == 1
    assert json.dumps(status) == "1"
    assert bool(torch.tensor(1) == status)


def test_the_statuses_of_a_batch_by_name() -> None:
    all_of_them = list(idf.Status)
    shape = {"batch": torch.tensor(all_of_them), "one": torch.tensor(3), "grid": torch.tensor([[0, 1], [2, 5]])}
    found = {k: idf.SolveInfo(s, s, s == 0, s, 0, "M").statuses for k, s in shape.items()}
    assert found["batch"] == all_of_them
    assert found["one"] == [idf.Status.INDEFINITE]
    assert [status.name for status in found["grid"]] == ["CONVERGED", "MAX_ITERATIONS", "BREAKDOWN", "NON_FINITE"]


# ------------------------------------------------------------------------------------------------ modules


def test_the_version_is_that_of_the_package() -> None:
    assert idf.__version__[0].isdigit()


@pytest.mark.parametrize("module", [idf.bilevel, idf.cones, idf.preconditioners, idf.profile, idf.prox], ids=repr)
def test_completion_offers_public_names_alone(module: ModuleType) -> None:
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
