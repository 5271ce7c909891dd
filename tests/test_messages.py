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
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, init_device_mesh

import implicitdiff as idf
from implicitdiff import bilevel, conditions, cones, inner_solvers, operators, preconditioners, projections, prox
from implicitdiff.testing import check_linear_solver

from .problems import D

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
    """The messages that the page lists: the code at the beginning of each item, and findings of check."""
    heads = re.findall(r"^\* ((?:`[^`]+`\s*)+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [" ".join(code.split()) for head in heads for code in re.findall("`([^`]+)`", head)]


def is_listed(entry: str, message: str) -> bool:
    """Whether the entry is the message, or its beginning followed by …"""
    return entry == message or (entry.endswith(" …") and message.startswith(entry.removesuffix("…")))


def test_the_page_lists_every_message() -> None:
    missing = [f"{file}: {text}" for text, file in OURS.items() if not any(is_listed(e, text) for e in entries())]
    assert not missing, f"{PAGE} has no item for\n" + "\n".join(missing)


def test_the_page_lists_nothing_else() -> None:
    known = [*OURS, *messages("imaml")]
    stale = [entry for entry in entries() if not any(is_listed(entry, text) for text in known)]
    assert not stale, f"{PAGE} lists what the code does not say:\n" + "\n".join(stale)
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
    steps = inner_solvers.GradientDescent(0.1, max_iterations=3, tol=0.0, on_failure="ignore")
    return idf.UnrolledLayer(objective, steps, checkpoint=checkpoint)


def without_graph(x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        return distance(x, t)


class Hidden(torch.autograd.Function):
    """x ↦ x · t, for a t that torch does not see here."""

    t = leaf(2.0)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * Hidden.t.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * Hidden.t


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
    jacobian = functools.partial(torch.autograd.functional.jacobian, vectorize=True, create_graph=True)
    return jacobian(lambda t: jacobian(lambda t: root(lambda x, t: x**3 - t)(ONE, t), t), ONE + 1)


@contextlib.contextmanager
def one_process() -> Iterator[Any]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def in_a_group(make: Callable[[Any], Any]) -> None:
    with one_process() as group:
        make(group)


def after_the_group() -> None:
    with one_process() as group:
        layer = argmin(process_group=group)
    layer.solve(ZERO, ONE)


def of_a_mesh(group: Any) -> None:
    argmin()(ZERO, DTensor.from_local(ONE, init_device_mesh("cpu", (1,))))


def findings(layer: Any, *args: Any) -> None:
    """What ``check`` finds, as an error."""
    report = idf.check(layer, *args)
    assert report.ok, "\n".join(report.problems)


class Declared(conditions.Root):
    """A root with a structure that somebody has declared."""

    def __init__(self, residual: Callable[..., Any], structure: Any) -> None:
        super().__init__(residual)
        self.structure = structure


def attached(residual: Callable[..., Any], structure: Any) -> Any:
    return idf.implicit(Declared(residual, structure))(lambda init, t: t.clone())


def two_bodies(x: Tensor, t: Tensor) -> Tensor:
    """Not symmetric."""
    return torch.stack([x[0] + x[1] - t[0] - t[1], x[1] - t[1], x[2] - t[2]])


def late_capture() -> None:
    late = leaf(2.0)
    unrolled(lambda x, t: distance(x, t) * (late if float(x.detach().sum()) > 0 else 1))(ZERO, ONE)


def scipy_on_meta() -> None:
    matrix = operators.FunctionOperator(lambda v: v, 3, structure="symmetric")
    idf.SciPy("minres")(matrix, torch.ones(3, device="meta"))


def lasso(stepsizes: Any = None) -> inner_solvers.BlockCoordinateDescent:
    return inner_solvers.BlockCoordinateDescent([prox.none, prox.none], stepsizes)


def blocks(x: Any, t: Tensor) -> Tensor:
    return distance(x, t) if isinstance(x, Tensor) else sum(distance(u, t) for u in x)


PROGRAM = (ZERO[None].mT, ONE, ONE[:1])  # A, b and c of a conic program in one unknown
QP = idf.QPLayer()
Two, Two64 = torch.ones(2, 2, dtype=D), torch.ones(2, dtype=D)

CASES: list[tuple[str, Callable[[], Any], str]] = [
    # ------------------------------------------------------------------------------- settings of layers and solvers
    ("a class for a linear solver", lambda: argmin(linear_solver=idf.CG), "TypeError: linear_solver is …CG'>, but it must be a LinearSolver such as CG(), or a callable (A, b) -> x (did you mean CG()?)."),  # noqa: E501
    ("a name for a linear solver", lambda: argmin(linear_solver="cg"), "TypeError: linear_solver is 'cg', but it must be a LinearSolver such as CG()"),
    ("a class for an inner solver", lambda: argmin(inner_solver=inner_solvers.LBFGS), "TypeError: inner_solver is …LBFGS'>, but it must be …(did you mean LBFGS()?)"),
    ("a name for an inner solver", lambda: argmin(inner_solver="lbfgs"), "TypeError: inner_solver is 'lbfgs', but it must be an InnerSolver such as LBFGS()"),
]
