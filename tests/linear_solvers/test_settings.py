"""The settings: policies, checks, preconditioners, warm start; and a callable in the place of a solver."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import implicitdiff as idf
from implicitdiff.inner_solvers import LBFGS
from implicitdiff.inner_solvers.base import as_inner_solver
from implicitdiff.linear_solvers.base import as_linear_solver
from implicitdiff.operators import DenseOperator
from implicitdiff.preconditioners import Jacobi

from ..problems import SYSTEMS, random, rotated, spread, vector, with_singular_values
from .table import assert_solved

# ------------------------------------------------------------------------------------------- what failures do


def test_a_failure_warns_with_solver_numbers_and_remedy() -> None:
    s = SYSTEMS["Poisson"]
    with pytest.warns(idf.ConvergenceWarning) as caught:
        idf.CG(max_iterations=2)(s.operator(), s.b)
    message = str(caught[0].message)
    for words in ("CG did not solve", "MAX_ITERATIONS", "at most 2 iterations", "residual up to", "raise max_iter"):
        assert words in message


def test_only_the_failed_systems_are_counted() -> None:
    A = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, 2.0, -3.0]))])
    with pytest.warns(idf.ConvergenceWarning, match=r"for 1 of 2 systems: INDEFINITE .* use MINRES"):
        idf.CG()(DenseOperator(A, "symmetric"), torch.ones(2, 3))


def test_a_failure_raises_or_is_ignored() -> None:
    s = SYSTEMS["Poisson"]
    with pytest.raises(idf.ConvergenceError, match="CG did not solve"):
        idf.CG(max_iterations=2, on_failure="raise")(s.operator(), s.b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not bool(idf.CG(max_iterations=2, on_failure="ignore")(s.operator(), s.b).info.converged)


def test_neumanns_remedy_is_one_of_its_own_settings() -> None:
    with pytest.warns(idf.ConvergenceWarning, match="terms"):
        idf.Neumann(terms=2)(SYSTEMS["contraction"].operator(), SYSTEMS["contraction"].b)


# ---------------------------------------------------------------------------------------- what is not accepted

EYE = DenseOperator(torch.eye(2))


def of_one(A: idf.LinearOperator) -> Callable[[Tensor], Tensor]:
    """A preconditioner of another size."""
    return lambda v: v[..., :1]


class Own(idf.IterativeLinearSolver):
    """Starts with a state of ones in the given fields and shapes."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes = shapes

    def start(self, A: Any, b: Tensor, x0: Tensor | None) -> Any:
        State = namedtuple("State", self.shapes)
        return State(**{name: torch.ones(shape) for name, shape in self.shapes.items()})

    def step(self, A: Any, state: Any) -> Any:
        return state


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: idf.CG(rtol=-1.0), ValueError, "rtol is -1.0"),
        (lambda: idf.CG(atol=float("nan")), ValueError, "atol is nan"),
        (lambda: idf.CG(max_iterations=0), ValueError, "max_iterations is 0"),
        (lambda: idf.CG(max_iterations=2.5), ValueError, "max_iterations is 2.5"),
        (lambda: idf.CG(on_failure="shout"), ValueError, "on_failure is 'shout'"),
        (lambda: idf.CG(tolerance=1.0), TypeError, "tolerance"),
        (lambda: idf.Dense(max_iterations=3), TypeError, "max_iterations"),
        (lambda: idf.CG(preconditioner=3), TypeError, "preconditioner is 3"),
        (lambda: idf.GMRES(restart=0), ValueError, "restart is 0"),
        (lambda: idf.Neumann(terms=0), ValueError, "0"),
        (lambda: idf.Neumann(terms=None), ValueError, "terms"),
        (lambda: idf.Neumann(terms=3, scale=-1.0), ValueError, "scale is -1.0"),
        (lambda: idf.CG()(torch.eye(2), torch.ones(2)), TypeError, "DenseOperator"),
        (lambda: idf.CG()(EYE, [1.0, 1.0]), TypeError, "b is"),
        (lambda: idf.CG()(EYE, torch.ones(2, dtype=torch.int64)), TypeError, "floating-point"),
        (lambda: idf.CG()(EYE, torch.ones(3)), ValueError, r"b must be \(\*batch, 2\)"),
        (lambda: idf.CG()(EYE, torch.tensor(1.0)), ValueError, r"b has the shape \(\)"),
        (lambda: idf.CG()(EYE, torch.ones(2).double()), ValueError, "float64"),
        (lambda: idf.CG()(EYE, torch.ones(2), torch.ones(3)), ValueError, "x0 has the shape"),
        (lambda: idf.CG()(EYE, torch.ones(2), [1.0, 1.0]), TypeError, "x0"),
        (lambda: idf.CG()(DenseOperator(torch.eye(2).expand(3, 2, 2)), torch.ones(2)), ValueError, "expand b"),
        (lambda: idf.CG()(DenseOperator(torch.eye(2).expand(3, 2, 2)), torch.ones(4, 2)), ValueError, "batch"),
        (lambda: as_linear_solver(idf.CG, idf.Auto), TypeError, r"did you mean CG\(\)\?"),
        (lambda: as_linear_solver("cg", idf.Auto), TypeError, "'cg'"),
        (lambda: as_linear_solver(LBFGS(), idf.Auto), TypeError, r"did you mean inner_solver=LBFGS\(\)\?"),
        (lambda: as_linear_solver(LBFGS, idf.Auto), TypeError, r"did you mean inner_solver=LBFGS\(\)\?"),
        (lambda: as_inner_solver(idf.CG, LBFGS), TypeError, r"did you mean linear_solver=CG\(\)\?"),
        (lambda: idf.CG(rtol="1e-3"), ValueError, "rtol is '1e-3'"),
        (lambda: idf.CG(preconditioner=Jacobi), TypeError, r"did you mean Jacobi\(\)\?"),
        (lambda: idf.CG(preconditioner=lambda A: 3)(EYE, torch.ones(2)), idf.ImplicitDiffError, "returned int for A"),
        (lambda: idf.CG(preconditioner=of_one)(EYE, torch.ones(2)), idf.ImplicitDiffError, r"of_one made .*\(1,\) of"),
        (lambda: Own(x=(2,))(EYE, torch.ones(2)), idf.ImplicitDiffError, "Own.start returned .*, no tensor res"),
        (lambda: Own(residual_norm=())(EYE, torch.ones(2)), idf.ImplicitDiffError, "no tensor x.*at least x of shape"),
        (lambda: Own(x=(2,), residual_norm=(2,))(EYE, torch.ones(2)), idf.ImplicitDiffError, r"= \(2,\) and .* = \(\)"),
        (lambda: Own(x=(2,), residual_norm=())(EYE, torch.ones(3, 2)), idf.ImplicitDiffError, r"\(3, 2\) and .*\(3,\)"),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_whole_numbers_become_integers() -> None:
    """1e3 is a natural way to write a limit, and a float would fail later, in a range."""
    for solver in (idf.CG(max_iterations=1e3), idf.Auto(max_iterations=1e3), LBFGS(max_iterations=1e3)):
        assert type(solver.max_iterations) is int
    assert type(LBFGS(history=5.0).history) is type(idf.Neumann(3.0).terms) is int


