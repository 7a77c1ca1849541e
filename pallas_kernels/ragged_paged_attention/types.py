"""Arguments of the ragged paged attention op.

Shape letters: R rows (requests) in the step, T packed query tokens, P block-table columns, N blocks in the pool, B
block size, Hq/Hk query/KV heads, G = Hq/Hk, D head dim, Ds the implementation's storage size of D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class AttentionSpec:
    """Static options of one attention layer: hashable, part of the executable's identity.

    ``num_heads``/``num_kv_heads`` are those of one shard. ``kv_dtype`` is the pool's dtype name.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  # of q and of the output: "float32" | "bfloat16"
    kv_dtype: str  # "float32" | "bfloat16" | "float8_e4m3fn" | "int8"
    scale: float
    sliding_window: int | None = None  # tokens a query sees, itself included
    soft_cap: float | None = None
    has_sinks: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPool:
    """One layer's share of the KV cache. A block is one contiguous piece: K heads, then V heads."""

    values: jax.Array  # [N, 2, Hk, B, Ds]
    scales: jax.Array | None = None  # fp8: float32[2, Hk]; int8: float32[N, 2, Hk, B]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedBatch:
    """Which query tokens belong to which request, and where their keys are. Shared by all layers of a step.

    Row r owns query tokens ``cu_q_lens[r] : cu_q_lens[r+1]``; token i of it stands at absolute position
    ``context_lens[r] - (cu_q_lens[r+1] - cu_q_lens[r]) + i``. Rows of width 0 are padding; tokens at or past
    ``cu_q_lens[R]`` are padding (their output is unspecified but finite, and they write nowhere).
    """

    block_table: jax.Array  # int32[R, P]
    context_lens: jax.Array  # int32[R], keys each row attends to, this step's tokens included
    cu_q_lens: jax.Array  # int32[R+1]
    token_block: jax.Array  # int32[T], pool block that token t's KV goes to; N or more = nowhere
    token_offset: jax.Array  # int32[T], its row in that block
    # Static: no row should have more query tokens, unless it is a prompt's in a step of more tokens than rows; None if
    # that isn't known. It changes speed, never results.
    max_width: int | None = field(default=None, metadata={"static": True})


Implementation = str  # "xla" | "pallas_gpu" | "pallas_tpu"
Sinks = Any  # float32[Hq] | None


@dataclass(frozen=True)
class KVLayout:
    """How one implementation stores a layer's pool. ``storage_dim`` is Ds, ``head_dim`` padded with zeros."""

    storage_dim: int

    def values_shape(self, spec: AttentionSpec, num_blocks: int) -> tuple[int, ...]:
        return (num_blocks, 2, spec.num_kv_heads, spec.block_size, self.storage_dim)

    def scales_shape(self, spec: AttentionSpec, num_blocks: int) -> tuple[int, ...] | None:
        """Shape of the float32 scales, or None where the KV dtype needs none."""
        if spec.kv_dtype == "int8":
            return (num_blocks, 2, spec.num_kv_heads, spec.block_size)
        if spec.kv_dtype == "float8_e4m3fn":
            return (2, spec.num_kv_heads)
        return None

    def bytes_per_block(self, spec: AttentionSpec) -> int:
        """Bytes that one more block costs in one layer."""
        size = math.prod(self.values_shape(spec, 1)) * jnp.dtype(spec.kv_dtype).itemsize
        if spec.kv_dtype == "int8":
            size += 4 * 2 * spec.num_kv_heads * spec.block_size
        return size

    def empty_pool(self, spec: AttentionSpec, num_blocks: int) -> KVPool:
        """A pool of zeros; fp8 scales are one. Traceable, so that it can be built sharded under ``jax.jit``."""
        shape = self.scales_shape(spec, num_blocks)
        scales = None if shape is None else jnp.ones(shape, jnp.float32)
        return KVPool(jnp.zeros(self.values_shape(spec, num_blocks), spec.kv_dtype), scales)
