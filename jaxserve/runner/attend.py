"""The attention of a step, bound to its batch: what the model calls in every layer after its qkv projection.

Shape letters: T tokens, Hq/Hk query/KV heads, G = Hq/Hk, D head dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Attend
from pallas_kernels.qkv_prologue.api import qkv_prologue
from pallas_kernels.qkv_prologue.types import QKNorm, RopeTable
from pallas_kernels.ragged_paged_attention.api import kv_layout, ragged_paged_attention
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVPool, RaggedBatch

HEADS = PartitionSpec(None, "tp")  # of [T, Hk, G+2, D] and [T, Hq, D]
POOL = PartitionSpec(None, None, "tp")  # of [N, 2, Hk, B, Ds], and of int8's scales [N, 2, Hk, B]
WHOLE = PartitionSpec()


@dataclass(frozen=True)
class PagedAttention:
    """Static: one spec a layer (per shard), the implementation that runs them all, and the mesh."""

    specs: tuple[AttentionSpec, ...]
    implementation: str
    mesh: Mesh

    def bind(self, batch: RaggedBatch) -> Attend:
        """The ``attend`` of ``Model.hidden`` for one step's batch."""

        def attend(
            layer: int,
            qkv: jax.Array,  # [T, Hk, G+2, D], all shards' heads
            rope: RopeTable,
            norm: QKNorm | None,
            pool: KVPool,
        ) -> tuple[jax.Array, KVPool]:  # [T, Hq, D]
            run = functools.partial(_write_and_attend, spec=self.specs[layer], implementation=self.implementation)
            return jax.shard_map(
                run,
                mesh=self.mesh,
                in_specs=(HEADS, WHOLE, WHOLE, POOL, WHOLE),
                out_specs=(HEADS, POOL),
                check_vma=False,
            )(qkv, rope, norm, pool, batch)

        return attend

    def bytes_per_block(self) -> int:
        """Bytes that one block costs on one device, over all layers."""
        return sum(kv_layout(spec, self.implementation).bytes_per_block(spec) for spec in self.specs)

    def empty_pools(self, num_blocks: int) -> tuple[KVPool, ...]:
        """Pools of zeros with all shards' heads; traceable.

        fp8 pools have no scales: no checkpoint that can be opened brings any, and scales of 1.0 would only be one more
        array a layer.
        """
        shards = self.mesh.shape["tp"]
        pools = []
        for spec in self.specs:
            whole = AttentionSpec(
                **{**vars(spec), "num_heads": spec.num_heads * shards, "num_kv_heads": spec.num_kv_heads * shards}
            )
            pool = kv_layout(spec, self.implementation).empty_pool(whole, num_blocks)
            pools.append(replace(pool, scales=None) if spec.kv_dtype == "float8_e4m3fn" else pool)
        return tuple(pools)


def _write_and_attend(
    qkv: jax.Array,  # [T, Hk, G+2, D], one shard's heads
    rope: RopeTable,
    norm: QKNorm | None,
    pool: KVPool,
    batch: RaggedBatch,
    *,
    spec: AttentionSpec,
    implementation: str,
) -> tuple[jax.Array, KVPool]:
    q, pool = qkv_prologue(qkv, rope, norm, pool, batch, spec, implementation)
    return ragged_paged_attention(q, pool, batch, spec, implementation), pool


def attention_specs(
    config: ModelConfig, *, block_size: int, dtype: str, kv_dtype: str, shards: int
) -> tuple[AttentionSpec, ...]:
    """One spec a layer, with the heads of one of ``shards`` shards."""
    return tuple(
        AttentionSpec(
            num_heads=config.num_heads // shards,
            num_kv_heads=config.num_kv_heads // shards,
            head_dim=config.head_dim,
            block_size=block_size,
            dtype=dtype,
            kv_dtype=kv_dtype,
            scale=config.attention_scale,
            sliding_window=layer.sliding_window,
        )
        for layer in config.layers
    )
