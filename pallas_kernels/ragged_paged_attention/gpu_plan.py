"""Work lists of the GPU kernels, computed in XLA from the batch's lengths.

They depend on the batch and on the window only, so the layers of one step share them (XLA merges equal computations).
Shape letters as in types.py; W is the static bound on the number of tiles, C the number of workers.

A *tile* is up to ``tile_tokens`` consecutive query tokens of one row with all G heads of one KV head. A *unit* is 64
key positions. Tokens past ``cu_q_lens[R]`` form one more row without keys, so that the kernels write zeros for them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.types import RaggedBatch

UNIT = 64  # key positions of one pipeline stage
MAX_SHORT = 8  # rows with at most this many query tokens go to the decode kernel when a bucket runs both kernels

# Columns of a tile's description.
ROW, FIRST_TOKEN, NUM_TOKENS, FIRST_POS, FIRST_UNIT, NUM_UNITS, KV_LEN = range(7)
# Columns of a worker's description.
START_TILE, START_HEAD, START_UNIT, WORKER_UNITS = range(4)
# Columns of a split tile's description. SPLIT_TOKENS is 0 for no tile; FIRST_SLOT says whether its first piece is its
# worker's first (0) or last (1).
SPLIT_TOKEN, SPLIT_TOKENS, SPLIT_HEAD, FIRST_WORKER, FIRST_SLOT, NUM_PIECES = range(6)

# First position of rows without keys: every key position is later, so all of them are masked.
_NO_POSITION = -(1 << 20)
# Splitting a tile costs a pass over its partial results: not worth it for fewer units than this.
_MIN_WORKER_UNITS = 4


class DecodePlan(NamedTuple):
    """Equal shares of all (tile, KV head, unit) triples, in that order, for C workers."""

    tiles: jax.Array  # int32[W, 7]
    workers: jax.Array  # int32[C, 4]
    splits: jax.Array  # int32[C-1, 6], the tile that worker i+1 is the first to go on with


class PrefillPlan(NamedTuple):
    """Tiles by falling cost; tile i of head h is item ``i * Hk + h``."""

    tiles: jax.Array  # int32[W, 7]
    num_tiles: jax.Array  # int32[1]


def max_decode_tiles(num_tokens: int, num_rows: int, tile_tokens: int, *, short_only: bool) -> int:
    """Most tiles that any batch of T tokens in R rows (and the row of padding) can need."""
    rows = min(num_rows + 1, num_tokens)
    if short_only:
        return rows * -(-MAX_SHORT // tile_tokens)
    return rows + (num_tokens - rows) // tile_tokens


def max_prefill_tiles(num_tokens: int, num_rows: int, tile_tokens: int) -> int:
    """Most tiles of rows that are longer than MAX_SHORT."""
    rows = min(num_rows + 1, num_tokens // (MAX_SHORT + 1))
    return max(1, rows + (num_tokens - rows) // tile_tokens)


def decode_plan(
    batch: RaggedBatch,
    num_tokens: int,
    *,
    tile_tokens: int,
    num_kv_heads: int,
    num_workers: int,
    window: int | None,
    short_only: bool,
) -> DecodePlan:
    """Plan of the decode kernel; ``short_only`` leaves rows above MAX_SHORT tokens to the prefill kernel."""
    num_tiles = max_decode_tiles(num_tokens, batch.context_lens.shape[0], tile_tokens, short_only=short_only)
    widths = _widths(batch, num_tokens)
    if short_only:
        widths = jnp.where(widths <= MAX_SHORT, widths, 0)
    tiles = _tiles(batch, num_tokens, widths, num_tiles, tile_tokens, window)

    units = tiles[:, NUM_UNITS]
    units_after = jnp.cumsum(units)
    total = units_after[-1] * num_kv_heads
    share = jnp.maximum(-(-total // num_workers), _MIN_WORKER_UNITS)
    start = jnp.arange(num_workers) * share
    tile = jnp.minimum(jnp.sum(units_after[None, :] * num_kv_heads <= start[:, None], axis=1), num_tiles - 1)
    within = start - (units_after - units)[tile] * num_kv_heads
    tile_units = jnp.maximum(units[tile], 1)
    left = jnp.clip(total - start, 0, share)
    head, unit = within // tile_units, within % tile_units
    workers = jnp.stack([tile, head, unit, left], axis=1).astype(jnp.int32)

    first = start - unit  # of the units of the tile and head that the worker begins with
    first_worker = first // share
    goes_on = (left > 0) & (unit > 0) & (first_worker == jnp.arange(num_workers) - 1)
    num_tokens_split = jnp.where(goes_on, tiles[tile, NUM_TOKENS], 0)
    num_pieces = (first + tile_units - 1) // share - first_worker + 1
    columns = [tiles[tile, FIRST_TOKEN], num_tokens_split, head, first_worker, first % share != 0, num_pieces]
    splits = jnp.stack(columns, axis=1).astype(jnp.int32)[1:]
    return DecodePlan(tiles, workers, splits)


def prefill_plan(batch: RaggedBatch, num_tokens: int, *, tile_tokens: int, window: int | None) -> PrefillPlan:
    """Plan of the prefill kernel: rows above MAX_SHORT tokens, the costliest tiles first."""
    num_tiles = max_prefill_tiles(num_tokens, batch.context_lens.shape[0], tile_tokens)
    widths = _widths(batch, num_tokens)
    widths = jnp.where(widths > MAX_SHORT, widths, 0)
    tiles = _tiles(batch, num_tokens, widths, num_tiles, tile_tokens, window)
    cost = tiles[:, NUM_UNITS]
    index = jnp.arange(num_tiles)
    before = (cost[None, :] > cost[:, None]) | ((cost[None, :] == cost[:, None]) & (index[None, :] < index[:, None]))
    rank = jnp.sum(before, axis=1)
    return PrefillPlan(jnp.zeros_like(tiles).at[rank].set(tiles), jnp.sum(cost > 0)[None].astype(jnp.int32))


def _widths(batch: RaggedBatch, num_tokens: int) -> jax.Array:  # int32[R+1]
    """Query tokens of every row, then of the padding."""
    return jnp.diff(batch.cu_q_lens, append=jnp.int32(num_tokens))


def _tiles(
    batch: RaggedBatch,
    num_tokens: int,
    widths: jax.Array,  # int32[R+1], 0 = not in this list
    num_tiles: int,
    tile_tokens: int,
    window: int | None,
) -> jax.Array:  # int32[W, 7]
    """The tiles of the rows, in row order; unused entries have no tokens and no units."""
    num_rows = batch.context_lens.shape[0]
    row_tiles = -(-widths // tile_tokens)
    tiles_after = jnp.cumsum(row_tiles)
    index = jnp.arange(num_tiles)
    row = jnp.minimum(jnp.sum(tiles_after[None, :] <= index[:, None], axis=1), num_rows)
    live = index < tiles_after[-1]

    width = widths[row]
    offset = (index - (tiles_after - row_tiles)[row]) * tile_tokens
    num_q = jnp.where(live, jnp.minimum(width - offset, tile_tokens), 0)
    has_keys = live & (row < num_rows)
    kv_len = jnp.where(has_keys, batch.context_lens[jnp.minimum(row, num_rows - 1)], 0)
    first_pos = jnp.where(has_keys, kv_len - width + offset, _NO_POSITION)
    first_key = jnp.maximum(first_pos - window + 1, 0) if window is not None else jnp.zeros_like(first_pos)
    first_unit = jnp.where(has_keys, first_key // UNIT, 0)
    end_unit = jnp.where(has_keys, -(-(first_pos + num_q) // UNIT), 0)
    # A tile without keys still takes one, wholly masked, unit: that is what writes its zeros.
    num_units = jnp.where(live, jnp.maximum(end_unit - first_unit, 1), 0)
    columns = [
        jnp.minimum(row, num_rows - 1),
        batch.cu_q_lens[row] + offset,
        num_q,
        first_pos,
        first_unit,
        num_units,
        kv_len,
    ]
    return jnp.stack(columns, axis=1).astype(jnp.int32)
