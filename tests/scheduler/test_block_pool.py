"""The pool gives all or nothing; the prefix cache never shares what it shouldn't."""

import copy

import pytest

from jaxserve.scheduler.block_pool import BlockPool
from jaxserve.scheduler.prefix_cache import PrefixCache

ROOT = ("salt", None)


def snapshot(pool):
    return copy.deepcopy((pool.free_and_idle(), pool.refs, pool.published))


def test_reserve_covers_or_changes_nothing():
    for block_size in (1, 2, 3, 5):
        for held in range(0, 12):
            for up_to in range(held, 30):
                pool = BlockPool(6, block_size, lambda block: None)
                table: list[int] = []
                if not pool.reserve(table, held):
                    continue
                before, old = snapshot(pool), list(table)
                granted = pool.reserve(table, up_to)
                assert granted == (-(-up_to // block_size) <= 6)
                if granted:
                    assert len(table) * block_size >= up_to and table[: len(old)] == old
                else:
                    assert table == old and snapshot(pool) == before


def test_headroom_is_left():
    pool = BlockPool(4, 2, lambda block: None)
    assert not pool.reserve([], 6, headroom=2)
    assert pool.reserve([], 6, headroom=1)


def publish_chain(cache, table, tokens):
    parent = ROOT
    size = cache.pool.block_size
    for at, block in enumerate(table[: len(tokens) // size]):
        parent = cache.publish(block, parent, tokens[at * size : (at + 1) * size])


def test_idle_hits_are_charged_and_refusal_is_atomic():
    cache = PrefixCache(4, 2)
    pool = cache.pool
    table: list[int] = []
    assert pool.reserve(table, 6)
    publish_chain(cache, table, [1, 2, 3, 4, 5, 6])
    pool.release(table)
    hits, _ = cache.match(ROOT, [1, 2, 3, 4, 5, 6, 7])
    assert len(hits) == 3 and pool.num_available == 4 and pool.num_idle == 3
    before = snapshot(pool)
    assert not pool.reserve([], 10, hits)  # 5 blocks of 4
    assert snapshot(pool) == before
    shared: list[int] = []
    assert pool.reserve(shared, 8, hits)
    assert shared[:3] == hits and pool.num_available == 0


def test_least_recently_used_goes_first_and_tails_before_heads():
    cache = PrefixCache(4, 1)
    pool = cache.pool
    first: list[int] = []
    second: list[int] = []
    assert pool.reserve(first, 2) and pool.reserve(second, 2)
    publish_chain(cache, first, [1, 2])
    publish_chain(cache, second, [3, 4])
    pool.release(second)
    pool.release(first)
    assert pool.reserve([], 1)
    assert len(cache.match(ROOT, [3, 4, 0])[0]) == 1  # its tail was evicted
    assert len(cache.match(ROOT, [1, 2, 0])[0]) == 2
    assert cache.is_consistent() and pool.num_evictions == 1


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_a_hit_leaves_the_last_token(block_size):
    cache = PrefixCache(16, block_size)
    tokens = list(range(8))
    table: list[int] = []
    assert cache.pool.reserve(table, 8)
    publish_chain(cache, table, tokens)
    for length in range(1, 9):
        hits, _ = cache.match(ROOT, tokens[:length])
        assert hits == table[: (length - 1) // block_size]


def test_equal_tokens_under_another_parent_or_salt_dont_hit():
    cache = PrefixCache(8, 2)
    table: list[int] = []
    assert cache.pool.reserve(table, 4)
    publish_chain(cache, table, [1, 2, 1, 2])
    assert cache.match(ROOT, [1, 2, 1, 2, 0])[0] == table
    assert cache.match(ROOT, [3, 4, 1, 2, 0])[0] == []
    assert cache.match(("salt", "other"), [1, 2, 1, 2, 0])[0] == []


def test_hash_collisions_dont_hit():
    class Colliding(bytes):
        def __hash__(self):
            return 7

    cache = PrefixCache(8, 2)
    cache.publish(0, ROOT, [1, 2])
    cache._entries = {(parent, Colliding(data)): entry for (parent, data), entry in cache._entries.items()}
    assert cache.match(ROOT, [9, 9, 9])[0] == []


def test_a_second_copy_stays_private():
    cache = PrefixCache(4, 2)
    node = cache.publish(0, ROOT, [1, 2])
    assert cache.publish(1, ROOT, [1, 2]) == node
    assert not cache.pool.published[1] and len(cache) == 1
