"""What a KV pool that is too small says."""

import pytest

from jaxserve.errors import KVCacheTooSmallError
from jaxserve.runner.memory import check_fits, plan_blocks

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
