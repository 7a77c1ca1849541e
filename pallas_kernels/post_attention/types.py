"""What the op takes. Shape letters: M rows, A attention width (Hq * D), E model dim, F ffn dim, Q qkv width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax


@dataclass(frozen=True)
class PostAttentionSpec:
    """Static settings of the op.

    Attributes:
        eps: of both norms.
        norm_offset: added to their weights: 1.0 where a checkpoint's weight is the distance from 1.
        activation: of the gate, "silu" or "gelu_tanh".
    """

    eps: float
    norm_offset: float
    activation: str


class LayerWeights(NamedTuple):
    """Of the layer whose attention ran. All weights are [in, out]."""

    o: jax.Array  # [A, E]
    mlp_norm: jax.Array  # [E]
    gate_up: jax.Array  # [E, 2F]: gate, then up
    down: jax.Array  # [F, E]


class NextWeights(NamedTuple):
    """Of the layer after it, up to its qkv product."""

    attn_norm: jax.Array  # [E]
    qkv: jax.Array  # [E, Q]


class Words(NamedTuple):
    """What the kernel's CTAs hand each other. All are empty (-1) at a step's start, and launches pass them on."""

    pieces: jax.Array  # int32[n], emptied by who reads them
    current: jax.Array  # int32[m]
    stale: jax.Array  # int32[m], of the launch before, which this one empties
