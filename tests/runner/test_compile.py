"""What a runner compiles goes with it."""

import gc
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxserve.config import EngineConfig, SpeculativeConfig
from jaxserve.engine.build import _lowering_processes, build_engine
from jaxserve.models.registry import build
from jaxserve.models.sharding import named_shardings
from jaxserve.runner.compile import compile_all, pool_free_tasks, run_trial
from jaxserve.runner.compiler import Compiler, Task
from jaxserve.runner.executables import BurstKey, SampleKey, sample_keys
from jaxserve.sampling.tier import Tier
from jaxserve.weights.config_file import read_model_toml
from jaxserve.weights.quantize import abstract_params
from pallas_kernels.lowering_processes import LoweringProcesses

MODEL = str(Path(__file__).parents[1] / "engine" / "tiny_dummy.toml")
CONFIGS = Path(__file__).parents[2] / "configs" / "models"
MAPS = Path("/proc/self/maps")
HERE = LoweringProcesses(0)

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


@pytest.mark.parametrize("was_enabled", [True, False])
def test_pythons_garbage_collector_waits_while_executables_are_traced(monkeypatch, was_enabled):
    """And is as it was before afterwards, whatever happens."""
    compiler = build_engine(SMALL, progress=False).core.runner.compiler()
    lower, seen = Task.lower, []

    def spy(task):
        seen.append(gc.isenabled())
        if len(seen) > 2:
            raise RuntimeError("no more")
        return lower(task)

    monkeypatch.setattr(Task, "lower", spy)
    set_as = gc.enable if was_enabled else gc.disable
    set_as()
    try:
        run_trial([compiler.admit()], {}, None, HERE)
        assert gc.isenabled() == was_enabled
        with pytest.raises(RuntimeError, match="no more"):
            compile_all(compiler, None, HERE, progress=False)
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
    assert seen == [False] * 3


def test_what_jax_is_told_for_the_calling_thread_holds_where_it_traces(monkeypatch):
    compiler = build_engine(SMALL, progress=False).core.runner.compiler()
    lower, seen = Task.lower, []
    monkeypatch.setattr(Task, "lower", lambda task: seen.append(jax.config.jax_default_matmul_precision) or lower(task))
    with jax.default_matmul_precision("highest"):
        executables = compile_all(compiler, None, HERE, progress=False)
        run_trial([compiler.admit()], {}, None, HERE)
    assert seen == ["highest"] * (executables.num_executables + 1)


def test_kernels_are_lowered_by_one_process_for_a_cache_of_jaxs_own(tmp_path, monkeypatch):
    """And otherwise by as many as there are cores, within limits."""

    def num(config, cores):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        return _lowering_processes(config)._num

    own = replace(SMALL, compilation_cache_dir=str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert [num(config, cores) for config in (SMALL, own) for cores in (None, 1, 2, 64)] == [0, 0, 2, 8] * 2
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert (num(SMALL, 64), num(own, 64)) == (0, 8)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_what_is_traced_before_the_pool_has_its_size_is_the_same_for_any():
    runner = build_engine(SMALL, progress=False).core.runner
    small = runner.compiler()
    kv = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2 * len(leaf), *leaf.shape[1:]), leaf.dtype), small.kv)
    large = replace(small, config=replace(small.config, num_blocks=2 * small.config.num_blocks), kv=kv)

    def programs(tasks):
        return {name: task.lower().as_text() for name, task in tasks.items()}

    assert programs(pool_free_tasks(small)) == programs(pool_free_tasks(large))
    key = small.config.token_buckets[0]
    assert small.forward(*key).lower().as_text() != large.forward(*key).lower().as_text()


def test_what_a_trial_has_traced_is_not_traced_again(monkeypatch):
    compiler = build_engine(SMALL, progress=False).core.runner.compiler()
    lower, traced = Task.lower, []
    monkeypatch.setattr(Task, "lower", lambda task: traced.append(task.name) or lower(task))
    early = pool_free_tasks(compiler)
    largest = compiler.forward(*compiler.config.token_buckets[-1]), compiler.sample(sample_keys(compiler.config)[-1])
    trial = run_trial(largest, early, None, HERE)
    assert trial.temp > 0 and trial.lowered.keys() == {task.name for task in early.values()}
    assert sorted(traced) == sorted([largest[0].name, *trial.lowered]), "nothing of the trial is traced twice"
    executables = compile_all(compiler, None, HERE, progress=False, lowered=trial.lowered)
    later = traced[1 + len(early) :]
    assert not set(later) & trial.lowered.keys() and len(later) + len(early) == executables.num_executables


