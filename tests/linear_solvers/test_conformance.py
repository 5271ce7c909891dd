"""One table of solvers and systems: what every linear solver must keep, whatever its method.

The residual is always computed here; what a solver says of itself is held against it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jacrev, vmap

import implicitdiff as idf
from implicitdiff.linear_solvers.base import initial
from implicitdiff.operators import DenseOperator, FunctionOperator
from implicitdiff.preconditioners import Jacobi

from ..problems import SYSTEMS, System, random, rotated


class RichardsonState(NamedTuple):
    x: Tensor
    residual: Tensor
    residual_norm: Tensor


class Richardson(idf.IterativeLinearSolver):
    """A subclass as a user writes it."""

    def start(self, A: idf.LinearOperator, b: Tensor, x0: Tensor | None) -> RichardsonState:
        x, r = initial(A, b, x0)  # type: ignore[arg-type]
        return RichardsonState(x, r, torch.linalg.vector_norm(r, dim=-1))

    def step(self, A: idf.LinearOperator, state: RichardsonState) -> RichardsonState:
        r = state.residual - 0.5 * A(state.residual)
        return RichardsonState(state.x + 0.5 * state.residual, r, torch.linalg.vector_norm(r, dim=-1))


DEFINITE = {"definite", "repeated eigenvalues", "poisson", "scalar"}
SYMMETRIC = DEFINITE | {"indefinite", "T² − √3 I", "singular, consistent"}
ALL = set(SYSTEMS)
# name -> (a maker, the systems that it claims to solve)
SOLVERS: dict[str, tuple[Callable[..., idf.LinearSolver], set[str]]] = {
    "CG": (idf.CG, DEFINITE),
    "CG, Jacobi": (lambda **s: idf.CG(preconditioner=Jacobi(), **s), DEFINITE),
    "MINRES": (idf.MINRES, SYMMETRIC),
    "MINRES, Jacobi": (lambda **s: idf.MINRES(preconditioner=Jacobi(), **s), SYMMETRIC - {"singular, consistent"}),
    # Without a restart it solves everything; the singular systems lie beyond what it promises.
    "GMRES": (lambda **s: idf.GMRES(restart=100, **s), ALL - {"singular, consistent"}),
    "GMRES(5)": (lambda **s: idf.GMRES(restart=5, **s), {"general", "contraction", "scalar", "repeated eigenvalues"}),
    "Dense": (idf.Dense, ALL),
    "Auto": (idf.Auto, ALL),
    "Neumann": (lambda **s: idf.Neumann(terms=400, scale=1.0, **s), {"contraction"}),
    "Richardson": (Richardson, {"contraction", "general"}),
}
TABLE = [(name, system) for name, (_, claimed) in SOLVERS.items() for system in sorted(claimed)]
RTOL = {torch.float64: 1e-10, torch.float32: 1e-3}
"""In float32 the Poisson system cannot be solved further than ε·‖A‖‖x‖/‖b‖ = 4e-4."""


def relative_residual(A: Tensor, x: Tensor, b: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(b, dim=-1)
    return torch.linalg.vector_norm(b - (A @ x.unsqueeze(-1)).squeeze(-1), dim=-1) / torch.where(norm > 0, norm, 1)


def holds(solver: idf.LinearSolver, system: System, dtype: torch.dtype, A: Tensor, b: Tensor) -> None:
    """Solved, said to be solved, and both true in the asked tolerance (and a rounding of the check itself)."""
    solution = solver(DenseOperator(A, system.structure), b)
    residual = relative_residual(A, solution.value, b)
    assert bool(solution.info.converged.all()), solution.info.summary()
    assert float(residual.max()) <= RTOL[dtype] * 1.01 + 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "system"), TABLE)
def test_solves_what_it_claims(name: str, system: str, dtype: torch.dtype) -> None:
    """Plain, transposed, in a batch of three that differ, and under vmap."""
    s = SYSTEMS[system]
    solver = SOLVERS[name][0](rtol=RTOL[dtype], on_failure="ignore")
    A, b = s.matrix.to(dtype), s.b.to(dtype)
    holds(solver, s, dtype, A, b)
    if "singular" not in system:
        holds(solver, s, dtype, A.mT.contiguous(), b)
    batch, bs = torch.stack([A, 1.5 * A, A]), torch.stack([b, b.flip(0) if "singular" not in system else 2 * b, 3 * b])
    if name not in ("Neumann", "Richardson"):  # 1.5 · A is outside of what these two claim
        holds(solver, s, dtype, batch, bs)
    x = vmap(lambda b: solver(DenseOperator(A, s.structure), b).value)(bs[::2])
    assert float(relative_residual(A, x, bs[::2]).max()) <= RTOL[dtype] * 1.01 + 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("system", sorted(ALL))
@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_never_a_false_success(name: str, system: str, dtype: torch.dtype) -> None:
    """Whatever the system, what is said to have converged has; for tolerances beyond rounding too."""
    s = SYSTEMS[system]
    A, b = s.matrix.to(dtype), torch.stack([s.b, random(40, len(s.b))]).to(dtype)
    for rtol in (1e-3, 1e-9, 1e-15):
        solution = SOLVERS[name][0](rtol=rtol, on_failure="ignore")(DenseOperator(A, s.structure), b)
        # Computed in double precision: the solver judged in its own.
        residual = relative_residual(A.double(), solution.value.double(), b.double())
        slack = (
            4 * torch.finfo(dtype).eps * (1 + torch.linalg.vector_norm(solution.value, dim=-1) * A.abs().sum(-1).max())
        )
        assert not bool((solution.info.converged & ~(residual <= rtol + slack)).any()), solution.info


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_scales_do_not_matter(name: str) -> None:
    """b = 0 gives exactly 0 in 0 iterations, and 1e-30·b and 1e30·b the same digits, within one batch."""
    s = SYSTEMS["contraction" if name in ("Neumann", "Richardson", "GMRES(5)") else "repeated eigenvalues"]
    b = torch.stack([s.b, 0 * s.b, 1e-30 * s.b, 1e30 * s.b])
    solution = SOLVERS[name][0](rtol=1e-10)(s.operator(), b)
    assert torch.equal(solution.value[1], 0 * s.b)
    assert int(solution.info.iterations[1]) == 0
    want = torch.linalg.solve(s.matrix, s.b)
    for i, factor in ((0, 1.0), (2, 1e-30), (3, 1e30)):
        torch.testing.assert_close(solution.value[i] / factor, want, rtol=1e-7, atol=1e-9)


ITERATIVE = {"CG": idf.CG, "MINRES": idf.MINRES, "GMRES": idf.GMRES, "Richardson": Richardson}


@pytest.mark.parametrize("name", ITERATIVE)
def test_a_batch_of_unequal_conditioning_stops_system_by_system(name: str) -> None:
    """Condition numbers 1 … 1e6: each system takes the steps it takes alone; a mean residual would not."""
    spectra = torch.stack([torch.logspace(0, -k / 2, 12, dtype=torch.float64) for k in range(0, 13, 4)])
    A, b = rotated(spectra, 3), random(5, 4, 12)
    solver = ITERATIVE[name](rtol=1e-8, max_iterations=2000, on_failure="ignore")
    together = solver(DenseOperator(A, "positive_definite"), b)
    for i in range(4):
        alone = solver(DenseOperator(A[i], "positive_definite"), b[i])
        assert abs(int(together.info.iterations[i]) - int(alone.info.iterations)) <= 2
        assert int(together.info.status[i]) == int(alone.info.status)
    if name != "Richardson":
        assert bool(together.info.converged.all())
    assert int(together.info.iterations[0]) <= int(together.info.iterations[-1])


@pytest.mark.parametrize(
    ("solver", "reference", "system"),
    [
        (idf.CG, "cg", "definite"),
        (idf.CG, "cg", "poisson"),
        (idf.MINRES, "minres", "indefinite"),
        (idf.MINRES, "minres", "T² − √3 I"),
        (idf.GMRES, "gmres", "general"),
    ],
)
def test_takes_as_many_iterations_as_scipy(
    solver: Callable[..., idf.LinearSolver], reference: str, system: str
) -> None:
    s, rtol = SYSTEMS[system], 1e-8
    count = [0]
    extra = {"restart": 30, "callback_type": "pr_norm"} if reference == "gmres" else {}
    solve = getattr(scipy.sparse.linalg, reference)
    if reference == "minres":
        # SciPy stops MINRES by ‖r‖ ≤ rtol·‖A‖‖x‖: count its steps to our criterion instead.
        def note(x: object) -> None:
            r = s.b - s.matrix @ torch.as_tensor(x)
            count[0] += float(r.norm()) > rtol * float(s.b.norm())

        solve(s.matrix.numpy(), s.b.numpy(), rtol=1e-14, callback=note)
        count[0] += 1
    else:
        solve(s.matrix.numpy(), s.b.numpy(), rtol=rtol, callback=lambda _: count.__setitem__(0, count[0] + 1), **extra)
    assert abs(int(solver(rtol=rtol)(s.operator(), s.b).info.iterations) - count[0]) <= 2


def test_cg_says_indefinite_and_auto_goes_on_with_minres() -> None:
    A, b = rotated(torch.linspace(-1, 5, 80, dtype=torch.float64).add(0.01), 1), random(1, 80)
    cg = idf.CG(on_failure="ignore")(DenseOperator(A, "symmetric"), b)
    assert int(cg.info.status) == idf.Status.INDEFINITE
    assert not bool(cg.info.converged)
    auto = idf.Auto()(DenseOperator(A, "symmetric"), b)
    assert "MINRES" in auto.info.method
    assert float(relative_residual(A, auto.value, b)) <= 1e-6
    assert int(auto.info.iterations) > int(cg.info.iterations)


def test_auto_chooses_by_structure_and_size() -> None:
    I = torch.eye(80, dtype=torch.float64)
    b = random(1, 80)
    assert "CG" in idf.Auto()(DenseOperator(2 * I, "positive_definite"), b).info.method
    assert "GMRES" in idf.Auto()(DenseOperator(2 * I), b).info.method
    assert "Dense" in idf.Auto()(DenseOperator(2 * I[:9, :9]), b[:9]).info.method


def test_a_singular_inconsistent_system_is_reported_by_all() -> None:
    A = rotated(torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64), 2)
    b = random(3, 4)
    for solver in (idf.MINRES, idf.GMRES, idf.Dense, idf.Auto, idf.CG):
        info = solver(on_failure="ignore")(DenseOperator(A, "symmetric"), b).info
        assert not bool(info.converged), solver
        assert int(info.status) != idf.Status.CONVERGED
    # Least squares of minimum norm, where it is dense.
    x = idf.Dense(on_failure="ignore")(DenseOperator(A, "symmetric"), b).value
    torch.testing.assert_close(x, torch.linalg.pinv(A, hermitian=True) @ b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["CG", "MINRES", "GMRES", "Dense", "Auto"])
def test_a_nan_stays_in_its_own_system(name: str) -> None:
    s = SYSTEMS["definite"]
    b = torch.stack([s.b, s.b * float("nan"), s.b.clone().index_fill_(0, torch.tensor(3), float("inf")), s.b])
    solution = SOLVERS[name][0](rtol=1e-8, on_failure="ignore")(s.operator(), b)
    assert solution.info.status[1:3].tolist() == [idf.Status.NON_FINITE] * 2
    assert solution.info.converged.tolist() == [True, False, False, True]
    for i in (0, 3):
        assert float(relative_residual(s.matrix, solution.value[i], b[i])) <= 1.01e-8


def test_max_iterations_atol_x0_and_warm_start() -> None:
    s = SYSTEMS["definite"]
    info = idf.CG(max_iterations=3, on_failure="ignore")(s.operator(), s.b).info
    assert (int(info.iterations), int(info.status)) == (3, idf.Status.MAX_ITERATIONS)
    loose = idf.CG(rtol=0.0, atol=0.5 * float(s.b.norm()))(s.operator(), s.b).info
    assert int(loose.iterations) < int(idf.CG()(s.operator(), s.b).info.iterations)
    exact = torch.linalg.solve(s.matrix, s.b)
    assert int(idf.CG()(s.operator(), s.b, x0=exact).info.iterations) == 0
    solver = idf.CG(warm_start=True)
    first = int(solver(s.operator(), s.b).info.iterations)
    assert int(solver(s.operator(), s.b * 1.0001).info.iterations) < first
    small = SYSTEMS["repeated eigenvalues"]
    assert bool(solver(small.operator(), small.b).info.converged)  # another shape: the old start is dropped


def test_a_preconditioner_saves_iterations() -> None:
    D = torch.logspace(0, 2, 30, dtype=torch.float64)
    A = D.unsqueeze(-1) * rotated(torch.linspace(1, 2, 30, dtype=torch.float64), 1) * D
    for solver in (idf.CG, idf.MINRES):
        plain, with_it = (
            solver(max_iterations=500, preconditioner=p)(DenseOperator(A, "symmetric"), random(2, 30))
            for p in (None, Jacobi())
        )
        assert int(with_it.info.iterations) < 0.5 * int(plain.info.iterations)
        assert float(relative_residual(A, with_it.value, random(2, 30))) <= 1.01e-6


@pytest.mark.parametrize("name", ["CG", "MINRES", "GMRES", "Dense", "Neumann"])
def test_a_direct_call_is_differentiable(name: str) -> None:
    """In the matrix and in b, twice, forward mode and batched gradients included."""
    solver = SOLVERS[name][0](rtol=1e-13, on_failure="ignore")
    M, b = (
        torch.eye(3, dtype=torch.float64) + 0.1 * rotated(torch.tensor([1.0, 2, 3], dtype=torch.float64)),
        random(2, 3),
    )
    solve = lambda M, b: solver(DenseOperator((M + M.mT) / 2, "symmetric"), b).value  # noqa: E731
    leaves = (M.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(solve, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(solve, leaves)
    torch.testing.assert_close(
        jacrev(solve, 1)(M.detach(), b.detach()), torch.linalg.inv(M.detach()), rtol=1e-9, atol=1e-12
    )


def test_a_function_operator_with_captures_under_transforms() -> None:
    d, b = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64)

    def total(d: Tensor) -> Tensor:
        A = FunctionOperator(lambda v: d * v, n=3, structure="positive_definite", dtype=torch.float64)
        return idf.CG(rtol=1e-12)(A, b).value.sum()

    torch.testing.assert_close(grad(total)(d), -1 / d**2)
    torch.testing.assert_close(vmap(grad(total))(torch.stack([d, 2 * d])), torch.stack([-1 / d**2, -1 / (2 * d) ** 2]))


def test_failures_follow_the_policy() -> None:
    s = SYSTEMS["poisson"]
    with pytest.warns(
        idf.ConvergenceWarning, match=r"CG did not solve the linear system: MAX_ITERATIONS after at most 2"
    ):
        idf.CG(max_iterations=2)(s.operator(), s.b)
    with pytest.raises(idf.ConvergenceError, match="What to try: raise max_iterations"):
        idf.CG(max_iterations=2, on_failure="raise")(s.operator(), s.b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        idf.CG(max_iterations=2, on_failure="ignore")(s.operator(), s.b)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: idf.CG(rtol=-1.0), ValueError, "rtol is -1.0"),
        (lambda: idf.CG(max_iterations=0), ValueError, "max_iterations is 0"),
        (lambda: idf.CG(on_failure="shout"), ValueError, "on_failure is 'shout'"),  # type: ignore[arg-type]
        (lambda: idf.CG(tolerance=1.0), TypeError, "tolerance"),  # type: ignore[call-arg]
        (lambda: idf.CG(preconditioner=3), TypeError, "preconditioner is 3"),  # type: ignore[arg-type]
        (lambda: idf.GMRES(restart=0), ValueError, "restart is 0"),
        (lambda: idf.Neumann(terms=0), ValueError, "max_iterations is 0|terms"),
        (lambda: idf.Neumann(terms=3, scale=-1.0), ValueError, "scale is -1.0"),
        (lambda: idf.CG()(torch.eye(2), torch.ones(2)), TypeError, "DenseOperator"),  # type: ignore[arg-type]
        (lambda: idf.CG()(DenseOperator(torch.eye(2)), torch.ones(3)), ValueError, r"b must be \(\*batch, 2\)"),
        (lambda: idf.CG()(DenseOperator(torch.eye(2)), torch.ones(2).double()), ValueError, "float64"),
        (lambda: idf.CG()(DenseOperator(torch.eye(2).expand(3, 2, 2)), torch.ones(2)), ValueError, "expand b"),
        (lambda: DenseOperator(torch.ones(2, 3)), ValueError, "must be square"),
        (lambda: DenseOperator(torch.eye(2), "spd"), ValueError, "structure is 'spd'"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_neumann_sums_exactly_its_terms() -> None:
    A, b = SYSTEMS["contraction"].matrix, SYSTEMS["contraction"].b
    I, want, power = torch.eye(12, dtype=torch.float64), torch.zeros_like(b), b
    for _ in range(7):
        want, power = want + 0.9 * power, (I - 0.9 * A) @ power
    got = idf.Neumann(terms=7, scale=0.9, on_failure="ignore")(DenseOperator(A), b)
    torch.testing.assert_close(got.value, want, rtol=1e-13, atol=0)
    assert int(got.info.iterations) == 7


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 6),
    batch=st.lists(st.integers(0, 3), max_size=2),
    exponent=st.integers(-30, 30),
    spread=st.floats(0, 4),
    seed=st.integers(0, 1000),
    name=st.sampled_from(["CG", "MINRES", "GMRES", "Dense", "Auto"]),
)
def test_odd_shapes_and_scales(n: int, batch: list[int], exponent: int, spread: float, seed: int, name: str) -> None:
    """No unknowns, no systems, one of them, tiny and huge: solved, with reports of the batch's shape."""
    A = (
        rotated(torch.logspace(0, spread, n, dtype=torch.float64).expand(*batch, n), seed)
        if n
        else torch.zeros(*batch, 0, 0).double()
    )
    b = 10.0**exponent * random(seed + 1, *batch, n)
    solution = SOLVERS[name][0](rtol=1e-8)(DenseOperator(A, "positive_definite"), b)
    assert solution.value.shape == b.shape
    assert solution.info.iterations.shape == torch.Size(batch)
    assert bool(solution.info.converged.all())
    if b.numel():
        assert float(relative_residual(A, solution.value, b).max()) <= 1.1e-8


