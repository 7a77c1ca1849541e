"""What a KV pool that is too small says, and what there is no room for."""

import logging
from types import SimpleNamespace

import pytest

from jaxserve.errors import ConfigError, KVCacheTooSmallError
from jaxserve.runner.executables import BurstKey, Executables, without_large_bursts
from jaxserve.runner.memory import GRAPH_RESERVE_BYTES, check_fits, plan_blocks
from jaxserve.sampling.tier import Tier

GIB = 1 << 30


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"override": 3}, "num_gpu_blocks_override gives 3; the largest max_model_len that fits is 48; lower "
         "max_model_len, or raise num_gpu_blocks_override$"),
        ({"kv_bytes": 2 << 20}, "fits is 32; lower max_model_len, or raise kv_cache_memory_bytes$"),
        ({"kv_bytes": 5}, "kv_cache_memory_bytes gives 0; raise kv_cache_memory_bytes$"),
        ({"limit": 2 * GIB, "params": GIB}, "fits is 8192; lower max_model_len, or raise gpu_memory_utilization$"),
        ({"limit": GIB, "params": 2 * GIB}, "the memory that is left gives 0; raise gpu_memory_utilization$"),
        ({}, r"the default of 1\.00 GiB gives 1024; .* or raise kv_cache_memory_bytes$"),
    ],
)  # fmt: skip
def test_advice_names_the_setting_that_decided(settings, advice):
    plan = plan_blocks(
        **{"limit": None, "params": 0, "state": 0, "temp": 0, "block": 1 << 20, "override": None, "kv_bytes": None}
        | settings
    )
    with pytest.raises(KVCacheTooSmallError, match=advice):
        check_fits(plan, max_model_len=100_000, block_size=16)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (
            {"override": 10**9},
            r"num_gpu_blocks_override gives 1000000000 KV blocks, 976562\.50 GiB; allowed: at most \d+",
        ),
        ({"kv_bytes": 10**15}, "kv_cache_memory_bytes gives 953674316 KV blocks"),
        ({"override": 3 * 2**30, "block": 1}, "at most 2147483647 blocks, 2.00 GiB$"),
        ({"override": 1022, "limit": 2 * GIB, "params": GIB, "state": 3 << 20}, "at most 1021 blocks, 1021 MiB$"),
        ({"override": 1, "limit": GIB, "params": 2 * GIB}, "at most 0 blocks, 0 B$"),
    ],
)
def test_more_than_the_memory_is_refused(settings, most):
    plan = plan_blocks(
        **{"limit": None, "params": 0, "state": 0, "temp": 0, "block": 1 << 20, "override": None, "kv_bytes": None}
        | settings
    )
    with pytest.raises(ConfigError, match=most):
        check_fits(plan, max_model_len=16, block_size=16)


def test_room_for_temporaries_is_what_was_measured_and_a_part_of_the_reserve():
    settings = {"params": 0, "state": 0, "block": 1 << 20, "override": None, "kv_bytes": None}
    assert plan_blocks(limit=2 * GIB, temp=100, **settings).most_temp == 100 + GRAPH_RESERVE_BYTES // 4
    assert plan_blocks(limit=None, temp=0, **settings).most_temp is None


def test_a_little_memory_more_or_less_leaves_the_number_of_blocks():
    """Of which a start finds its executables in the cache; less than 1% is given up for that."""
    settings = {"state": 0, "temp": 0, "override": None, "kv_bytes": None, "limit": 70 * GIB}
    blocks = {plan_blocks(params=GIB + n * (4 << 20), block=7 << 20, **settings).num_blocks for n in range(4)}
    (num_blocks,) = blocks
    most = (69 * GIB - GRAPH_RESERVE_BYTES) // (7 << 20)
    assert 0.99 * most < num_blocks <= most
    few = [plan_blocks(params=70 * GIB - GRAPH_RESERVE_BYTES - n, block=1, **settings).num_blocks for n in range(256)]
    assert few == list(range(256))


def test_bursts_without_room_are_left_out_and_said(caplog):
    def compiled(size):
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=size))

    burst = {BurstKey(Tier.PLAIN, 8, 8, 4): compiled(10), BurstKey(Tier.PLAIN, 256, 256, 2): compiled(11)}
    rest = dict.fromkeys(("stage", "admit", "prompt_scores", "forward", "sample", "propose"))
    executables = Executables(**rest, burst=burst, prompt_score_tokens=1, num_from_cache=0, seconds={})
    with caplog.at_level(logging.WARNING, "jaxserve"):
        assert without_large_bursts(executables, None).burst == without_large_bursts(executables, 11).burst == burst
        assert not caplog.records
        assert [key.num_rows for key in without_large_bursts(executables, 10).burst] == [8]
    assert "2 steps of 256 requests in one call aren't used: their temporaries take 11 bytes" in caplog.text
