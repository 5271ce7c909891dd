"""Errors and warnings: each names its cause, and docs/errors.md lists each of them.

In this file a message is written with … for what varies: "b has the shape …, but A has the shape …".
"""

from __future__ import annotations

import ast
import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._vmap_internals import _vmap
from torch.distributed.tensor import DTensor, init_device_mesh

import implicitdiff as idf
from implicitdiff import bilevel, conditions, cones, operators, preconditioners, projections, prox
from implicitdiff.inner_solvers import (
    LBFGS,
    Bisection,
    BlockCoordinateDescent,
    Broyden,
    GaussNewton,
    GradientDescent,
    NelderMead,
    NewtonCG,
    ProximalGradient,
    SciPyMinimize,
    TorchOptimizer,
)
from implicitdiff.testing import check_linear_solver

D = torch.float64
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"

# ------------------------------------------------------------------------------------------- the messages in the code

COMPOSED = {"_failure_message", "_difference"}
"""Functions that put a message together; what they return is one."""
WITHOUT_TEXT = {
    "raise ConvergenceError(message)",  # of _failure_message
    "raise ImplicitDiffError(_difference(everywhere))",
    "raise not_unrolled(self)",  # it returns the error
    "raise not_unrolled(solver)",
    "raise NotImplementedError",  # in a base class that is not public
    "raise AttributeError(name)",  # of Python's own protocol
    "raise Ended(Status.MAX_ITERATIONS)",  # caught within
    "raise Ended(Status.CONVERGED)",
    "raise",
}


def template(node: ast.expr) -> str | None:
    """The text of a string in the code, with … for what is formatted into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
        return re.sub("…+", "…", "".join(parts))
    return None


def messages_in(tree: ast.AST) -> Iterator[str | None]:
    """The text of each error and warning that a module makes, and of each finding of ``check``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in COMPOSED:
            yield from (template(n.value) for n in ast.walk(node) if isinstance(n, ast.Return) and n.value)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            if called.endswith(("Error", "warnings.warn", "report.problems.append")):
                yield template(node.args[0])
        elif isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "report.problems":
            yield from (template(n.elt) for n in ast.walk(node.value) if isinstance(n, ast.ListComp))


def messages(package: str) -> dict[str, str]:
    """Each message of a package and the file that it is in."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        found |= {text: name for text in messages_in(ast.parse(path.read_text(encoding="utf-8"))) if text}
    return found


OURS = messages("implicitdiff")


def fits(pattern: str, text: str) -> bool:
    """Whether a text begins as the pattern says, with anything for each …"""
    return re.match(".*".join(map(re.escape, pattern.split("…"))), text, re.DOTALL) is not None


# ------------------------------------------------------------------------------------------------------ the page


def entries() -> list[str]:
    """The messages that the page lists: lines of code at the beginning of an item, with a forced break after each."""
    heads = re.findall(r"^\* ((?:`[^`]+`\\\n\s*)+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [" ".join(code.split()) for head in heads for code in re.findall("`([^`]+)`", head)]


def is_listed(entry: str, message: str) -> bool:
    """Whether the entry is the message, or its beginning followed by …"""
    return entry == message or (entry.endswith(" …") and message.startswith(entry.removesuffix("…")))


def test_the_page_lists_every_message() -> None:
    missing = [f"{file}: {text}" for text, file in OURS.items() if not any(is_listed(e, text) for e in entries())]
    assert not missing, f"{PAGE} has no item for\n" + "\n".join(missing)


def test_the_page_lists_nothing_else() -> None:
    known = [*OURS, *messages("imaml")]
    stale = [entry for entry in entries() if sum(is_listed(entry, text) for text in known) != 1]
    assert not stale, f"{PAGE} lists what is not, or not clearly, a message in the code:\n" + "\n".join(stale)
    assert len(entries()) == len(set(entries()))


def test_the_page_explains_every_status() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [status.name for status in idf.Status]


def test_no_message_is_made_out_of_sight() -> None:
    """Fails where an error is raised by a text that the tests above do not see."""
    for path in sorted((ROOT / "implicitdiff").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and not any(messages_in(node)):
                assert ast.unparse(node).split(" from ")[0] in WITHOUT_TEXT, f"{path}:{node.lineno}"


# ------------------------------------------------------------------------------------------------------- mistakes

ZERO, ONE = torch.zeros(3, dtype=D), torch.ones(3, dtype=D)
EYE = torch.eye(3, dtype=D)
A = operators.DenseOperator(EYE, "positive_definite")
WIDE = operators.DenseOperator(torch.ones(2, 3, dtype=D))


def leaf(value: float = 1.0, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=D, requires_grad=True)


def distance(x: Tensor, t: Tensor) -> Tensor:
    return ((x - t) ** 2).sum()


def argmin(objective: Callable[..., Any] = distance, **settings: Any) -> idf.ArgminLayer:
    return idf.ArgminLayer(objective, **settings)


def root(residual: Callable[..., Any] = lambda x, t: x - t, **settings: Any) -> idf.RootLayer:
    return idf.RootLayer(residual, **settings)


def unrolled(objective: Callable[..., Any] = distance, checkpoint: bool = True) -> idf.UnrolledLayer:
    steps = GradientDescent(0.1, max_iterations=3, tol=0.0, on_failure="ignore")
    return idf.UnrolledLayer(objective, steps, checkpoint=checkpoint)


def sliced(objective: Callable[..., Any], argument: int | str) -> idf.ArgminLayer:
    return argmin(objective, condition=idf.Stationary(objective, (argument, 0, 2)))


def slope(layer: Any, init: Any = ZERO, t: Any = None) -> None:
    """The backward pass of a layer."""
    layer(init, leaf(1.0, 3) if t is None else t).sum().backward()


def without_graph(x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        return distance(x, t)


class Double(torch.autograd.Function):
    """2 a, out of sight of torch's function modes."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return 2 * a

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def hidden_capture() -> None:
    a = leaf()
    root(lambda x, t: x - t * Double.apply(a))(ZERO, ONE)


