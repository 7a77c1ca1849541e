"""Llama 2 and 3, SmolLM2, and the plain pre-norm decoder that Mistral, Qwen2 and Qwen3 share with them.

Shape letters: T packed tokens, E model dim.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.qkv_prologue.types import RopeTable
from pallas_kernels.ragged_paged_attention.types import KVPool

from .config import ModelConfig
from .layers import MLP, Attend, Attention, Embedding, RMSNorm
from .rope import rope_tables


class LlamaLayer(nnx.Module):
    """``x + attn(norm(x))``, then ``x + mlp(norm(x))``."""

    norm_type: ClassVar[type[RMSNorm]] = RMSNorm  # of all norms, the model's final one included

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        self.attn_norm = self.norm_type(config.model_dim, config.norm_eps, dtype)
        self.attn = Attention(config, dtype, self.norm_type)
        self.mlp_norm = self.norm_type(config.model_dim, config.norm_eps, dtype)
        self.mlp = MLP(config, dtype)

    def __call__(
        self,
        layer: int,
        x: jax.Array,  # [T, E]
        rope: RopeTable,
        pool: KVPool,
        attend: Attend,
    ) -> tuple[jax.Array, KVPool]:
        attended, pool = self.attn(layer, self.attn_norm(x), rope, pool, attend)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), pool


class Llama(nnx.Module):
    """Embedding and layers. A family whose layers differ names its own ``layer_type``."""

    layer_type: ClassVar[type[LlamaLayer]] = LlamaLayer

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, padded_vocab: int):
        self.config = config
        self.embed = Embedding(config, dtype, padded_vocab)
        self.layers = nnx.List([self.layer_type(config, dtype) for _ in config.layers])

    def __call__(
        self,
        token_ids: jax.Array,  # int32[T]
        positions: jax.Array,  # int32[T]
        kv: tuple[KVPool, ...],
        attend: Attend,
    ) -> tuple[jax.Array, tuple[KVPool, ...]]:
        layers = self.config.layers
        tables = rope_tables((layer.rope for layer in layers), positions, self.config.head_dim)
        x = self.embed(token_ids)  # [T, E]

        @partial(jax.jit, static_argnums=(0, 1))
        def run(alike: int, graph: nnx.GraphDef, weights: nnx.State, x: jax.Array, pool: KVPool):
            # Equal layers are traced and lowered once; XLA inlines the calls.
            return nnx.merge(graph, weights)(alike, x, tables[layers[alike].rope], pool, attend)

        pools = []
        for i, (layer, settings, pool) in enumerate(zip(self.layers, layers, kv, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                x, pool = run(layers.index(settings), *nnx.split(layer), x, pool)
            pools.append(pool)
        return x, tuple(pools)