def test_a_state_of_the_right_shapes_is_accepted() -> None:
    info = Own(x=(3, 2), residual_norm=(3,)).solve(EYE, torch.ones(3, 2)).info
    assert info.statuses == [idf.Status.MAX_ITERATIONS] * 3


def test_a_function_that_is_not_exact_is_told_so() -> None:
    """Neither that A may be singular, nor of a setting that a function does not have."""
    layer = idf.RootLayer(lambda x, t: 2 * x - t, linear_solver=lambda A, b: 0.51 * b)
    with pytest.warns(idf.ConvergenceWarning) as caught:
        layer(torch.zeros(3), torch.ones(3, requires_grad=True)).sum().backward()
    message = str(caught[0].message)
    assert "its answer does not solve A u = b: relative residual up to 2.0e-02" in message
    assert "A subclass of LinearSolver in place of the function takes settings" in message
    assert "singular" not in message
    assert "makes this an error" not in message


def test_a_structure_declared_wrongly_is_a_cause_of_breakdown() -> None:
    """A is not singular, but the symmetric matrix with its lower triangle is."""
    A = DenseOperator(torch.tensor([[1.0, 5.0], [1.0, 1.0]]), "symmetric")
    with pytest.warns(idf.ConvergenceWarning, match="BREAKDOWN.*the declared structure is wrong: implicitdiff.check"):
        idf.Dense()(A, torch.tensor([1.0, 0.0]))