def replaced_capture() -> None:
    held = [leaf()]
    x = root(lambda x: x - held[0])(torch.zeros((), dtype=D))
    held[0] = leaf()
    x.backward()


def leaked_tensor() -> Tensor:
    leaked: list[Tensor] = []
    torch.func.vmap(lambda v: leaked.append(v) or v)(ONE)
    return torch.func.grad(lambda t: root(lambda x, t: x - t * leaked[0])(t * 0, t))(torch.ones((), dtype=D))


def nested_vectorize() -> Tensor:
    t = leaf(1, 3)
    x = root()(ZERO, t)
    pull = lambda v, w: torch.autograd.grad(x, t, v * w, retain_graph=True)[0]  # noqa: E731
    return _vmap(lambda v: _vmap(lambda w: pull(v, w))(EYE))(EYE)


@contextlib.contextmanager
def one_process() -> Iterator[Any]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def in_a_group(objective: Any = distance, **settings: Any) -> idf.ArgminLayer:
    with one_process() as group:
        return argmin(objective, process_group=group, **settings)


def of_a_mesh() -> None:
    with one_process():
        argmin()(ZERO, DTensor.from_local(ONE, init_device_mesh("cpu", (1,))))


def findings(layer: Any, *args: Any) -> None:
    """What ``check`` finds, as an error."""
    if problems := idf.check(layer, *args).problems:
        raise AssertionError("\n".join(problems))


class Declared(conditions.Root):
    """A root with a structure that somebody has declared."""

    def __init__(self, residual: Callable[..., Any], structure: Any) -> None:
        super().__init__(residual)
        self.structure = structure


def attached(residual: Callable[..., Any], structure: Any) -> Any:
    return idf.implicit(Declared(residual, structure))(lambda init, t: t.clone())


class NormOnly(NamedTuple):
    """A state without x."""

    residual_norm: Tensor


