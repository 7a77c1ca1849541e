"""What a runner compiles goes with it."""

import gc
from pathlib import Path

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.build import build_engine
from jaxserve.runner.compiler import Compiler
from jaxserve.runner.executables import BurstKey, sample_keys
from jaxserve.sampling.tier import Tier

MODEL = str(Path(__file__).parents[1] / "engine" / "tiny_dummy.toml")
MAPS = Path("/proc/self/maps")

SMALL = EngineConfig(
    model=MODEL, load_format="dummy", skip_tokenizer_init=True, max_model_len=64, max_num_seqs=1,
    max_num_batched_tokens=8, block_size=8, kv_cache_memory_bytes=1 << 18,
)  # fmt: skip


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux says what a process has mapped")
def test_an_engine_that_is_gone_leaves_no_compiled_code():
    """On CPU an executable is some hundred mappings, of which a process may have 65,530."""

    def num_mappings() -> int:
        gc.collect()
        return MAPS.read_text().count("\n")

    build_engine(SMALL, progress=False)  # what all engines share stays
    before = num_mappings()
    engine = build_engine(SMALL, progress=False)
    alive = num_mappings()
    del engine
    assert alive - before > 500
    assert num_mappings() - before < 50


def test_what_would_be_recorded_in_each_step_of_a_gpu_is_compiled_without_graphs(monkeypatch):
    compiler = build_engine(SMALL, progress=False).core.runner.compiler()
    buckets = compiler.config.token_buckets
    assert all(compiler.forward(*bucket).options is None for bucket in buckets)
    monkeypatch.setattr(Compiler, "_platform", "gpu")
    tasks = {bucket: compiler.forward(*bucket) for bucket in buckets}
    assert {tokens > rows for tokens, rows in tasks} == {True, False}
    for (tokens, rows), task in tasks.items():
        assert (task.options is not None) == (tokens > rows)
        task.lower().compile(task.options)  # XLA knows the option's name
    small = [compiler.stage(), compiler.admit(), *(compiler.sample(key) for key in sample_keys(compiler.config))]
    assert all(task.options for task in small)
    assert compiler.burst(BurstKey(Tier.PLAIN, 1, 1, 2)).options is None
