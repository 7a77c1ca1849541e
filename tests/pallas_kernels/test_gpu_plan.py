"""The GPU kernels' work lists against a walk through the batch by hand: every unit of work exactly once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ragged_paged_attention import gpu_plan as plan
from pallas_kernels.ragged_paged_attention.types import RaggedBatch

NUM_KV_HEADS = 2
NUM_WORKERS = 7
NUM_BLOCKS = 50
BLOCK_SIZE = 2 * plan.UNIT
TABLE = np.random.default_rng(0).permutation(5 * 13).reshape(5, 13).astype(np.int32) % NUM_BLOCKS
_SIZES = ("num_tokens", "tile_tokens", "num_kv_heads", "num_workers", "num_blocks", "block_size")
_STATIC = (*_SIZES, "window", "min_tile_units", "short_only")
decode_plan = jax.jit(plan.decode_plan, static_argnames=_STATIC)
prefill_plan = jax.jit(plan.prefill_plan, static_argnames=("num_tokens", "tile_tokens", "window"))
Rows = list[tuple[int, int]]  # (context length, width)


@st.composite
def rows_and_tokens(draw: st.DrawFn) -> tuple[Rows, int]:
    """5 rows, empty ones among them, and T with padding or none; few sizes of T, since each is compiled."""
    num_tokens = left = draw(st.sampled_from([5, 40, 640]))
    rows = []
    for i in range(5):
        width = draw(st.one_of(st.just(0), st.just(1), st.integers(1, 9), st.integers(1, 300)))
        width = left if i == 4 and draw(st.booleans()) else min(width, left)
        left -= width
        rows.append((draw(st.integers(width, width + 1000)) if width else 0, width))
    return rows, num_tokens


def batch_of(rows: Rows) -> RaggedBatch:
    contexts, widths = (np.array(x, np.int32) for x in zip(*rows, strict=True))
    none = jnp.zeros(0, jnp.int32)
    cu_q_lens = np.concatenate([[0], np.cumsum(widths)])
    return RaggedBatch(jnp.asarray(TABLE), jnp.asarray(contexts), jnp.asarray(cu_q_lens, jnp.int32), none, none)


def plan_of(rows: Rows, num_tokens: int, **settings: Any) -> plan.DecodePlan:
    pool = {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE}
    return decode_plan(
        batch_of(rows), num_tokens, num_kv_heads=NUM_KV_HEADS, num_workers=NUM_WORKERS, **pool, **settings
    )


def keys_of(rows: Rows, window: int | None) -> list[tuple[int, int]]:
    """For each token of a row: (first visible key, position)."""
    keys = []
    for context, width in rows:
        for position in range(context - width, context):
            keys.append((0 if window is None else max(0, position - window + 1), position))
    return keys


def check_tiles(tiles: np.ndarray, rows: Rows, num_tokens: int, window: int | None, tile_tokens: int) -> np.ndarray:
    """Tiles hold the keys that their tokens need, and no token is in two; returns how often each token occurs."""
    keys = keys_of(rows, window)
    seen = np.zeros(num_tokens, int)
    for tile in tiles[tiles[:, plan.NUM_UNITS] > 0]:
        first, num = tile[plan.FIRST_TOKEN], tile[plan.NUM_TOKENS]
        assert 0 < num <= tile_tokens
        begin = tile[plan.FIRST_UNIT] * plan.UNIT
        end = begin + tile[plan.NUM_UNITS] * plan.UNIT
        for token in range(first, first + num):
            seen[token] += 1
            first_key, position = keys[token]
            assert tile[plan.FIRST_POS] + token - first == position
            assert begin <= first_key and position < end
            assert tile[plan.KV_LEN] == rows[tile[plan.ROW]][0]
    return seen


def widths_of_tokens(rows: Rows, num_tokens: int) -> np.ndarray:
    """For each token the width of its row; 0 for padding."""
    widths = [width for _, width in rows]
    return np.append(np.repeat(widths, widths), np.zeros(num_tokens - sum(widths), int))


@settings(max_examples=60, deadline=None)
@given(
    case=rows_and_tokens(),
    window=st.sampled_from([None, 100]),
    tile_tokens=st.sampled_from([1, 2, 5]),
    min_tile_units=st.sampled_from([1, 3, 9]),
)
@pytest.mark.parametrize("short_only", [False, True])
def test_decode_workers_share_every_unit_once(
    short_only: bool, case: tuple[Rows, int], window: int | None, tile_tokens: int, min_tile_units: int
) -> None:
    rows, num_tokens = case
    work = plan_of(
        rows,
        num_tokens,
        tile_tokens=tile_tokens,
        window=window,
        min_tile_units=min_tile_units,
        short_only=short_only,
    )
    tiles, workers = (np.asarray(x) for x in work)
    seen = check_tiles(tiles, rows, num_tokens, window, tile_tokens)
    widths = widths_of_tokens(rows, num_tokens)
    np.testing.assert_array_equal(seen, (widths > 0) & ((widths <= plan.MAX_SHORT) | (not short_only)))

    # A tile and head: first what only takes time, then its units.
    line = []
    for t, tile in enumerate(tiles):
        num = tile[plan.NUM_UNITS]
        for head in range(NUM_KV_HEADS if num else 0):
            line += [None] * (min_tile_units - num) + [(t, head, unit) for unit in range(num)]
    share = max(-(-len(line) // NUM_WORKERS), 1)
    pieces: dict[tuple[int, int], list[int]] = {}  # of a tile and head: who has them
    for w, worker in enumerate(workers):
        units = [unit for unit in line[w * share : (w + 1) * share] if unit is not None]
        assert worker[plan.WORKER_UNITS] == len(units)
        if units:
            assert tuple(worker[: plan.WORKER_UNITS]) == units[0]  # tile, head, unit
            first = [unit for t, head, unit in units if (t, head) == units[0][:2]]
            assert worker[plan.FIRST_UNITS] == len(first)
            for place, unit in zip(worker[plan.FIRST_PLACE :], first, strict=False):
                tile = tiles[units[0][0]]
                block, within = divmod(tile[plan.FIRST_UNIT] + unit, 2)
                assert place == TABLE[tile[plan.ROW], block] * 2 + within
        for t, head in dict.fromkeys(unit[:2] for unit in units):
            pieces.setdefault((t, head), []).append(w)
    num_after = np.zeros(NUM_WORKERS, int)
    for first, *others in pieces.values():
        assert others == list(range(first + 1, first + 1 + len(others)))
        assert all(workers[w, plan.START_UNIT] > 0 for w in others)
        num_after[first] += len(others)
    np.testing.assert_array_equal(workers[:, plan.NUM_AFTER], num_after)
    np.testing.assert_array_equal(workers[:, plan.LAUNCHES], 0)


@settings(max_examples=40, deadline=None)
@given(case=rows_and_tokens(), window=st.sampled_from([None, 100]), tile_tokens=st.sampled_from([8, 128]))
def test_prefill_tiles_hold_the_long_rows_by_falling_cost(
    case: tuple[Rows, int], window: int | None, tile_tokens: int
) -> None:
    rows, num_tokens = case
    work = prefill_plan(batch_of(rows), num_tokens, tile_tokens=tile_tokens, window=window)
    tiles = np.asarray(work.tiles)
    seen = check_tiles(tiles, rows, num_tokens, window, tile_tokens)
    np.testing.assert_array_equal(seen, widths_of_tokens(rows, num_tokens) > plan.MAX_SHORT)
    cost = tiles[:, plan.NUM_UNITS]
    assert (np.diff(cost) <= 0).all()
    assert work.num_tiles[0] == (cost > 0).sum()


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(1, 1), (8, 8), (256, 256), (8, 256), (8192, 256), (40, 8)])
def test_bounds_on_tiles_hold_for_the_worst_rows(num_tokens: int, num_rows: int) -> None:
    """As many rows as fit one token over a multiple of the tile."""
    for tile_tokens in (1, 2, 5, 8, 32):
        rows: Rows = []
        left = num_tokens
        while left and len(rows) < num_rows:
            width = min(left, tile_tokens + 1)
            rows.append((width, width))
            left -= width
        rows += [(0, 0)] * (num_rows - len(rows))
        needed = sum(-(-width // tile_tokens) for _, width in rows)
        assert plan.max_decode_tiles(num_tokens, num_rows, tile_tokens, short_only=False) >= needed
        long = [width for _, width in rows if width > plan.MAX_SHORT]
        needed = sum(-(-width // tile_tokens) for width in long)
        assert plan.max_prefill_tiles(num_tokens, num_rows, tile_tokens) >= needed


def test_padding_tokens_are_zeroed_by_one_worker_each() -> None:
    rows: Rows = [(5, 1), (0, 0), (90, 3), (0, 0), (0, 0)]
    for num_tokens in (4, 5, 40):
        work = plan_of(rows, num_tokens, tile_tokens=5, window=None, min_tile_units=2, short_only=False)
        first = np.asarray(work.workers)[:, plan.FIRST_PADDING]
        zeroed = sorted(token for start in first for token in range(start, num_tokens, NUM_WORKERS))
        assert zeroed == list(range(4, num_tokens))
