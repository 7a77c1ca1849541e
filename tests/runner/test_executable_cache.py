"""Executables that come from disk are those that were compiled, and only for what they were compiled for."""

import dataclasses
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve import LLM
from jaxserve.config import EngineConfig, Limits
from jaxserve.engine.build import build_engine
from jaxserve.runner.compile import measure_temp
from jaxserve.runner.executable_cache import ExecutableCache
from jaxserve.runner.executables import sample_keys
from jaxserve.sampling_params import SamplingParams

MODEL = str(Path(__file__).parents[1] / "engine" / "tiny_dummy.toml")
SMALL = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 8,
    "block_size": 8,
    "kv_cache_memory_bytes": 1 << 18,
    "limits": Limits(max_stop_token_ids=2, max_logit_bias=2, max_bad_words=1, max_bad_word_len=1, max_logprobs=2),
}


def start(directory, **settings):
    return build_engine(
        EngineConfig(model=MODEL, compilation_cache_dir=str(directory), **SMALL, **settings), progress=False
    )


@pytest.fixture
def no_jax_cache():
    """The engine points JAX's own cache at its directory: back to where the tests have it."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_second_start_compiles_nothing_and_answers_the_same(tmp_path, no_jax_cache, caplog):
    answers, counts = [], []
    params = SamplingParams(max_tokens=9, temperature=0.7, seed=5, logprobs=1, detokenize=False)
    for _ in range(2):
        with LLM.from_engine(start(tmp_path, steps_per_dispatch=2)) as llm:
            executables = llm.engine.core.runner.executables
            counts.append((executables.num_from_cache, executables.num_executables))
            (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
            answers.append((output.outputs[0].token_ids, output.outputs[0].cumulative_logprob))
    assert counts == [(0, counts[0][1]), (counts[0][1], counts[0][1])]
    assert executables.seconds["trace"] == 0
    assert answers[0] == answers[1]

    # A damaged file is said, and made anew.
    damaged = sorted((tmp_path / "jaxserve").glob("sample_full*.executable"))
    for path in damaged:
        path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, logger="jaxserve"):
        engine = start(tmp_path, steps_per_dispatch=2)
    assert [r.getMessage() for r in caplog.records if str(damaged[0]) in r.getMessage()]
    assert engine.core.runner.executables.num_from_cache == counts[0][1] - len(damaged)


@pytest.fixture(scope="module")
def compiler():
    return build_engine(EngineConfig(model=MODEL, **SMALL), progress=False).core.runner.compiler()


def test_whatever_is_compiled_in_is_part_of_the_key(tmp_path, compiler, monkeypatch):
    task = compiler.stage()
    cache = ExecutableCache.of(str(tmp_path), compiler)
    cache.store(task, task.lower().compile())
    assert ExecutableCache.of(str(tmp_path), compiler).load(task) is not None
    other = dataclasses.replace(compiler, config=dataclasses.replace(compiler.config, num_blocks=99))
    assert ExecutableCache.of(str(tmp_path), other).load(other.stage()) is None
    attention = dataclasses.replace(compiler.attention, implementation="pallas_gpu")
    other = dataclasses.replace(compiler, attention=attention)
    assert ExecutableCache.of(str(tmp_path), other).load(task) is None
    wider = dataclasses.replace(
        task, args=(task.args[0], jax.ShapeDtypeStruct((3,), np.int32, sharding=task.args[1].sharding))
    )
    assert cache.load(wider) is None
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert ExecutableCache.of(str(tmp_path), compiler).load(task) is None


def test_the_sources_are_part_of_the_key(tmp_path, compiler, monkeypatch):
    from jaxserve.runner import executable_cache

    before = ExecutableCache.of(str(tmp_path), compiler).identity
    changed = tmp_path / "pallas_kernels" / "kernel.py"
    changed.parent.mkdir()
    changed.write_text("x = 1")
    monkeypatch.setattr(executable_cache.pallas_kernels, "__path__", [str(changed.parent)])
    executable_cache._sources.cache_clear()
    one = ExecutableCache.of(str(tmp_path), compiler).identity
    changed.write_text("x = 2")
    executable_cache._sources.cache_clear()
    two = ExecutableCache.of(str(tmp_path), compiler).identity
    monkeypatch.undo()
    executable_cache._sources.cache_clear()
    assert len({before, one, two}) == 3
    assert ExecutableCache.of(str(tmp_path), compiler).identity == before


def test_temporary_memory_is_measured_once(tmp_path, compiler, monkeypatch):
    task = compiler.sample(sample_keys(compiler.config)[0])
    cache = ExecutableCache.of(str(tmp_path), compiler)
    size = measure_temp(task, cache)
    assert size == task.lower().compile().memory_analysis().temp_size_in_bytes
    monkeypatch.setattr(type(task), "lower", lambda self: pytest.fail("compiled again"))
    assert measure_temp(task, cache) == size
