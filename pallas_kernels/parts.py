"""Rows of a vocabulary in parts: a handful of whole rows can't occupy an accelerator."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_PARTS = 64  # of a row; a multiple of the mesh's size, so that shards of the vocabulary hold whole parts


def in_parts(
    x: jax.Array,  # [M, V]
    fill: float,
) -> jax.Array:
    """[M, parts, ceil(V / parts)], padded with ``fill``."""
    M, V = x.shape
    part = -(-V // _PARTS)
    return jnp.pad(x, ((0, 0), (0, _PARTS * part - V)), constant_values=fill).reshape(M, _PARTS, part)
