"""Arguments of the op between the qkv projection and attention.

Shape letters: T packed tokens, Hk KV heads, G query heads of one KV head, Hq = Hk * G, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax

RopeTable = tuple[jax.Array, jax.Array]  # cos, sin: float32[T, D/2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QKNorm:
    """Root-mean-square norms of query and key heads: ``x / sqrt(mean(x^2) + eps) * (weight + offset)``."""

    q_weight: jax.Array  # [D]
    k_weight: jax.Array  # [D]
    eps: float = field(metadata={"static": True})
    offset: float = field(metadata={"static": True})  # 1.0 where the weight is the distance from 1
