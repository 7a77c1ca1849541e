"""Prefill kernel for Hopper: rows with many query tokens, bound by the tensor cores.

A tile is 128 rows: ``tile_tokens`` tokens with the G heads of one KV head, G padded to a power of two; row = g *
tile_tokens + token. Two warpgroups compute 64 rows each against the same K and V tiles and take turns on the tensor
cores: one multiplies while the other is in its softmax. A third warpgroup fetches through the block table with TMA and
runs ahead across tile borders. CTAs are persistent and take tiles by falling cost, in snake order.
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

from pallas_kernels.ragged_paged_attention import gpu_plan as plan
from pallas_kernels.ragged_paged_attention.gpu_tile import (
    LOG2E,
    fetch_step,
    logits,
    mask,
    mma_dtype,
    new_accumulator,
    online_softmax,
    queries,
    rows_of,
    smem_tile,
    unit_rows,
    widen_step,
    zero_rows_past,
)
from pallas_kernels.ragged_paged_attention.types import AttentionSpec

ROWS = 128  # of a tile
WG_ROWS = 64  # of a computing warpgroup


@dataclass(frozen=True)
class PrefillConfig:
    """Tuning of the prefill kernel, as gpu_tuning.json has it; part of the compiled kernel's identity."""

    num_ctas: int
    block_kv: int  # keys of a step, a multiple of 64
    stages: int
    compute_registers: int  # see DecodeConfig
    memory_registers: int
    raw_stages: int = 0  # fp8 only: K or V units in flight, not yet widened


def tile_tokens(spec: AttentionSpec) -> int:
    """Query tokens of a tile."""
    group = spec.num_heads // spec.num_kv_heads
    return ROWS // (1 << (group - 1).bit_length())


