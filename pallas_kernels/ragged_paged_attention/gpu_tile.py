"""What the decode and the prefill kernel share: where a tile's keys are, and what a computing warpgroup does with
registers.

Matrices are in the WGMMA layout, values for each row, or for each column of the decode kernel's transposed ones, in its
reduction. Logits are in units of log2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lane import when
from pallas_kernels.ragged_paged_attention import gpu_plan as plan
from pallas_kernels.ragged_paged_attention.types import AttentionSpec

LOG2E = math.log2(math.e)
_PART = 16  # rows of a unit that are left out of a copy together
NO_MAXIMUM = -1e30  # start of running maxima: finite, so that a wholly masked row has alpha = 1 and p = 0


def smem_transforms(columns: int, dtype: Any) -> tuple[Any, ...]:
    """Of tiles in the layout that TMA writes and wgmma reads: 8 rows of up to 128 bytes, swizzled."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(128, columns * itemsize)
    # An empty method of the base class looks abstract to mypy.
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # type: ignore[abstract]
    return (tiling, plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract]


def smem_tile(shape: tuple[int, ...], dtype: Any) -> Any:
    """``[..., rows, D]`` such tiles in shared memory."""
    return plgpu.SMEM(shape, dtype, transforms=smem_transforms(shape[-1], dtype))


def mma_dtype(spec: AttentionSpec) -> Any:
    """fp8 is widened to float16, which holds it exactly and costs one instruction for two values."""
    return jnp.float16 if spec.kv_dtype == "float8_e4m3fn" else jnp.bfloat16


def queries(raw_ref: Any, spec: AttentionSpec) -> jax.Array:
    """A [64, D] tile of queries in ``mma_dtype``."""
    q = plgpu.load(raw_ref, layout=plgpu.Layout.WGMMA, optimized=False)
    if mma_dtype(spec) == jnp.float16:
        limit = float(jnp.finfo(jnp.float16).max)
        q = jnp.clip(q.astype(jnp.float32), -limit, limit).astype(jnp.float16)
    return q


def widen(raw_ref: Any, ref: Any) -> None:
    """fp8 to float16, shared memory to shared memory."""
    ref[...] = plgpu.load(raw_ref, layout=plgpu.Layout.WGMMA_8BIT).astype(jnp.float16)


def logits(
    s: jax.Array,  # float32[M, N], raw products
    spec: AttentionSpec,
    scale: jax.Array | float,
) -> tuple[jax.Array, jax.Array | float]:
    """(x, c): the logits in units of log2 are x * c, a product that later fuses with the subtraction of the maximum."""
    if spec.soft_cap is None:
        return s, scale * LOG2E
    return jnp.tanh(s * (scale * (1.0 / spec.soft_cap))), spec.soft_cap * LOG2E


def mask(
    x: jax.Array,  # float32[M, N]
    q_pos: jax.Array,  # int32[M, N]
    kv_pos: jax.Array,  # int32[M, N]
    spec: AttentionSpec,
) -> jax.Array:  # float32[M, N]
    """-inf where the causal rule or the window hides the key."""
    visible = kv_pos <= q_pos
    if spec.sliding_window is not None:
        visible &= kv_pos > q_pos - spec.sliding_window
    return jnp.where(visible, x, -jnp.inf)


def rows_of(x: jax.Array, like: jax.Array) -> jax.Array:
    """A value for each row, spread over the columns."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def columns_of(x: jax.Array, rows: int) -> jax.Array:  # [M] -> [rows, M]
    """A value for each column, the same in all rows."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (rows, *x.shape), [1]), plgpu.Layout.WGMMA)


def unit_rows(
    tiles_ref: Any,
    table_ref: Any,
    kv_shape: tuple[int, ...],  # [N, 2, Hk, B, D]
    tile: jax.Array,
    head: jax.Array,
    unit: jax.Array,  # of the tile
) -> tuple[jax.Array, jax.Array]:
    """Where K of a unit is: see place_rows."""
    unit = tiles_ref[tile, plan.FIRST_UNIT] + unit
    place = plan.unit_place(table_ref, tiles_ref[tile, plan.ROW], unit, kv_shape[0], kv_shape[3])
    return place_rows(place, kv_shape, head)


