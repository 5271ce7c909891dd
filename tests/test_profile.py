"""The profile of implicit layers, by a clock that only the problems' own code moves: every time is known exactly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff import _timing, info, profile
from implicitdiff.inner_solvers import Newton
from implicitdiff.operators import FunctionOperator, LinearOperator
from implicitdiff.profile import Profile, Solves
from implicitdiff.profile.__main__ import main

D = torch.float64
Y = torch.tensor([4.0, 9.0], dtype=D)
START = torch.ones(2, dtype=D)


class Clock:
    """Counts the seconds that :meth:`work` is said to take."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def work(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(profile, "perf_counter", clock)
    return clock


class _Slow(torch.autograd.Function):
    """The identity, whose evaluation and whose derivative take so many seconds."""

    @staticmethod
    def forward(x: Tensor, clock: Clock, forward: float, backward: float) -> Tensor:
        clock.work(forward)
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.clock, ctx.seconds = inputs[1], inputs[3]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return _Slow.apply(g, ctx.clock, ctx.seconds, ctx.seconds), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *rest: None) -> Tensor:
        return _Slow.apply(tangent, ctx.clock, ctx.seconds, ctx.seconds)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *rest: Any) -> tuple[Tensor, int | None]:
        return _Slow.apply(x, *rest), in_dims[0]


def slow_residual(clock: Clock) -> Callable[[Tensor, Tensor], Tensor]:
    """x² − y: 1 second to evaluate, 7 for a product with A, 11 for one with B."""
    return lambda x, y: _Slow.apply(x * x, clock, 1, 7) - _Slow.apply(y, clock, 0, 11)


def seconds(solves: Solves) -> dict[str, float]:
    return {part: timed.seconds for part, timed in solves.parts.items() if timed.seconds}


def calls(solves: Solves) -> dict[str, int]:
    return {part: timed.calls for part, timed in solves.parts.items()}


def one(profile: Profile, kind: str) -> Solves:
    (solves,) = [solves for solves in profile.solves if solves.kind == kind]
    return solves


def nobody_measures() -> bool:
    return not _timing.watchers and not info.histories


# ------------------------------------------------------------------------------------------------------------ the parts


def sqrt_layer(clock: Clock) -> idf.RootLayer:
    """Square roots by an inner and a linear solver that take 5 and 13 seconds, and evaluate three times and twice."""

    def by_torch(problem: Any, x0: Tensor) -> Tensor:
        for _ in range(3):
            problem.residual(x0)
        clock.work(5)
        return Y.sqrt()

    def by_division(A: LinearOperator, b: Tensor) -> Tensor:
        clock.work(13)
        assert torch.equal(A(b), A(b))
        return b / (2 * Y.sqrt())

    return idf.RootLayer(slow_residual(clock), inner_solver=by_torch, linear_solver=by_division)


def test_the_parts_of_a_layer_and_of_its_derivative(clock: Clock) -> None:
    layer, y = sqrt_layer(clock), Y.clone().requires_grad_()
    with Profile() as profile:
        clock.work(100)
        x = layer(START, y).sum()
        clock.work(100)
        x.backward()
    forward, backward = profile.solves
    assert (forward.kind, forward.method, forward.count) == ("forward", "by_torch", 1)
    # The fourth evaluation is that of the report.
    assert seconds(forward) == {"captured tensors": 1, "inner solver": 5, "evaluations": 4}
    assert {"captured tensors": 1, "evaluations": 4}.items() < calls(forward).items()
    assert (backward.kind, backward.method, backward.count) == ("backward", "by_division", 1)
    # The third product is that of the report.
    assert seconds(backward) == {"building A": 1, "linear solver": 13, "products": 21, "args product": 11}
    assert calls(backward)["products"] == 3
    assert profile.seconds == forward.seconds + backward.seconds == 10 + 46
    assert profile.wall_seconds == 200 + 56
    torch.testing.assert_close(y.grad, 1 / (2 * Y.sqrt()))


@pytest.mark.parametrize(
    "evaluate", ["objective", "gradient", "value_and_gradient", "residual", "apply", "least squares"]
)
def test_every_way_to_evaluate(clock: Clock, evaluate: str) -> None:
    """One second each, whatever is asked for; the second one is that of the report."""
    how: dict[str, Callable[[Any, Tensor], Any]] = {
        "apply": lambda problem, x: problem.apply(residual, x),
        "least squares": lambda problem, x: problem.least_squares_residual(x),
    }

    def residual(x: Tensor) -> Tensor:
        clock.work(1)
        return x - Y

    def solver(problem: Any, x0: Tensor) -> Tensor:
        how.get(evaluate, lambda problem, x: getattr(problem, evaluate)(x))(problem, x0)
        return Y

    with Profile() as profile, torch.no_grad():
        idf.ArgminLayer(idf.LeastSquares(residual), inner_solver=solver)(START)
    evaluations = one(profile, "forward").parts["evaluations"]
    assert (evaluations.calls, evaluations.seconds, profile.seconds) == (2, 2, 2)


