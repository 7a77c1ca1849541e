"""The op in plain XLA: its definition, and its implementation on everything but Hopper GPUs.

Norm and rotation are float32, each rounded to the dtype of its input. Shape letters: see types.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.qkv_prologue.types import QKNorm, RopeTable


def heads(
    qkv: jax.Array,  # [T, Hk, G+2, D]: of each KV head its G query heads, its key, its value
    rope: RopeTable,
    norm: QKNorm | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # [T, Hq, D], [T, Hk, D], [T, Hk, D]
    """Queries and keys, normed and turned, and values, in the dtype of ``qkv``."""
    num_tokens, num_kv_heads, columns, head_dim = qkv.shape
    group = columns - 2
    q = qkv[:, :, :group].reshape(num_tokens, num_kv_heads * group, head_dim)
    k, v = qkv[:, :, group], qkv[:, :, group + 1]
    if norm is not None:
        q = rms_norm(q, norm.q_weight, norm.eps, norm.offset)
        k = rms_norm(k, norm.k_weight, norm.eps, norm.offset)
    return apply_rope(q, rope), apply_rope(k, rope), v


def rms_norm(
    x: jax.Array,  # [..., D]
    weight: jax.Array,  # [D]
    eps: float,
    offset: float,
) -> jax.Array:  # [..., D]
    """Root-mean-square norm over the last axis, scaled by ``weight + offset``; float32, rounded once."""
    wide, scale = x.astype(jnp.float32), weight.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse * (scale + offset if offset else scale)).astype(x.dtype)


def apply_rope(
    x: jax.Array,  # [T, H, D]
    rope: RopeTable,
) -> jax.Array:  # [T, H, D]
    """Turns dimension i with dimension i + D/2 by the token's angles; float32, rounded once."""
    cos, sin = (part[:, None, :] for part in rope)  # [T, 1, D/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [T, H, D/2]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)  # [T, H, D]
    return turned.astype(x.dtype)
