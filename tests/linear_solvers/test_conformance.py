"""What every linear solver must keep, whatever its method: one table of solvers and systems (``table.py``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff import Status
from implicitdiff._jacobian import JacobianOperator
from implicitdiff.operators import (
    DenseOperator,
    DiagonalOperator,
    FunctionOperator,
    LowRankUpdate,
    SparseOperator,
)
from implicitdiff.testing.linear_solver import (
    RTOL,
    claims_truly,
    is_indifferent_to_scale,
    solves,
    stops_per_system,
    true_residual,
)

from ..problems import KNOWN, SYSTEMS, System, random, rotated, second_difference, spread, vector
from .table import (
    ALL,
    CLAIMS,
    ITERATIVE,
    SOLVERS,
    assert_passes,
    assert_solved,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
EACH = pytest.mark.parametrize("name", SOLVERS)
EACH_ITERATIVE = pytest.mark.parametrize("name", ITERATIVE)


def ordinary(name: str) -> System:
    """A system that the solver claims, for tests that are not about the system."""
    return SYSTEMS["definite" if "definite" in SOLVERS[name].claims else "contraction"]


@DTYPES
@pytest.mark.parametrize(("name", "system"), CLAIMS)
def test_solves_what_it_claims(name: str, system: str, dtype: torch.dtype) -> None:
    """Fails for a wrong recurrence, for A in the place of Aᵀ, for systems of a batch that share a step length."""
    assert_passes(solves(SOLVERS[name].make, SYSTEMS[system], dtype, RTOL[dtype]))


@pytest.mark.parametrize("system", sorted(ALL))
@EACH
def test_never_claims_falsely(name: str, system: str) -> None:
    """Fails for a solver that trusts its recursive residual: beyond its class, and beyond what rounding allows."""
    limit = {"max_iterations": 40} if SOLVERS[name].iterative or name == "Auto" else {}
    for dtype, rtol in ((torch.float64, 1e-3), (torch.float64, 1e-15), (torch.float32, 1e-7)):
        make = lambda **s: SOLVERS[name].make(**limit, **s)  # noqa: E731
        assert_passes(claims_truly(make, SYSTEMS[system], dtype, rtol))


@DTYPES
@EACH
def test_the_scale_of_b_does_not_matter(name: str, dtype: torch.dtype) -> None:
    """Fails for an absolute tolerance, and for ‖b‖² that underflows in float32 (then 1e-30·b is taken for 0)."""
    assert_passes(is_indifferent_to_scale(SOLVERS[name].make, ordinary(name), dtype, RTOL[dtype]))


@DTYPES
@pytest.mark.parametrize("name", ["CG", "MINRES", "GMRES", "Dense", "Auto"])
def test_a_batch_of_unequal_conditioning(name: str, dtype: torch.dtype) -> None:
    """Fails for a batch stopped on its mean (or worst, or best) residual."""
    assert_passes(stops_per_system(SOLVERS[name].make, dtype))


@EACH
def test_a_non_finite_system_is_named_and_the_others_are_right(name: str) -> None:
    """Fails where a NaN passes for convergence, spreads by a sum over the batch, or makes LAPACK raise."""
    s = ordinary(name)
    A, b = s.matrix.expand(5, *s.matrix.shape).clone(), s.b.expand(5, *s.b.shape).clone()
    b[1] *= torch.nan
    b[2, 0] = torch.inf
    A[3, 0, 0] = torch.nan
    solution = SOLVERS[name].make(rtol=1e-9, on_failure="ignore")(DenseOperator(A, s.structure), b)
    assert solution.info.status.tolist() == [0, *[Status.NON_FINITE] * 3, 0]
    assert solution.info.converged.tolist() == [True, False, False, False, True]
    assert_solved(A[[0, 4]], solution.value[[0, 4]], b[[0, 4]], 1e-9)


@EACH
def test_an_overflowing_solution_is_not_a_success(name: str) -> None:
    """Fails where the residual is judged before ‖b‖ is multiplied back: x = 1e39 does not fit float32."""
    A = DenseOperator(1e-20 * torch.eye(3), "positive_definite")
    solution = SOLVERS[name].make(on_failure="ignore")(A, torch.full((3,), 1e19))
    assert not bool(solution.info.converged)
    # NormalCG's AᵀA = 1e-40 is zero in float32.
    assert int(solution.info.status) in (Status.NON_FINITE, Status.MAX_ITERATIONS, Status.BREAKDOWN)


@EACH_ITERATIVE
def test_x0_is_used(name: str) -> None:
    """Fails where x0 is dropped, or not scaled together with b."""
    s = ordinary(name)
    solver = SOLVERS[name].make(rtol=1e-6)
    b = 1e-5 * s.b
    from_zero, from_near, from_there = (
        solver(s.operator(), b, x0).info.iterations for x0 in (None, 1e-5 * (s.x + 1e-4), 1e-5 * s.x)
    )
    assert int(from_there) == 0
    assert int(from_near) < int(from_zero)


def test_b_of_zero_is_solved_by_zero_even_from_x0() -> None:
    s = SYSTEMS["definite"]
    solution = idf.CG()(s.operator(), torch.zeros_like(s.b), s.x)
    assert torch.equal(solution.value, torch.zeros_like(s.b))
    assert int(solution.info.iterations) == 0


@EACH_ITERATIVE
def test_atol_is_a_second_way_to_be_done(name: str) -> None:
    """Fails where atol is compared with the relative residual, or added to rtol."""
    s = ordinary(name)
    solution = SOLVERS[name].make(rtol=0.0, atol=0.03)(s.operator(), 10 * s.b)
    residual = float((10 * s.b - s.matrix @ solution.value).norm())
    assert 1e-4 < residual <= 0.03  # reached, and not much more than asked for
    assert int(SOLVERS[name].make(atol=100 * float(s.b.norm()))(s.operator(), s.b).info.iterations) == 0


@EACH_ITERATIVE
def test_max_iterations_is_kept_by_each_system(name: str) -> None:
    """Fails for a limit off by one, a limit on the sum over the batch, or a report that is not of the value given."""
    s = SYSTEMS["definite"]
    eye = torch.eye(30, dtype=torch.float64)
    A, b = torch.stack([s.matrix, 2 * eye]), s.b.expand(2, 30)
    solution = SOLVERS[name].make(max_iterations=3, on_failure="ignore")(DenseOperator(A, s.structure), b)
    assert solution.info.iterations.tolist() == [3, 1]
    assert solution.info.status.tolist() == [Status.MAX_ITERATIONS, Status.CONVERGED]
    residual, rounding = true_residual(A, solution.value, b)
    assert bool(((solution.info.residual_norm - residual).abs() <= 1e-9 + rounding).all())


def test_cg_names_negative_curvature_and_auto_goes_on() -> None:
    """Fails for a step frozen at negative curvature; per system, above Auto's size for dense solves."""
    definite, indefinite = spread(9, 80), torch.linspace(-1, 5, 80, dtype=torch.float64) + 0.01
    A, b = rotated(torch.stack([definite, indefinite]), 1), random(1, 2, 80)
    operator = DenseOperator(A, "symmetric")
    cg = idf.CG(on_failure="ignore")(operator, b)
    assert cg.info.status.tolist() == [Status.CONVERGED, Status.INDEFINITE]
    assert_solved(A[0], cg.value[0], b[0], 1e-6)
    auto = idf.Auto()(operator, b)
    assert auto.info.method == "Auto: MINRES, as CG met negative curvature"
    assert_solved(A, auto.value, b, 1e-6)
    assert int(auto.info.iterations[0]) == int(cg.info.iterations[0])