def test_settings_are_printed() -> None:
    assert repr(idf.CG(rtol=1e-3, max_iterations=7)) == "CG(rtol=0.001, atol=0.0, on_failure='warn', max_iterations=7)"


# -------------------------------------------------------------------------------------------- preconditioners


def badly_scaled(A: Tensor) -> Tensor:
    scale = spread(100, len(A))
    return scale.unsqueeze(-1) * A * scale


@pytest.mark.parametrize("solver", [idf.CG, idf.MINRES, idf.GMRES])
def test_a_preconditioner_saves_iterations(solver: Any) -> None:
    """Fails where M is applied on the wrong side, or the preconditioned residual is taken for the true one."""
    A, b = badly_scaled(rotated(spread(2, 30), 1)), random(2, 30)
    plain = solver(max_iterations=60, on_failure="ignore")(DenseOperator(A, "symmetric"), b)
    helped = solver(max_iterations=60, preconditioner=Jacobi())(DenseOperator(A, "symmetric"), b)
    assert int(helped.info.iterations) < 0.7 * int(plain.info.iterations)
    assert_solved(A, helped.value, b, 1e-6)


class GaussSeidel:
    """M = the lower triangle of A: not symmetric, so that Mᵀ in its place does not help. Keeps what it was given."""

    def __init__(self) -> None:
        self.matrices: list[Tensor] = []

    def __call__(self, A: idf.LinearOperator) -> Callable[[Tensor], Tensor]:
        self.matrices.append(A.to_dense())
        M = self.matrices[-1].tril()
        return lambda v: torch.linalg.solve_triangular(M, v.unsqueeze(-1), upper=False).squeeze(-1)


def test_a_transposed_system_is_preconditioned_by_its_own() -> None:
    """Of Aᵀ the preconditioner is built, in a direct call and in a backward pass; fails for that of A."""
    n = 20
    A = torch.eye(n, dtype=torch.float64) + 3 * with_singular_values(spread(10, n) / 10, 1).tril(-1)
    A, b = A + 0.01 * random(3, n, n), random(2, n)
    seidel = GaussSeidel()
    solver = idf.GMRES(rtol=1e-10, preconditioner=seidel)
    plain, helped = (s(DenseOperator(A).T, b) for s in (idf.GMRES(rtol=1e-10), solver))
    assert torch.equal(seidel.matrices[0], A.mT)
    assert_solved(A.mT, helped.value, b, 1e-10)
    assert int(helped.info.iterations) < int(plain.info.iterations)

    b = b.requires_grad_()
    solver(DenseOperator(A), b).value.sum().backward()
    assert torch.equal(seidel.matrices[-1], A.mT)
    assert_solved(A.mT, b.grad, torch.ones(n, dtype=torch.float64), 1e-10)


def test_a_batch_is_preconditioned_system_by_system() -> None:
    A = torch.stack([badly_scaled(rotated(spread(2, 12), 1)), rotated(spread(2, 12), 2)])
    b = random(3, 2, 12)
    x = idf.CG(rtol=1e-9, preconditioner=Jacobi())(DenseOperator(A, "positive_definite"), b).value
    assert_solved(A, x, b, 1e-9)


def test_jacobi_leaves_zeros_and_signs_alone() -> None:
    """|d| for symmetric operators: M must be positive definite."""
    A = torch.diag(vector(2, -4, 0))
    assert torch.equal(Jacobi()(DenseOperator(A, "symmetric"))(vector(2, 4, 3)), vector(1, 1, 3))
    assert torch.equal(Jacobi()(DenseOperator(A))(vector(2, 4, 3)), vector(1, -1, 3))


# -------------------------------------------------------------------------------------------------- warm start


