"""What a type checker tells users of the library: a module of theirs, in which mypy --strict refuses some lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is what is asked")

ROOT = Path(__file__).parents[1]
MODULE = '''
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from typing_extensions import assert_type

import implicitdiff as idf
from implicitdiff.conditions import Condition
from implicitdiff.inner_solvers import LBFGS, GradientDescent, InnerProblem, Newton
from implicitdiff.linear_solvers import System
from implicitdiff.operators import DenseOperator, Structure
from implicitdiff.preconditioners import Jacobi, Preconditioner

t, A = torch.ones(2), DenseOperator(torch.eye(2))


def residual(x: Tensor, y: Tensor) -> Tensor:
    return x * x - y


# ---------------------------------------------------------------- a wrapped solver keeps its signature
@idf.implicit(idf.Root(residual), linear_solver=idf.CG())
def square_root(init: Tensor | None, y: Tensor, steps: int = 3) -> Tensor:
    return y.sqrt()


@idf.implicit(idf.Root(residual), has_aux=True)
def with_steps(init: None, y: Tensor) -> tuple[Tensor, int]:
    return y.sqrt(), 0


assert_type(square_root(None, t, steps=2), Tensor)
assert_type(with_steps(None, t), tuple[Tensor, int])
assert_type(square_root.condition, Condition)
square_root(None)  # refused
square_root(None, t, stepz=2)  # refused
square_root(None, "t")  # refused
idf.implicit(residual)  # refused
assert_type(idf.attach(idf.Root(residual), {"a": t}, t), dict[str, Tensor])


# ---------------------------------------------------------------- solvers: an object or a function
def by_cholesky(A: idf.LinearOperator, b: Tensor) -> Tensor:
    return torch.cholesky_solve(b.unsqueeze(-1), torch.linalg.cholesky(A.to_dense())).squeeze(-1)


def one_step(problem: InnerProblem, x0: Tensor) -> Tensor:
    return x0 - problem.gradient(x0)


idf.RootLayer(residual, inner_solver=Newton(linear_solver=by_cholesky), linear_solver=by_cholesky)
idf.RootLayer(residual, inner_solver=lambda problem, x0: x0 - problem.residual(x0))
idf.FixedPointLayer(residual, inner_solver=one_step, linear_solver=idf.Dense())
idf.ArgminLayer(residual, inner_solver=LBFGS(), linear_solver=None)
idf.RootLayer(residual, inner_solver=LBFGS)  # refused
idf.RootLayer(residual, linear_solver="cg")  # refused
idf.ArgminLayer(residual, linear_solver=idf.CG)  # refused
idf.ArgminLayer(residual, inner_solver=GradientDescent)  # refused
idf.FixedPointLayer(residual, inner_solver=idf.CG())  # refused
idf.LeastSquaresLayer(residual, inner_solver=by_cholesky)  # refused
idf.DEQ(residual, linear_solver=one_step)  # refused
idf.SinkhornLayer(0.1, inner_solver="newton")  # refused
idf.QPLayer(linear_solver=idf.Dense)  # refused
idf.attach(idf.Root(residual), t, t, linear_solver="cg")  # refused
idf.implicit(idf.Root(residual), linear_solver=idf.CG)  # refused
Newton(linear_solver="dense")  # refused

# ---------------------------------------------------------------- operators, and what layers and solvers return
assert_type(A @ t, Tensor)
assert_type(A @ A, idf.LinearOperator)
A @ 3.0  # refused
assert_type(idf.QPLayer()(torch.eye(2), t), Tensor)
assert_type(idf.SinkhornLayer(0.1)(torch.eye(2), t, t), Tensor)
idf.QPLayer()(torch.eye(2))  # refused
assert_type(idf.RootLayer(residual).solve(t, t).forward.statuses, list[idf.Status])
assert_type(idf.CG()(A, t).value, Tensor)


# ---------------------------------------------------------------- conditions
class Annotated:
    structure: Structure = "symmetric"

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        return x - y


class Constant:
    structure: Final = "symmetric"

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        return x - y


class Unannotated:
    structure = "symmetric"

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        return x - y


class OfPoint(NamedTuple):
    structure: Structure

    def residual(self, x: Tensor) -> Tensor:
        return x


conditions: list[Condition] = [Annotated(), Constant(), OfPoint("general"), idf.Root(residual)]
idf.ArgminLayer(residual, condition=Annotated())
idf.attach(Unannotated(), t, t)  # refused
idf.attach(residual, t, t)  # refused


# ---------------------------------------------------------------- a linear solver with a setting of its own
class State(NamedTuple):
    x: Tensor
    residual: Tensor
    residual_norm: Tensor


class Richardson(idf.IterativeLinearSolver):
    def __init__(self, stepsize: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.stepsize = stepsize

    def start(self, A: System, b: Tensor, x0: Tensor | None) -> State:
        x = torch.zeros_like(b) if x0 is None else x0
        r = b - A @ x
        return State(x, r, torch.linalg.vector_norm(r, dim=-1))

    def step(self, A: System, state: State) -> State:
        r = state.residual - self.stepsize * (A @ state.residual)
        return State(state.x + self.stepsize * state.residual, r, torch.linalg.vector_norm(r, dim=-1))


jacobi: Preconditioner = Jacobi()
idf.RootLayer(residual, linear_solver=Richardson(0.1, rtol=1e-3, preconditioner=jacobi))
idf.CG(preconditioner=Jacobi)  # refused
'''


def test_mypy_refuses_the_marked_lines_alone(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    path = tmp_path / "module_of_a_user.py"
    path.write_text(MODULE)
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("mypy")  # as torch's own types take ten seconds, the first time
    # Silent, as for a package that is installed: its own lines are no concern of the user's.
    options = ["--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={cache}", "--no-pretty"]
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", *options, path.name],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    found = {int(line) for line in re.findall(r"^\S+\.py:(\d+): error:", ran.stdout, re.MULTILINE)}
    lines = MODULE.splitlines()
    refused = {i for i, line in enumerate(lines, 1) if line.endswith("# refused")}
    assert not found - refused, ran.stdout
    assert not (accepted := refused - found), "accepted: " + "; ".join(lines[i - 1] for i in sorted(accepted))
