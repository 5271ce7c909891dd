"""Systems that nobody would write down, from Hypothesis."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicitdiff.operators import DenseOperator

from ..problems import random, rotated, with_singular_values
from .table import SOLVERS, true_residual

SPECTRA = st.lists(st.sampled_from([1.0, 1.0, 2.0, 3.0, 30.0]), max_size=8)  # sizes 0 … 8, most values repeated
BATCHES = st.lists(st.integers(0, 3), max_size=2)
SIGNS = {"CG": "positive_definite", "MINRES": "symmetric", "GMRES": "general", "Dense": "general", "Auto": "symmetric"}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(SIGNS)),
    spectrum=SPECTRA,
    batch=BATCHES,
    exponents=st.tuples(st.integers(-30, 30), st.integers(-4, 4)),
    negative=st.booleans(),
    single=st.booleans(),
    seed=st.integers(0, 100),
)
def test_odd_sizes_batches_scales_and_spectra(
    name: str,
    spectrum: list[float],
    batch: list[int],
    exponents: tuple[int, int],
    negative: bool,
    single: bool,
    seed: int,
) -> None:
    """Solved, truly, with reports in the shape of the batch; b from 1e-30 to 1e30, A from 1e-4 to 1e4."""
    dtype, rtol = (torch.float32, 1e-4) if single else (torch.float64, 1e-9)
    values = torch.tensor(spectrum, dtype=torch.float64).expand(*batch, -1).clone()
    if negative and SIGNS[name] != "positive_definite":
        values[..., ::2] *= -1
    make = with_singular_values if SIGNS[name] == "general" else rotated
    A = (10.0 ** exponents[1] * make(values, seed)).to(dtype)
    b = (10.0 ** exponents[0] * random(seed + 1, *batch, len(spectrum))).to(dtype)
    solution = SOLVERS[name].make(rtol=rtol, on_failure="raise")(DenseOperator(A, SIGNS[name]), b)
    assert solution.value.shape == b.shape
    assert solution.info.iterations.shape == solution.info.residual_norm.shape == torch.Size(batch)
    residual, rounding = true_residual(A, solution.value, b)
    assert bool((residual <= 1.001 * rtol + rounding).all())
