"""Joins the partial results of tiles that the decode kernel split among workers.

For a tile and KV head with pieces i: out = sum_i 2^(lse_i - lse) out_i with lse = log2 sum_i 2^lse_i. A tile is split
where a worker's share ends within it, so there are fewer split tiles than workers: a CTA looks at one border between
two workers, for every ``token_ctas``-th token. Tiles of one worker are left alone. A piece is D * 8 bytes for each of a
token's heads, so the pass costs little more than its launch.
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

from pallas_kernels.ragged_paged_attention import gpu_plan as plan
from pallas_kernels.ragged_paged_attention.gpu_store import store_rows

_THREADS = 128
_AT_ONCE = 8  # pieces whose loads are in flight together


def combine(
    out_ref: Any,  # ref bfloat16[T * Hq, D], written in place
    part: jax.Array,  # float32[2C, 64, D]
    lse: jax.Array,  # float32[2C, 64, D], the same value in every column
    work: plan.DecodePlan,
    *,
    num_heads: int,
    num_kv_heads: int,
    group_rows: int,
    token_ctas: int,
    store: Callable[..., None] = store_rows,
) -> None:
    """Writes the output rows of every tile that has several pieces; ``token_ctas`` CTAs share a tile's tokens.

    ``store`` stands in for ``store_rows`` where a test interprets the kernel.
    """
    D, G = out_ref.shape[1], num_heads // num_kv_heads
    # Whole warpgroups: where a token's G heads are fewer values than threads, padding rows are computed with them.
    rows = next(n for n in (G, group_rows) if n * D % _THREADS == 0)
    at_once = max(1, min(_AT_ONCE, 8192 // (rows * D)))  # in registers
    layout = plgpu.Layout.WG_STRIDED((rows, D), vec_size=math.gcd(4, rows * D // _THREADS))
    load = functools.partial(plgpu.load, layout=layout, optimized=False)

    def constant(value: float) -> jax.Array:
        return plgpu.layout_cast(jnp.full((rows, D), value, jnp.float32), layout)

    def kernel(part_ref: Any, lse_ref: Any, splits_ref: Any, out: Any) -> None:
        split, first = lax.axis_index("split"), lax.axis_index("first_token")
        num_pieces = splits_ref[split, plan.NUM_PIECES]
        first_worker, first_slot = splits_ref[split, plan.FIRST_WORKER], splits_ref[split, plan.FIRST_SLOT]

        def join(token_rows: pl.Slice, group: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            acc, m, l = carry
            pieces = [group * at_once + k for k in range(at_once)]
            # All but the first piece are what their worker began with. The last one stands in for those past the end.
            slots = [
                2 * (first_worker + jnp.minimum(piece, num_pieces - 1)) + jnp.where(piece == 0, first_slot, 0)
                for piece in pieces
            ]
            outs = [load(part_ref.at[slot, token_rows]) for slot in slots]
            lses = [load(lse_ref.at[slot, token_rows]) for slot in slots]
            for piece, out_k, lse_k in zip(pieces, outs, lses, strict=True):
                lse_k = lse_k + jnp.where(piece < num_pieces, 0.0, -jnp.inf)
                m_new = jnp.maximum(m, lse_k)
                alpha, weight = jnp.exp2(m - m_new), jnp.exp2(lse_k - m_new)
                acc, m, l = acc * alpha + out_k * weight, m_new, l * alpha + weight
            return acc, m, l

        num_tokens = splits_ref[split, plan.SPLIT_TOKENS]

        @pl.loop(0, lax.div(num_tokens + (token_ctas - 1 - first), jnp.int32(token_ctas)))
        def _(round_):
            token = first + round_ * token_ctas
            join_token = functools.partial(join, pl.ds(token * group_rows, rows))
            start = (constant(0.0), constant(-1e30), constant(0.0))
            acc, _, l = lax.fori_loop(0, pl.cdiv(num_pieces, at_once), join_token, start)
            value = (acc / jnp.maximum(l, 1e-30)).astype(jnp.bfloat16)
            first_token, head = splits_ref[split, plan.SPLIT_TOKEN], splits_ref[split, plan.SPLIT_HEAD]
            first_row = (first_token + token) * num_heads + head * G
            store(value, out, first_row, jnp.int32(1), layout=layout, token_rows=rows, stored_rows=G, token_stride=G)

    plgpu.kernel(
        kernel,
        grid=(work.splits.shape[0], token_ctas),
        grid_names=("split", "first_token"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # Layouts are said here: to infer them takes longer than all else of lowering a step.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="ragged_paged_attention_combine",
    )(part, lse, work.splits, out_ref)