def test_options_of_a_gpu(monkeypatch):
    """No graphs for what would be recorded in each step, or isn't launch-bound; products of many rows go to cuBLAS."""
    compiler = build_engine(SMALL, progress=False).core.runner.compiler()
    buckets = compiler.config.token_buckets
    assert all(compiler.forward(*bucket).options is None for bucket in buckets)
    monkeypatch.setattr(Compiler, "_platform", "gpu")
    tasks = {bucket: compiler.forward(*bucket) for bucket in buckets}
    assert {tokens > rows for tokens, rows in tasks} == {True, False}
    assert all(task.options is None for task in tasks.values())  # the layers are small: the host would be slower
    monkeypatch.setattr("jaxserve.runner.compiler._MOST_WORK_OF_A_GRAPH", 0)
    tasks = {bucket: compiler.forward(*bucket) for bucket in buckets}
    for (tokens, rows), task in tasks.items():
        assert (task.options is not None) == (tokens > rows)
        task.lower().compile(task.options)  # XLA knows the option's name
    small = [compiler.stage(), compiler.admit(), *(compiler.sample(key) for key in sample_keys(compiler.config))]
    assert all(task.options for task in small)
    assert compiler.burst(BurstKey(Tier.PLAIN, 1, 1, 2)).options is None
    wide = compiler.burst(BurstKey(Tier.PLAIN, 64, 64, 2)).options
    assert wide == {"xla_gpu_enable_triton_gemm": False}
    jax.jit(lambda x: x).lower(1.0).compile(wide)


@pytest.mark.parametrize(
    ("target", "draft", "rows_with_triton"),
    [
        (None, None, {"burst": [8], "mixed": [8, 64]}),
        (None, "same", {"burst": [8], "mixed": [8, 64], "propose": [8]}),
        ("int8", None, {"burst": [8, 64], "mixed": [8, 64]}),
        ("fp8", None, {"burst": [], "mixed": []}),
        (None, "int8", {"burst": [8, 64], "mixed": [8, 64], "propose": [8, 64]}),
        (None, "fp8", {"burst": [], "mixed": [], "propose": []}),
        ("int8", "fp8", {"burst": [8, 64], "mixed": [8, 64], "propose": []}),
    ],
)
def test_whose_products_are_those_of_packed_weights(monkeypatch, drafting, target, draft, rows_with_triton):
    """Triton's where a product unpacks a weight, also a draft model's; cuBLAS's where all are of fp8 matrices."""
    monkeypatch.setattr(Compiler, "_platform", "gpu")
    monkeypatch.setattr("jaxserve.runner.compiler._MOST_WORK_OF_A_GRAPH", 0)
    shardings = named_shardings(drafting.model.param_axes, drafting.attention.mesh)
    weights = {kind: abstract_params(drafting.model, shardings, kind) for kind in (None, "int8", "fp8")}
    drafter = None
    if draft is not None:
        drafter = replace(drafting.drafter, params=weights[None if draft == "same" else draft])
    compiler = replace(drafting, params=weights[target], drafter=drafter)
    make = {
        "burst": lambda rows: compiler.burst(BurstKey(Tier.PLAIN, rows, rows, 2)),
        "mixed": lambda rows: compiler.forward(rows, 1),
        "propose": lambda rows: compiler.propose(drafter, SampleKey(Tier.PLAIN, 4, rows)),
    }
    for kind, with_triton in rows_with_triton.items():
        options = {rows: make[kind](rows).options or {} for rows in (8, 64)}
        assert [n for n, told in options.items() if told.get("xla_gpu_enable_triton_gemm", True)] == with_triton, kind
        assert all(("xla_gpu_graph_min_graph_size" in told) == (kind == "mixed") for told in options.values())


@pytest.fixture(scope="module")
def drafting():
    """The compiler of an engine whose model drafts for itself."""
    twin = SpeculativeConfig(method="draft_model", quantization="int8", adaptive=False)
    return build_engine(replace(SMALL, speculative_config=twin), progress=False).core.runner.compiler()


@pytest.mark.parametrize(
    ("shape", "launch_bound"),
    [("qwen3-0.6b", {512, 1024}), ("llama-3.1-8b", set()), ("smollm2-135m", {512, 1024, 2048, 4096})],
)
def test_mixed_steps_of_small_models_are_graphs_with_products_from_cublas(monkeypatch, shape, launch_bound):
    compiler = build_engine(SMALL, progress=False).core.runner.compiler()
    config = read_model_toml(CONFIGS / f"{shape}.toml")
    model = build(config, dtype="bfloat16", padded_vocab=config.vocab_size)
    compiler = replace(compiler, model=model)
    monkeypatch.setattr(Compiler, "_platform", "gpu")
    for tokens in (512, 1024, 2048, 4096, 8192):
        [option] = compiler.forward(tokens, 256).options
        assert option == ("xla_gpu_enable_triton_gemm" if tokens in launch_bound else "xla_gpu_graph_min_graph_size")


def test_the_samplers_kernels_run_where_attentions_do_on_one_device_with_a_vocabulary_that_they_support():
    engine = build_engine(SMALL, progress=False)
    compiler = engine.core.runner.compiler()
    assert engine.info["sampler"] == compiler.sampler_implementation(compiler.model) == "xla"

    def sampled_by(implementation: str, vocab_size: int, num_devices: int) -> str:
        mesh = Mesh(np.array(jax.devices()[:num_devices]), ("tp",))
        model = replace(compiler.model, padded_vocab=vocab_size)
        attention = replace(compiler.attention, implementation=implementation, mesh=mesh)
        config = replace(compiler.config, vocab_size=vocab_size)
        return replace(compiler, attention=attention, config=config).sampler_implementation(model)

    assert sampled_by("pallas_gpu", 512, 1) == "pallas_gpu"
    assert sampled_by("pallas_gpu", 511, 1) == "xla"
    assert sampled_by("pallas_gpu", 512, 2) == "xla"
    assert sampled_by("pallas_tpu", 512, 1) == "xla"
