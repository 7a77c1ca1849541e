"""Cuts the rows of a batch into query tiles: runs of consecutive query tokens of one row. Plain XLA on tiny arrays.

Shape letters: see types.py. M is the static bound on the number of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.types import RaggedBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """Tiles ``0 .. count-1`` are real, in the order of their tokens; the rest have length 0."""

    row: jax.Array  # int32[M]
    first_token: jax.Array  # int32[M], index of the first query token
    first_pos: jax.Array  # int32[M], its absolute position
    length: jax.Array  # int32[M], query tokens
    count: jax.Array  # int32[1]


def cut_tiles(batch: RaggedBatch, num_tokens: int, tile: int, *, above: int = 0, upto: int | None = None) -> Tiles:
    """Tiles of at most ``tile`` tokens of the rows that have more than ``above`` and at most ``upto`` tokens."""
    R = batch.context_lens.shape[0]
    starts, lengths = batch.cu_q_lens[:-1], jnp.diff(batch.cu_q_lens)
    wanted = lengths > above
    if upto is not None:
        wanted &= lengths <= upto
    lengths = jnp.where(wanted, lengths, 0)
    num_tiles = (lengths + tile - 1) // tile  # int32[R]
    ends = jnp.cumsum(num_tiles)

    # Each row fills whole tiles and at most one partial one, and each has at least ``above + 1`` tokens.
    bound = min(R, num_tokens // (above + 1))
    if upto is None or upto > tile:
        bound += num_tokens // tile
    index = jnp.arange(max(bound, 1))
    row = jnp.minimum(jnp.sum(ends <= index[:, None], axis=1), R - 1)
    done = (index - (ends - num_tiles)[row]) * tile  # the row's tokens in earlier tiles
    return Tiles(
        row=row.astype(jnp.int32),
        first_token=(starts[row] + done).astype(jnp.int32),
        first_pos=(batch.context_lens[row] - lengths[row] + done).astype(jnp.int32),
        length=jnp.clip(lengths[row] - done, 0, tile).astype(jnp.int32),
        count=ends[-1:].astype(jnp.int32),
    )
