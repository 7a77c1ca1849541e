"""Joins the partial results of tiles that the decode kernel split among workers.

For a tile and KV head with pieces i: out = sum_i 2^(lse_i - lse) out_i with lse = log2 sum_i 2^lse_i. A piece is 8 KB
for each query token (D = 128), so the pass costs little more than its launch; tiles of one worker are left alone.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import gpu_plan as plan


def combine(
    out_ref: Any,  # ref bfloat16[T * Hq, D], written in place
    part: jax.Array,  # float32[2C, 64, D]
    lse: jax.Array,  # float32[2C, 64, D], the same value in every column
    work: plan.DecodePlan,
    *,
    num_heads: int,
    num_kv_heads: int,
    group_rows: int,
) -> None:
    """Writes the output rows of every tile that has several pieces."""
    num_tiles, D = work.tiles.shape[0], out_ref.shape[1]
    G, PG = num_heads // num_kv_heads, group_rows
    rows = G if G * D % 128 == 0 else PG  # whole warpgroups have 128 threads
    at_once = max(1, 8192 // (rows * D))  # pieces whose loads are in flight together, in registers
    layout = plgpu.Layout.WG_STRIDED((rows, D), vec_size=math.gcd(4, rows * D // 128))

    def kernel(part_ref: Any, lse_ref: Any, tiles_ref: Any, share_ref: Any, out: Any, o_smem: Any) -> None:
        tile, head = lax.axis_index("tile"), lax.axis_index("head")
        num_units, share = tiles_ref[tile, plan.NUM_UNITS], share_ref[0]
        first_unit = tiles_ref[tile, plan.UNITS_BEFORE] * num_kv_heads + head * num_units
        first_worker = lax.div(first_unit, share)
        last_worker = lax.div(first_unit + jnp.maximum(num_units, 1) - 1, share)
        num_pieces = last_worker - first_worker + 1
        first_row = tiles_ref[tile, plan.FIRST_TOKEN] * num_heads + head * G

        def piece(index: jax.Array) -> jax.Array:
            """A worker's first piece is in its slot 0; a piece that starts within its share is its last."""
            worker = first_worker + jnp.minimum(index, num_pieces - 1)
            within = (index == 0) & (lax.rem(first_unit, share) != 0)
            return worker * 2 + jnp.where(within, 1, 0)

        def join(token_rows: Any, carry: tuple[jax.Array, ...], first: jax.Array) -> tuple[jax.Array, ...]:
            acc, m, l = carry
            read = functools.partial(plgpu.load, layout=layout, optimized=False)
            slots = [piece(first + k) for k in range(at_once)]
            outs = [read(part_ref.at[slot, token_rows]) for slot in slots]
            lses = [read(lse_ref.at[slot, token_rows]) for slot in slots]
            for k in range(at_once):
                lse_k = lses[k] + jnp.where(first + k < num_pieces, 0.0, -jnp.inf)
                m_new = jnp.maximum(m, lse_k)
                alpha, weight = jnp.exp2(m - m_new), jnp.exp2(lse_k - m_new)
                acc, m, l = acc * alpha + outs[k] * weight, m_new, l * alpha + weight
            return acc, m, l

        @pl.when(num_pieces > 1)
        def _():
            @pl.loop(0, tiles_ref[tile, plan.NUM_TOKENS])
            def _(token):
                token_rows = pl.ds(token * PG, rows)
                start = tuple(
                    plgpu.layout_cast(jnp.full((rows, D), value, jnp.float32), layout) for value in (0.0, -1e30, 0.0)
                )
                acc, _, l = lax.fori_loop(
                    0, pl.cdiv(num_pieces, at_once), lambda i, c: join(token_rows, c, i * at_once), start
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_smem[...] = (acc / jnp.maximum(l, 1e-30)).astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_smem.at[pl.ds(0, G)], out.at[pl.ds(first_row + token * num_heads, G)])

            plgpu.wait_smem_to_gmem(0)

    plgpu.kernel(
        kernel,
        grid=(num_tiles, num_kv_heads),
        grid_names=("tile", "head"),
        scratch_types=[plgpu.SMEM((rows, D), jnp.bfloat16)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="ragged_paged_attention_combine",
    )(part, lse, work.tiles, work.share, out_ref)
