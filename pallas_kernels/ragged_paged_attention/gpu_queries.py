"""A tile's queries, laid out for wgmma: as they are, or for a product with fp8 keys as the sum of two fp8 matrices.

A row is scaled by a power of two that puts its largest value into [128, 256). A bfloat16 has 8 bits of precision and a
float8_e4m3fn has 4, so what rounding to the first part leaves fits into the second one, but for its subnormals: the
error is 0 for values from 1/512 of the row's largest on, and at most 2^-17 of the largest below. A row whose largest
value is below 2^-119 counts as zeros, and infinities as the largest float8_e4m3fn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_ROWS = 8  # that a warpgroup has at once: 16 threads a row
_LARGEST = 7  # log2 of what a row's largest value becomes, at least
_MANTISSA_BITS = 23  # of float32


def copy_rows(raw: Any, tiles: Any, num_rows: int) -> None:
    """Of refs bfloat16[M, D] in shared memory: the first rows of ``raw``, as TMA wrote them, into swizzled tiles."""
    for rows, x in _chunks(raw, num_rows):
        tiles.at[rows][...] = x


def scaled_parts(raw: Any, parts: Any, unscale: Any, num_rows: int) -> None:
    """Each row's two parts, and what their sum must be multiplied by to give the row.

    Args:
        raw: ref bfloat16[M, D] in shared memory.
        parts: ref float8_e4m3fn[2, M, D], in swizzled tiles.
        unscale: ref float32[M].
        num_rows: that are done, the first ones.
    """
    for rows, x in _chunks(raw, num_rows):
        x = x.astype(jnp.float32)
        # The largest value's exponent, as float32 has it; for a row of zeros one whose scale is finite.
        largest = lax.bitcast_convert_type(jnp.maximum(x, -x).max(axis=1), jnp.int32)
        exponent = jnp.maximum(largest >> _MANTISSA_BITS, _LARGEST)
        scale, inverse = (
            lax.bitcast_convert_type(bits << _MANTISSA_BITS, jnp.float32)
            for bits in (2 * 127 + _LARGEST - exponent, exponent - _LARGEST)
        )
        x = x * plgpu.layout_cast(lax.broadcast_in_dim(scale, x.shape, [0]), _layout(x.shape[1]))
        first = x.astype(parts.dtype)
        parts.at[0, rows][...] = first
        parts.at[1, rows][...] = (x - first.astype(jnp.float16).astype(jnp.float32)).astype(parts.dtype)
        unscale.at[rows][...] = inverse


def _chunks(raw: Any, num_rows: int) -> Iterator[tuple[pl.Slice, jax.Array]]:
    for row in range(0, num_rows, _ROWS):
        rows = pl.ds(row, _ROWS)
        yield rows, plgpu.load(raw.at[rows], layout=_layout(raw.shape[1]), optimized=False)


def _layout(dim: int) -> Any:
    columns = min(dim, 128)
    tiling = plgpu.Tiling(((_ROWS, columns), (_ROWS // 4, columns), (columns // 16,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