# ------------------------------------------------------------------ bugs that peers have had, planted once


class IterateBeforeLast(idf.CG):
    def finish(self, A: object, state: object) -> Tensor:
        return getattr(self, "_before", state.x)  # type: ignore[attr-defined]

    def step(self, A: object, state: object) -> object:
        self._before = state.x  # type: ignore[attr-defined]
        return super().step(A, state)  # type: ignore[arg-type]


class OldResidualInDirection(idf.CG):
    def step(self, A: object, state: object) -> object:
        new = super().step(A, state)  # type: ignore[arg-type]
        beta = new.rho / state.rho  # type: ignore[attr-defined]
        return new._replace(direction=state.residual + beta * state.direction)  # type: ignore[attr-defined]


class FrozenAtNegativeCurvature(idf.CG):
    """Takes no step there, and says that it is done."""

    def step(self, A: object, state: object) -> object:
        new = super().step(A, state)  # type: ignore[arg-type]
        stuck = new.status == idf.Status.INDEFINITE
        return new._replace(status=state.status, residual_norm=torch.where(stuck, 0, new.residual_norm))  # type: ignore[attr-defined]


@pytest.mark.parametrize("broken", [IterateBeforeLast, OldResidualInDirection, FrozenAtNegativeCurvature])
def test_a_classic_bug_does_not_pass_as_success(broken: type[idf.CG]) -> None:
    """The base class judges by the true residual: a wrong method is slow or fails, but never claims."""
    s = SYSTEMS["indefinite" if broken is FrozenAtNegativeCurvature else "definite"]
    solver = broken(rtol=1e-10, max_iterations=40, on_failure="ignore")
    solution = solver(DenseOperator(s.matrix, "positive_definite"), s.b)
    assert float(relative_residual(s.matrix, solution.value, s.b)) > 1e-10
    assert not bool(solution.info.converged)
    with pytest.raises(AssertionError):
        holds(solver, System("", s.matrix, s.b, "positive_definite"), torch.float64, s.matrix, s.b)
