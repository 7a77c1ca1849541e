"""Decode kernel for Hopper: rows with few query tokens, bound by the bandwidth of reading K and V.

A tile is a ``[64, D]`` matrix of queries: ``tile_tokens`` tokens, each with the G heads of one KV head padded to
``group_rows`` (8 or 16) rows. All (tile, KV head, unit of 64 keys) triples form one line that is cut into shares of
equal cost, one for each worker (gpu_plan.py); so the load is even whatever the lengths are, and long contexts split by
themselves. A worker that has the whole of a tile's keys writes its output; the others leave partial results, which
gpu_combine.py joins. Both go from registers to memory (gpu_store.py).

A worker is a pair of warpgroups: one fetches through the block table with TMA, running ahead across tile borders, the
other computes: S = Q K^T (wgmma), online softmax in float32 registers, O += P V. With fp8 there are two that fetch, one
for K and one for V, and they widen what they fetched.

A unit of D = 128 is 32 KB of K and V and 2 * 2 * 64 * 64 * 128 = 2.1 MFLOP, most of them on padding rows: at the full
bandwidth of an H100 that is a quarter of its tensor peak, and 4 stages keep 128 KB in flight on each multiprocessor.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import gpu_plan as plan
from pallas_kernels.ragged_paged_attention.gpu_store import store_rows
from pallas_kernels.ragged_paged_attention.gpu_tile import (
    LOG2E,
    fetch_step,
    fetch_unit,
    logits,
    mask,
    mma_dtype,
    new_accumulator,
    online_softmax,
    place_rows,
    queries,
    rows_of,
    smem_tile,
    unit_rows,
    widen_step,
    zero_rows_past,
)
from pallas_kernels.ragged_paged_attention.types import AttentionSpec

ROWS = 64  # of a tile: M of one wgmma


@dataclass(frozen=True)
class DecodeConfig:
    """Tuning of the decode kernel, as gpu_tuning.json has it; part of the compiled kernel's identity."""

    num_ctas: int  # a CTA is a worker
    min_tile_units: int  # a tile of fewer units of 64 keys takes as long as one of so many
    block_kv: int  # keys of a step, a multiple of 64
    stages: int  # K and V tiles of a step in flight
    # For a thread. A CTA gets 65536 // threads for each at its start: a sum above that never starts.
    compute_registers: int
    memory_registers: int
    raw_stages: int = 0  # fp8 only: K units (and as many V units) in flight, not yet widened


def group_rows(spec: AttentionSpec) -> int:
    """Rows that one token's G heads take in a tile."""
    return 8 if spec.num_heads // spec.num_kv_heads <= 8 else 16


def tile_tokens(spec: AttentionSpec) -> int:
    return ROWS // group_rows(spec)