@pytest.mark.parametrize("structure", ["symmetric", "chunked", "general"])
@pytest.mark.parametrize("kind", ["backward", "tangent"])
def test_a_linear_solver_of_the_user_s_takes_products_from_the_operator_itself(structure: str, kind: str) -> None:
    def objective(x: Tensor, data: Tensor) -> Tensor:
        return ((x - data) ** 2 / 2).mean(0).sum()

    def solver(A: LinearOperator, b: Tensor) -> Tensor:
        return A(A.to_dense() @ A(b))  # A is the identity

    condition: Any = {
        "symmetric": idf.Stationary(objective),
        "chunked": idf.Stationary(objective, chunks=(0, 0, 2)),
        "general": idf.Root(lambda x, data: x - data.mean(0)),
    }[structure]
    data = torch.stack([Y - 1, Y + 1])
    with Profile() as profile:
        solution = lambda data: idf.attach(condition, Y, data, linear_solver=solver)  # noqa: E731
        if kind == "backward":
            torch.autograd.functional.vjp(solution, data, torch.ones_like(Y))
        else:
            torch.func.jvp(solution, (data,), (torch.ones_like(data),))
    # Whether what was attached is a solution takes a solve of its own here. The third product is that of the report.
    solves = 2 if (kind, structure) == ("tangent", "general") else 1
    expected = {"matrix of A": solves, "products": 3 * solves, "args product": 1}
    assert expected.items() < calls(one(profile, kind)).items()


def test_the_longest_call(clock: Clock) -> None:
    lengths = iter([3.0, 1.0, 2.0, 0.0])

    def residual(x: Tensor) -> Tensor:
        clock.work(next(lengths, 0.0))
        return x - 1

    with Profile() as profile, torch.no_grad():
        for _ in range(3):
            idf.attach(idf.Root(residual), START)
    timed = one(profile, "forward").parts["evaluations"]
    assert (timed.calls, timed.seconds, timed.longest) == (3, 6, 3)


class _State(NamedTuple):
    x: Tensor
    residual: Tensor
    residual_norm: Tensor


class _Richardson(idf.IterativeLinearSolver):
    clock: Clock

    def start(self, A: Any, b: Tensor, x0: Tensor | None) -> _State:
        x = torch.zeros_like(b) if x0 is None else x0
        r = b - A(x)
        return _State(x, r, torch.linalg.vector_norm(r, dim=-1))

    def step(self, A: Any, state: _State) -> _State:
        self.clock.work(4)
        d = A.precondition(state.residual)
        r = state.residual - A(d)
        return _State(state.x + d, r, torch.linalg.vector_norm(r, dim=-1))


def test_the_parts_of_a_linear_solver_that_is_called_directly(clock: Clock) -> None:
    def matvec(v: Tensor) -> Tensor:
        clock.work(2)
        return torch.tensor([1.0, 2.0, 4.0], dtype=D) * v

    def preconditioner(A: LinearOperator) -> Callable[[Tensor], Tensor]:
        A(torch.ones(3, dtype=D))  # its products are its own time

        def apply(v: Tensor) -> Tensor:
            clock.work(3)
            return v / 3

        return apply

    solver = _Richardson(preconditioner=preconditioner)
    solver.clock = clock
    A = FunctionOperator(matvec, 3, structure="positive_definite")
    with Profile() as profile:
        found = solver(A, torch.ones(3, dtype=D)).info
    (solves,) = profile.solves
    steps = int(found.iterations)
    assert steps > 3
    assert (solves.kind, solves.method, solves.count, solves.iterations) == ("linear", "_Richardson", 1, steps)
    assert seconds(solves) == {
        "captured tensors": 2,
        "preconditioner": 2 + 3 * steps,
        "products": 2 * (steps + 2),  # the start's, and that of the true residual
        "linear solver": 4 * steps,
    }
    assert calls(solves)["products"] == found.matvecs - 1  # all but the preconditioner's


