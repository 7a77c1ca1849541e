"""Decode kernel for Hopper: rows with few query tokens, bound by the bandwidth of reading K and V.

A tile is a matrix ``[M, D]`` of queries: ``tile_tokens`` tokens, each with the G heads of one KV head padded to
``group_rows`` (8 or 16) rows. All (tile, KV head, unit of 64 keys) triples form one line that is cut into shares of
equal cost, one for each worker (gpu_plan.py); so the load is even whatever the lengths are, and long contexts split by
themselves: the workers of a tile bring their results together in the one that began it (gpu_pieces.py), which writes
them from registers to memory (gpu_store.py).

A worker is a few warpgroups. One fetches units through the block table with TMA, running ahead across tile borders.
Another computes, with everything transposed, so that products are as wide as there are queries, not as the 64 rows that
wgmma has at least: S^T = K Q^T, the online softmax down its columns in float32 registers, O^T += V^T P^T.

fp8 K is multiplied as it is, by queries that are two fp8 matrices: a bfloat16 scaled into their range is the sum of a
float8_e4m3fn and of what that rounding left, exactly but for values below a 512th of their row's largest. That is their
representation: Hopper's tensor cores are said to add products of fp8 with about 14 bits of the largest, so a logit of
20 may be wrong by 0.02, where rounding its keys to fp8 costs more. V^T isn't something that wgmma reads in fp8: a third
warpgroup widens V to float16, which holds it exactly.

A unit of D = 128 is 32 KB of K and V: 1.4 us of an H100's bandwidth for one multiprocessor. Its products read it from
shared memory once, in 0.15 us for up to 32 query rows. 4 units keep 128 KB in flight on each multiprocessor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lane import when
from pallas_kernels.ragged_paged_attention import gpu_pieces as pieces
from pallas_kernels.ragged_paged_attention import gpu_plan as plan
from pallas_kernels.ragged_paged_attention.gpu_queries import copy_rows, scaled_parts
from pallas_kernels.ragged_paged_attention.gpu_store import store_columns, store_zeros
from pallas_kernels.ragged_paged_attention.gpu_tile import (
    LOG2E,
    NO_MAXIMUM,
    columns_of,
    fetch_step,
    logits,
    mask,
    mma_dtype,
    place_rows,
    smem_tile,
    unit_rows,
    widen,
    zero_rows_past,
)
from pallas_kernels.ragged_paged_attention.types import AttentionSpec

UNIT = plan.UNIT
_ACC, _COLUMNS = pieces.RESULTS, pieces.SUMS  # of matrices, and of a value for each query
_PARTS = 2  # of fp8 queries


@dataclass(frozen=True)
class DecodeConfig:
    """Tuning of the decode kernel, as gpu_tuning.json has it; part of the compiled kernel's identity."""

    num_ctas: int  # a CTA is a worker
    min_tile_units: int  # a tile of fewer units of 64 keys takes as long as one of so many
    stages: int  # units in flight
    # For a thread. A CTA gets 65536 // threads for each at its start: a sum above that never starts.
    compute_registers: int
    memory_registers: int
    wide_stages: int = 0  # fp8 only: units of widened V
    widen_registers: int = 0  # fp8 only


def group_rows(spec: AttentionSpec) -> int:
    """Rows that one token's G heads take in a tile."""
    return 8 if spec.num_heads // spec.num_kv_heads <= 8 else 16


def _segments(tiles_ref: Any, workers_ref: Any, worker: jax.Array, num_kv_heads: int, body: Any) -> None:
    """Walks a worker's share; ``body(segment, tile, head, unit, num, done)`` does ``num`` units of one tile and head.

    ``segment`` and ``done`` count the segments and the units that came before.
    """

    def one(carry: Any) -> Any:
        segment, tile, head, unit, left, done = carry
        num = jnp.minimum(tiles_ref[tile, plan.NUM_UNITS] - unit, left)
        body(segment, tile, head, unit, num, done)
        last_head = head + 1 == num_kv_heads
        return (
            segment + 1,
            jnp.where(last_head, tile + 1, tile),
            jnp.where(last_head, 0, head + 1),
            jnp.int32(0),
            left - num,
            done + num,
        )

    start = (
        jnp.int32(0),
        workers_ref[worker, plan.START_TILE],
        workers_ref[worker, plan.START_HEAD],
        workers_ref[worker, plan.START_UNIT],
        workers_ref[worker, plan.WORKER_UNITS],
        jnp.int32(0),
    )
    lax.while_loop(lambda carry: carry[4] > 0, one, start)


