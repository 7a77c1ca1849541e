"""KV write for TPU: a kernel, because XLA's scatter isn't always in place there.

Compiling ahead of time showed that XLA copies the whole pool around a scatter into an 8-bit pool (four rows share a
32-bit word), and into any pool when there are thousands of tokens. The kernel reads, changes and writes back
*segments*: as many rows of a block as a memory tile is high (8 in float32, 16 in bfloat16, 32 in 8 bits). The new
rows of a segment are consecutive query tokens, so each segment is touched once:

    bytes of a segment = 2 (read and write) * 2 Hk * 32 Ds + 2 Hk Ds e a token

Llama-3.1-8B: 132 KiB a decoded token, 1.6% of what attention then reads at a context of 2,048 in bf16, 3% in 8 bits.
Segments are double-buffered: segment e+1 is read and segment e-1 written while e is changed. Nothing is computed but
selections.

VMEM: two old segments, two changed ones, two sets of new rows, and one segment of rows and values in float32 each:
512 Hk Ds bytes in float32, 640 in bfloat16, 1024 in 8 bits. For Llama-3.1-8B that is 640 KiB, and 1 MiB with 8-bit KV.
SMEM: 16 bytes a token.

Shape letters: see types.py. S rows of a segment, e bytes an element of the new rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import kv_write
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVPool, RaggedBatch


def write_kv(
    k: jax.Array,  # [T, Hk, D]
    v: jax.Array,  # [T, Hk, D]
    pool: KVPool,
    batch: RaggedBatch,
    spec: AttentionSpec,
    *,
    interpret: Any = False,
) -> KVPool:
    """As ``kv_write.write_kv``, in place on TPU for every dtype and T. A row's tokens must be consecutive."""
    new, scale = kv_write.quantise(k, v, pool, spec)
    new = new.astype(pool.values.dtype)
    if pool.values.dtype.itemsize == 1:
        new = new.astype(jnp.bfloat16)  # which holds every fp8 and int8 value exactly
    values = _write_segments(new, pool.values, batch, interpret)
    if scale is None or pool.scales is None:
        return KVPool(values, pool.scales)
    return KVPool(values, _write_scales(scale, pool.scales, batch))