def _segments(
    tiles_ref: Any, workers_ref: Any, worker: jax.Array, num_kv_heads: int, step_units: int, body: Any
) -> None:
    """Walks a worker's share; ``body(segment, tile, head, unit, num, step)`` does ``num`` units of one tile and head.

    ``segment`` and ``step`` count the segments and the steps (of up to ``step_units`` units) that came before.
    """

    def one(carry: Any) -> Any:
        segment, tile, head, unit, left, step = carry
        tile_units = tiles_ref[tile, plan.NUM_UNITS]
        num = jnp.minimum(tile_units - unit, left)
        body(segment, tile, head, unit, num, step)
        last_head = head + 1 == num_kv_heads
        return (
            segment + 1,
            jnp.where(last_head, tile + 1, tile),
            jnp.where(last_head, 0, head + 1),
            jnp.int32(0),
            left - num,
            step + pl.cdiv(num, step_units),
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output [T, Hq, D] of the plan's tokens; of tiles with several workers, partial results and the log2 of their sums
    of exponentials, the same in each column: float32[2C, 64, D] both.

    Padding tokens get zeros. The output rows of other tokens outside of the plan, and of split tiles, are not written.
    """
    T, Hq, D = q.shape
    N, _, Hk, B, _ = values.shape
    G, PG, TQ = Hq // Hk, group_rows(spec), tile_tokens(spec)
    fp8 = spec.kv_dtype == "float8_e4m3fn"
    stages, BK = config.stages, config.block_kv
    units = BK // plan.UNIT
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
        q_ref, kv_ref, table_ref, tiles_ref, workers_ref, *optional, out_ref, part_ref, lse_ref = refs
        scales_ref = None if scales is None else optional.pop(0)
        sinks_ref = optional.pop(0) if sinks is not None else None
        tile = functools.partial(smem_tile, dtype=mma_dtype(spec))
        raw = smem_tile((2, config.raw_stages, plan.UNIT, D), values.dtype)
        raw_full = plgpu.Barrier(num_barriers=(2, config.raw_stages))
        produced = plgpu.Barrier(num_arrivals=1 if fp8 else units, num_barriers=stages)
        consumed = plgpu.Barrier(num_barriers=stages)
        pl.run_scoped(
            functools.partial(
                body,
                q_ref,
                kv_ref,
                table_ref,
                tiles_ref,
                workers_ref,
                scales_ref,
                sinks_ref,
                out_ref,
                part_ref,
                lse_ref,
            ),
            plgpu.SMEM((ROWS, D), jnp.bfloat16),
            tile((stages, BK, D)),
            tile((stages, BK, D)),
            # Zeros for padding tokens, then a segment's queries.
            plgpu.RefUnion(
                tile((ROWS, D)),
                plgpu.SMEM((ROWS, D), jnp.bfloat16),
            ),
            plgpu.Barrier(num_arrivals=TQ),
            plgpu.Barrier(),
            [produced, produced, consumed, consumed],
            [raw, raw_full] if fp8 else [],
            collective_axes="wg",
        )

    def body(
        q_ref, kv_ref, table_ref, tiles_ref, workers_ref, scales_ref, sinks_ref, out_ref, part_ref, lse_ref,
        q_raw, k_smem, v_smem, q_or_zeros, q_full, q_free, kv_barriers, raw
    ) -> None:  # fmt: skip
        k_full, v_full, k_free, v_free = kv_barriers
        kv_buffers = ((k_smem, k_full, k_free), (v_smem, v_full, v_free))
        q_smem, zeros_smem = q_or_zeros
        store = functools.partial(store_rows, layout=plgpu.Layout.WGMMA, token_rows=PG)
        wg = lax.axis_index("wg")
        worker = lax.axis_index("cta")

        place_of = functools.partial(unit_rows, tiles_ref, table_ref, values.shape)

        def keys_from(tile, unit):
            """How many keys of the tile's row begin at one of its units."""
            return tiles_ref[tile, plan.KV_LEN] - (tiles_ref[tile, plan.FIRST_UNIT] + unit) * plan.UNIT

        def fetch_q(segment, tile, head):
            @pl.when(segment > 0)
            def _():
                plgpu.barrier_wait(q_free)

            first_row = tiles_ref[tile, plan.FIRST_TOKEN] * Hq + head * G
            for i in range(TQ):
                # Past the tile's tokens come those of the next request, or zeros: nobody reads their results.
                plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(first_row + i * Hq, G)], q_raw.at[pl.ds(i * PG, G)], q_full)

        # The first steps' places stand beside the worker: their copies start before a tile or the table is read.
        num_ahead = min(stages, plan.NUM_PLACES // units)

        def first_place(n):
            place = workers_ref[worker, plan.FIRST_PLACE + n]
            return place_rows(place, values.shape, workers_ref[worker, plan.START_HEAD])

        def fetch_first():
            for step in range(num_ahead):

                @pl.when(step * units < workers_ref[worker, plan.FIRST_UNITS])
                def _(step=step):
                    buffers = [[ref.at[step] for ref in refs] for refs in kv_buffers]
                    places = [first_place(step * units + u) for u in range(units)]
                    fetch_step(kv_ref, places, Hk, False, buffers, [None] * units)

        def fetch(segment, tile, head, unit, num, step):
            fetch_q(segment, tile, head)
            num_steps = pl.cdiv(num, units)
            num_keys = keys_from(tile, unit)

            @pl.loop(jnp.where(segment == 0, jnp.minimum(num_ahead, num_steps), 0), num_steps)
            def _(j):
                slot = lax.rem(step + j, jnp.int32(stages))
                # The last step's units past the segment's last one repeat it: masked, but finite.
                ahead = [jnp.minimum(j * units + u, num - 1) for u in range(units)]
                places = [place_of(tile, head, unit + n) for n in ahead]
                buffers = [[ref.at[slot] for ref in refs] for refs in kv_buffers]
                keys = [num_keys - n * plan.UNIT for n in ahead]
                fetch_step(kv_ref, places, Hk, step + j >= stages, buffers, keys)

        def fetch_fp8(part, segment, tile, head, unit, num, step):
            """K (part 0) or V (part 1), fetched ahead into ``raw`` and widened from there."""
            smem, full, free = kv_buffers[part]
            ahead = config.raw_stages - 1
            num_steps = pl.cdiv(num, units)
            num_keys = keys_from(tile, unit)

            def raw_of(n):
                slot = lax.rem(step * units + n, jnp.int32(config.raw_stages))
                return [ref.at[part, slot] for ref in raw]

            def load(n):
                at = jnp.minimum(n, num - 1)
                index, row = place_of(tile, head, unit + at)
                slot, arrived = raw_of(n)
                fetch_unit(kv_ref.at[index + part * Hk], row, slot, arrived, num_keys - at * plan.UNIT)

            pl.loop(0, jnp.minimum(num_steps * units, ahead))(load)
            if part == 0:
                fetch_q(segment, tile, head)

            @pl.loop(0, num_steps)
            def _(j):
                slot = lax.rem(step + j, jnp.int32(stages))

                @pl.when(step + j >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                widen_step(j * units, num_steps * units, ahead, load, raw_of, smem.at[slot], full.at[slot])

        fetchers = [functools.partial(fetch_fp8, part) for part in (0, 1)] if fp8 else [fetch]

        def zero_padding():
            first = workers_ref[worker, plan.FIRST_PADDING]

            @pl.when(first < T)
            def _():
                rows = Hq if Hq <= ROWS else math.gcd(Hq, ROWS)
                zeros_smem[...] = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.bfloat16), plgpu.Layout.WGMMA)
                plgpu.commit_smem()

                @pl.loop(0, pl.cdiv(T - first, config.num_ctas))
                def _(i):
                    row = (first + i * config.num_ctas) * Hq
                    for part in range(Hq // rows):
                        plgpu.copy_smem_to_gmem(
                            zeros_smem.at[pl.ds(0, rows)], out_ref.at[pl.ds(row + part * rows, rows)]
                        )

        def compute(segment, tile, head, unit, num, step):
            num_tokens, first_pos = tiles_ref[tile, plan.NUM_TOKENS], tiles_ref[tile, plan.FIRST_POS]
            kv_len, tile_units = tiles_ref[tile, plan.KV_LEN], tiles_ref[tile, plan.NUM_UNITS]
            first_key = (tiles_ref[tile, plan.FIRST_UNIT] + unit) * plan.UNIT
            k_scale, v_scale = (1.0, 1.0) if scales_ref is None else (scales_ref[0, head], scales_ref[1, head])
            iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (ROWS, BK), layout=plgpu.Layout.WGMMA)
            # The copies of zeros out of the union.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_wait(q_full)
            q_smem[...] = queries(q_raw, spec)
            plgpu.commit_smem()
            plgpu.barrier_arrive(q_free)

            num_steps, end_key = pl.cdiv(num, units), first_key + num * plan.UNIT

            def step_fn(j, carry, masked):
                acc, m, l = carry
                slot = lax.rem(step + j, jnp.int32(stages))
                key = first_key + j * BK
                plgpu.barrier_wait(k_full.at[slot])

                def scores(ref):
                    plgpu.wgmma(ref, q_smem, k_smem.at[slot].transpose((1, 0)))
                    return ref[...]

                s = pl.run_scoped(scores, plgpu.ACC((ROWS, BK), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                x, c = logits(s, spec, spec.scale * k_scale)
                if masked:
                    q_pos, kv_pos = first_pos + lax.div(iota(dimension=0), jnp.int32(PG)), key + iota(dimension=1)
                    x = mask(x, q_pos, kv_pos, spec, end_key if units > 1 else None)
                p, alpha, m, l = online_softmax(x, c, m, l)
                acc = acc * rows_of(alpha, acc)
                p16 = p.astype(mma_dtype(spec))
                plgpu.barrier_wait(v_full.at[slot])
                if masked:

                    @pl.when(key + BK > kv_len)
                    def _():
                        zero_rows_past(v_smem.at[slot], key, kv_len)

                acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p16, v_smem.at[slot]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, m, l

            carry, whole_end = new_accumulator(ROWS, D), jnp.int32(0)
            if spec.sliding_window is None:
                # Steps that every query sees whole need no mask.
                seen = jnp.minimum(first_pos + 1 - first_key, num * plan.UNIT)
                whole_end = lax.div(jnp.maximum(seen, 0), jnp.int32(BK))
                carry = lax.fori_loop(0, whole_end, functools.partial(step_fn, masked=False), carry)
            acc, m, l = lax.fori_loop(whole_end, num_steps, functools.partial(step_fn, masked=True), carry)
            if sinks_ref is not None:
                # In the piece with the last unit only: the combination adds the pieces' sums. A query may see none of
                # that piece's keys, so the sink counts for the maximum too.
                sink = plgpu.load(sinks_ref.at[head], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                sink = sink + jnp.where(unit + num == tile_units, 0.0, -jnp.inf)
                m_keys, m = m, jnp.maximum(m, sink)
                alpha = jnp.exp2(m_keys - m)
                acc, l = acc * rows_of(alpha, acc), l * alpha + jnp.exp2(sink - m)
            l_safe = jnp.maximum(l, 1e-30)
            out = acc * rows_of(v_scale / l_safe, acc)

            @pl.when(num == tile_units)
            def _whole():
                first_row = tiles_ref[tile, plan.FIRST_TOKEN] * Hq + head * G
                store(out.astype(jnp.bfloat16), out_ref, first_row, num_tokens, stored_rows=G, token_stride=Hq)

            @pl.when(num != tile_units)
            def _piece():
                # A worker has at most two pieces: its first segment, and its last.
                index = worker * 2 + jnp.where(segment == 0, 0, 1)
                # Spread over the columns, so that the combination is elementwise.
                lse = m + jnp.log(l_safe) * LOG2E
                for value, ref in ((out, part_ref), (rows_of(lse, out), lse_ref)):
                    store(value, ref, index * ROWS, num_tokens, stored_rows=PG, token_stride=PG)

        walk = functools.partial(_segments, tiles_ref, workers_ref, worker, Hk, units)

        @pl.when(wg == 0)
        def _compute():
            plgpu.set_max_registers(config.compute_registers, action="increase")
            zero_padding()
            walk(compute)
            plgpu.wait_smem_to_gmem(0)

        for i, fetcher in enumerate(fetchers):

            @pl.when(wg == i + 1)
            def _memory(fetcher=fetcher):
                plgpu.set_max_registers(config.memory_registers, action="decrease")
                if not fp8:
                    fetch_first()
                walk(fetcher)

    out, part, lse = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((T * Hq, D), q.dtype),
            jax.ShapeDtypeStruct((2 * config.num_ctas * ROWS, D), jnp.float32),
            jax.ShapeDtypeStruct((2 * config.num_ctas * ROWS, D), jnp.float32),
        ],
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=3 if fp8 else 2,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="ragged_paged_attention_decode",
    )(*operands)
    pieces = 2 * config.num_ctas, ROWS, D
    return out.reshape(T, Hq, D), part.reshape(pieces), lse.reshape(pieces)
