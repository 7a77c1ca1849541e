"""Llama 2 and 3, SmolLM2, and the plain pre-norm decoder that Mistral, Qwen2 and Qwen3 share with them.

Shape letters: T packed tokens, E model dim.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.post_attention.api import empty_words, post_attention
from pallas_kernels.post_attention.types import LayerWeights, NextWeights
from pallas_kernels.qkv_prologue.types import RopeTable
from pallas_kernels.ragged_paged_attention.types import KVPool

from .config import ModelConfig, RopeConfig
from .fused import FusedLayers
from .layers import MLP, Attend, Attention, Embedding, RMSNorm
from .rope import rope_tables


class LlamaLayer(nnx.Module):
    """``x + attn(norm(x))``, then ``x + mlp(norm(x))``."""

    norm_type: ClassVar[type[RMSNorm]] = RMSNorm  # of all norms, the model's final one included
    plain: ClassVar[bool] = True  # it is what this class computes: no more norms, no other order

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
        out, pool = self.attn(layer, self.attn_norm(x), rope, pool, attend)
        return self.finish(x, out), pool

    def finish(self, x: jax.Array, out: jax.Array) -> jax.Array:  # [T, E], [T, Hq, D] -> [T, E]
        """The residual stream after the layer, from what attention gave."""
        x = x + self.attn.project(out)
        return x + self.mlp(self.mlp_norm(x))

    def after_attention(self) -> LayerWeights:
        """What comes after its attention, matrices as [in, out]."""
        o, gate_up = self.attn.o.weight.get_value(), self.mlp.gate_up.weight.get_value()
        return LayerWeights(
            o=o.reshape(-1, o.shape[-1]),
            mlp_norm=self.mlp_norm.weight.get_value(),
            gate_up=gate_up.reshape(gate_up.shape[0], -1),
            down=self.mlp.down.weight.get_value(),
        )

    def before_attention(self) -> NextWeights:
        qkv = self.attn.qkv.weight.get_value()
        return NextWeights(self.attn_norm.weight.get_value(), qkv.reshape(qkv.shape[0], -1))

    def is_packed(self) -> bool:
        """Whether a weight isn't a plain array."""
        linears = self.attn.qkv, self.attn.o, self.mlp.gate_up, self.mlp.down
        return not all(isinstance(linear.weight.get_value(), jax.Array) for linear in linears)


class Llama(nnx.Module):
    """Embedding and layers. A family whose layers differ names its own ``layer_type``."""

    layer_type: ClassVar[type[LlamaLayer]] = LlamaLayer

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, padded_vocab: int, fused_layers: FusedLayers | None = None
    ):
        self.config, self.fused_layers = config, fused_layers
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
        fused = self.fused_layers
        if fused is not None and fused.launches(len(token_ids)) and not any(layer.is_packed() for layer in self.layers):
            return self._fused(fused, x, tables, kv, attend)

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

    def _fused(
        self,
        fused: FusedLayers,
        x: jax.Array,  # [T, E]
        tables: dict[RopeConfig, RopeTable],
        kv: tuple[KVPool, ...],
        attend: Attend,
    ) -> tuple[jax.Array, tuple[KVPool, ...]]:
        """The layers, each from its attention on in one op with the next one's qkv."""
        layers = self.config.layers

        @partial(jax.jit, static_argnums=(0, 1))
        def run(alike: int, graph: nnx.GraphDef, weights: nnx.State, qkv: jax.Array, pool: KVPool):
            return nnx.merge(graph, weights).attend(alike, qkv, tables[layers[alike].rope], pool, attend)

        num_tokens = len(x)
        words = empty_words(fused.rows(num_tokens), fused.num_ctas)
        first = self.layers[0]
        qkv = first.attn.qkv(first.attn_norm(x))  # [T, Hk, G+2, D]
        shape, pools = qkv.shape, []
        for i, (layer, settings, pool) in enumerate(zip(self.layers, layers, kv, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                out, pool = run(layers.index(settings), *nnx.split(layer.attn), qkv, pool)  # [T, Hq, D]
                if i + 1 < len(layers):
                    weights, following = layer.after_attention(), self.layers[i + 1].before_attention()
                    out = out.reshape(num_tokens, -1)
                    x, qkv, words = post_attention(out, x, weights, following, words, fused.spec, fused.num_ctas)
                    qkv = qkv.reshape(shape)
                else:
                    x = layer.finish(x, out)
            pools.append(pool)
        return x, tuple(pools)
