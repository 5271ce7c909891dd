"""Projections and proxes: the nearest point, and its derivatives, of every order and under every transform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff import projections as onto
from implicitdiff import prox

from ..problems import KNOWN, random, vector
from .table import PROJECTIONS, PROXES, TABLE, Entry

D = torch.float64
CONVEX = [name for name, entry in PROJECTIONS.items() if entry.convex]


def scaled(entry: Entry, factor: float, dtype: torch.dtype = D) -> tuple[Tensor, ...]:
    """v and the parameters in other units, in which the answer is that much larger."""
    parameters = (p if i in entry.kept else factor * p for i, p in enumerate(entry.parameters))
    return tuple(t.to(dtype) for t in (factor * entry.v, *parameters))


@pytest.mark.parametrize("name", TABLE)
def test_against_another_way_of_solving(name: str) -> None:
    entry = TABLE[name]
    found = entry.function(entry.v, *entry.parameters)
    for i, x in enumerate(found):
        expected = torch.as_tensor(entry.reference(entry.v[i].numpy(), *(p[i].numpy() for p in entry.parameters)))
        torch.testing.assert_close(x, expected, rtol=entry.accuracy, atol=entry.accuracy)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_projection_of_a_projection_is_itself(name: str) -> None:
    entry = PROJECTIONS[name]
    once = entry.function(entry.v, *entry.parameters)
    torch.testing.assert_close(entry.function(once, *entry.parameters), once, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", CONVEX)
def test_variational_inequality_and_non_expansiveness(name: str) -> None:
    """⟨v − x, y − x⟩ ≤ 0 for every y of a convex set, and ‖P(u) − P(v)‖ ≤ ‖u − v‖."""
    entry = PROJECTIONS[name]
    dims = tuple(range(1, entry.v.ndim))
    x = entry.function(entry.v, *entry.parameters)
    symmetric = (entry.v + entry.v.mT) / 2 if entry.v.ndim == 3 else entry.v
    for seed in range(50):
        u = entry.v + 10.0 ** (seed % 5 - 3) * random(seed, *entry.v.shape)
        y = entry.function(u, *entry.parameters)
        assert float(((symmetric - x) * (y - x)).sum(dims).max()) <= 1e-12
        assert bool(((y - x).square().sum(dims) <= (u - entry.v).square().sum(dims) + 1e-24).all())


@pytest.mark.parametrize("name", TABLE)
def test_derivatives_against_central_differences(name: str) -> None:
    """In v and in every parameter, both modes, batched, twice."""
    entry = TABLE[name]
    inputs = tuple(t.clone().requires_grad_() for t in (entry.v, *entry.parameters))
    if name == "none":
        inputs = (inputs[0], entry.parameters[0])
    assert gradcheck(entry.function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(entry.function, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", TABLE)
def test_batch_vmap_and_loop_agree_in_values_and_derivatives(name: str) -> None:
    entry = TABLE[name]
    inputs = (entry.v, *entry.parameters)
    where = tuple(range(len(inputs)))

    def scalar(*inputs: Tensor) -> Tensor:
        x = entry.function(*inputs)
        return (x**3).sum() + x.sum()

    def loop(function: Callable[..., Any]) -> Any:
        results = [function(*(t[i] for t in inputs)) for i in range(len(entry.v))]
        return results if isinstance(results[0], tuple) else torch.stack(results)

    values = loop(entry.function)
    torch.testing.assert_close(entry.function(*inputs), values, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(vmap(entry.function)(*inputs), values, rtol=1e-13, atol=1e-13)
    two = tuple(torch.stack([t, t]) for t in inputs)
    torch.testing.assert_close(entry.function(*two), torch.stack([values, values]), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(vmap(vmap(entry.function))(*two)[1], values, rtol=1e-13, atol=1e-13)

    def by_autograd(*system: Tensor) -> Any:
        return torch.autograd.functional.jacobian(entry.function, system)

    expected = loop(by_autograd)
    for transform in (jacfwd, jacrev):
        for k, found in enumerate(vmap(transform(entry.function, argnums=where))(*inputs)):
            torch.testing.assert_close(found, torch.stack([e[k] for e in expected]), rtol=1e-11, atol=1e-11)
    curvatures = [torch.autograd.functional.hessian(scalar, tuple(t[i] for t in inputs)) for i in range(len(entry.v))]
    nestings = (lambda f: jacfwd(jacfwd(f, where), where), lambda f: jacrev(jacfwd(f, where), where))
    for transform in (*nestings, lambda f: hessian(f, where)):
        found = vmap(transform(scalar))(*inputs)
        for k in where:
            for l in where:
                expected_block = torch.stack([c[k][l] for c in curvatures])
                torch.testing.assert_close(found[k][l], expected_block, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_single_precision_at_every_scale(name: str) -> None:
    """Squares of 1e30 do not fit into float32, nor those of 1e-30: value and derivative are those of float64."""
    entry = PROJECTIONS[name]
    cotangent = random(1, *entry.v.shape)

    def slope(v: Tensor, *parameters: Tensor) -> Tensor:
        return grad(lambda v: (cotangent.to(v.dtype) * entry.function(v, *parameters)).sum())(v).double()

    for factor in (1e-30, 1e30):
        inputs, expected = scaled(entry, factor, torch.float32), scaled(entry, 1.0)
        x = entry.function(*inputs)
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double() / factor, entry.function(*expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slope(*inputs), slope(*expected), rtol=1e-4, atol=1e-4)


def test_the_branch_not_taken_leaves_no_nan() -> None:
    """Of a vector of 1e-30 the direction has a second derivative beyond float32, where it does not enter."""
    v = torch.tensor([1e-30, 2e-30, -1e-30])
    for function in (
        onto.l2_ball,
        lambda v: onto.second_order_cone(torch.cat([torch.ones(1), v])),
        lambda v: onto.second_order_cone(torch.cat([-torch.ones(1), v])),
        lambda v: prox.group_lasso(v, 1.0),
    ):
        for transform in (lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacfwd(f))):
            assert not bool(transform(function)(v).any())  # NaN would count as true


@pytest.mark.parametrize("name", TABLE)
def test_at_zero_values_are_finite_and_so_are_two_derivatives(name: str) -> None:
    """v = 0, parameters as they are and all 0: kinks of norms, ties of sorts, roots at 0."""
    entry = TABLE[name]
    for zero_parameters in (False, True):
        parameters = [torch.zeros_like(p) if zero_parameters else p for p in entry.parameters]
        if zero_parameters and name == "hypercube":
            continue  # its unit is the test's own
        system = tuple(t[0] for t in (torch.zeros_like(entry.v), *parameters))
        where = tuple(range(len(system)))
        assert bool(entry.function(*system).isfinite().all())
        for transform in (jacrev, jacfwd):
            first = transform(entry.function, where)
            assert all(bool(j.isfinite().all()) for j in first(*system))
            second = jacrev(first, where)(*system)
            assert all(bool(block.isfinite().all()) for row in second for block in row)


def test_a_point_of_the_sphere_is_chosen_where_many_are_nearest() -> None:
    for sphere, expected in ((onto.l2_sphere, vector(2, 0)), (onto.l1_sphere, vector(1, 1))):
        torch.testing.assert_close(sphere(torch.zeros(2, dtype=D), 2.0), expected)
    torch.testing.assert_close(onto.l1_sphere(vector(0, -1), 3.0), vector(1, -2))


@pytest.mark.parametrize("name", TABLE)
def test_nan_stays_in_its_system(name: str) -> None:
    entry = TABLE[name]
    v = entry.v.clone()
    v[1, 0] = torch.nan
    v.requires_grad_()
    x = entry.function(v, *entry.parameters)
    (gradient,) = torch.autograd.grad(x.sum(), v)
    assert bool(x[1].isnan().any())
    kept = torch.tensor([i for i in range(len(v)) if i != 1])
    expected = entry.function(entry.v, *entry.parameters)
    torch.testing.assert_close(x[kept], expected[kept], rtol=1e-14, atol=1e-14)
    assert bool(gradient[kept].isfinite().all())


# ------------------------------------------------------------------------------------------------ one set at a time


def test_the_jacobian_of_the_simplex() -> None:
    """diag(s) − ssᵀ/‖s‖₀ on the support s (DESIGN §8), s/‖s‖₀ in the total, and no second derivative."""
    v = vector(0.5, 1.25, -1, 1.0)
    s = vector(0, 1, 0, 1)
    for transform in (jacrev, jacfwd):
        jacobian = transform(onto.simplex)(v)
        torch.testing.assert_close(jacobian, torch.diag(s) - torch.outer(s, s) / 2, rtol=0, atol=1e-10)
        in_total = transform(onto.simplex, 1)(v, vector(1)[0])
        torch.testing.assert_close(in_total, s / 2, rtol=0, atol=1e-10)
    assert not bool(jacfwd(jacrev(onto.simplex))(v).any())


def test_the_simplex_beside_an_entry_that_dwarfs_it() -> None:
    for dtype in (torch.float32, D):
        v = torch.tensor([1e30, 0.0, -1e30, 1e30], dtype=dtype)
        torch.testing.assert_close(onto.simplex(v), torch.tensor([0.5, 0, 0, 0.5], dtype=dtype))
    assert onto.simplex(torch.tensor([3e38, -3e38, -3e38])).tolist() == [1, 0, 0]  # differences overflow
    assert onto.simplex(torch.tensor([0.25, -torch.inf, 0.5])).tolist() == [0.375, 0, 0.625]


def by_eigh(V: Tensor) -> Tensor:
    """The projection onto the cone with torch's own derivatives, right where no eigenvalue is repeated."""
    values, vectors = torch.linalg.eigh((V + V.mT) / 2)
    return (vectors * torch.relu(values).unsqueeze(-2)) @ vectors.mT


