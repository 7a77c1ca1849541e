"""Queries as two fp8 matrices, in Mosaic's interpreter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import gpu_queries

ROWS = 16


def split(q: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:  # bfloat16[M, D] -> [2, M, D], [M]
    """Both parts and the factors, of float32; rows past ``num_rows`` are NaN."""
    shape = (2, *q.shape)

    def kernel(q_ref: Any, parts_out: Any, unscale_out: Any, raw: Any, parts: Any, unscale: Any) -> None:
        raw[...] = q_ref[...]
        parts[...] = jnp.full(shape, jnp.nan, jnp.float8_e4m3fn)
        unscale[...] = jnp.full(len(q), jnp.nan, jnp.float32)
        gpu_queries.scaled_parts(raw, parts, unscale, num_rows)
        parts_out[...] = parts[...]
        unscale_out[...] = unscale[...]

    run = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct((len(q),), jnp.float32)],
        scratch_types=[
            plgpu.SMEM(q.shape, jnp.bfloat16),
            plgpu.SMEM(shape, jnp.float8_e4m3fn),
            plgpu.SMEM((len(q),), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        parts, unscale = jax.jit(run)(jnp.asarray(q))
    return np.asarray(parts.astype(jnp.float32)), np.asarray(unscale)


@pytest.mark.parametrize("dim", [64, 256])
def test_two_parts_are_the_query(dim: int) -> None:
    """To the last bit from 1/512 of a row's largest value on, and nearly below, whatever the row's size."""
    rng = np.random.default_rng(dim)
    sizes = np.exp2(rng.uniform(-100, 100, (ROWS, 1))) * np.exp2(rng.uniform(-14, 0, (ROWS, dim)))
    q = (rng.choice([-1, 1], (ROWS, dim)) * sizes).astype(jnp.bfloat16)
    q[3], q[5] = 0, np.where(np.arange(dim) == 7, 1.9921875, 0)  # a mantissa of ones
    parts, unscale = split(q, ROWS)
    want = q.astype(np.float64)
    got = parts.astype(np.float64).sum(axis=0) * unscale[:, None]
    largest = np.abs(want).max(axis=1, keepdims=True)
    error = np.abs(got - want)
    assert (error[np.abs(want) >= largest / 512] == 0).all()
    assert (error <= largest * 2.0**-17).all() and error.any()
    assert np.abs(parts[0, largest[:, 0] > 0]).max(axis=1).min() >= 128 and np.abs(parts).max() <= 256


def test_of_some_rows_only() -> None:
    q = np.ones((ROWS, 64), jnp.bfloat16)
    parts, unscale = split(q, 8)
    assert (parts[:, :8].sum(axis=0) * unscale[:8, None] == 1).all()
    assert np.isnan(parts[:, 8:]).all() and np.isnan(unscale[8:]).all()