def place_rows(
    place: jax.Array,  # int32[], see plan.unit_place
    kv_shape: tuple[int, ...],  # [N, 2, Hk, B, D]
    head: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Index of K of a unit in [N * 2 * Hk, B, D] (V: Hk further), and its first row in that block."""
    _, _, Hk, B, _ = kv_shape
    per_block = jnp.int32(B // plan.UNIT)
    return lax.div(place, per_block) * (2 * Hk) + head, lax.rem(place, per_block) * plan.UNIT


def fetch_unit(
    source: Any,  # ref [B, D]: K or V of a block and head
    row: jax.Array,  # of the block: the unit's first
    smem: Any,  # ref [64, D]
    full: Any,  # the barrier of its arrival
    num_keys: jax.Array | None = None,  # of the unit, if it may be a row's last one; any number above 64 is 64
) -> None:
    """Starts the copy of a unit, or of as many rows of it as hold keys, in parts of 16.

    The rows after those keep what was there before. A context ends anywhere in its last unit: half a unit that is not
    read is a twentieth of a context of 600.
    """

    def copy(size: int) -> None:
        plgpu.copy_gmem_to_smem(source.at[pl.ds(row, size)], smem.at[pl.ds(0, size)], full)

    if num_keys is None:
        copy(plan.UNIT)
        return
    when(num_keys > plan.UNIT - _PART)(functools.partial(copy, plan.UNIT))

    @when(num_keys <= plan.UNIT - _PART)
    def _() -> None:
        for size in range(_PART, plan.UNIT, _PART):
            when((num_keys > size - _PART) & (num_keys <= size))(functools.partial(copy, size))


def fetch_step(
    kv_ref: Any,  # ref [N * 2 * Hk, B, D]
    places: list[tuple[jax.Array, jax.Array]],  # of the step's units: see unit_rows
    num_kv_heads: int,
    reuses: jax.Array | None,  # whether an earlier step had these buffers; None is that none had
    buffers: Any,  # of K, then V: (ref [units * 64, D], the barrier of its arrival, the barrier of its release)
    num_keys: list[jax.Array | None],  # of the step's units: see fetch_unit
) -> None:
    """Starts the copies of a step's keys and values, as soon as their buffers are free."""
    for part, (smem, full, free) in enumerate(buffers):
        if reuses is not None:
            when(reuses)(functools.partial(plgpu.barrier_wait, free))
        for u, ((index, row), keys) in enumerate(zip(places, num_keys, strict=True)):
            source, target = kv_ref.at[index + part * num_kv_heads], smem.at[pl.ds(u * plan.UNIT, plan.UNIT)]
            fetch_unit(source, row, target, full, keys)


def widen_step(
    first: jax.Array,  # the step's first unit, counted as ``load`` does
    num_loads: jax.Array,
    ahead: int,  # units that are on their way before one is widened
    load: Callable[[jax.Array], None],  # starts the copy of a unit
    raw_of: Callable[[jax.Array], Any],  # its (ref fp8[64, D], barrier of its arrival)
    smem: Any,  # ref float16[units * 64, D]
    full: Any,  # its barrier
) -> None:
    """Widens a step's units of K or V as they arrive, and keeps the copies of later ones going."""
    for u in range(smem.shape[0] // plan.UNIT):
        n = first + u
        raw, arrived = raw_of(n)

        # Its slot was read before the last commit_smem, which waited for all of the warpgroup.
        when(n + ahead < num_loads)(functools.partial(load, n + ahead))

        plgpu.barrier_wait(arrived)
        widen(raw, smem.at[pl.ds(u * plan.UNIT, plan.UNIT)])
        plgpu.commit_smem()
    plgpu.barrier_arrive(full)


def zero_rows_past(v_ref: Any, first_pos: jax.Array, kv_len: jax.Array) -> None:
    """Clears the V rows of positions at or past ``kv_len``: nobody wrote them, and 0 * NaN is NaN."""
    rows, dim = v_ref.shape
    pos = first_pos + plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=plgpu.Layout.WGMMA)
    # In pieces, for want of registers.
    for row in range(0, rows, 64):
        for column in range(0, dim, 64):
            piece = v_ref.at[pl.ds(row, 64), pl.ds(column, 64)]
            v = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
            piece[...] = jnp.where(pos + row < kv_len, v, jnp.zeros_like(v))
    plgpu.commit_smem()


def online_softmax(
    x: jax.Array,  # float32[M, N], masked entries -inf
    c: jax.Array | float,  # positive
    m: jax.Array,  # float32[M]
    l: jax.Array,  # float32[M]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One step on the logits x * c (units of log2): (p, alpha, new m, new l)."""
    m_new = jnp.maximum(m, x.max(axis=1) * c)
    alpha = jnp.exp2(m - m_new)
    p = jnp.exp2(x * c - rows_of(m_new, x))
    return p, alpha, m_new, l * alpha + p.sum(axis=1)


def new_accumulator(rows: int, dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(acc, m, l) before any key."""
    per_row = functools.partial(plgpu.layout_cast, new_layout=plgpu.Layout.WGMMA.reduce(1))
    acc = plgpu.layout_cast(jnp.zeros((rows, dim), jnp.float32), plgpu.Layout.WGMMA)
    return acc, per_row(jnp.full((rows,), NO_MAXIMUM, jnp.float32)), per_row(jnp.zeros((rows,), jnp.float32))
