"""Writes this step's keys and values into the pool: an XLA scatter, in place under donation.

Shape letters: see types.py. XLA compiles the scatter in place (no copy of the pool) on CPU, GPU and TPU; it moves
little more than the new rows.
"""

from __future__ import annotations

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

    Quantises to the pool's dtype: fp8 divides by the pool's scale per head (1.0 if it has none) and saturates, int8
    scales each token and head by its largest magnitude and stores that scale. Tokens whose block is N or more write
    nowhere. Offsets and blocks must not be negative. Two tokens of one step must not share a (block, offset).
    """
    new = jnp.stack([k, v], axis=1)  # [T, 2, Hk, D]
    scales = pool.scales
    index = (batch.token_block, slice(None), slice(None), batch.token_offset)
    if spec.kv_dtype == "int8":
        assert scales is not None
        new = new.astype(jnp.float32)
        scale = jnp.max(jnp.abs(new), axis=-1) / 127.0  # [T, 2, Hk]
        new = jnp.round(new / jnp.where(scale > 0, scale, 1.0)[..., None])
        scales = scales.at[index].set(scale, mode="drop", unique_indices=True)
    elif spec.kv_dtype == "float8_e4m3fn":
        new = new.astype(jnp.float32)
        if scales is not None:
            new = new / scales[None, :, :, None]
        new = jnp.clip(new, -_FP8_MAX, _FP8_MAX)
    new = new.astype(pool.values.dtype)
    storage_dim = pool.values.shape[-1]
    if storage_dim > spec.head_dim:
        new = jnp.pad(new, ((0, 0), (0, 0), (0, 0), (0, storage_dim - spec.head_dim)))
    values = pool.values.at[index].set(new, mode="drop", unique_indices=True)
    return KVPool(values, scales)
