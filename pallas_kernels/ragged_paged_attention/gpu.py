"""Ragged paged attention for Hopper GPUs in Pallas Mosaic GPU.

Rows with few query tokens are bound by the bandwidth of reading K and V: gpu_decode.py. Rows with many are bound by the
tensor cores: gpu_prefill.py. A bucket of T tokens and R rows runs the decode kernel alone when T <= R (correct for any
lengths, made for width 1), else both, each on its rows. Work lists come from gpu_plan.py; grids are static, nothing
depends on the host, so a step stays one CUDA graph.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

import jax

from pallas_kernels.ragged_paged_attention import gpu_decode, gpu_plan, gpu_prefill
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVLayout, KVPool, RaggedBatch, Sinks

HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (64, 128)
KV_DTYPES = ("bfloat16", "float8_e4m3fn")
MAX_GROUP = 16


def supports(spec: AttentionSpec) -> str | None:
    """Why this attention is refused, or None."""
    group = spec.num_heads // spec.num_kv_heads
    if spec.dtype != "bfloat16":
        return f"dtype is {spec.dtype}; the GPU kernel computes in bfloat16"
    if spec.kv_dtype not in KV_DTYPES:
        return f"kv_dtype is {spec.kv_dtype}; the GPU kernel reads {' and '.join(KV_DTYPES)}"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim is {spec.head_dim}; the GPU kernel has {HEAD_DIMS}"
    if spec.block_size not in BLOCK_SIZES:
        return f"block_size is {spec.block_size}; the GPU kernel has {BLOCK_SIZES}"
    if spec.num_heads % spec.num_kv_heads:
        return f"num_heads {spec.num_heads} isn't a multiple of num_kv_heads {spec.num_kv_heads}"
    if group > MAX_GROUP:
        return f"{group} query heads share a KV head; the GPU kernel packs at most {MAX_GROUP}"
    return None


def kv_layout(spec: AttentionSpec) -> KVLayout:
    """Heads are stored unpadded."""
    return KVLayout(storage_dim=spec.head_dim)


def attend(
    q: jax.Array,  # [T, Hq, D] bfloat16
    pool: KVPool,
    batch: RaggedBatch,
    spec: AttentionSpec,
    sinks: Sinks = None,  # float32[Hq]
) -> jax.Array:  # [T, Hq, D] bfloat16
    """Attention of every query token to its row's keys at positions up to its own: see api.ragged_paged_attention."""
    decode_config, prefill_config = configs(spec)
    return attend_tuned(q, pool, batch, spec, sinks, decode_config=decode_config, prefill_config=prefill_config)


@functools.partial(jax.jit, static_argnames=("spec", "decode_config", "prefill_config"))
def attend_tuned(
    q: jax.Array,  # [T, Hq, D] bfloat16
    pool: KVPool,
    batch: RaggedBatch,
    spec: AttentionSpec,
    sinks: Sinks,  # float32[Hq]
    *,
    decode_config: gpu_decode.DecodeConfig,
    prefill_config: gpu_prefill.PrefillConfig,
) -> jax.Array:  # [T, Hq, D] bfloat16
    """``attend`` with the tuning given. An inner jit: the layers of a step share one lowering."""
    T, Hq, D = q.shape
    Hk, R = spec.num_kv_heads, batch.context_lens.shape[0]
    with_prefill = T > R
    tile_tokens = decode_tile_tokens(spec, batch.max_width)
    work = gpu_plan.decode_plan(
        batch,
        T,
        tile_tokens=tile_tokens,
        num_kv_heads=Hk,
        num_workers=decode_config.num_ctas,
        num_blocks=pool.values.shape[0],
        block_size=spec.block_size,
        window=spec.sliding_window,
        min_tile_units=decode_config.min_tile_units,
        short_only=with_prefill,
    )
    table = batch.block_table
    out = gpu_decode.decode(q, pool.values, pool.scales, table, work, spec, decode_config, sinks, tile_tokens)
    if not with_prefill:
        return out
    tiles = gpu_plan.prefill_plan(batch, T, tile_tokens=gpu_prefill.tile_tokens(spec), window=spec.sliding_window)
    out_ref = jax.new_ref(out)
    gpu_prefill.prefill(q, pool.values, pool.scales, table, out_ref, tiles, spec, prefill_config, sinks)
    return jax.freeze(out_ref)


def decode_tile_tokens(spec: AttentionSpec, max_width: int | None) -> int:
    """Tokens of a decode tile: a token and the four drafts that are verified with it, as far as registers go."""
    most = 5 if gpu_decode.group_rows(spec) == 8 or spec.head_dim < 256 else 2
    return most if max_width is None else min(most, max_width)


def configs(spec: AttentionSpec) -> tuple[gpu_decode.DecodeConfig, gpu_prefill.PrefillConfig]:
    """The measured tuning of gpu_tuning.json."""
    entry = _tuning()[spec.kv_dtype][str(spec.head_dim)]
    return gpu_decode.DecodeConfig(**entry["decode"]), gpu_prefill.PrefillConfig(**entry["prefill"])


@functools.cache
def _tuning() -> dict[str, Any]:
    return json.loads(importlib.resources.files(__package__).joinpath("gpu_tuning.json").read_text())
