"""Layers import downwards only: each file of implicitdiff from rows before its own, imaml from public names only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = (
    ("_lanczos", "_names", "_norms", "_parameters", "_timing", "_vectors", "errors"),
    ("_cone_projections", "_exponential_cone", "_limited_memory"),
    ("cones",),
    ("_tree", "info"),
    ("_captures",),
    ("_autograd", "_iteration", "_marginals", "operators.base"),
    ("_compiled", "_recomputation", "layers._interior_point"),
    ("operators.block_diagonal", "operators.diagonal", "operators.low_rank", "operators.sparse"),
    ("operators",),
    ("_chunks", "_jacobian", "_kinks", "_support", "conditions.base", "preconditioners"),
    ("_linear_problem", "conditions.fixed_point", "conditions.root", "conditions.stationary"),
    ("conditions.conic", "conditions.kkt"),
    ("conditions.mirror_descent", "conditions.newton", "conditions.proximal_gradient", "least_squares"),
    ("conditions",),
    ("linear_solvers._operator_family", "linear_solvers._structured", "linear_solvers.system"),
    ("linear_solvers.base",),
    ("linear_solvers._scaled_identity", "linear_solvers.iterative"),
    (
        "linear_solvers.bicgstab",
        "linear_solvers.cg",
        "linear_solvers.dense",
        "linear_solvers.gmres",
        "linear_solvers.jacobian_free",
        "linear_solvers.lsmr",
        "linear_solvers.minres",
        "linear_solvers.mixed_precision",
        "linear_solvers.neumann",
        "linear_solvers.normal_cg",
        "linear_solvers.one_step",
        "linear_solvers.scipy_solver",
    ),
    ("linear_solvers.auto",),
    ("linear_solvers",),
    ("testing.systems",),
    ("testing.linear_solver",),
    ("testing",),
    ("inner_solvers.base",),
    ("inner_solvers._line_search", "inner_solvers._step_search", "inner_solvers._unfollowed", "inner_solvers._wrapper"),
    ("inner_solvers._polished", "inner_solvers._scipy", "inner_solvers._strong_wolfe", "inner_solvers._verified"),
    (
        "inner_solvers.anderson",
        "inner_solvers.bisection",
        "inner_solvers.block_coordinate_descent",
        "inner_solvers.broyden",
        "inner_solvers.fixed_point_iteration",
        "inner_solvers.gauss_newton",
        "inner_solvers.gradient_descent",
        "inner_solvers.lbfgs",
        "inner_solvers.levenberg_marquardt",
        "inner_solvers.mirror_descent",
        "inner_solvers.newton",
        "inner_solvers.nelder_mead",
        "inner_solvers.newton_cg",
        "inner_solvers.nonlinear_cg",
        "inner_solvers.proximal_gradient",
        "inner_solvers.projected_gradient",
        "inner_solvers.scipy_minimize",
        "inner_solvers.scipy_root",
        "inner_solvers.torch_optimizer",
    ),
    ("inner_solvers",),
    ("_equations",),
    ("_problem",),
    ("_data_parallel",),
    ("api",),
    ("checks", "layers.implicit_layers", "layers.unrolled"),
    ("layers.deq", "layers.least_squares", "layers.quadratic_program", "layers.sinkhorn"),
    ("layers",),
    ("bilevel",),
    (
        "projections.affine",
        "projections.box_section",
        "projections.boxes",
        "projections.kl",
        "projections.polyhedron",
        "projections.simplices",
        "projections.transport",
    ),
    ("projections.balls",),
    ("projections",),
    ("prox",),
    ("profile",),
    ("profile.__main__",),
    ("",),
)
"""The files of implicitdiff from the bottom to the top; files of one row do not import each other."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "implicitdiff").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """The modules of implicitdiff that a file of it imports, relative to the package."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [p for p in package if p][: len([p for p in package if p]) - node.level + 1]
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield ".".join([*base, name])


FILES = sorted((ROOT / "implicitdiff").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_imports_from_rows_before_it(path: Path) -> None:
    row = {name: i for i, names in enumerate(ROWS) for name in names}
    name = module_name(path)
    assert name in row, f"{name} has no row: say in ROWS where it belongs"
    for other in imported(path):
        assert row[other] < row[name], f"{name} imports {other}, which is not below it"


def test_no_row_names_a_file_that_is_gone() -> None:
    assert {name for names in ROWS for name in names} == {module_name(path) for path in FILES}


@pytest.mark.parametrize("path", sorted((ROOT / "imaml").rglob("*.py")), ids=lambda p: p.name)
def test_imaml_uses_public_names_of_implicitdiff_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("implicitdiff"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert not [p for p in parts if p.startswith("_")], f"{path.name} imports {parts}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "idf":
            assert not node.attr.startswith("_"), f"{path.name} uses idf.{node.attr}"