def test_the_matrix_of_a_small_system(clock: Clock) -> None:
    """It is one part, whatever the products that it takes."""
    layer, y = idf.RootLayer(slow_residual(clock), linear_solver=idf.Dense()), Y.clone().requires_grad_()
    x = layer(START, y).sum()
    with Profile() as profile:
        x.backward()
    (backward,) = profile.solves
    matrix = backward.parts["matrix of A"]
    assert (matrix.calls, matrix.seconds) == (1, 7)  # one sweep for all rows
    assert "products" not in backward.parts  # the true residual is that of the matrix


def test_the_products_of_an_operator_of_the_user_s(clock: Clock) -> None:
    def product(v: Tensor) -> Tensor:
        clock.work(2)
        return 3 * v

    A = FunctionOperator(product, 2, rmatvec=product, dtype=D)
    for solver in (idf.LSMR(), idf.Dense()):
        with Profile() as profile, torch.no_grad():
            found = solver(A, Y)
        (solves,) = profile.solves
        matrix = calls(solves).get("matrix of A", 0)
        assert matrix == (1 if isinstance(solver, idf.Dense) else 0)
        assert calls(solves).get("products", 0) + 2 * matrix == found.info.matvecs >= 2
        taken = seconds(solves).get("products", 0.0) + 4 * matrix
        assert sum(seconds(solves).values()) == taken == 2 * found.info.matvecs


def test_a_newton_solver_s_systems_are_parts_of_the_forward_solve(clock: Clock) -> None:
    layer = idf.RootLayer(slow_residual(clock), inner_solver=Newton(idf.GMRES()))
    with Profile() as profile, torch.no_grad():
        solution = layer.solve(START, Y)
    (forward,) = profile.solves
    steps = int(solution.forward.iterations)
    assert (forward.kind, forward.method, forward.iterations) == ("forward", "Newton", steps)
    assert calls(forward)["building A"] == forward.parts["building A"].seconds == steps > 2
    assert calls(forward)["products"] > steps
    assert forward.seconds == clock.seconds


def test_the_solver_that_polish_calls_is_a_part_too(clock: Clock) -> None:
    layer = idf.RootLayer(slow_residual(clock), polish=True)
    with Profile() as profile, torch.no_grad():
        layer(START, Y)
    (forward,) = profile.solves
    assert (forward.kind, forward.method, forward.count) == ("forward", "Newton", 1)
    assert "linear solver" in forward.parts
    assert forward.seconds == clock.seconds


# ------------------------------------------------------------------------------------------------- kinds and transforms


def test_solves_of_one_kind_and_method_are_summed() -> None:
    layer = idf.RootLayer(lambda x, y: x**2 - y)
    with Profile() as profile, idf.record() as history:
        for _ in range(3):
            y = torch.stack([Y, 100 * Y]).requires_grad_()
            torch.func.vmap(lambda y: layer(START, y))(y).sum().backward()
    assert [(s.kind, s.method, s.count) for s in profile.solves] == [
        ("forward", "Newton", 3),
        ("backward", "Auto: Dense", 3),
    ]
    most = [int(solve.iterations.max()) for solve in history if solve.kind == "forward"]
    least = [int(solve.iterations.min()) for solve in history if solve.kind == "forward"]
    assert profile.solves[0].iterations == sum(most) > sum(least)


@pytest.mark.parametrize(
    ("transform", "want", "kinds"),
    [
        (lambda f: torch.func.jvp(f, (Y,), (torch.ones_like(Y),))[1], 0.5 * Y**-0.5, {"tangent": 1}),
        (lambda f: torch.func.jacrev(f)(Y).diagonal(), 0.5 * Y**-0.5, {"backward": 1}),
        (lambda f: torch.func.jacfwd(torch.func.jacrev(lambda y: f(y).sum()))(Y).diagonal(), -0.25 * Y**-1.5, None),
        (lambda f: torch.func.vmap(torch.func.grad(lambda y: f(y).sum()))(Y[None])[0], 0.5 * Y**-0.5, {"backward": 1}),
    ],
    ids=["jvp", "jacrev", "hessian", "vmap grad"],
)
def test_transforms(clock: Clock, transform: Any, want: Tensor, kinds: dict[str, int] | None) -> None:
    """The same derivative as ever, every second counted once."""
    layer = idf.RootLayer(slow_residual(clock), inner_solver=Newton(tol=1e-14))
    with Profile() as profile, idf.record() as history:
        found = transform(lambda y: layer(START, y))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=0)
    # torch itself differentiates through the layers' own Functions, so not all of the time is theirs.
    assert profile.seconds == clock.seconds
    for kind in {solve.kind for solve in history}:
        assert sum(s.count for s in profile.solves if s.kind == kind) == sum(h.kind == kind for h in history)
    assert all(s.parts["args product"].seconds for s in profile.solves if s.kind in ("backward", "tangent"))
    if kinds is not None:
        assert {s.kind: s.count for s in profile.solves} == {"forward": 1, **kinds}
    assert nobody_measures()


