"""The parts that all families share: norm, embedding, attention block, MLP, LM head.

Shape letters: T packed tokens, M rows of the LM head, Hq/Hk query/KV heads, G = Hq/Hk, D head dim, E model dim,
F ffn dim, V padded vocabulary.

Modules are abstract: a parameter is born as a shape with the names of its axes, and the real array comes in from
outside when a step merges its params with the graph definition (see registry.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.post_attention.reference import ACTIVATIONS
from pallas_kernels.qkv_prologue.reference import rms_norm
from pallas_kernels.qkv_prologue.types import QKNorm, RopeTable
from pallas_kernels.ragged_paged_attention.types import KVPool

from .config import ModelConfig
from .linear import einsum, take

Axes = tuple[str | None, ...]  # one logical name an axis; sharding.py maps them to the mesh
# (layer index, qkv [T, Hk, G+2, D], rope, norm, pool) -> (out [T, Hq, D], pool with this step's keys and values)
Attend = Callable[[int, jax.Array, RopeTable, QKNorm | None, KVPool], tuple[jax.Array, KVPool]]


def param(shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype) -> nnx.Param:
    """A parameter without a value."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)


class Linear(nnx.Module):
    """One projection, written as an einsum of the activations with the weight."""

    def __init__(self, spec: str, shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype, bias: bool = False):
        """``bias``: over all axes of the weight but the first."""
        self.spec, self.has_bias = spec, bias
        self.weight = param(shape, axes, dtype)
        if bias:
            self.bias = param(shape[1:], axes[1:], dtype)

    def __call__(self, x: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
        out = einsum(self.spec, x, self.weight.get_value(), out_dtype)
        return out + self.bias.get_value() if self.has_bias else out


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32 and rounded once."""

    offset: ClassVar[float] = 0.0  # 1.0 where the checkpoint's weight is the distance from 1

    def __init__(self, dim: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.weight = param((dim,), (None,), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., dim] -> [..., dim]
        return rms_norm(x, self.weight.get_value(), self.eps, self.offset)


class Embedding(nnx.Module):
    """Token ids to vectors, times the family's embedding scale."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, padded_vocab: int):
        self.embedding_scale, self.dtype = config.embedding_scale, dtype
        self.weight = param((padded_vocab, config.model_dim), ("vocab", "embed"), dtype)

    def __call__(self, token_ids: jax.Array) -> jax.Array:  # [T] -> [T, E]
        x = take(self.weight.get_value(), token_ids, self.dtype)
        if self.embedding_scale == 1.0:
            return x
        return x * jnp.asarray(self.embedding_scale, x.dtype)  # rounded to the dtype first, as the checkpoints expect


class Attention(nnx.Module):
    """Fused qkv projection, optional bias and qk-norm, rope, attention over the cache, output projection.

    ``qkv`` keeps each KV head's G query heads, its key and its value side by side, so that sharding KV heads shards all
    three alike.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, norm_type: type[RMSNorm]):
        heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
        dim, head_dim = config.model_dim, config.head_dim
        self.group, self.qk_norm = group, config.qk_norm
        self.qkv = Linear(
            "te,ehgd->thgd",
            (dim, heads, group + 2, head_dim),
            ("embed", "kv_heads", "q_group", "head_dim"),
            dtype,
            bias=config.qkv_bias,
        )
        if config.qk_norm:
            self.q_norm = norm_type(head_dim, config.norm_eps, dtype)
            self.k_norm = norm_type(head_dim, config.norm_eps, dtype)
        self.o = Linear(
            "thgd,hgde->te",
            (heads, group, head_dim, dim),
            ("kv_heads", "q_group", "head_dim", "embed"),
            dtype,
        )

    def __call__(
        self,
        layer: int,
        x: jax.Array,  # [T, E]
        rope: RopeTable,
        pool: KVPool,
        attend: Attend,
    ) -> tuple[jax.Array, KVPool]:  # [T, Hq, D]
        """All but the output projection."""
        return self.attend(layer, self.qkv(x), rope, pool, attend)

    def attend(
        self,
        layer: int,
        qkv: jax.Array,  # [T, Hk, G+2, D]
        rope: RopeTable,
        pool: KVPool,
        attend: Attend,
    ) -> tuple[jax.Array, KVPool]:  # [T, Hq, D]
        """What stands between the two projections."""
        norm = None
        if self.qk_norm:
            q_weight, k_weight = self.q_norm.weight.get_value(), self.k_norm.weight.get_value()
            norm = QKNorm(q_weight, k_weight, self.q_norm.eps, self.q_norm.offset)
        return attend(layer, qkv, rope, norm, pool)

    def project(self, out: jax.Array) -> jax.Array:  # [T, Hq, D] -> [T, E]
        num_tokens, num_heads, head_dim = out.shape
        return self.o(out.reshape(num_tokens, num_heads // self.group, self.group, head_dim))


class MLP(nnx.Module):
    """Gated MLP: ``down(activation(gate(x)) * up(x))`` with gate and up in one weight."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        dim, ffn = config.model_dim, config.ffn_dim
        self.activation = config.activation
        self.gate_up = Linear("te,ezf->tzf", (dim, 2, ffn), ("embed", None, "ffn"), dtype)
        self.down = Linear("tf,fe->te", (ffn, dim), ("ffn", "embed"), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:  # [T, E] -> [T, E]
        gate_up = self.gate_up(x)  # [T, 2, F]
        gate = ACTIVATIONS[self.activation](gate_up[:, 0].astype(jnp.float32))
        inner = (gate * gate_up[:, 1]).astype(x.dtype)  # [T, F]
        return self.down(inner)


class LMHead(nnx.Module):
    """Final norm and logits. A tied model's head reads ``embed`` of the params, another's ``lm_head``."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, padded_vocab: int, norm_type: type[RMSNorm]):
        self.vocab_size, self.soft_cap, self.tied = config.vocab_size, config.logit_soft_cap, config.tie_embeddings
        self.final_norm = norm_type(config.model_dim, config.norm_eps, dtype)
        table = Linear("me,ve->mv", (padded_vocab, config.model_dim), ("vocab", "embed"), dtype)
        if self.tied:
            self.embed = table
        else:
            self.lm_head = table

    def __call__(self, hidden: jax.Array) -> jax.Array:  # [M, E] -> float32[M, V]
        table = self.embed if self.tied else self.lm_head
        logits = table(self.final_norm(hidden), jnp.dtype(jnp.float32))
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        if logits.shape[-1] == self.vocab_size:
            return logits
        is_real = jnp.arange(logits.shape[-1]) < self.vocab_size
        return jnp.where(is_real, logits, -jnp.inf)