@pytest.mark.parametrize("solver", [idf.CG, idf.MINRES, idf.GMRES])
def test_a_warm_start_saves_iterations(solver: Any) -> None:
    """For a b nearby, and for the same b at another scale: fails where the start is not scaled with b."""
    s, warm = SYSTEMS["definite"], solver(warm_start=True)
    first = int(warm(s.operator(), s.b).info.iterations)
    assert int(warm(s.operator(), s.b * 1.0001).info.iterations) < first / 2
    for factor in (1e-30, 1e30):
        again = warm(s.operator(), factor * s.b)
        assert int(again.info.iterations) < first / 2
        assert_solved(s.matrix, again.value, factor * s.b, 1e-6)


def test_a_warm_start_is_dropped_where_it_does_not_fit() -> None:
    """Another n, another batch, another dtype."""
    warm, small, s = idf.CG(warm_start=True), SYSTEMS["clustered"], SYSTEMS["definite"]
    for system, b in ((s, s.b), (small, small.b), (small, small.b.expand(3, -1)), (small, small.b.float())):
        assert bool(warm(system.operator(b.dtype), b).info.converged.all())


def test_a_failed_solve_does_not_spoil_the_next() -> None:
    """CG on a singular system without solution runs to 1e290; the next solve starts afresh."""
    warm = idf.CG(warm_start=True, on_failure="ignore")
    b = vector(1, 1, 1, 1)
    assert not bool(warm(DenseOperator(torch.diag(vector(0, 1, 2, 3)), "symmetric"), b).info.converged)
    assert bool(warm(DenseOperator(torch.diag(vector(1, 1, 2, 3)), "symmetric"), b).info.converged)


def test_a_warm_start_outlives_a_vmap() -> None:
    """Fails where a transformed tensor is kept."""
    s, warm = SYSTEMS["definite"], idf.CG(warm_start=True)
    bs = torch.stack([s.b, 2 * s.b])
    first = vmap(lambda b: warm(s.operator(), b).value)(bs)
    assert_solved(s.matrix, first, bs, 1e-6)
    assert warm(s.operator(), bs).info.iterations.tolist() == [0, 0]


# ------------------------------------------------------------------------------------------ any callable at all


def test_a_callables_residual_is_checked() -> None:
    """(A, b) -> x: a wrong x is reported under the callable's name."""

    def by_hand(A: idf.LinearOperator, b: Tensor) -> Tensor:
        return torch.linalg.solve(A.to_dense(), b)

    def half(A: idf.LinearOperator, b: Tensor) -> Tensor:
        return by_hand(A, b) / 2

    s = SYSTEMS["general"]
    assert bool(as_linear_solver(by_hand, idf.Auto)(s.operator(), s.b).info.converged)
    with pytest.warns(idf.ConvergenceWarning, match=r"half did not solve .* residual up to 5.0e-01"):
        as_linear_solver(half, idf.Auto)(s.operator(), s.b)
    with pytest.raises(idf.ImplicitDiffError, match="must return a tensor of the shape of b"):
        as_linear_solver(lambda A, b: b[:1], idf.Auto)(s.operator(), s.b)


def test_the_default_tolerance_of_auto_is_within_reach_of_the_dtype() -> None:
    """A tolerance that somebody gave or set, as a loop around a layer does, is kept in any dtype."""
    b = random(0, 100)
    A = rotated(torch.logspace(0, 2, 100, dtype=torch.float64))

    def iterations(solver: idf.Auto, dtype: torch.dtype) -> int:
        info = solver(DenseOperator(A.to(dtype), "positive_definite"), b.to(dtype)).info
        assert bool(info.converged)
        return int(info.iterations)

    for dtype, reachable in ((torch.float32, 1.2e-5), (torch.float64, 1e-6)):
        assert iterations(idf.Auto(), dtype) == iterations(idf.Auto(rtol=reachable), dtype)
        later = idf.Auto()
        later.rtol = 1e-3
        assert iterations(later, dtype) == iterations(idf.Auto(rtol=1e-3), dtype) < iterations(idf.Auto(), dtype)
    absolute = idf.Auto()
    absolute.rtol, absolute.atol = 0.0, 1e-12
    with pytest.warns(idf.ConvergenceWarning):
        absolute(DenseOperator(A.float(), "positive_definite"), b.float())
