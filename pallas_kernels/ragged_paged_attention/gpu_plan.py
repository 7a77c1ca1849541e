"""Work lists of the GPU kernels, computed in XLA from the batch's lengths.

They depend on the batch and on the window only, so the layers of one step share them (XLA merges equal computations).
Shape letters as in types.py; W is the static bound on the number of tiles, C the number of workers.

A *tile* is up to ``tile_tokens`` consecutive query tokens of one row with all G heads of one KV head. A *unit* is 64
key positions. Tokens past ``cu_q_lens[R]`` are in no tile: the decode kernel's workers write zeros for them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged_paged_attention.types import RaggedBatch

UNIT = 64  # key positions of one pipeline stage
MAX_SHORT = 8  # rows with at most this many query tokens go to the decode kernel when a bucket runs both kernels

# Columns of a tile's description.
ROW, FIRST_TOKEN, NUM_TOKENS, FIRST_POS, FIRST_UNIT, NUM_UNITS, KV_LEN = range(7)
# Columns of a worker's description. It writes zeros for padding token FIRST_PADDING and every C-th after that. What it
# fetches first is said beside it, since reads that wait for each other are much of a small batch's time: how many units
# it has of the tile that it starts with, and the places (see unit_place) of the first NUM_PLACES of them.
# NUM_AFTER is how many workers go on with the tile and head that it begins last. LAUNCHES is the kernel's own: see
# gpu_pieces.py.
START_TILE, START_HEAD, START_UNIT, WORKER_UNITS, FIRST_PADDING, FIRST_UNITS = range(6)
NUM_AFTER, LAUNCHES, FIRST_PLACE = range(6, 9)
NUM_PLACES = 8


class DecodePlan(NamedTuple):
    """Shares of all (tile, KV head, unit) triples, in that order, that take C workers the same time."""

    tiles: jax.Array  # int32[W, 7]
    workers: jax.Array  # int32[C, 8 + NUM_PLACES]


class PrefillPlan(NamedTuple):
    """Tiles by falling cost; tile i of head h is item ``i * Hk + h``."""

    tiles: jax.Array  # int32[W, 7]
    num_tiles: jax.Array  # int32[1]


def max_decode_tiles(num_tokens: int, num_rows: int, tile_tokens: int, *, short_only: bool) -> int:
    """Most tiles that any batch of T tokens in R rows can need."""
    rows = min(num_rows, num_tokens)
    if short_only:
        return rows * -(-MAX_SHORT // tile_tokens)
    return rows + (num_tokens - rows) // tile_tokens


def max_prefill_tiles(num_tokens: int, num_rows: int, tile_tokens: int) -> int:
    """Most tiles of rows that are longer than MAX_SHORT."""
    rows = min(num_rows, num_tokens // (MAX_SHORT + 1))
    return max(1, rows + (num_tokens - rows) // tile_tokens)


def decode_plan(
    batch: RaggedBatch,
    num_tokens: int,
    *,
    tile_tokens: int,
    num_kv_heads: int,
    num_workers: int,
    num_blocks: int,
    block_size: int,
    window: int | None,
    min_tile_units: int,
    short_only: bool,
) -> DecodePlan:
    """Plan of the decode kernel; ``short_only`` leaves rows above MAX_SHORT tokens to the prefill kernel.

    A worker takes as long for a tile (of one head) of fewer than ``min_tile_units`` units as for one that has so many.
    """
    num_tiles = max_decode_tiles(num_tokens, batch.context_lens.shape[0], tile_tokens, short_only=short_only)
    widths = jnp.diff(batch.cu_q_lens)
    if short_only:
        widths = jnp.where(widths <= MAX_SHORT, widths, 0)
    tiles = _tiles(batch, widths, num_tiles, tile_tokens, window)

    # The line of all tiles and heads, as long as they take: a tile of few units begins with time for none.
    units = tiles[:, NUM_UNITS]
    cost = jnp.where(units > 0, jnp.maximum(units, min_tile_units), 0)
    cost_after = jnp.cumsum(cost)
    total = cost_after[-1] * num_kv_heads
    share = jnp.maximum(-(-total // num_workers), 1)
    start = jnp.arange(num_workers + 1) * share
    tile = jnp.minimum(jnp.sum(cost_after[None, :] * num_kv_heads <= start[:, None], axis=1), num_tiles - 1)
    tile_start = (cost_after - cost)[tile] * num_kv_heads
    tile_units, tile_cost = units[tile], jnp.maximum(cost[tile], 1)
    head, within = jnp.divmod(start - tile_start, tile_cost)
    unit = jnp.maximum(within - (tile_cost - tile_units), 0)
    units_after = jnp.cumsum(units)
    before = (units_after - units)[tile] * num_kv_heads + head * tile_units + unit
    before = jnp.where(start < total, before, units_after[-1] * num_kv_heads)
    left = jnp.diff(before)
    first_padding = batch.cu_q_lens[-1] + jnp.arange(num_workers)
    first_units = jnp.minimum((tile_units - unit)[:-1], left)
    ahead = jnp.clip(first_units[:, None] - 1, 0, jnp.arange(NUM_PLACES))
    first_tile = tiles[tile[:-1]]
    units_ahead = first_tile[:, FIRST_UNIT, None] + unit[:-1, None] + ahead
    place = unit_place(batch.block_table, first_tile[:, ROW, None], units_ahead, num_blocks, block_size)

    # Of the tile and head that a worker begins with: who has its first and its last unit.
    tile_start = tile_start + head * tile_cost
    first_worker = (tile_start + tile_cost - tile_units) // share
    last_worker = (tile_start + tile_cost - 1) // share
    # The one after a worker is the first to go on with what that worker begins last, if anybody does.
    goes_on = (start < total) & (unit > 0) & (first_worker == jnp.arange(num_workers + 1) - 1)
    num_after = jnp.where(goes_on, last_worker - first_worker, 0)[1:]
    launches = jnp.zeros_like(num_after)
    columns = [tile[:-1], head[:-1], unit[:-1], left, first_padding, first_units, num_after, launches]
    workers = jnp.concatenate([jnp.stack(columns, axis=1), place], axis=1).astype(jnp.int32)
    return DecodePlan(tiles, workers)


def unit_place(
    block_table: Any,  # int32[R, P], array or ref
    row: jax.Array,  # int32[...]
    unit: jax.Array,  # int32[...], of the row
    num_blocks: int,
    block_size: int,
) -> jax.Array:  # int32[...]
    """Where a unit is in the pool: its block times the units of a block, plus the unit in that block."""
    per_block = block_size // UNIT
    column = jnp.minimum(lax.div(unit, jnp.int32(per_block)), block_table.shape[1] - 1)
    block = jnp.clip(block_table[row, column], 0, num_blocks - 1)
    return block * per_block + lax.rem(unit, jnp.int32(per_block))


def prefill_plan(batch: RaggedBatch, num_tokens: int, *, tile_tokens: int, window: int | None) -> PrefillPlan:
    """Plan of the prefill kernel: rows above MAX_SHORT tokens, the costliest tiles first."""
    num_tiles = max_prefill_tiles(num_tokens, batch.context_lens.shape[0], tile_tokens)
    widths = jnp.diff(batch.cu_q_lens)
    widths = jnp.where(widths > MAX_SHORT, widths, 0)
    tiles = _tiles(batch, widths, num_tiles, tile_tokens, window)
    cost = tiles[:, NUM_UNITS]
    index = jnp.arange(num_tiles)
    before = (cost[None, :] > cost[:, None]) | ((cost[None, :] == cost[:, None]) & (index[None, :] < index[:, None]))
    rank = jnp.sum(before, axis=1)
    return PrefillPlan(jnp.zeros_like(tiles).at[rank].set(tiles), jnp.sum(cost > 0)[None].astype(jnp.int32))


def _tiles(
    batch: RaggedBatch,
    widths: jax.Array,  # int32[R], 0 = not in this list
    num_tiles: int,
    tile_tokens: int,
    window: int | None,
) -> jax.Array:  # int32[W, 7]
    """The tiles of the rows, in row order; unused entries have no tokens and no units."""
    num_rows = batch.context_lens.shape[0]
    row_tiles = -(-widths // tile_tokens)
    tiles_after = jnp.cumsum(row_tiles)
    index = jnp.arange(num_tiles)
    row = jnp.minimum(jnp.sum(tiles_after[None, :] <= index[:, None], axis=1), num_rows - 1)
    live = index < tiles_after[-1]

    width, kv_len = widths[row], batch.context_lens[row]
    offset = (index - (tiles_after - row_tiles)[row]) * tile_tokens
    num_q = jnp.where(live, jnp.minimum(width - offset, tile_tokens), 0)
    first_pos = kv_len - width + offset
    first_key = jnp.maximum(first_pos - window + 1, 0) if window is not None else jnp.zeros_like(first_pos)
    first_unit = first_key // UNIT
    num_units = jnp.where(live, -(-(first_pos + num_q) // UNIT) - first_unit, 0)
    columns = [row, batch.cu_q_lens[row] + offset, num_q, first_pos, first_unit, num_units, kv_len]
    return jnp.stack(columns, axis=1).astype(jnp.int32)
