"""Rotary position embedding, in the half-split layout of HF checkpoints: dimension i turns with dimension i + D/2.

Shape letters: T packed tokens, H heads, D head dim. Angles and rotation are float32 in every dtype: bfloat16 can't even
hold position 257.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from .config import LinearScaling, Llama3Scaling, RopeConfig

RopeTable = tuple[jax.Array, jax.Array]  # cos, sin: float32[T, D/2]


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> list[float]:
    """Radians per position of each of the D/2 pairs, scaling applied."""
    frequencies = [rope.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    match rope.scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return [f / factor for f in frequencies]
        case Llama3Scaling():
            return [_llama3(f, rope.scaling) for f in frequencies]


def _llama3(frequency: float, scaling: Llama3Scaling) -> float:
    """Keeps fast pairs, slows slow ones by ``factor``, and blends between: by turns made over the original context."""
    turns = scaling.original_max_position * frequency / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = min(max(blend, 0.0), 1.0)
    return kept * frequency + (1.0 - kept) * frequency / scaling.factor


def rope_tables(ropes: Iterable[RopeConfig], positions: jax.Array, head_dim: int) -> dict[RopeConfig, RopeTable]:
    """cos and sin of every token, once for each distinct RopeConfig, to be shared by all layers that have it.

    Args:
        positions: int32[T], absolute positions.
    """
    distinct = list(dict.fromkeys(ropes))
    tables = []
    for rope in distinct:
        inverse = jnp.asarray(inverse_frequencies(rope, head_dim), jnp.float32)  # [D/2]
        angles = positions.astype(jnp.float32)[:, None] * inverse  # [T, D/2]
        tables.append((jnp.cos(angles), jnp.sin(angles)))
    # The barrier keeps XLA from computing cos and sin again in the fusions of every layer.
    return dict(zip(distinct, jax.lax.optimization_barrier(tables), strict=True))


def apply_rope(x: jax.Array, table: RopeTable) -> jax.Array:
    """Turns ``x`` [T, H, D] by its tokens' angles; returns its dtype."""
    cos, sin = (part[:, None, :] for part in table)  # [T, 1, D/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [T, H, D/2]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)  # [T, H, D]
    return turned.astype(x.dtype)