@pytest.mark.parametrize(
    ("structure", "n", "method"),
    [("positive_definite", 80, "CG"), ("symmetric", 80, "CG"), ("general", 80, "GMRES"), ("general", 9, "Dense")],
)
def test_auto_chooses_by_structure_and_size(structure: Any, n: int, method: str) -> None:
    A = DenseOperator(2 * torch.eye(n, dtype=torch.float64), structure)
    assert idf.Auto()(A, random(1, n)).info.method.startswith(f"Auto: {method}")


def test_auto_uses_the_structure_of_the_operator() -> None:
    d = spread(10, 200)
    matrix = second_difference(200)
    for A, method in (
        (DiagonalOperator(d), "Auto: Dense, as DiagonalOperator is solved as it is"),
        (SparseOperator(matrix.to_sparse()), "Auto: Dense, as SparseOperator is solved as it is"),
        (LowRankUpdate(DiagonalOperator(d), random(1, 200, 2)), "Auto: Dense, as LowRankUpdate is solved as it is"),
        (LowRankUpdate(DenseOperator(matrix, "symmetric"), random(1, 200, 2)), "Auto: CG, as A is symmetric"),
        (DenseOperator(random(2, 300, 200)), "Auto: LSMR, as A is rectangular, (300, 200)"),
    ):
        b = A @ random(3, 200)
        solution = idf.Auto(rtol=1e-8)(A, b)
        assert solution.info.method == method
        assert_solved(A.to_dense(), solution.value, b, 1e-8)