def test_a_layer_in_the_function_of_a_layer_is_counted_once(clock: Clock) -> None:
    inner = idf.RootLayer(slow_residual(clock), inner_solver=Newton(), linear_solver=idf.GMRES())

    def outer_residual(x: Tensor, y: Tensor) -> Tensor:
        clock.work(1000)
        return inner(START, y + 0 * x) - x

    outer = idf.RootLayer(outer_residual, inner_solver=idf.inner_solvers.Anderson(), linear_solver=idf.OneStep())
    y = Y.clone().requires_grad_()
    with Profile() as profile:
        outer(START, y).sum().backward()
    by_method = {(s.kind, s.method): s for s in profile.solves}
    assert {("forward", "Anderson"), ("forward", "Newton"), ("backward", "OneStep")} < set(by_method)
    evaluations = by_method["forward", "Anderson"].parts["evaluations"]
    assert evaluations.seconds == 1000 * evaluations.calls  # and nothing of the inner layer
    assert by_method["forward", "Newton"].count > evaluations.calls
    assert profile.seconds == profile.wall_seconds == clock.seconds


def test_layers_on_two_threads_at_a_time(clock: Clock) -> None:
    """The second one runs while the first one evaluates its function, and is no part of it."""
    met, done = threading.Event(), threading.Event()

    def waiting(x: Tensor) -> Tensor:
        met.set()
        assert done.wait(60)
        return x - 1

    def working(x: Tensor) -> Tensor:
        clock.work(3)
        return x - 1

    def attach(residual: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            idf.attach(idf.Root(residual), START)

    with Profile() as profile:
        thread = threading.Thread(target=attach, args=(waiting,))
        thread.start()
        assert met.wait(60)
        attach(working)
        done.set()
        thread.join()
    (solves,) = profile.solves
    assert (solves.count, seconds(solves)) == (2, {"evaluations": 3 + 3})


# --------------------------------------------------------------------------------------------- errors, and nothing left


def test_an_error_in_the_function_leaves_nothing_open(clock: Clock) -> None:
    def residual(x: Tensor) -> Tensor:
        clock.work(2)
        raise RuntimeError("no value there")

    measured = Profile()
    with pytest.raises(RuntimeError, match="no value there"), measured:
        idf.RootLayer(residual)(START)
    assert nobody_measures()
    (solves,) = measured.solves
    assert (solves.kind, solves.method, solves.count, solves.seconds) == ("unfinished", "", 0, 2)
    with measured:  # opened again, it starts from the outside of all layers
        idf.attach(idf.Root(lambda x: x - 1), START)
    assert [s.kind for s in measured.solves] == ["forward", "unfinished"]
    assert calls(measured.solves[0])["layer"] == 1
    assert "unfinished, 0 solves" in str(measured)


def test_a_solve_that_raises_by_its_policy_is_reported() -> None:
    solver = Newton(max_iterations=1, on_failure="raise")
    measured = Profile()
    with pytest.raises(idf.ConvergenceError), measured:
        idf.RootLayer(lambda x, y: x**2 - y, inner_solver=solver)(START, Y)
    assert [(s.kind, s.method, s.count, s.iterations) for s in measured.solves] == [("forward", "Newton", 1, 1)]


def test_no_clock_is_asked_unless_somebody_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock() -> float:
        raise AssertionError

    monkeypatch.setattr(profile, "perf_counter", clock)
    monkeypatch.setattr(torch.cuda, "synchronize", clock)
    y = Y.clone().requires_grad_()
    idf.RootLayer(lambda x, y: x**2 - y)(START, y).sum().backward()
    assert nobody_measures()


def test_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Its work, of 2 seconds here, belongs to the part that gave it, wherever somebody waits for it."""
    capturing, queued = False, 0

    def synchronize() -> None:
        nonlocal queued
        assert not capturing
        clock.work(queued)
        queued = 0

    def residual(x: Tensor) -> Tensor:
        nonlocal queued
        queued += 2
        return x - 1

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with Profile() as measured, torch.no_grad():
        idf.attach(idf.Root(residual), START)
    assert seconds(one(measured, "forward")) == {"evaluations": 2}
    capturing = True  # where one must not wait
    with Profile(), torch.no_grad():
        idf.attach(idf.Root(residual), START)


def test_compiled_code_is_one_piece() -> None:
    """What torch.compile sees has no clock in it, and is not compiled again because somebody measures."""

    @_timing.timed("products")
    def product(v: Tensor) -> Tensor:
        return 2 * v

    compiled = torch.compile(lambda v: product(v) + 1, backend="eager", fullgraph=True)
    layer = _timing.timed("layer")(compiled)
    for _ in range(2):
        torch.testing.assert_close(layer(START), 2 * START + 1)
        with Profile() as measured, torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(layer(START), 2 * START + 1)
        assert [list(solves.parts) for solves in measured.solves] == [["layer"]]


def test_one_profile_in_another(clock: Clock) -> None:
    layer, y = sqrt_layer(clock), Y.clone().requires_grad_()
    with Profile() as around:
        with Profile() as within:
            x = layer(START, y).sum()
        x.backward()
    assert [s.kind for s in within.solves] == ["forward"]
    assert [s.kind for s in around.solves] == ["forward", "backward"]
    assert within.solves[0] == around.solves[0]
    assert nobody_measures()


# ------------------------------------------------------------------------------------------------- table, command line

TABLE = """\
implicit layers: 56.0000 s, 28.0 % of 200.0000 s

                                                 calls    µs each    longest    seconds   share
forward: by_torch, 1 solve, 0 iterations                                        10.0000  17.9 %
  finding captured tensors                           1  1000000.0  1000000.0     1.0000   1.8 %
  evaluations of the function and its gradient       4  1000000.0  1000000.0     4.0000   7.1 %
  inner solver (steps)                                                           5.0000   8.9 %
  the rest                                                                       0.0000   0.0 %
backward: by_division, 1 solve, 0 iterations                                    46.0000  82.1 %
  building A (the graph of F)                        1  1000000.0  1000000.0     1.0000   1.8 %
  products with A                                    3  7000000.0  7000000.0    21.0000  37.5 %
  args product (Bᵀu)                                 1 11000000.0 11000000.0    11.0000  19.6 %
  linear solver (vectors, factors)                                              13.0000  23.2 %
  the rest                                                                       0.0000   0.0 %"""


def test_the_table(clock: Clock) -> None:
    layer, y = sqrt_layer(clock), Y.clone().requires_grad_()
    clock.work(1000)  # before the block
    with Profile() as measured:
        clock.work(144)
        layer(START, y).sum().backward()
    assert str(measured) == TABLE


def test_the_table_of_nothing(clock: Clock) -> None:
    with Profile() as measured:
        clock.work(2)
    assert str(measured) == "implicit layers: 0.0000 s, 0.0 % of 2.0000 s: none was called"


SCRIPT = """\
import sys
import torch, implicitdiff as idf
import beside
assert __name__ == "__main__" and __file__ == sys.argv[0]
y = torch.tensor([4.0, 9.0], requires_grad=True)
idf.RootLayer(lambda x, y: x**2 - y)(torch.ones(2), y).sum().backward()
print("arguments", sys.argv[1:])
beside.end(sys.argv[1:])
"""
BESIDE = """\
import sys
def end(arguments):
    if "exit" in arguments:
        sys.exit(3)
    if "fail" in arguments:
        raise ValueError("of the script")
"""


@pytest.mark.parametrize(
    ("command", "code"),
    [(("{}/script.py", "exit", "--out"), 3), (("{}/script.py", "fail"), 1), (("-m", "script"), 0)],
    ids=["exit", "fail", "module"],
)
def test_the_command_line(tmp_path: Path, command: tuple[str, ...], code: int) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text(BESIDE)
    root = str(Path(idf.__file__).parents[1])
    python = [sys.executable, "-W", "error::RuntimeWarning"]
    ended = subprocess.run(
        [*python, "-m", "implicitdiff.profile", *(part.format(tmp_path) for part in command)],
        cwd=tmp_path if "-m" in command else root,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == code, ended.stderr
    arguments, head, *rows = ended.stdout.splitlines()
    assert arguments == f"arguments {[c for c in command[1:] if c != 'script']}"
    assert head.startswith("implicit layers: ")
    assert [row.split(",")[0] for row in rows if row and row[0] != " "] == ["forward: Newton", "backward: Auto: Dense"]
    assert ("ValueError: of the script" in ended.stderr) == (code == 1)


@pytest.mark.parametrize("arguments", [[], ["-m"]])
def test_a_command_line_without_a_program(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["profile", *arguments])
    with pytest.raises(SystemExit, match="usage: python -m"):
        main()
