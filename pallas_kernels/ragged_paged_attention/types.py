"""Arguments of the ragged paged attention op.

Shape letters: R rows (requests) in the step, T packed query tokens, P block-table columns, N blocks in the pool, B block
size, Hq/Hk query/KV heads, G = Hq/Hk, D head dim, Ds the implementation's storage size of D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


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


Implementation = str  # "xla" | "pallas_gpu" | "pallas_tpu"
Sinks = Any  # float32[Hq] | None