@pytest.mark.parametrize("name", ["MINRES", "GMRES", "Dense"])
@pytest.mark.parametrize("eigenvalues", [(0, 1, 2, 3), (0, 0, 0, 0)], ids=["inconsistent", "zero"])
def test_a_singular_system_without_solution_breaks_down(name: str, eigenvalues: tuple[float, ...]) -> None:
    """Fails where a column that is zero up to rounding is divided by: x of 1e17, or a residual of 0 · anything."""
    b = vector(1, 1, 1, 1)
    solution = SOLVERS[name].make(on_failure="ignore")(DenseOperator(torch.diag(vector(*eigenvalues)), "symmetric"), b)
    assert int(solution.info.status) == Status.BREAKDOWN
    assert float(solution.value.abs().max()) < 10
    # What is left is the part of b that no x reaches, and the report says so.
    unreachable = (sum(e == 0 for e in eigenvalues) / 4) ** 0.5
    torch.testing.assert_close(float(solution.info.residual_norm), unreachable)


def test_a_system_that_is_singular_up_to_rounding_is_reported_by_all() -> None:
    """Rotated, its zero eigenvalue is 1e-16; Dense gives the least-squares solution of minimum norm."""
    A, b = rotated(vector(0, 1, 2, 3), 2), random(3, 4)
    for name in ("CG", "MINRES", "GMRES", "GMRES(5)", "Dense", "Auto"):
        solution = SOLVERS[name].make(on_failure="ignore")(DenseOperator(A, "symmetric"), b)
        assert not bool(solution.info.converged), name
        assert int(solution.info.status) != Status.CONVERGED
    for structure in ("symmetric", "general"):
        x = idf.Dense(on_failure="ignore")(DenseOperator(A, structure), b).value
        torch.testing.assert_close(x, torch.linalg.pinv(A, hermitian=True) @ b, rtol=1e-9, atol=1e-12)


def test_a_restart_that_gains_nothing_ends_gmres() -> None:
    """On the cyclic shift a cycle of fewer than n steps does not lower the residual, nor would any later one."""
    s, b = SYSTEMS["cyclic shift"], torch.eye(12, dtype=torch.float64)[0]
    info = idf.GMRES(restart=5, on_failure="ignore")(s.operator(), b).info
    assert int(info.status) == Status.STAGNATED
    assert int(info.iterations) == 5
    assert bool(idf.GMRES(restart=12)(s.operator(), b).info.converged)


def test_what_rounding_leaves_is_not_called_singular() -> None:
    """Poisson in float32 beyond its accuracy: no solver may claim it, nor may Dense blame the matrix."""
    s = SYSTEMS["Poisson"]
    for name in ("CG", "MINRES", "GMRES", "Dense"):
        info = SOLVERS[name].make(rtol=1e-7, on_failure="ignore")(s.operator(torch.float32), s.b.float()).info
        assert int(info.status) == Status.STAGNATED, name


def test_a_restart_of_one_system_leaves_the_others_alone() -> None:
    """Fails where the true residual's check restarts the whole batch: others then move on, or lose their status."""
    drifting, indefinite = 1 / spread(1e7, 12), torch.cat([spread(5, 11), vector(-1)])
    A, b = rotated(torch.stack([drifting, indefinite, torch.ones_like(drifting)]), 3), random(4, 3, 12)
    solver = idf.CG(rtol=1e-11, max_iterations=1000, on_failure="ignore")
    together = solver(DenseOperator(A, "symmetric"), b).info
    assert int(together.status[0]) == Status.STAGNATED  # so that there was a restart
    for i in (1, 2):
        alone = solver(DenseOperator(A[i], "symmetric"), b[i]).info
        assert int(together.status[i]) == int(alone.status)
        assert int(together.iterations[i]) == int(alone.iterations)


@EACH
def test_a_function_operator_that_knows_no_dtype(name: str) -> None:
    """ "None: as the vector it meets": fails where a basis or a preconditioner is made in torch's default dtype."""
    s = ordinary(name)
    A = FunctionOperator(lambda v: v @ s.matrix.mT, len(s.b), structure=s.structure)
    assert_solved(s.matrix, SOLVERS[name].make(rtol=1e-9)(A, s.b).value, s.b, 1e-9)


