"""Executables that come from disk are those that were compiled, and only for what they were compiled for."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.config import EngineConfig, Limits
from jaxserve.engine.build import build_engine
from jaxserve.models.fused import FusedLayers
from jaxserve.runner.compile import _compile, run_trial
from jaxserve.runner.executable_cache import ExecutableCache
from jaxserve.runner.executables import sample_keys
from jaxserve.runner.jax_cache import ApartFromJaxCache
from pallas_kernels.lowering_processes import LoweringProcesses
from pallas_kernels.post_attention.plan import Shape
from pallas_kernels.post_attention.types import PostAttentionSpec

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


# In a process of its own: JAX's cache, which the tests share, is another there.
THREE_STARTS = """
import json, logging, pathlib, sys
from jaxserve import LLM, SamplingParams
from jaxserve.config import Limits

settings, directory = json.loads(sys.argv[1]), sys.argv[2]
settings["limits"] = Limits(**settings["limits"])
params = SamplingParams(max_tokens=9, temperature=0.7, seed=5, logprobs=1, detokenize=False)
warnings, told = [], []
logging.getLogger("jaxserve").addHandler(handler := logging.Handler(logging.WARNING))
handler.emit = lambda record: warnings.append(record.getMessage())
damaged = []
for number in range(3):
    if number == 2:
        damaged = sorted(pathlib.Path(directory).glob("jaxserve/sample_full*.executable"))
        for path in damaged:
            path.write_bytes(path.read_bytes()[:100])
    with LLM(**settings, compilation_cache_dir=directory, steps_per_dispatch=2) as llm:
        executables = llm.engine.core.runner.executables
        (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
        (plain,) = llm.generate([[5, 6, 7]], params.with_changes(logprobs=None), use_tqdm=False)  # goes by bursts
        told.append({
            "read": executables.num_from_cache, "all": executables.num_executables,
            "trace": executables.seconds["trace"], "ids": [output.outputs[0].token_ids, plain.outputs[0].token_ids],
            "logprob": output.outputs[0].cumulative_logprob,
        })
print(json.dumps({"told": told, "warnings": warnings, "damaged": [str(path) for path in damaged]}))
"""


def test_a_second_start_compiles_nothing_and_answers_the_same(tmp_path):
    settings = {"model": MODEL, **SMALL, "limits": vars(SMALL["limits"])}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    run = subprocess.run(
        [sys.executable, "-c", THREE_STARTS, json.dumps(settings), str(tmp_path)],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    answer = json.loads(run.stdout.splitlines()[-1])
    cold, warm, mended = answer["told"]
    assert (cold["read"], warm["read"]) == (0, cold["all"])
    assert warm["trace"] == 0 < cold["trace"]
    assert (cold["ids"], cold["logprob"]) == (warm["ids"], warm["logprob"]) == (mended["ids"], mended["logprob"])
    assert cold["ids"][0] == cold["ids"][1]
    # A damaged file is said, and made anew.
    assert 0 < len(answer["damaged"]) == cold["all"] - mended["read"]
    assert all(any(path in warning for warning in answer["warnings"]) for path in answer["damaged"])


def test_what_jax_read_from_its_cache_is_not_written(tmp_path, compiler):
    """XLA:CPU can't run what was read and written again."""
    task, cache = compiler.stage(), ExecutableCache.of(str(tmp_path), compiler)
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    lowered = task.lower()

    class Hit:
        def compile(self, options):
            jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
            return lowered.compile(options)

    with ApartFromJaxCache() as apart:
        assert jax.config.jax_persistent_cache_min_compile_time_secs == float("inf")
        assert not apart.compile(Hit(), None)[1]
        _compile(task, Hit(), cache, apart)
    assert cache.load(task) is None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before


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
    settings, shape = PostAttentionSpec(1e-6, 0.0, "silu"), Shape(8, 64, 64, 64, 64)
    fused = [
        dataclasses.replace(
            compiler, model=dataclasses.replace(compiler.model, fused=FusedLayers(settings, shape, num_ctas))
        )
        for num_ctas in (66, 132)
    ]
    keys = {ExecutableCache.of(str(tmp_path), one).identity for one in (compiler, *fused)}
    assert len(keys) == 3, "a kernel is compiled for as many CTAs as the GPU has multiprocessors"
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
    size = run_trial([task, compiler.stage()], {}, cache, LoweringProcesses(0)).temp
    assert size == task.lower().compile().memory_analysis().temp_size_in_bytes
    monkeypatch.setattr(type(task), "lower", lambda self: pytest.fail("compiled again"))
    assert run_trial([task, compiler.stage()], {}, cache, LoweringProcesses(0)).temp == size


def test_a_directory_that_cannot_be_written_costs_a_warning_not_the_engine(tmp_path, compiler, caplog):
    (tmp_path / "jaxserve").write_text("a file where the directory should be")
    task, cache = compiler.stage(), ExecutableCache.of(str(tmp_path), compiler)
    cache.store(task, task.lower().compile())
    assert cache.load(task) is None
    assert "can't be written" in caplog.text