def decode(
    q: jax.Array,  # [T, Hq, D]
    values: jax.Array,  # [N, 2, Hk, B, D]
    scales: jax.Array | None,  # float32[2, Hk], fp8 only; None is 1.0
    block_table: jax.Array,  # int32[R, P]
    work: plan.DecodePlan,
    spec: AttentionSpec,
    config: DecodeConfig,
    sinks: jax.Array | None,  # float32[Hq]
    tile_tokens: int,
) -> jax.Array:  # [T, Hq, D]
    """The outputs of the plan's tokens. Padding tokens get zeros; other tokens outside of the plan are not written."""
    T, Hq, D = q.shape
    N, _, Hk, B, _ = values.shape
    G, PG, TQ = Hq // Hk, group_rows(spec), tile_tokens
    M = TQ * PG
    fp8 = spec.kv_dtype == "float8_e4m3fn"
    wide = mma_dtype(spec)
    stages = config.stages
    operands: list[Any] = [
        q.reshape(T * Hq, D),
        values.reshape(N * 2 * Hk, B, D),
        block_table,
        work.tiles,
        work.workers,
    ]
    if scales is not None:
        operands.append(scales)
    if sinks is not None:
        # Row r of every tile of KV head h has the sink of query head h * G + r % PG.
        padded = jnp.pad(sinks.reshape(Hk, G) * LOG2E, ((0, 0), (0, PG - G)))
        operands.append(jnp.tile(padded, (1, TQ)).astype(jnp.float32))

    def kernel(*refs: Any) -> None:
        q_ref, kv_ref, table_ref, tiles_ref, workers_ref, *optional, out_ref, pieces_ref, scratch = refs
        scales_ref = None if scales is None else optional.pop(0)
        sinks_ref = None if sinks is None else optional.pop(0)
        (q_raw, q_full, q_free), q_smem, k_buffers, v_buffers, p_smem, *fp8_scratch = scratch
        # What the products read of K and V.
        k_smem, k_full, k_free = k_buffers
        v_smem, v_full, v_free = fp8_scratch[0] if fp8 else v_buffers
        # Workers wait for later ones (gpu_pieces.py), so those are the CTAs that start first.
        wg, worker = lax.axis_index("wg"), config.num_ctas - 1 - lax.axis_index("cta")
        launches = pieces.num_launches(workers_ref, worker)

        def fetch_q(segment: jax.Array, tile: jax.Array, head: jax.Array) -> None:
            @when(segment > 0)
            def _() -> None:
                plgpu.barrier_wait(q_free)

            first_row = tiles_ref[tile, plan.FIRST_TOKEN] * Hq + head * G
            for i in range(TQ):
                # Past the tile's tokens come those of the next request, or zeros: nobody reads their results.
                plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(first_row + i * Hq, G)], q_raw.at[pl.ds(i * PG, G)], q_full)

        # The first units' places stand beside the worker: their copies start before a tile or the table is read.
        num_ahead = min(stages, plan.NUM_PLACES)

        def buffers_of(slot: Any) -> list[list[Any]]:
            return [[ref.at[slot] for ref in refs] for refs in (k_buffers, v_buffers)]

        def fetch_first() -> None:
            for unit in range(num_ahead):

                @when(unit < workers_ref[worker, plan.FIRST_UNITS])
                def _(unit: int = unit) -> None:
                    place = workers_ref[worker, plan.FIRST_PLACE + unit]
                    source = place_rows(place, values.shape, workers_ref[worker, plan.START_HEAD])
                    fetch_step(kv_ref, [source], Hk, None, buffers_of(unit), [None])

        def fetch(segment: Any, tile: Any, head: Any, unit: Any, num: Any, done: Any) -> None:
            fetch_q(segment, tile, head)
            num_keys = tiles_ref[tile, plan.KV_LEN] - (tiles_ref[tile, plan.FIRST_UNIT] + unit) * UNIT

            @pl.loop(jnp.where(segment == 0, jnp.minimum(num_ahead, num), 0), num)
            def _(j: jax.Array) -> None:
                source = unit_rows(tiles_ref, table_ref, values.shape, tile, head, unit + j)
                buffers = buffers_of(lax.rem(done + j, jnp.int32(stages)))
                fetch_step(kv_ref, [source], Hk, done + j >= stages, buffers, [num_keys - j * UNIT])

        def widen_values() -> None:
            raw, raw_full, raw_free = v_buffers

            @pl.loop(0, workers_ref[worker, plan.WORKER_UNITS])
            def _(unit: jax.Array) -> None:
                slot, wide_slot = lax.rem(unit, jnp.int32(stages)), lax.rem(unit, jnp.int32(config.wide_stages))

                @when(unit >= config.wide_stages)
                def _() -> None:
                    plgpu.barrier_wait(v_free.at[wide_slot])

                plgpu.barrier_wait(raw_full.at[slot])
                widen(raw.at[slot], v_smem.at[wide_slot])
                plgpu.commit_smem()
                plgpu.barrier_arrive(v_full.at[wide_slot])
                plgpu.barrier_arrive(raw_free.at[slot])

        def compute(segment: Any, tile: Any, *segment_rest: Any) -> None:
            if TQ == 1:
                attend(PG, segment, tile, *segment_rest)
                return
            # Most tiles are one token. What is computed for the others' columns would take most of the time.
            is_narrow = tiles_ref[tile, plan.NUM_TOKENS] == 1
            when(is_narrow)(functools.partial(attend, PG, segment, tile, *segment_rest))
            when(jnp.logical_not(is_narrow))(functools.partial(attend, M, segment, tile, *segment_rest))

        def attend(columns: int, segment: Any, tile: Any, head: Any, unit: Any, num: Any, done: Any) -> None:
            """A segment, for the first ``columns`` rows of the tile."""
            num_tokens, first_pos = tiles_ref[tile, plan.NUM_TOKENS], tiles_ref[tile, plan.FIRST_POS]
            kv_len, tile_units = tiles_ref[tile, plan.KV_LEN], tiles_ref[tile, plan.NUM_UNITS]
            first_key = (tiles_ref[tile, plan.FIRST_UNIT] + unit) * UNIT
            k_scale, v_scale = (1.0, 1.0) if scales_ref is None else (scales_ref[0, head], scales_ref[1, head])
            iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (UNIT, columns), layout=_ACC)
            first_columns = pl.ds(0, columns)
            weights = p_smem.at[first_columns].transpose((1, 0))
            plgpu.barrier_wait(q_full)
            if fp8:
                q_unscale = fp8_scratch[1]
                scaled_parts(q_raw, q_smem, q_unscale, columns)
            else:
                copy_rows(q_raw, q_smem.at[0], columns)
            plgpu.commit_smem()
            plgpu.barrier_arrive(q_free)
            if fp8:
                unscale = columns_of(plgpu.load(q_unscale.at[first_columns], layout=_COLUMNS, optimized=False), UNIT)

            def step(j: jax.Array, carry: Any, masked: bool) -> Any:
                acc, m, l = carry
                slot, key = lax.rem(done + j, jnp.int32(stages)), first_key + j * UNIT
                v_slot = lax.rem(done + j, jnp.int32(config.wide_stages)) if fp8 else slot
                plgpu.barrier_wait(k_full.at[slot])

                def scores(ref: Any) -> jax.Array:
                    for part in range(q_smem.shape[0]):
                        plgpu.wgmma(ref, k_smem.at[slot], q_smem.at[part, first_columns].transpose((1, 0)))
                    return ref[...]

                s = pl.run_scoped(scores, plgpu.ACC((UNIT, columns), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                x, c = logits(s * unscale if fp8 else s, spec, spec.scale * k_scale)
                if masked:
                    q_pos, kv_pos = first_pos + lax.div(iota(dimension=1), jnp.int32(PG)), key + iota(dimension=0)
                    x = mask(x, q_pos, kv_pos, spec)
                # The sum of exponentials stays spread over the threads; the maximum is the whole warpgroup's.
                m_new = jnp.maximum(m, x.max(axis=0) * c)
                alpha = jnp.exp2(m - m_new)
                p = jnp.exp2(x * c - columns_of(m_new, UNIT))
                l = l * columns_of(alpha, UNIT) + p
                acc = acc * columns_of(alpha, D)
                # Every warp's last product has read what was here: all met for the maximum.
                weights[...] = p.astype(wide)
                plgpu.commit_smem()
                plgpu.barrier_wait(v_full.at[v_slot])
                if masked:

                    @when(key + UNIT > kv_len)
                    def _() -> None:
                        zero_rows_past(v_smem.at[v_slot], key, kv_len)

                def add(ref: Any) -> None:
                    plgpu.wgmma(ref, v_smem.at[v_slot].transpose((1, 0)), weights)

                acc = pl.run_state(add)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[v_slot])
                return acc, m_new, l

            def constant(value: float, shape: tuple[int, ...], layout: Any) -> jax.Array:
                return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

            start = constant(0.0, (D, columns), _ACC), constant(NO_MAXIMUM, (columns,), _COLUMNS)
            carry, whole_end = (*start, constant(0.0, (UNIT, columns), _ACC)), jnp.int32(0)
            if spec.sliding_window is None:
                # Units that every query sees whole need no mask.
                seen = jnp.minimum(first_pos + 1 - first_key, num * UNIT)
                whole_end = lax.div(jnp.maximum(seen, 0), jnp.int32(UNIT))
                carry = lax.fori_loop(0, whole_end, functools.partial(step, masked=False), carry)
            acc, m, l = lax.fori_loop(whole_end, num, functools.partial(step, masked=True), carry)
            l = l.sum(axis=0)
            if sinks_ref is not None:
                # In the piece with the last unit only: where pieces are joined, their sums are added. A query may see
                # none of that piece's keys, so the sink counts for the maximum too.
                sink = plgpu.load(sinks_ref.at[head, first_columns], layout=_COLUMNS, optimized=False)
                sink = sink + jnp.where(unit + num == tile_units, 0.0, -jnp.inf)
                m_keys, m = m, jnp.maximum(m, sink)
                alpha = jnp.exp2(m_keys - m)
                acc, l = acc * columns_of(alpha, D), l * alpha + jnp.exp2(sink - m)
            l_safe = jnp.maximum(l, 1e-30)
            out, sums = acc * columns_of(v_scale / l_safe, D), m + jnp.log(l_safe) * LOG2E

            @when(unit > 0)
            def _() -> None:
                pieces.publish(out, sums, pieces_ref, worker)
                pieces.count_launch(workers_ref, worker, launches)

            @when(unit == 0)
            def _() -> None:
                num_after = jnp.where(num == tile_units, 0, workers_ref[worker, plan.NUM_AFTER])
                first_row = tiles_ref[tile, plan.FIRST_TOKEN] * Hq + head * G
                store_columns(
                    pieces.join(out, sums, pieces_ref, workers_ref, worker, num_after, launches).astype(jnp.bfloat16),
                    out_ref,
                    first_row,
                    num_tokens,
                    token_rows=PG,
                    stored_rows=G,
                    token_stride=Hq,
                )

        def walk(body: Any) -> None:
            _segments(tiles_ref, workers_ref, worker, Hk, body)

        @when(wg == 0)
        def _() -> None:
            plgpu.set_max_registers(config.compute_registers, action="increase")
            has_piece = (workers_ref[worker, plan.WORKER_UNITS] > 0) & (workers_ref[worker, plan.START_UNIT] > 0)
            when(jnp.logical_not(has_piece))(lambda: pieces.count_launch(workers_ref, worker, launches))
            store_zeros(out_ref, workers_ref[worker, plan.FIRST_PADDING], T, config.num_ctas, Hq)
            walk(compute)

        @when(wg == 1)
        def _() -> None:
            plgpu.set_max_registers(config.memory_registers, action="decrease")
            fetch_first()
            walk(fetch)

        if fp8:

            @when(wg == 2)
            def _() -> None:
                plgpu.set_max_registers(config.widen_registers, action="decrease")
                widen_values()

    def ring(num: int, shape: tuple[int, ...], dtype: Any) -> list[Any]:
        """Buffers, the barriers of their arrival, and those of their release."""
        return [smem_tile((num, *shape), dtype), plgpu.Barrier(num_barriers=num), plgpu.Barrier(num_barriers=num)]

    scratch = [
        [plgpu.SMEM((M, D), jnp.bfloat16), plgpu.Barrier(num_arrivals=TQ), plgpu.Barrier()],
        smem_tile((_PARTS, M, D), values.dtype) if fp8 else smem_tile((1, M, D), jnp.bfloat16),
        ring(stages, (UNIT, D), values.dtype),
        ring(stages, (UNIT, D), values.dtype),
        smem_tile((M, UNIT), wide),
    ]
    if fp8:
        scratch += [ring(config.wide_stages, (UNIT, D), wide), plgpu.SMEM((M,), jnp.float32)]
    out, _ = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((T * Hq, D), q.dtype),
            pieces.all_words(config.num_ctas, D, M),
        ],
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=3 if fp8 else 2,
        thread_name="wg",
        scratch_types=[scratch],
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # What one warpgroup tells another goes over barriers that are said here.
            unsafe_no_auto_barriers=True,
            # Layouts are said here: to infer them takes longer than all else of lowering a step.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=M * 128,  # 4 bytes of each query from 4 warps' 8 threads each
        ),
        kernel_name="ragged_paged_attention_decode",
    )(*operands)
    return out.reshape(T, Hq, D)
