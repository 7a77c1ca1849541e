"""Writes this step's keys and values into the pool: an XLA scatter, in place under donation.

Shape letters: see types.py. XLA compiles the scatter in place (no copy of the pool) on GPU and CPU, but for fp8 on
CPU, which it widens; it moves little more than the new rows. On TPU it copies the pool: tpu_write.py is for that.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVPool, RaggedBatch

_FP8_MAX = 448.0  # the largest float8_e4m3fn; casting anything larger gives NaN


def write_kv(
    k: jax.Array,  # [T, Hk, D]
    v: jax.Array,  # [T, Hk, D]
    pool: KVPool,
    batch: RaggedBatch,
    spec: AttentionSpec,
) -> KVPool:
    """The pool with token t's key and value at (``token_block[t]``, ``token_offset[t]``).

    Quantises as ``quantise`` says. Tokens whose block is N or more write nowhere. Offsets and blocks must not be
    negative. Two tokens of one step must not share a (block, offset).
    """
    new, scale = quantise(k, v, pool, spec)
    values = pool.values.at[slots(batch)].set(new.astype(pool.values.dtype), mode="drop", unique_indices=True)
    if scale is None or pool.scales is None:
        return KVPool(values, pool.scales)
    return KVPool(values, pool.scales.at[slots(batch)].set(scale, mode="drop", unique_indices=True))


def slots(batch: RaggedBatch) -> tuple[Any, ...]:
    """Index of the tokens' slots in an array [N, 2, Hk, B, ...]; it selects [T, 2, Hk, ...]."""
    return (batch.token_block, slice(None), slice(None), batch.token_offset)


def quantise(
    k: jax.Array,  # [T, Hk, D]
    v: jax.Array,  # [T, Hk, D]
    pool: KVPool,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array | None]:  # [T, 2, Hk, Ds], float32[T, 2, Hk] | None
    """What is stored of keys and values, before the cast to the pool's dtype, padded to its storage dim; int8's scales.

    fp8 divides by the pool's scale per head (1.0 if it has none) and saturates; int8 scales each token and head by its
    largest magnitude and rounds to nearest.
    """
    new, scale = jnp.stack([k, v], axis=1), None
    if spec.kv_dtype == "int8":
        new = new.astype(jnp.float32)
        scale = jnp.max(jnp.abs(new), axis=-1) / 127.0
        new = jnp.round(new / jnp.where(scale > 0, scale, 1.0)[..., None])
    elif spec.kv_dtype == "float8_e4m3fn":
        new = new.astype(jnp.float32)
        if pool.scales is not None:
            new = new / pool.scales[None, :, :, None]
        new = jnp.clip(new, -_FP8_MAX, _FP8_MAX)
    return jnp.pad(new, ((0, 0), (0, 0), (0, 0), (0, pool.values.shape[-1] - spec.head_dim))), scale
