"""The harness of the benchmarks: nothing is timed that is not right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.peers import fixed_point, ridge, timing
from benchmarks.peers.hypergradient import by_hand, cg
from benchmarks.peers.timing import compare, ready
from benchmarks.problems import logistic

REFERENCE = [torch.tensor([1.0, 2.0])]


def right() -> list[torch.Tensor]:
    return [torch.tensor([1.0, 2.0])]


def wrong() -> list[torch.Tensor]:
    return [torch.tensor([1.0, 2.1])]


def test_a_way_that_does_not_agree_is_not_timed() -> None:
    rows = compare("w", {"by hand": ready(right), "peer": ready(wrong)}, REFERENCE, tolerance=1e-3, seconds=0.0)
    by_name = {row.way: row for row in rows}
    assert by_name["by hand"].ratio == 1.0
    assert by_name["peer"].seconds is None
    assert by_name["peer"].error == pytest.approx(0.1 / 5**0.5, rel=1e-5)


@pytest.mark.parametrize("name", ["by hand", "implicitdiff, CG"])
def test_the_baseline_and_ours_have_to_agree(name: str) -> None:
    ways = {"by hand": ready(right), name: ready(wrong)}
    with pytest.raises(AssertionError, match="off by"):
        compare("w", ways, REFERENCE, tolerance=1e-3, seconds=0.0)


def test_what_prepares_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing, "clock", lambda: now[0])

    def slow_to_prepare() -> Callable[[], list[torch.Tensor]]:
        now[0] += 100.0

        def work() -> list[torch.Tensor]:
            now[0] += 2.0
            return right()

        return work

    (row,) = compare("w", {"by hand": slow_to_prepare}, REFERENCE, 1e-3, seconds=0.0)
    assert row.seconds == 2.0


def test_conjugate_gradients_by_hand_give_the_dense_answer() -> None:
    work = logistic(60, 8)
    g = torch.linspace(1, 2, 8, dtype=torch.float64)
    hessian = torch.func.hessian(work.objective)(work.x, *(a.detach() for a in work.args))
    # In little more than n steps, which a wrong direction does not do.
    u = cg(lambda v: hessian @ v, g, rtol=1e-12, max_iterations=10)
    torch.testing.assert_close(u, torch.linalg.solve(hessian, g))
    penalties = work.args[0].detach().exp()
    expected = -penalties * work.x * torch.linalg.solve(hessian, g)
    torch.testing.assert_close(by_hand(work, work.x, g, rtol=1e-12)[0], expected)


def test_ridge_by_hand_is_the_derivative_through_cholesky() -> None:
    args, g = ridge.problems(3)
    learned = [a.requires_grad_() for a in args]
    expected = torch.autograd.grad(ridge.solved(*ridge.normal_equations(*args)), learned, g)
    for found, e in zip(ridge.by_hand(args, learned, g), expected, strict=True):
        torch.testing.assert_close(found, e)


def test_the_fixed_point_by_hand_is_the_derivative_of_the_iteration() -> None:
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    W, x, U, b = args = [a.requires_grad_() for a in (0.2 * random(4, 4), random(2, 4), random(4, 4), random(4))]
    g, z = random(2, 4), torch.zeros(2, 4, dtype=torch.float64)
    for _ in range(80):
        z = fixed_point.update(z, W, fixed_point.injection(x, U, b))
    expected = torch.autograd.grad(z, args, g)
    for found, e in zip(fixed_point.by_hand(args, g, rtol=1e-14), expected, strict=True):
        torch.testing.assert_close(found, e)
