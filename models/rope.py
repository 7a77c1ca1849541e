"""The angles of rotary position embedding; qkv_prologue turns queries and keys by them.

Shape letters: T packed tokens, D head dim. Angles are float32 in every dtype: bfloat16 can't even hold position 257.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from pallas_kernels.qkv_prologue.types import RopeTable

from .config import LinearScaling, Llama3Scaling, RopeConfig


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
