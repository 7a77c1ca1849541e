"""Gemma 3, text: four norms a layer, norms that scale by ``1 + weight``, qk-norm, tanh GELU, scaled embeddings.

The window pattern and the two rope bases come in through ``config.layers``.

Shape letters: T packed tokens, E model dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .config import ModelConfig
from .layers import RMSNorm
from .llama import Llama, LlamaLayer


class GemmaRMSNorm(RMSNorm):
    """RMS norm whose checkpoint weight is the distance from 1."""

    offset = 1.0


class Gemma3Layer(LlamaLayer):
    """``x + norm(attn(norm(x)))``, then ``x + norm(mlp(norm(x)))``."""

    norm_type = GemmaRMSNorm
    plain = False

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        super().__init__(config, dtype)
        self.post_attn_norm = GemmaRMSNorm(config.model_dim, config.norm_eps, dtype)
        self.post_mlp_norm = GemmaRMSNorm(config.model_dim, config.norm_eps, dtype)

    def finish(self, x: jax.Array, out: jax.Array) -> jax.Array:  # [T, E], [T, Hq, D] -> [T, E]
        x = x + self.post_attn_norm(self.attn.project(out))
        return x + self.post_mlp_norm(self.mlp(self.mlp_norm(x)))


class Gemma3(Llama):
    layer_type = Gemma3Layer