@EACH
def test_nothing_to_solve(name: str) -> None:
    """No unknowns, and no systems, without a matrix at hand."""
    none = SOLVERS[name].make()(FunctionOperator(lambda v: 2 * v, 0, structure="positive_definite"), torch.ones(2, 0))
    assert none.value.shape == (2, 0)
    assert none.info.converged.tolist() == [True, True]
    empty = SOLVERS[name].make()(FunctionOperator(lambda v: 2 * v, 3, structure="positive_definite"), torch.ones(0, 3))
    assert empty.value.shape == (0, 3)


@pytest.mark.parametrize(
    "name", ["CG", "MINRES", "GMRES", "BiCGStab", "NormalCG", "LSMR", "SciPy: bicgstab", "Dense", "Auto"]
)
def test_complex_systems(name: str) -> None:
    """Fails where an inner product or a transpose does not conjugate."""
    M = random(1, 6, 6, dtype=torch.complex128)
    A, b = M @ M.mH + torch.eye(6), random(2, 2, 6, dtype=torch.complex128)
    x = SOLVERS[name].make(rtol=1e-10)(DenseOperator(A, "positive_definite"), b).value
    torch.testing.assert_close(x, torch.linalg.solve(A, b.mT).mT, rtol=1e-7, atol=1e-9)


def test_neumann_sums_exactly_its_terms() -> None:
    s = SYSTEMS["contraction"]
    want, power = torch.zeros_like(s.b), s.b
    for _ in range(7):
        want, power = want + 0.9 * power, power - 0.9 * s.matrix @ power
    got = idf.Neumann(terms=7, scale=0.9, on_failure="ignore")(s.operator(), s.b)
    torch.testing.assert_close(got.value, want, rtol=1e-13, atol=0)
    assert (int(got.info.iterations), int(got.info.status)) == (7, Status.MAX_ITERATIONS)


def test_neumann_estimates_its_scale() -> None:
    """scale=None must contract far from the identity too, here at ‖A‖ = 1e4, and per system."""
    A, b = torch.stack([1e4 * torch.eye(3), torch.diag(torch.tensor([1e-4, 2e-4, 1e-4]))]).double(), random(1, 2, 3)
    x = idf.Neumann(terms=60)(DenseOperator(A), b).value
    assert_solved(A, x, b, 1e-6)


@pytest.mark.parametrize("problem", KNOWN.values(), ids=KNOWN)
def test_the_banks_jacobians_come_out(problem: Any) -> None:
    """∂x/∂θ = −A⁻¹B for every condition of the bank: the bank, the Jacobian operator and the solvers agree."""
    torch.testing.assert_close(problem.residual(problem.x, problem.theta), 0 * problem.x, rtol=0, atol=1e-13)
    B = torch.func.jacrev(problem.residual, 1)(problem.x, problem.theta)
    A = JacobianOperator(lambda x: problem.residual(x, problem.theta), problem.x, problem.structure)
    for solver in (idf.GMRES(rtol=1e-12), idf.Dense(rtol=1e-12)):
        with torch.no_grad():
            columns = [solver(A, -column).value for column in B.unbind(-1)]
        torch.testing.assert_close(torch.stack(columns, -1), problem.jacobian, rtol=1e-9, atol=1e-11)


def test_poisson_is_the_textbooks() -> None:
    """The bank's own table: a wrong matrix would be solved as well as the right one."""
    i = torch.arange(1, 101, dtype=torch.float64)
    assert torch.equal(second_difference(100) @ (i * (101 - i) / 2), torch.ones(100, dtype=torch.float64))
    x = idf.CG(rtol=RTOL[torch.float64])(SYSTEMS["Poisson"].operator(), SYSTEMS["Poisson"].b).value
    torch.testing.assert_close(x, i * (101 - i) / 2, rtol=1e-8, atol=0)


def test_every_solve_is_recorded() -> None:
    with idf.record() as history:
        idf.CG()(SYSTEMS["scalar"].operator(), SYSTEMS["scalar"].b)
    assert [(solve.kind, solve.info.method) for solve in history] == [("linear", "CG")]


def test_products_are_counted() -> None:
    """Fails where a product happens outside of the count: the check of the true residual, a dense sweep."""
    s, calls = SYSTEMS["definite"], [0]

    def matvec(v: Tensor) -> Tensor:
        calls[0] += 1
        return v @ s.matrix.mT

    A = FunctionOperator(matvec, 30, structure="positive_definite", dtype=torch.float64)
    for solver in (idf.CG(), idf.MINRES(), idf.GMRES(), idf.Dense(), idf.Neumann(5, on_failure="ignore")):
        with torch.no_grad():
            calls[0] = 0
            assert solver(A, s.b).info.matvecs == calls[0], solver
