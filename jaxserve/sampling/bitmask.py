"""Sets of token ids as bits: id v is bit ``v % 32`` of word ``v // 32``."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

WORD = 32


def num_words(num_ids: int) -> int:
    return -(-num_ids // WORD)


def from_ids(ids: Iterable[int], num_ids: int) -> np.ndarray:
    """uint32[ceil(num_ids / 32)] on the host; every id must be in 0..num_ids-1."""
    flags = np.zeros(num_words(num_ids) * WORD, np.uint8)
    flags[np.fromiter(ids, np.int64)] = 1
    return np.packbits(flags, bitorder="little").view(np.dtype("<u4")).astype(np.uint32)


def unpack(
    words: jax.Array,  # uint32[..., W]
    width: int,
) -> jax.Array:
    """bool[..., width]; ids past the mask's end are not in the set."""
    bits = (words[..., None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1  # [..., W, 32]
    flags = bits.reshape(*words.shape[:-1], -1) != 0
    return fit(flags, width)


def holds(
    words: jax.Array,  # uint32[M, W]
    ids: jax.Array,  # int32[M, C]; what is said of negative ones means nothing
) -> jax.Array:
    """bool[M, C]: whether the row's set has the id."""
    word = jnp.take_along_axis(words, ids // WORD, axis=1)
    return ((word >> (ids % WORD).astype(jnp.uint32)) & 1) != 0


def pack(
    flags: jax.Array,  # bool[..., W * 32]
) -> jax.Array:
    """uint32[..., W]; the last axis must be a multiple of 32."""
    grouped = flags.reshape(*flags.shape[:-1], -1, WORD).astype(jnp.uint32)
    return jnp.sum(grouped << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def fit(
    rows: jax.Array,  # [..., N]
    width: int,
) -> jax.Array:
    """[..., width]: the last axis cut, or padded with zeros."""
    size = rows.shape[-1]
    if size >= width:
        return rows[..., :width]
    return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, width - size)])