class OwnState(idf.IterativeLinearSolver):
    """A solver whose first state is as it is told."""

    def __init__(self, state: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.state = state

    def start(self, A: Any, b: Tensor, x0: Tensor | None) -> Any:
        return self.state(b)

    def step(self, A: Any, state: Any) -> Any:
        return state


def two_bodies(x: Tensor, t: Tensor) -> Tensor:
    """Not symmetric."""
    return torch.stack([x[0] + x[1] - t[0] - t[1], x[1] - t[1], x[2] - t[2]])


def late_capture() -> None:
    late = leaf(2.0)
    unrolled(lambda x, t: distance(x, t) * (late if float(x.detach().sum()) > 0 else 1))(ZERO, ONE)


def scipy_on_meta() -> None:
    matrix = operators.FunctionOperator(lambda v: v, 3, structure="symmetric")
    idf.SciPy("minres")(matrix, torch.ones(3, device="meta"))


def distance_of_means(x: Tensor, t: Tensor) -> Tensor:
    """Neither a mean nor a sum over t."""
    return (x - t.square().mean().sqrt()) ** 2


def of_a_pair(x: Tensor, t: tuple[Tensor, Tensor]) -> Tensor:
    return distance(x, t[0]) + t[1].sum()


def random(x: Tensor, t: Tensor) -> Tensor:
    return x - t * torch.rand(3, dtype=D)


def curved(x: Tensor, t: Tensor) -> Tensor:
    return distance(x, t) + (x[0] - x[1]) ** 2 + (x[1] - 3 * x[2]) ** 2


def total(x: list[Tensor], t: Tensor) -> Tensor:
    return sum((distance(u, t) for u in x), torch.zeros((), dtype=D))


def half_distance_to_one(x: Tensor, t: Tensor) -> Tensor:
    """With the lasso of penalty t = 1, zero is the solution, and just so."""
    return 0.5 * distance(x, ONE)


TWO_BLOCKS = BlockCoordinateDescent([prox.none, prox.none])
ONE_BLOCK = conditions.BlockProximalGradient(total, [prox.none], [1.0])
ON_SUM = idf.KKT(lambda x: x.square().sum(), equality=lambda x: x.sum())
CONIC = conditions.ConicProgram([cones.NonNegative(2)])
QP = idf.QPLayer()
Q, ROW = EYE, ONE[None]

CASES: list[tuple[str, Callable[[], Any], str]] = [
    # ------------------------------------------------------------------------------------------ what a layer is made of
    ("objective: a number", lambda: argmin(3.0), "TypeError: objective is 3.0, but it must be a callable"),
    ("objective: a class", lambda: argmin(torch.nn.Linear), "TypeError: objective is <class …Linear'>, but it must be"),
    ("linear solver: its class", lambda: argmin(linear_solver=idf.CG), "TypeError: linear_solver is …mean CG()?"),
    ("linear solver: its name", lambda: argmin(linear_solver="cg"), "TypeError: linear_solver is 'cg', but …CG(), or"),
    ("inner solver: its class", lambda: argmin(inner_solver=LBFGS), "TypeError: inner_…mean LBFGS()?"),
    ("inner solver: its name", lambda: argmin(inner_solver="lbfgs"), "TypeError: inner_solver is 'lbfgs', but …LBFGS"),
    ("inner solver: a linear one", lambda: argmin(inner_solver=idf.CG()), "TypeError: inner_…mean linear_solver=CG()?"),
    ("linear solver: an inner one", lambda: argmin(linear_solver=LBFGS()), "TypeError: linear_…mean inner_solver=LB"),
    ("condition: a name", lambda: argmin(condition="kkt"), "TypeError: condition is 'kkt', but …Root(residual)"),
    ("condition: its class", lambda: argmin(condition=idf.Stationary), "TypeError: condition is <class …object with"),
    ("condition: bare decorator", lambda: idf.implicit(lambda init, t: t), "TypeError: condition is <function …object"),
    ("condition: structure", lambda: attached(two_bodies, "spd"),
     "ValueError: structure is 'spd', but it must be one of"),
    ("solver: no callable", lambda: idf.implicit(idf.Root(distance))(3), "TypeError: implicit …callable…given 3"),
    ("unrolled: any callable", lambda: idf.UnrolledLayer(distance, max), "TypeError: inner_solver is …GradientDescent"),
    ("truncate", lambda: idf.UnrolledLayer(distance, LBFGS(), -1), "ValueError: truncate is -1, but …None"),
    ("check: a function", lambda: idf.check(distance, ZERO, ONE),
     "TypeError: check takes an ArgminLayer…given distance. Of a DEQ"),
    ("layer to warm-start", lambda: bilevel.WarmStart(distance), "TypeError: layer is <function …ArgminLayer"),
    # --------------------------------------------------------------------------------------------------- their settings
    ("rtol: negative", lambda: idf.CG(rtol=-1.0), "ValueError: rtol is -1.0, but it must be a number of at least 0"),
    ("rtol: text", lambda: idf.CG(rtol="tight"), "ValueError: rtol is 'tight', but it must be a number of at least 0"),
    ("max_iterations", lambda: idf.CG(max_iterations=2.5), "ValueError: max_iterations is 2.5, but …whole …or None"),
    ("max_iterations: text", lambda: idf.CG(max_iterations="9"),
     "ValueError: max_iterations is '9', but it must be a whole number"),
    ("history", lambda: LBFGS(history=0), "ValueError: history is 0, but it must be a whole number"),
    ("history: None", lambda: Broyden(history=None), "ValueError: history is None, but it must be a whole number"),
    ("inner iterations: None", lambda: LBFGS(max_iterations=None), "ValueError: max_iterations is None, but"),
    ("on_failure", lambda: idf.CG(on_failure="stop"), "ValueError: on_failure is 'stop', but …ignore"),
    ("check_every", lambda: idf.CG(check_every=0), "ValueError: check_every is 0, but it must be a whole number"),
    ("preconditioner", lambda: idf.CG(preconditioner=EYE), "TypeError: preconditioner is tensor(…takes the operator A"),
    ("preconditioner: its class", lambda: idf.CG(preconditioner=preconditioners.Jacobi),
     "TypeError: preconditioner is <class …(did you mean Jacobi()?)"),
    ("restart", lambda: idf.GMRES(restart=0), "ValueError: restart is 0, but it must be a whole number of at least 1"),
    ("terms", lambda: idf.Neumann(0), "ValueError: terms is 0, but it must be a whole number of at least 1"),
    ("terms: None", lambda: idf.Neumann(None), "ValueError: terms is None, but it must be a whole number"),
    ("scale", lambda: idf.Neumann(3, scale=-1.0), "ValueError: scale is -1.0, but it must be a positive number, or"),
    ("OneStep", lambda: idf.OneStep(0.0), "ValueError: stepsize is 0.0, but it must be a positive number."),
    ("SciPy", lambda: idf.SciPy("bfgs"), "ValueError: method is 'bfgs', but it must be one of …minres"),
    ("MixedPrecision: solver", lambda: idf.MixedPrecision(idf.Dense()), "TypeError: linear_solver is Dense(…iterative"),
    ("MixedPrecision: dtype", lambda: idf.MixedPrecision(idf.CG(), dtype=D),
     "ValueError: dtype is torch.float64…bfloat16"),
    ("rank", lambda: preconditioners.Nystrom(0), "ValueError: rank is 0, but it must be a whole number of at least 1"),
    ("probes", lambda: preconditioners.Jacobi(0), "ValueError: probes is 0, but it must be a whole number"),
    ("structure of a check", lambda: check_linear_solver(idf.CG(), "spd"), "TypeError: got CG(…'spd': give a solver"),
    ("stepsize", lambda: GradientDescent(-0.1), "ValueError: stepsize is -0.1, but …None for a line"),
    ("momentum", lambda: GradientDescent(0.1, 1.0), "ValueError: momentum is 1.0, but it must be below 1"),
    ("momentum: no stepsize", lambda: GradientDescent(None, 0.9), "ValueError: momentum needs a fixed stepsize"),
    ("nesterov", lambda: GradientDescent(0.1, 0.0, True), "ValueError: nesterov=True needs …for example 0.9"),
    ("stepsize of a condition", lambda: conditions.ProximalGradient(distance, prox.none, 0),
     "ValueError: stepsize is 0, but it must be a positive number"),
    ("simplex of Nelder-Mead", lambda: NelderMead(tol=1.0), "ValueError: tol is 1.0, but it must be below"),
    ("bounds", lambda: LBFGS(lower=1.0, upper=0.0), "ValueError: lower is 1.0 and upper 0.0, but lower must"),
    ("brackets", lambda: Bisection(1.0, 0.0), "ValueError: lower is 1.0 and upper is 0.0, but both must"),
    ("torch optimizer", lambda: TorchOptimizer("Adam"), "TypeError: optimizer_class is 'Adam'…torch.optim"),
    ("SciPyMinimize", lambda: SciPyMinimize("adam"), "ValueError: method is 'adam', but it must be one of"),
    ("Gauss-Newton by CG", lambda: GaussNewton(idf.CG()), "ValueError: linear_solver is CG(…use Dense()"),
    ("chunks", lambda: idf.Stationary(distance, chunks=3),
     "ValueError: chunks is 3, but it must be (argument, dim, k)"),
    ("stepsizes of blocks", lambda: conditions.BlockProximalGradient(distance, [prox.none], [1.0, 1.0]),
     "ValueError: proxes are …[*]) and stepsizes …, but there must be one of each per block"),
    ("cones", lambda: conditions.ConicProgram([3]), "TypeError: cones has 3, but each must be a cone such as"),
    ("size of a cone", lambda: cones.NonNegative(-1), "ValueError: n is -1, but NonNegative(n) takes an integer"),
    ("iterations of a QP", lambda: idf.QPLayer(max_iterations=None), "ValueError: max_iterations is None, but"),
    ("epsilon", lambda: idf.SinkhornLayer(0.0)(EYE, ONE, ONE), "ValueError: epsilon is 0.0, but it must be positive"),
    ("tolerances", lambda: bilevel.decreasing(0.1, 1.0), "ValueError: first is 0.1 and power 1.0, but they must be"),
    ("tolerance", lambda: setattr(bilevel.WarmStart(argmin()), "tolerance", 0.0), "ValueError: tolerance is 0.0, but"),
    # -------------------------------------------------------------------------------------------------- calling a layer
    ("init: forgotten", lambda: argmin()(ONE),
     "TypeError: the objective takes (x: …) …called with 1 arguments, (Tensor): x first…layer(init, *args)"),
    ("args: one too many", lambda: argmin()(ZERO, ONE, ONE),
     "TypeError: the objective takes …with 3 arguments…layer(init, *args)"),
    ("keyword: unknown", lambda: argmin()(ZERO, ONE, weight=1),
     "TypeError: the objective takes …weight=…layer(init, *args)"),
    ("prox: of v alone", lambda: argmin(inner_solver=ProximalGradient(lambda v: v))(ZERO, ONE),
     "TypeError: <lambda> takes (v), but …(Tensor, Tensor, Tensor): x first, for a prox the stepsize, then all args"),
    ("init: a number", lambda: argmin()(0.0, ONE),
     "ImplicitDiffError: init must be a tree …holds 0.0 of type float. Pass a tensor"),
    ("init: integers", lambda: argmin()(ZERO.long(), ONE),
     "ImplicitDiffError: init must be …holds a torch.int64 tensor"),
    ("init: NumPy", lambda: argmin()(ZERO.numpy(), ONE),
     "ImplicitDiffError: init must be …of type ndarray. Pass a tensor"),
    ("init: two devices", lambda: root()([ZERO, ZERO.to("meta")], ONE),
     "ImplicitDiffError: init has …(cpu, meta): move"),
    ("x_star: NumPy", lambda: idf.attach(idf.Root(distance), ZERO.numpy(), ONE),
     "ImplicitDiffError: x_star must be a tree"),
    ("solver: gives NumPy", lambda: idf.implicit(idf.Root(distance))(lambda init, t: t.numpy())(None, ONE),
     "ImplicitDiffError: what <lambda> returned must be …of type ndarray"),
    ("solver: gives no aux", lambda: idf.implicit(idf.Root(distance), has_aux=True)(lambda init, t: t)(ZERO, ONE),
     "ImplicitDiffError: <lambda> has has_aux=True and must return (x, aux), but it returned Tensor"),
    ("objective: a vector", lambda: argmin(lambda x, t: x - t)(ZERO, ONE),
     "ImplicitDiffError: the objective returned a torch.float64 tensor of shape (3,), but it must return a scalar "
     "tensor …sum or average"),
    ("objective: a float", lambda: argmin(lambda x, t: 1.5)(ZERO, ONE),
     "ImplicitDiffError: the objective returned 1.5, but"),
    ("objective: complex", lambda: argmin(lambda x, t: distance(x, t) + 0j)(ZERO, ONE),
     "ImplicitDiffError: the objective returned a torch.complex128 tensor of shape (), but …real"),
    ("objective: no graph", lambda: argmin(without_graph)(ZERO, ONE),
     "ImplicitDiffError: the objective does not depend on x …torch.no_grad()"),
    ("objective: detached", lambda: torch.func.vmap(argmin(lambda x, t: distance(x.detach(), t)))(EYE, EYE),
     "ImplicitDiffError: the objective does not depend on x …is x detached"),
    ("objective: constant", lambda: argmin(lambda x, t: t.sum())(ZERO, ONE),
     "ImplicitDiffError: the objective does not depend on x"),
    ("residual: detached", lambda: root(lambda x, t: x.detach() - t)(ZERO, ONE),
     "ImplicitDiffError: the residual does not depend on x …is x detached"),
    ("residual: a scalar", lambda: root(distance)(ZERO, ONE),
     "ImplicitDiffError: the residual must have the shapes of init, (3,), but it has ()."),
    ("residual: another tree", lambda: root(lambda x, t: {"b": x["a"] - t})({"a": ZERO}, ONE),
     "ImplicitDiffError: the residual must be a tree like init, TreeSpec(dict, ['a']…but it is TreeSpec(dict, ['b']"),
    ("residual: a number", lambda: root(lambda x, t: 0.0)(ZERO, ONE), "ImplicitDiffError: the residual …holds float"),
    ("residual: where init is None", lambda: root(lambda x, t: [x[0] - t, t])([ZERO, None], ONE),
     "ImplicitDiffError: the residual must be None where init is None"),
    ("update: another shape", lambda: idf.FixedPointLayer(lambda x, t: x.sum())(ZERO, ONE),
     "ImplicitDiffError: what update returned must have the shapes of init, (3,), but it has ()"),
    ("DTensor", of_a_mesh, "ImplicitDiffError: an argument is a DTensor…pass its local tensor"),
    ("DEQ", lambda: idf.DEQ(lambda x, t: x + t)(torch.zeros(4, 3), torch.zeros(5, 3)),
     "ImplicitDiffError: …[(4, 3), (5, 3)], but all must have the same leading dimension"),
    ("chunks of no argument", lambda: slope(sliced(distance, "X")),
     "ImplicitDiffError: there is no argument 'X': the call has 1 args and the keywords []."),
    ("chunks of two sizes", lambda: slope(sliced(of_a_pair, 0), ZERO, (leaf(1, 3), leaf(1, 2))),
     "ImplicitDiffError: chunks slices the tensors of argument 0 along dimension 0, where they have the sizes [2, 3]"),
    ("chunks of no sum", lambda: slope(sliced(distance_of_means, 0), ZERO[0], leaf(1.0, 3) * ONE.cumsum(0)),
     "ImplicitDiffError: the objective is asked for in 2 chunks, but it is neither a mean nor a sum"),
    # --------------------------------------------------------------------------------------------- in the forward solve
    ("too few iterations", lambda: argmin(inner_solver=GradientDescent(0.1, max_iterations=2))(ZERO, ONE),
     "ConvergenceWarning: GradientDescent did not solve the inner problem: MAX_ITERATIONS after at most 2 "
     "iterations, ‖F(x)‖ up to …raise max_iterations…on_failure"),
    ("too long a step", lambda: argmin(inner_solver=GradientDescent(9.0, max_iterations=999))(ZERO, ONE),
     "ConvergenceWarning: GradientDescent did not solve …NON_FINITE…too long a stepsize"),
    ("NaN in the args", lambda: argmin()(ZERO, ONE * torch.nan),
     "ConvergenceWarning: LBFGS did not …NON_FINITE…a NaN in init"),
    ("no root", lambda: root(lambda x, t: x**2 + t)(ONE, ONE),
     "ConvergenceWarning: Newton did not solve …no solution near"),
    ("no change of sign", lambda: root(inner_solver=Bisection(2.0, 3.0))(ZERO[0], ONE[0]),
     "ConvergenceWarning: Bisection did not solve the inner problem: BREAKDOWN …no change of sign between the bounds"),
    ("a failure that raises", lambda: root(inner_solver=Bisection(2.0, 3.0, on_failure="raise"))(ZERO, ONE),
     "ConvergenceError: Bisection did not solve the inner problem: BREAKDOWN"),
    ("a QP without a point", lambda: QP(Q, ONE, G=torch.cat([ROW, -ROW]), h=-ONE[:2]),
     "ConvergenceWarning: QPLayer did not solve the inner problem: INFEASIBLE…relax them"),
    ("a QP without a minimum", lambda: QP(0 * Q, ONE), "ConvergenceWarning: QPLayer …UNBOUNDED…add constraints"),
    ("needs an objective", lambda: root(inner_solver=GradientDescent())(ZERO, ONE),
     "ImplicitDiffError: problem.gradient was asked for, but this problem is a root …belongs into an ArgminLayer"),
    ("needs least squares", lambda: argmin(inner_solver=GaussNewton())(ZERO, ONE),
     "ImplicitDiffError: the inner solver works with the residual …LeastSquares(residual)"),
    ("own inner solver: a pair", lambda: argmin(inner_solver=lambda problem, x0: (x0, 1))(ZERO, ONE),
     "ImplicitDiffError: the inner solver <lambda> returned tuple, but it must return a tensor of the shape of x0, "
     "(3,)"),
    ("SciPy: complex x", lambda: argmin(inner_solver=SciPyMinimize("BFGS"))(ZERO + 0j, ONE),
     "ImplicitDiffError: SciPyMinimize needs real unknowns, but init is torch.complex128"),
    ("bounds: shape", lambda: argmin(inner_solver=LBFGS(lower=ZERO[:2]))(ZERO, ONE),
     "ImplicitDiffError: LBFGS has lower=tensor(…shapes of x, which here are [(3,)]"),
    ("bounds: order", lambda: argmin(inner_solver=LBFGS(lower=ONE, upper=ZERO))(ZERO, ONE),
     "ImplicitDiffError: LBFGS has bounds with a lower one above the upper one, lower=tensor(…no x satisfies both"),
    ("brackets: shape", lambda: root(inner_solver=Bisection(-ONE[:2], 3.0))(ZERO, ONE),
     "ImplicitDiffError: lower has the shape (2,), but it must broadcast to x as a vector, (3,)."),
    ("blocks: another tree", lambda: argmin(total, inner_solver=TWO_BLOCKS)([ZERO], ONE),
     "ValueError: x must be a container of blocks like the proxes"),
    ("blocks: of a condition", lambda: ONE_BLOCK.residual([ZERO, ZERO], ONE),
     "ValueError: x must be a container of blocks like the proxes"),
    ("compile", lambda: idf.GMRES(compile=True)(A, ONE),
     "UserWarning: GMRES(compile=True) goes on uncompiled, here and later: "),
    # -------------------------------------------------------------------------------------------- in the backward solve
    ("linear: too few iterations", lambda: slope(argmin(curved, linear_solver=idf.CG(max_iterations=1))),
     "ConvergenceWarning: CG did not solve the backward linear system: MAX_ITERATIONS after at most 1 iterations, "
     "relative residual up to …raise max_iterations"),
    ("linear: indefinite", lambda: slope(root(lambda x, t: t - x, linear_solver=idf.CG())),
     "ConvergenceWarning: CG did not solve …INDEFINITE …use MINRES, Dense() or Auto()"),
    ("linear: singular", lambda: argmin(lambda x, t: (x[0] - t) ** 2)(ZERO, leaf()).sum().backward(),
     "ConvergenceWarning: Auto: Dense …did not solve the backward linear system: BREAKDOWN…regularise the problem"),
    ("linear: own, wrong", lambda: slope(argmin(linear_solver=lambda A, b: b)),
     "ConvergenceWarning: <lambda> did not solve the backward linear system: BREAKDOWN, its answer does not solve "
     "A u = b: relative residual up to …subclass of LinearSolver …takes settings"),
    ("linear: own, a pair", lambda: slope(argmin(linear_solver=lambda A, b: (b, 0))),
     "ImplicitDiffError: the linear solver <lambda> returned tuple, but it must return a tensor of the shape of b, "
     "(3,)"),
    ("kink", lambda: slope(argmin(half_distance_to_one, inner_solver=ProximalGradient(prox.lasso)), ZERO, leaf(1.0)),
     "ConvergenceWarning: …but not uniquely: NOT_SMOOTH, x lies where its condition has a kink"),
    ("x_star: no solution", lambda: slope(lambda x, t: idf.attach(idf.Root(lambda x, t: x - t), x, t)),
     "ConvergenceWarning: …but not at a solution: NOT_A_SOLUTION, x does not satisfy its condition"),
    ("state: a field is missing", lambda: OwnState(lambda r: NormOnly(r.norm()))(A, ONE),
     "ImplicitDiffError: OwnState.start returned NormOnly with no tensor x, residual_norm of shape (), but it must "
     "return a NamedTuple with at least x of shape (*batch, n) = (3,) and residual_norm of shape (*batch,) = ()."),
    ("preconditioner: a matrix", lambda: idf.CG(preconditioner=lambda A: EYE)(A, ONE),
     "ImplicitDiffError: the preconditioner <lambda> returned Tensor for A, but …callable v -> M⁻¹ v"),
    ("preconditioner: another n", lambda: idf.CG(preconditioner=lambda A: lambda v: v[:2])(A, ONE),
     "ImplicitDiffError: the preconditioner <lambda> made a tensor of shape (2,) of v of shape (3,), but"),
    ("InverseLBFGS elsewhere", lambda: idf.CG(preconditioner=preconditioners.InverseLBFGS())(A, ONE),
     "ImplicitDiffError: InverseLBFGS() needs the steps of …inner_solver=LBFGS()"),
    ("capture: replaced", replaced_capture,
     "ImplicitDiffError: of the tensors …captured …1 did not appear …as arguments"),
    ("capture: hidden", hidden_capture,
     "ImplicitDiffError: the function depends on a tensor of shape () that reaches it only inside a custom "
     "autograd.Function…as an argument"),
    ("checkpoint: random", lambda: slope(unrolled(lambda x, t: distance(x, t * torch.rand(3, dtype=D)))),
     "ImplicitDiffError: the objective gave another value when backward evaluated it again…checkpoint=False"),
    ("checkpoint: branch", late_capture,
     "ImplicitDiffError: the objective uses other tensors at the end …as arguments"),
    # -------------------------------------------------------------------------------------------- unrolling, transforms
    ("unrolled: products", lambda: idf.UnrolledLayer(distance, NewtonCG())(ZERO, leaf(1, 3)),
     "ImplicitDiffError: an inner solver that uses problem.hessian …unroll a first-order one (GradientDescent"),
    ("unrolled: no steps", lambda: idf.UnrolledLayer(distance, NelderMead())(ZERO, leaf(1, 3)),
     "ImplicitDiffError: NelderMead cannot be unrolled, …unroll a first-order"),
    ("checkpoint: jvp", lambda: torch.func.jvp(lambda t: unrolled()(ZERO, t), (ONE,), (ONE,)),
     "ImplicitDiffError: checkpoint=True has no forward-mode derivative: give checkpoint=False"),
    ("linearize", lambda: torch.func.linearize(lambda t: argmin()(ZERO, t), ONE),
     "ImplicitDiffError: the layer is being traced (torch.func.linearize…Use torch.func.jvp or jacfwd"),
    ("vectorize: nested", nested_vectorize,
     "ImplicitDiffError: nested is_grads_batched / vectorize=True …use torch.func.vmap"),
    ("capture: leaked", leaked_tensor,
     "ImplicitDiffError: the function uses a tensor of a torch.func transform that has already ended …as an argument"),
    ("brackets: batched", lambda: torch.func.vmap(lambda t: root(inner_solver=Bisection(-t, t))(t, t))(ONE),
     "ImplicitDiffError: lower or upper belongs to a torch.func transform…outside of vmap"),
    # ------------------------------------------------------------------------------ operators and solvers by themselves
    ("A: a matrix", lambda: idf.CG()(EYE, ONE),
     "TypeError: A is a Tensor, but it must be a LinearOperator: wrap a matrix as DenseOperator(matrix)"),
    ("b: a list", lambda: idf.CG()(A, [1.0, 1.0, 1.0]),
     "TypeError: b is [1.0, 1.0, 1.0], but it must be a floating-point"),
    ("b: a column", lambda: idf.CG()(A, ONE[:, None]),
     "ValueError: b has the shape (3, 1), but A has the shape (3, 3): b must be (*batch, 3)"),
    ("b: float32", lambda: idf.CG()(A, ONE.float()),
     "ValueError: A is torch.float64 and b is torch.float32: convert one"),
    ("b: no batch", lambda: idf.CG()(operators.DenseOperator(EYE.expand(2, 3, 3)), ONE),
     "ValueError: A has the batch shape (2,) and b has (): expand b"),
    ("x0: a list", lambda: idf.CG()(A, ONE, [0.0]),
     "TypeError: x0 is a list, but it must be a tensor of the shape of b, (3,)"),
    ("x0: shape", lambda: idf.CG()(A, ONE, ZERO[:2]),
     "ValueError: x0 has the shape (2,), but the solution will have …(3,)"),
    ("A: rectangular", lambda: idf.CG()(WIDE, ONE[:2]),
     "ValueError: CG needs a square operator, but A has the shape (2, 3): use LSMR() or Dense()"),
    ("A: rectangular, followed", lambda: idf.LSMR()(operators.DenseOperator(leaf(1, 2, 3)), ONE[:2]),
     "ImplicitDiffError: A is rectangular, (2, 3), and depends …by ArgminLayer"),
    ("SciPy: not on the CPU", scipy_on_meta,
     "ImplicitDiffError: SciPy…solves on the CPU, but b is on meta: use a solver of torch"),
    ("mixed precision: complex", lambda: idf.MixedPrecision(idf.CG())(operators.DenseOperator(EYE + 0j), ONE + 0j),
     "ImplicitDiffError: b is torch.complex128, but MixedPrecision…is for real systems: use the solver alone"),
    ("operator: not square", lambda: operators.FunctionOperator(len, (2, 3), structure="symmetric"),
     "ValueError: an operator of shape (2, 3) is not square, so it cannot be symmetric"),
    ("operator: vector", lambda: A(ONE[:2]),
     "ValueError: an operator of shape (3, 3) met a vector of shape (2,): its last dimension must be 3"),
    ("operator: matrix", lambda: operators.DenseOperator(ONE),
     "ValueError: matrix has the shape (3,), but it must be a matrix"),
    ("operator: sum", lambda: A + WIDE, "ValueError: operators of shapes (3, 3) and (2, 3) cannot be added"),
    ("operator: product", lambda: A @ WIDE, "ValueError: operators of shapes (3, 3) and (2, 3) cannot be multiplied"),
    ("operator: shift", lambda: WIDE.shift(1.0),
     "ValueError: an operator of shape (2, 3) cannot be shifted: it is not square"),
    ("operator: no blocks", operators.BlockDiagonalOperator,
     "ValueError: blocks are (), but there must be at least one"),
    ("operator: diagonal", lambda: operators.DiagonalOperator(ONE[0]),
     "ValueError: diagonal is a scalar, but it must be a vector"),
    ("operator: low rank", lambda: operators.LowRankUpdate(A, ONE[:, None].mT),
     "ValueError: A has the shape (3, 3), U (1, 3) and V (1, 3), but …U and V must be (*batch, n, k)"),
    ("operator: not sparse", lambda: operators.SparseOperator(EYE),
     "ValueError: matrix has the layout torch.strided and the shape (3, 3), but it must be a sparse …to_sparse()"),
    # ---------------------------------------------------------------------- conditions with multipliers, QPs, transport
    ("KKT: no point", lambda: ON_SUM.residual(ZERO),
     "ImplicitDiffError: x must be a KKTPoint(primal, dual_equality, dual_inequality), but it is tensor("),
    ("KKT: no multiplier", lambda: ON_SUM.residual(idf.KKTPoint(ZERO)),
     "ImplicitDiffError: x has no dual_equality, but the condition has an equality constraint"),
    ("KKT: shape", lambda: ON_SUM.residual(idf.KKTPoint(ZERO, ZERO)),
     "ImplicitDiffError: dual_equality must be …[()], but it has [(3,)]"),
    ("cones: no point", lambda: CONIC.residual(ZERO, EYE[:2], ONE[:2], ONE),
     "ImplicitDiffError: x must be a ConicPoint(primal, dual), but it is tensor("),
    ("cones: shape", lambda: CONIC.residual(conditions.ConicPoint(ZERO, ZERO), EYE[:2], ONE[:2], ONE),
     "ImplicitDiffError: with cones of 2 entries in all and c of 3, the shapes must be …'dual': (2,)}, but they are "
     "…'dual': (3,)}"),
    ("QP: half a constraint", lambda: QP(Q, ONE, ROW),
     "ImplicitDiffError: A was given without b: A and b come together"),
    ("QP: a list", lambda: QP([[1.0]], ONE), "ImplicitDiffError: Q must be a floating-point tensor, but it is [[1.0]]"),
    ("QP: dtypes", lambda: QP(Q.float(), ONE),
     "ImplicitDiffError: Q is torch.float32 on cpu and q is torch.float64 on cpu"),
    ("QP: shapes", lambda: QP(Q, ONE[:2]),
     "ImplicitDiffError: the shapes must be Q (*batch, n, n)…but they are Q (3, 3), q (2,)"),
    ("QP: batches", lambda: QP(Q.expand(4, 3, 3), ONE.expand(2, 3)),
     "ImplicitDiffError: the batch dimensions do not broadcast: Q (4,), q (2,)"),
    ("QP: not convex", lambda: QP(-Q, ONE),
     "ImplicitDiffError: Q must be positive semidefinite, but its smallest eigenvalue is -1"),
    ("transport: shape", lambda: projections.transport_polytope(EYE, ONE[:2], ONE),
     "ImplicitDiffError: row_sums has the shape (2,), but for a plan of shape (3, 3) its last dimension must be 3"),
    ("transport: negative", lambda: projections.transport_polytope(EYE, -ONE, ONE),
     "ImplicitDiffError: row_sums has a negative entry, -1: no plan"),
    ("transport: nothing", lambda: projections.transport_polytope(EYE, ZERO, ZERO),
     "ImplicitDiffError: row_sums adds up to 0"),
    ("transport: totals", lambda: projections.transport_polytope(EYE, ONE, 2 * ONE),
     "ImplicitDiffError: row_sums adds up to 3 and column_sums to 6, but …rescale one of them"),
    # ------------------------------------------------------------------------------------------- projections and proxes
    ("projection: 0-d", lambda: projections.simplex(ONE[0]),
     "ValueError: v is 0-d, but it must be of shape (*batch, n): use v.reshape(1)"),
    ("projection: radius", lambda: projections.l2_ball(ONE, -1.0),
     "ValueError: radius is -1.0, but it must be at least 0"),
    ("projection: box", lambda: projections.box(ONE, 1.0, 0.0),
     "ValueError: lower is 1.0 and upper is 0.0, but lower must be at most upper"),
    ("projection: k", lambda: projections.sparse_simplex(ONE, 0),
     "ValueError: k is 0, but it must be a whole number of at least 1"),
    ("projection: normal", lambda: projections.hyperplane(ONE, ONE[:2], 1.0),
     "ValueError: a has shape (2,), but its last dimension must be 3, as v has shape (3,)"),
    ("projection: A", lambda: projections.affine_set(ONE, ONE, ONE),
     "ValueError: A has shape (3,), but it must be of shape (*batch"),
    ("projection: b", lambda: projections.affine_set(ONE, EYE[:2], ONE),
     "ValueError: b has shape (3,), but its last dimension must be 2, as A has shape (2, 3)"),
    ("projection: not a matrix", lambda: projections.positive_semidefinite_cone(ONE),
     "ValueError: V has shape (3,), but …n, n)."),
    ("prox: not a matrix", lambda: prox.nuclear_norm(ONE, 1.0), "ValueError: V has shape (3,), but it must be …m, n)."),
    ("projection: doubly stochastic", lambda: projections.birkhoff_polytope(ROW),
     "ImplicitDiffError: V has the shape (1, 3), but a doubly stochastic matrix is square"),
    ("projection: exponential cone", lambda: projections.exponential_cone(ONE[:2]),
     "ValueError: v has shape (2,), but a point of the exponential cone has 3 entries"),
    # ------------------------------------------------------------------------------------------------------------ check
    ("check: inner solve", lambda: findings(argmin(curved, inner_solver=LBFGS(max_iterations=1)), ZERO, ONE),
     "AssertionError: the inner solve failed: LBFGS: 0 of 1 converged (MAX_ITERATIONS)"),
    ("check: linear solve", lambda: findings(argmin(curved, linear_solver=idf.CG(max_iterations=1)), ZERO, ONE),
     "AssertionError: a linear solve failed: CG: 0 of 1 converged (MAX_ITERATIONS)"),
    ("check: NaN", lambda: findings(idf.implicit(idf.Root(two_bodies))(lambda init, t: t * torch.nan), ZERO, ONE),
     "AssertionError: …the solution is not finite: look for overflow"),
    ("check: dropout", lambda: findings(root(random, inner_solver=lambda problem, x0: x0), ZERO, ONE),
     "AssertionError: two evaluations of the condition differ: is there dropout"),
    ("check: not symmetric", lambda: findings(attached(two_bodies, "symmetric"), ZERO, ONE),
     "AssertionError: structure is 'symmetric', but ∂F/∂x is not symmetric: declare it 'general'"),
    ("check: not definite", lambda: findings(attached(lambda x, t: t - x, "positive_definite"), ZERO, ONE),
     "AssertionError: structure is 'positive_definite', but ∂F/∂x has the eigenvalue -1: declare it 'symmetric'"),
    ("check: not a solution", lambda: findings(attached(lambda x, t: x - t - 1, "general"), ZERO, ONE),
     "AssertionError: the solution is about …away from where the condition holds: tighten the inner solver"),
    ("check: another gradient", lambda: findings(root(lambda x, t: x - t.detach()), ZERO, ONE),
     "AssertionError: the gradient along a random direction is 0, but central differences give "),
    # --------------------------------------------------------------------------------------------------- process groups
    ("process group: a name", lambda: argmin(process_group="world"),
     "TypeError: process_group is 'world', but it must be a torch.distributed.ProcessGroup"),
    ("process group: gone", lambda: in_a_group()(ZERO, ONE),
     "ImplicitDiffError: the layer has a process_group, but torch.distributed is not initialised: call"),
    ("process group: least squares", lambda: in_a_group(idf.LeastSquares(two_bodies)),
     "ImplicitDiffError: LeastSquares with a process_group …give 0.5"),
    ("process group: condition", lambda: in_a_group(condition=idf.Root(distance)),
     "ImplicitDiffError: process_group sums the condition's objective over the ranks, but Root has none: leave "
     "condition out"),
    ("process group: chunks", lambda: in_a_group(condition=idf.Stationary(distance, (0, 0, 2))),
     "ImplicitDiffError: Stationary(chunks=...) slices the data …leave chunks out"),
]

NEED_PROCESSES = ("…. With a process_group", "the ranks call the layer under different transforms")
"""Tried in test_data_parallel.py."""


@functools.cache
def said(provoke: Callable[[], Any]) -> str:
    """The error that a mistake meets, or its first warning, as ``Class: message``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch's own
        try:
            provoke()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return next((f"{w.category.__name__}: {w.message}" for w in caught), "nothing")


@pytest.mark.parametrize(("provoke", "pattern"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_message_names_the_cause(provoke: Callable[[], Any], pattern: str) -> None:
    assert fits(pattern, said(provoke)), said(provoke)


def test_every_message_is_tried() -> None:
    met = [said(provoke).partition(": ")[2] for _, provoke, _ in CASES]
    met += [line for text in met for line in text.splitlines()]  # check has a line for each finding
    here = [text for text in OURS if not text.startswith(NEED_PROCESSES)]
    left = [text for text in here if not any(fits(text, m) for m in met)]
    assert not left, "no case above meets\n" + "\n".join(left)
