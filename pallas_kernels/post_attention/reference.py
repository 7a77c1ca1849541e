"""The op as XLA composes it, in the dtype of its inputs: what the kernel is compared with."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.post_attention.types import LayerWeights, NextWeights, PostAttentionSpec
from pallas_kernels.qkv_prologue.reference import rms_norm

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {  # of the gate
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def post_attention(
    attended: jax.Array,  # [M, A]
    x: jax.Array,  # [M, E]
    layer: LayerWeights,
    following: NextWeights,
    spec: PostAttentionSpec,
) -> tuple[jax.Array, jax.Array]:  # [M, E], [M, Q]
    """See api.post_attention."""
    x = x + _dot(attended, layer.o)
    gate, up = jnp.split(_dot(rms_norm(x, layer.mlp_norm, spec.eps, spec.norm_offset), layer.gate_up), 2, axis=1)
    inner = (ACTIVATIONS[spec.activation](gate.astype(jnp.float32)) * up).astype(x.dtype)
    x = x + _dot(inner, layer.down)
    return x, _dot(rms_norm(x, following.attn_norm, spec.eps, spec.norm_offset), following.qkv)


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, weight, precision=precision, preferred_element_type=x.dtype)