def prefill(
    q: jax.Array,  # [T, Hq, D]
    values: jax.Array,  # [N, 2, Hk, B, D]
    scales: jax.Array | None,  # float32[2, Hk], fp8 only; None is 1.0
    block_table: jax.Array,  # int32[R, P]
    out_ref: Any,  # ref [T, Hq, D], written in place
    work: plan.PrefillPlan,
    spec: AttentionSpec,
    config: PrefillConfig,
    sinks: jax.Array | None,  # float32[Hq]
) -> None:
    """Writes the output of the plan's tokens, and no other rows."""
    T, Hq, D = q.shape
    N, _, Hk, B, _ = values.shape
    G, TQ, BK = Hq // Hk, tile_tokens(spec), config.block_kv
    units, stages = BK // plan.UNIT, config.stages
    heads_per_wg, wg_tokens = max(WG_ROWS // TQ, 1), min(TQ, WG_ROWS)
    fp8 = spec.kv_dtype == "float8_e4m3fn"
    operands: list[Any] = [q, values.reshape(N * 2 * Hk, B, D), block_table, work.tiles, work.num_tiles]
    if scales is not None:
        operands.append(scales)
    if sinks is not None:
        padded = jnp.pad(sinks.reshape(Hk, G) * LOG2E, ((0, 0), (0, ROWS // TQ - G)))
        operands.append(jnp.repeat(padded, TQ, axis=1).astype(jnp.float32))

    def kernel(*refs: Any) -> None:
        q_ref, kv_ref, table_ref, tiles_ref, num_tiles_ref, *optional, out = refs
        scales_ref = None if scales is None else optional.pop(0)
        sinks_ref = optional.pop(0) if sinks is not None else None
        tile = functools.partial(smem_tile, dtype=mma_dtype(spec))
        raw = smem_tile((config.raw_stages, plan.UNIT, D), values.dtype)
        consumed = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
        produced = plgpu.Barrier(num_arrivals=1 if fp8 else units, num_barriers=stages)
        pl.run_scoped(
            functools.partial(body, q_ref, kv_ref, table_ref, tiles_ref, num_tiles_ref, scales_ref, sinks_ref, out),
            plgpu.SMEM((ROWS, D), jnp.bfloat16),
            tile((stages, BK, D)),
            tile((stages, BK, D)),
            # A tile's queries, then its output.
            plgpu.RefUnion(tile((2, WG_ROWS, D)), plgpu.SMEM((ROWS, D), jnp.bfloat16)),
            plgpu.Barrier(num_arrivals=G),
            plgpu.Barrier(num_arrivals=2),
            [produced, produced, consumed, consumed],
            plgpu.Barrier(num_arrivals=2),
            [raw, plgpu.Barrier(num_barriers=config.raw_stages)] if fp8 else [],
            collective_axes="wg",
        )

    def body(
        q_ref, kv_ref, table_ref, tiles_ref, num_tiles_ref, scales_ref, sinks_ref, out,
        q_raw, k_smem, v_smem, q_and_o, q_full, q_free, kv_barriers, turn, raw
    ) -> None:  # fmt: skip
        k_full, v_full, k_free, v_free = kv_barriers
        kv_buffers = ((k_smem, k_full, k_free), (v_smem, v_full, v_free))
        q_smem, o_smem = q_and_o
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        num_items = num_tiles_ref[0] * Hk

        def for_each_item(run: Any) -> None:
            """``run(i, tile, head, num_steps, first_step)``, first_step counting the steps of the items before."""

            def one(i: jax.Array, first_step: jax.Array) -> jax.Array:
                # Snake order evens out what the falling costs leave.
                place = jnp.where(lax.rem(i, jnp.int32(2)) == 0, cta, config.num_ctas - 1 - cta)
                item = i * config.num_ctas + place
                tile, head = lax.div(item, jnp.int32(Hk)), lax.rem(item, jnp.int32(Hk))
                live = item < num_items
                tile = jnp.where(live, tile, 0)
                num_steps = jnp.where(live, pl.cdiv(tiles_ref[tile, plan.NUM_UNITS], units), 0)

                @pl.when(live)
                def _():
                    run(i, tile, head, num_steps, first_step)

                return first_step + num_steps

            lax.fori_loop(0, pl.cdiv(num_items, config.num_ctas), one, jnp.int32(0))

        def place_of(tile, head, unit):
            # The last step's units past the tile's last one repeat it: masked, but finite.
            unit = jnp.minimum(unit, tiles_ref[tile, plan.NUM_UNITS] - 1)
            return unit_rows(tiles_ref, table_ref, values.shape, tile, head, unit)

        def fetch_q(i, tile, head):
            @pl.when(i > 0)
            def _():
                plgpu.barrier_wait(q_free)

            for g in range(G):
                # Past the tile's tokens come those of the next request, or zeros: nobody reads their results.
                plgpu.copy_gmem_to_smem(
                    q_ref.at[pl.ds(tiles_ref[tile, plan.FIRST_TOKEN], TQ), head * G + g],
                    q_raw.at[pl.ds(g * TQ, TQ)],
                    q_full,
                )

        def fetch(i, tile, head, num_steps, first_step):
            fetch_q(i, tile, head)

            @pl.loop(0, num_steps)
            def _(j):
                slot = lax.rem(first_step + j, jnp.int32(stages))
                places = [place_of(tile, head, j * units + u) for u in range(units)]
                buffers = [[ref.at[slot] for ref in refs] for refs in kv_buffers]
                fetch_step(kv_ref, places, Hk, first_step + j >= stages, buffers, [None] * units)

        def fetch_fp8(i, tile, head, num_steps, first_step):
            ahead = config.raw_stages - 1
            num_loads, first_load = num_steps * (2 * units), first_step * (2 * units)
            fetch_q(i, tile, head)

            def raw_of(n):
                slot = lax.rem(first_load + n, jnp.int32(config.raw_stages))
                return [ref.at[slot] for ref in raw]

            def load(n):
                """Each step's K units, then its V units."""
                slot = raw_of(n)
                step, part = lax.div(n, jnp.int32(2 * units)), lax.rem(lax.div(n, jnp.int32(units)), jnp.int32(2))
                index, row = place_of(tile, head, step * units + lax.rem(n, jnp.int32(units)))
                plgpu.copy_gmem_to_smem(kv_ref.at[index + part * Hk, pl.ds(row, plan.UNIT)], *slot)

            pl.loop(0, jnp.minimum(num_loads, ahead))(load)

            @pl.loop(0, num_steps)
            def _(j):
                slot = lax.rem(first_step + j, jnp.int32(stages))
                for part, (smem, full, free) in enumerate(kv_buffers):

                    @pl.when(first_step + j >= stages)
                    def _(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    first = (2 * j + part) * units
                    widen_step(first, num_loads, ahead, load, raw_of, smem.at[slot], full.at[slot])

        def take_turn():
            """Both warpgroups meet here; the second one starts half a step late (see _compute)."""
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def compute(i, tile, head, num_steps, first_step):
            del i
            num_tokens, first_pos = tiles_ref[tile, plan.NUM_TOKENS], tiles_ref[tile, plan.FIRST_POS]
            first_key, kv_len = tiles_ref[tile, plan.FIRST_UNIT] * plan.UNIT, tiles_ref[tile, plan.KV_LEN]
            k_scale, v_scale = (1.0, 1.0) if scales_ref is None else (scales_ref[0, head], scales_ref[1, head])
            iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (WG_ROWS, BK), layout=plgpu.Layout.WGMMA)
            my_rows = pl.ds(wg * WG_ROWS, WG_ROWS)

            # The copies out of the union of the item before.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_wait(q_full)
            q_smem.at[wg][...] = queries(q_raw.at[my_rows], spec)
            plgpu.commit_smem()
            plgpu.barrier_arrive(q_free)
            plgpu.barrier_wait(k_full.at[lax.rem(first_step, jnp.int32(stages))])

            def step(j, carry, masked):
                acc, m, l = carry
                slot = lax.rem(first_step + j, jnp.int32(stages))

                def scores(ref):
                    plgpu.wgmma(ref, q_smem.at[wg], k_smem.at[slot].transpose((1, 0)))
                    take_turn()
                    return ref[...]

                s = pl.run_scoped(scores, plgpu.ACC((WG_ROWS, BK), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                x, c = logits(s, spec, spec.scale * k_scale)
                if masked:
                    token = lax.rem(iota(dimension=0) + wg * WG_ROWS, jnp.int32(TQ))
                    x = mask(x, first_pos + token, first_key + j * BK + iota(dimension=1), spec)
                p, alpha, m, l = online_softmax(x, c, m, l)
                acc = acc * rows_of(alpha, acc)
                p16 = p.astype(mma_dtype(spec))
                acc, l, m, p16 = lax.optimization_barrier((acc, l, m, p16))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                if masked:

                    @pl.when(first_key + (j + 1) * BK > kv_len)
                    def _():
                        zero_rows_past(v_smem.at[slot], first_key + j * BK, kv_len)

                plgpu.barrier_wait(turn)

                def values_step(ref):
                    plgpu.wgmma(ref, p16, v_smem.at[slot])

                    @pl.when(j + 1 < num_steps)
                    def _():
                        plgpu.barrier_wait(k_full.at[lax.rem(first_step + j + 1, jnp.int32(stages))])

                acc = pl.run_state(values_step)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, m, l

            # Steps that every query sees whole need no mask; the last ones, and a window's first ones, do.
            whole_end = jnp.clip(lax.div(first_pos + 1 - first_key, jnp.int32(BK)), 0, num_steps)
            carry = new_accumulator(WG_ROWS, D)
            masked_step = functools.partial(step, masked=True)
            if spec.sliding_window is not None:
                whole_start = pl.cdiv(jnp.maximum(first_pos + TQ - spec.sliding_window - first_key, 0), BK)
                whole_start = jnp.minimum(whole_start, num_steps)
                whole_end = jnp.maximum(whole_end, whole_start)
                carry = lax.fori_loop(0, whole_start, masked_step, carry)
            else:
                whole_start = jnp.int32(0)
            carry = lax.fori_loop(whole_start, whole_end, functools.partial(step, masked=False), carry)
            acc, m, l = lax.fori_loop(whole_end, num_steps, masked_step, carry)

            if sinks_ref is not None:
                sink = plgpu.load(sinks_ref.at[head, my_rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                l = l + jnp.exp2(sink - m)
            o_smem.at[my_rows][...] = (acc * rows_of(v_scale / jnp.maximum(l, 1e-30), acc)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            write(tile, head, num_tokens)

        def write(tile, head, num_tokens):
            """This warpgroup's output rows: whole, or 8 tokens at a time, then one."""
            first_token = tiles_ref[tile, plan.FIRST_TOKEN]
            # With one head, the warpgroups share the tile's tokens; with more, its heads.
            before = wg * WG_ROWS if TQ > WG_ROWS else 0
            num = jnp.clip(num_tokens - before, 0, wg_tokens)
            for h in range(heads_per_wg):
                g = (wg * heads_per_wg if TQ <= WG_ROWS else 0) + h

                def copy(start, count, g=g, h=h):
                    plgpu.copy_smem_to_gmem(
                        o_smem.at[pl.ds(wg * WG_ROWS + h * TQ + start, count)],
                        out.at[pl.ds(first_token + before + start, count), head * G + g],
                    )

                @pl.when(g < G)
                def _(copy=copy):
                    @pl.when(num == wg_tokens)
                    def _():
                        copy(0, wg_tokens)

                    @pl.when(num != wg_tokens)
                    def _():
                        num_groups = lax.div(num, jnp.int32(8))
                        pl.loop(0, num_groups)(lambda n: copy(n * 8, 8))
                        pl.loop(num_groups * 8, num)(lambda n: copy(n, 1))

        # A CTA of 384 threads starts with 168 registers for each: 504 for the three roles.
        @pl.when(wg == 2)
        def _memory():
            plgpu.set_max_registers(config.memory_registers, action="decrease")
            for_each_item(fetch_fp8 if fp8 else fetch)

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(config.compute_registers, action="increase")
            pl.when(wg == 1)(take_turn)
            for_each_item(compute)
            pl.when(wg == 0)(take_turn)
            plgpu.wait_smem_to_gmem(0)

    plgpu.kernel(
        kernel,
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="ragged_paged_attention_prefill",
    )(*operands, out_ref)