def by_svd(V: Tensor, threshold: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(V, full_matrices=False)
    return (U * torch.relu(S - threshold).unsqueeze(-2)) @ Vh


@pytest.mark.parametrize(
    ("function", "reference", "shape"), [(onto.positive_semidefinite_cone, by_eigh, (3, 3)), (None, by_svd, (2, 3))]
)
def test_spectral_maps_to_the_third_order(function: Any, reference: Any, shape: tuple[int, int]) -> None:
    """Against autograd through the decomposition, at distinct values; all eight nestings."""
    args = (random(7, *shape),) if function else (random(7, *shape), vector(0.3)[0])
    function = function or prox.nuclear_norm
    weights = random(8, *shape)

    def scalar(f: Any, *args: Tensor) -> Tensor:
        return (weights * f(*args)).sum() + (f(*args) ** 3).sum()

    last = len(args) - 1
    # Of the nestings of torch's own derivatives only this one is right: jacfwd∘jacrev∘jacfwd of eigh is NaN.
    expected = jacrev(jacrev(jacrev(functools.partial(scalar, reference))), last)(*args)
    for outer in (jacfwd, jacrev):
        for middle in (jacfwd, jacrev):
            for inner in (jacfwd, jacrev):
                found = outer(middle(inner(functools.partial(scalar, function))), last)(*args)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_cone_at_eigenvalues_of_zero() -> None:
    """Of rank 2 in 4 dimensions: the derivative along a change that keeps the rank is that change itself, and one
    that lowers eigenvalues of 0 has the derivative of the negative side; the value is exact in size."""
    for seed in range(20):
        Q = torch.linalg.qr(random(seed, 4, 4))[0]
        V = Q @ torch.diag(vector(2, 1, 0, 0)) @ Q.mT
        torch.testing.assert_close(onto.positive_semidefinite_cone(V), V, rtol=1e-14, atol=1e-14)
        K = random(seed + 1, 4, 4)
        kept = K @ V + V @ K.mT  # tangent to the matrices of rank 2
        lowered = -Q[:, 2:] @ Q[:, 2:].mT
        for change, expected in ((kept, kept), (lowered, torch.zeros_like(V)), (kept + lowered, kept)):
            _, found = torch.func.jvp(onto.positive_semidefinite_cone, (V,), (change,))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_nuclear_norm_without_penalty_is_the_identity() -> None:
    V = torch.zeros(2, 3, dtype=D)
    jacobian = jacrev(prox.nuclear_norm)(V, 0.5, 0.0)
    torch.testing.assert_close(jacobian.reshape(6, 6), torch.eye(6, dtype=D))


@pytest.mark.parametrize("function", [prox.lasso, prox.group_lasso])
def test_no_penalty_no_threshold(function: Any) -> None:
    """An entry that is not penalised keeps its derivative of 1 at 0 too: an intercept, say."""
    torch.testing.assert_close(jacrev(function)(torch.zeros(3), 0.5, 0.0), torch.eye(3))


def test_moreau_decomposition() -> None:
    """v = prox of a norm + projection onto the ball of the dual norm; v = projections on a cone and on its polar."""
    for name in ("lasso", "group_lasso"):
        ball = {"lasso": onto.linf_ball, "group_lasso": onto.l2_ball}[name]
        v = PROXES[name].v
        torch.testing.assert_close(TABLE[name].function(v, 0.4, 1.5) + ball(v, 0.6), v, rtol=1e-14, atol=1e-14)
    for cone in (onto.second_order_cone, onto.positive_semidefinite_cone):
        v = PROJECTIONS[cone.__name__].v
        torch.testing.assert_close(cone(v) - cone(-v), (v + v.mT) / 2 if v.ndim == 3 else v, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_affine_set_of_any_rank(rank: int) -> None:
    """Repeated equations change nothing, in the value and in the derivative; none at all is the whole space."""
    A, b, v = random(1, rank, 4), random(2, rank), random(3, 4)

    def repeated(A: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return onto.affine_set(v, torch.cat([A, 2 * A]), torch.cat([b, 2 * b]))

    def once(A: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return onto.affine_set(v, A, b)

    torch.testing.assert_close(repeated(A, b, v), once(A, b, v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacrev(repeated, (0, 1, 2))(A, b, v), jacfwd(once, (0, 1, 2))(A, b, v))


@pytest.mark.parametrize("v", [0.0, 1.0, -1e30, 1e30, -1e-30])
@pytest.mark.parametrize("weight", [1e-30, 1.0, 1e30])
def test_log_barrier_at_every_scale(v: float, weight: float) -> None:
    """x > 0 solves x − v = weight / x to rounding, in float32, with the derivative x / (2x − v)."""
    entry = torch.tensor(v)
    x = prox.log_barrier(entry, weight).double()
    y = entry.double()
    weight = float(torch.tensor(weight).double())
    size = (y.square() + 4 * weight).sqrt()
    torch.testing.assert_close(x, (y + size) / 2 if v >= 0 else 2 * weight / (size - y), rtol=1e-6, atol=1e-38)
    slope = grad(prox.log_barrier)(entry, weight).double()
    torch.testing.assert_close(slope, x / size, rtol=1e-5, atol=1e-30)


# ----------------------------------------------------------------------------------------------- through the layers


@pytest.mark.parametrize("name", CONVEX)
def test_the_fixed_point_of_projected_gradient_steps_differentiates_as_the_projection(name: str) -> None:
    entry = PROJECTIONS[name]

    def update(x: Tensor, v: Tensor, *parameters: Tensor) -> Tensor:
        return entry.function(x - 0.7 * (x - v), *parameters)

    layer = idf.FixedPointLayer(update, linear_solver=idf.Dense())
    inputs = (entry.v, *entry.parameters)
    where = tuple(range(len(inputs)))

    def scalar(function: Any, *inputs: Tensor) -> Tensor:
        x = function(*inputs)
        return (x**3).sum() + x.sum()

    implicit = functools.partial(scalar, lambda v, *p: layer(torch.zeros_like(v), v, *p))
    closed = functools.partial(scalar, entry.function)
    for transform in (lambda f: vmap(grad(f, where)), lambda f: vmap(hessian(f, where))):
        torch.testing.assert_close(transform(implicit)(*inputs), transform(closed)(*inputs), rtol=1e-6, atol=1e-6)
    leaves = tuple(t[0].clone().requires_grad_() for t in inputs)
    first, expected = (torch.autograd.grad(f(*leaves), leaves, create_graph=True) for f in (implicit, closed))
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-6)
    second, expected = (
        torch.autograd.grad(sum((g**2).sum() for g in f), leaves, materialize_grads=True) for f in (first, expected)
    )
    torch.testing.assert_close(second, expected, rtol=1e-6, atol=1e-6)


def test_lasso_by_its_prox() -> None:
    """∂w_S/∂penalty = −G_S⁻¹ sign(w_S), of the bank of known problems."""
    known = KNOWN["lasso"]
    residual = idf.conditions.FixedPoint(lambda w, penalty: w - known.residual(w, penalty)).residual
    X = random(22, 12, 5)
    step = 1 / torch.linalg.eigvalsh(X.mT @ X).max()
    y = X @ known.x + X @ torch.linalg.inv(X.mT @ X) @ (known.theta * vector(1, 0.3, -1, -0.6, 1))

    def update(w: Tensor, penalty: Tensor) -> Tensor:
        return prox.lasso(w - step * (X.mT @ (X @ w - y)), step, penalty)

    w = known.x + 0.01 * random(1, 5)
    torch.testing.assert_close(w - update(w, known.theta), residual(w, known.theta), rtol=1e-12, atol=1e-12)
    layer = idf.FixedPointLayer(update, linear_solver=idf.Dense())
    for transform in (jacrev, jacfwd):
        found = transform(lambda penalty: layer(torch.zeros(5, dtype=D), penalty))(known.theta)
        torch.testing.assert_close(found, known.jacobian, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- odd cases

ENTRIES = st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, 0.5, 2.0, 1e-8, 3.0])
VECTORS = {
    "simplex": lambda v, r: onto.simplex(v, r),
    "sparse_simplex": lambda v, r: onto.sparse_simplex(v, 2, r),
    "l1_ball": onto.l1_ball,
    "l1_sphere": onto.l1_sphere,
    "l2_ball": onto.l2_ball,
    "l2_sphere": onto.l2_sphere,
    "linf_ball": onto.linf_ball,
    "second_order_cone": lambda v, r: onto.second_order_cone(v),
    "half_space": lambda v, r: onto.half_space(v, torch.ones_like(v), r),
    "hyperplane": lambda v, r: onto.hyperplane(v, torch.ones_like(v), r),
    "psd": lambda v, r: onto.positive_semidefinite_cone(v.unsqueeze(-1) * v.unsqueeze(-2) * v.sum(-1)[..., None, None]),
    "group_lasso": lambda v, r: prox.group_lasso(v, 1.0, r),
    "lasso": lambda v, r: prox.lasso(v, 1.0, r),
    "nuclear_norm": lambda v, r: prox.nuclear_norm(v, 1.0, r),
}


def violation(name: str, x: Tensor, radius: float) -> Tensor:
    """How far x is from the set, for the sets that one number describes."""
    if name in ("simplex", "sparse_simplex"):
        return torch.maximum((x.sum(-1) - radius).abs(), torch.relu(-x).amax(-1)) + ((x != 0).sum(-1) > 2) * (
            name == "sparse_simplex"
        )
    l1, l2, linf, total = x.abs().sum(-1), x.norm(dim=-1), x.abs().amax(-1), x.sum(-1)
    at_most = {"l1_ball": l1, "l2_ball": l2, "linf_ball": linf, "half_space": total}
    if name in at_most:
        return torch.relu(at_most[name] - radius)
    exactly = {"l1_sphere": l1, "l2_sphere": l2, "hyperplane": total}
    if name in exactly:
        return (exactly[name] - radius).abs()
    if name == "second_order_cone":
        return torch.relu(x[..., 1:].norm(dim=-1) - x[..., 0])
    return torch.zeros(())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(VECTORS)),
    entries=st.lists(ENTRIES, max_size=6),
    batch=st.lists(st.integers(0, 3), max_size=2),
    radius=st.sampled_from([0.0, 1.0, 1.0, 2.5]),
    exponent=st.integers(-8, 8),
    single=st.booleans(),
)
def test_odd_sizes_batches_scales_and_ties(
    name: str, entries: list[float], batch: list[int], radius: float, exponent: int, single: bool
) -> None:
    """In the set, to rounding, in the shape of v, with finite derivatives that never amplify (convex ones)."""
    dtype = torch.float32 if single else D
    scale = 10.0**exponent
    v = (scale * torch.tensor(entries, dtype=dtype)).expand(*batch, -1).clone().requires_grad_()
    if v.ndim < 2 and name == "nuclear_norm":
        v = v.detach().unsqueeze(0).requires_grad_()
    r = torch.tensor(scale * radius, dtype=dtype, requires_grad=True)
    x = VECTORS[name](v, r)
    assert x.dtype == dtype
    assert name == "psd" or x.shape == v.shape
    if entries and v.numel():
        assert float(violation(name, x.detach(), float(r.detach())).max()) <= 20 * torch.finfo(dtype).eps * scale
    (first,) = torch.autograd.grad(x.sum(), v, create_graph=True, materialize_grads=True)
    assert bool(first.isfinite().all())
    if first.requires_grad:
        for second in torch.autograd.grad(first.sum(), (v, r), materialize_grads=True):
            assert bool(second.isfinite().all())


@pytest.mark.parametrize("name", ["lasso", "non_negative_lasso", "ridge", "huber", "log_barrier", "elastic_net"])
def test_proxes_of_entries_take_a_single_number(name: str) -> None:
    x = getattr(prox, name)(torch.tensor(2.0), torch.tensor(0.5))
    assert x.shape == ()
    torch.testing.assert_close(x, getattr(prox, name)(torch.tensor([2.0]), 0.5)[0])


BAD: dict[str, Callable[[], Tensor]] = {
    r"radius is -1, but it must be at least 0": lambda: onto.l2_ball(torch.ones(3), -1),
    r"total is nan": lambda: onto.simplex(torch.ones(3), float("nan")),
    r"stepsize is -1\.0": lambda: prox.lasso(torch.ones(3), -1.0),
    r"penalty is -2": lambda: prox.group_lasso(torch.ones(3), 1.0, -2),
    r"ridge is -2": lambda: prox.elastic_net(torch.ones(3), 1.0, 1.0, -2),
    r"delta is -2": lambda: prox.huber(torch.ones(3), 1.0, 1.0, -2),
    r"lower is 2 and upper is 1": lambda: onto.box(torch.ones(3), 2, 1),
    r"k is 0, but": lambda: onto.sparse_simplex(torch.ones(3), 0),
    r"a has shape \(2,\), but its last dimension must be 3": lambda: onto.hyperplane(torch.ones(3), torch.ones(2), 1),
    r"A has shape \(3,\), but it must be of shape": lambda: onto.affine_set(
        torch.ones(3), torch.ones(3), torch.ones(1)
    ),
    r"A has shape \(1, 2\), but its last": lambda: onto.affine_set(torch.ones(3), torch.ones(1, 2), torch.ones(1)),
    r"b has shape \(2,\), but its last dimension must be 1": lambda: onto.affine_set(
        torch.ones(3), torch.ones(1, 3), torch.ones(2)
    ),
    r"V has shape \(2, 3\), but": lambda: onto.positive_semidefinite_cone(torch.ones(2, 3)),
    r"V has shape \(3,\), but": lambda: prox.nuclear_norm(torch.ones(3), 1.0),
    r"v is 0-d": lambda: onto.second_order_cone(torch.ones(())),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_what_was_given_and_what_was_expected(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()