def _write_scales(
    scale: jax.Array,  # float32[T, 2, Hk]
    scales: jax.Array,  # float32[N, 2, Hk, B]
    batch: RaggedBatch,
) -> jax.Array:  # float32[N, 2, Hk, B]
    """Of int8, by whole blocks: XLA copies the array to scatter along its last dimension."""
    N, _, _, block_size = scales.shape
    T, R = scale.shape[0], batch.context_lens.shape[0]
    runs = _runs(batch, N, block_size)
    bound = min(T, T // block_size + 2 * R)  # a row fills whole blocks and at most two partial ones
    block = jnp.where(jnp.arange(bound) < runs.count, runs.block[:bound], N)
    blocks = scales.at[block].get(mode="clip")  # float32[bound, 2, Hk, B]
    blocks = blocks.at[runs.of_token, :, :, batch.token_offset].set(scale, mode="drop", unique_indices=True)
    return scales.at[block].set(blocks, mode="drop")


def _write_segments(
    new: jax.Array,  # [T, 2, Hk, Ds], float32 or bfloat16
    values: jax.Array,  # [N, 2, Hk, B, Ds]
    batch: RaggedBatch,
    interpret: Any,
) -> jax.Array:  # [N, 2, Hk, B, Ds]
    N, _, Hk, _, Ds = values.shape
    segment_rows = 32 // values.dtype.itemsize
    runs = _runs(batch, N, segment_rows)
    scalars = (runs.first, runs.length, runs.block, runs.offset, runs.count)
    num_cores = 1 if interpret else pltpu.get_tpu_info().num_cores
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    scratch = {
        "old": pltpu.VMEM((2, 2, Hk, segment_rows, Ds), values.dtype),
        "rows": pltpu.VMEM((2, segment_rows, 2, Hk, Ds), new.dtype),
        "wide_rows": pltpu.VMEM((segment_rows, 2, Hk, Ds), jnp.float32),
        "work": pltpu.VMEM((2, Hk, segment_rows, Ds), jnp.float32),
        "done": pltpu.VMEM((2, 2, Hk, segment_rows, Ds), values.dtype),
        "read_sem": pltpu.SemaphoreType.DMA((2,)),
        "write_sem": pltpu.SemaphoreType.DMA((2,)),
    }

    def kernel(*arguments: Any) -> None:
        first, length, block, offset, count, new, _, values, *buffers = arguments
        refs = dict(zip(scratch, buffers, strict=True))
        core = pl.program_id(0)
        num_segments = lax.div(count[0] - core + num_cores - 1, num_cores)

        def index(n: jax.Array | int) -> jax.Array:
            return core + n * num_cores

        def segment(n: jax.Array | int) -> Any:
            e = index(n)
            row = pl.multiple_of(lax.div(offset[e], segment_rows) * segment_rows, segment_rows)
            return values.at[block[e], :, :, pl.ds(row, segment_rows), :]

        def read(n: jax.Array | int, act: str) -> None:
            slot, e = lax.rem(jnp.int32(n), 2), index(n)
            sem = refs["read_sem"].at[slot]
            getattr(pltpu.make_async_copy(segment(n), refs["old"].at[slot], sem), act)()

            def row(t: jax.Array, carry: None) -> None:
                getattr(pltpu.make_async_copy(new.at[first[e] + t], refs["rows"].at[slot, t], sem), act)()

            lax.fori_loop(0, length[e], row, None)

        def write(n: jax.Array | int, act: str) -> None:
            slot = lax.rem(jnp.int32(n), 2)
            getattr(pltpu.make_async_copy(refs["done"].at[slot], segment(n), refs["write_sem"].at[slot]), act)()

        def change(n: jax.Array, carry: None) -> None:
            slot, e = lax.rem(n, 2), index(n)

            @pl.when(n + 1 < num_segments)
            def _read_next() -> None:
                read(n + 1, "start")

            read(n, "wait")
            refs["work"][...] = refs["old"][slot].astype(jnp.float32)
            refs["wide_rows"][...] = refs["rows"][slot].astype(jnp.float32)
            row = lax.rem(offset[e], segment_rows)

            def replace(t: jax.Array, carry: None) -> None:
                for part in range(2):
                    for h in range(Hk):
                        refs["work"][part, h, pl.ds(row + t, 1), :] = refs["wide_rows"][t, part, pl.ds(h, 1), :]

            lax.fori_loop(0, length[e], replace, None)

            @pl.when(n >= 2)
            def _reuse() -> None:
                write(n - 2, "wait")

            refs["done"][slot] = refs["work"][...].astype(values.dtype)
            write(n, "start")

        @pl.when(num_segments > 0)
        def _read_first() -> None:
            read(0, "start")

        lax.fori_loop(0, num_segments, change, None)
        for behind in (2, 1):

            @pl.when(num_segments >= behind)
            def _drain(behind: int = behind) -> None:
                write(num_segments - behind, "wait")

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_cores,),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct(values.shape, values.dtype),
        input_output_aliases={len(scalars) + 1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="kv_write",
    )(*scalars, new, values)


@dataclass(frozen=True)
class _Runs:
    """Runs of consecutive tokens that go to the same rows of a block; the first ``count`` entries are real."""

    first: jax.Array  # int32[T], first token
    length: jax.Array  # int32[T], tokens
    block: jax.Array  # int32[T]
    offset: jax.Array  # int32[T], row of the first token in the block
    count: jax.Array  # int32[1]
    of_token: jax.Array  # int32[T], the run of each token; T where it writes nowhere


def _runs(batch: RaggedBatch, num_blocks: int, rows: int) -> _Runs:
    """Runs within aligned pieces of ``rows`` rows of a block."""
    block, offset = batch.token_block, batch.token_offset
    T = block.shape[0]
    piece = offset // rows
    writes = block < num_blocks
    moved = jnp.concatenate([jnp.ones(1, bool), (block[1:] != block[:-1]) | (piece[1:] != piece[:-1])])
    starts = writes & moved
    run = jnp.where(writes, jnp.cumsum(starts, dtype=jnp.int32) - 1, T)
    zeros = jnp.zeros(T, jnp.int32)
    first = zeros.at[jnp.where(starts, run, T)].set(jnp.arange(T, dtype=jnp.int32), mode="drop")
    length = zeros.at[run].add(1, mode="drop")
    return _Runs(first, length, block[first], offset[first], jnp.sum(starts, dtype=jnp.int32)[None], run)
