"""The set of executables is closed: nothing is compiled while serving; what lay on the device before is harmless."""

import logging
import threading

import jax
import jax.monitoring
import numpy as np
import pytest
from core_world import until
from tiny_engines import GREEDY, generate, ids

from jaxserve import SamplingParams
from jaxserve.engine.core import EngineCore
from jaxserve.errors import CompileAfterWarmupError, EngineDeadError
from jaxserve.scheduler.scheduler import Scheduler


@pytest.fixture
def compilations():
    """Names of the threads that compiled something meanwhile."""
    threads = []

    def heard(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            threads.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield threads
    jax.monitoring.unregister_event_duration_listener(heard)


def random_request(rng, vocab_size):
    """Any length, any tier, any feature."""
    prompt = rng.integers(3, vocab_size, rng.integers(1, 70)).tolist()
    settings = {"max_tokens": int(rng.integers(1, 96 - len(prompt)))}
    features = {
        "temperature": float(rng.choice([0.0, 0.7, 1.3])),
        "top_k": int(rng.integers(1, 50)),
        "top_p": float(rng.uniform(0.2, 1)),
        "min_p": float(rng.uniform(0, 0.2)),
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "logit_bias": {int(rng.integers(vocab_size)): 2.0},
        "allowed_token_ids": [*range(30, 100)],
        "bad_words": ["a", "bcd"],
        "min_tokens": int(rng.integers(0, settings["max_tokens"] + 1)),
        "stop_token_ids": [int(rng.integers(vocab_size))],
        "stop": "ab",
        "logprobs": int(rng.integers(0, 6)),
        "prompt_logprobs": int(rng.integers(0, 6)),
        "n": int(rng.integers(1, 6)),
        "seed": int(rng.integers(2**40)),
    }
    for name in rng.permutation(list(features))[: rng.integers(0, 5)]:
        settings[str(name)] = features[str(name)]
    return prompt, SamplingParams(**settings)


WORKLOADS = {
    "plain": {},
    "chunks": {"max_prefill_chunk_len": 5, "run_ahead": 3},
    "crowded": {"num_blocks": 25, "admission_headroom_len": 0},
    "small steps": {"max_num_batched_tokens": 6, "run_ahead": 0},
}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_nothing_is_compiled_while_serving(tiny, compilations, workload):
    """All tiers, chunks, preemption, aborts, streams; neither on the core's thread nor on a front's."""
    rng = np.random.default_rng(len(workload))
    engine = tiny("llama")
    compilations.clear()
    with engine.llm(**WORKLOADS[workload]) as llm:
        work = [random_request(rng, 131) for _ in range(30)]
        outputs = generate(llm, [prompt for prompt, _ in work], [params for _, params in work])
        for prompt, params in work[:6]:  # left in the middle
            with llm.stream(prompt, params.with_changes(max_tokens=20, min_tokens=0)) as stream:
                next(stream)
        until(lambda: llm.engine.core.stats()["num_running"] == 0)
        stats = llm.engine.core.stats()
        assert llm.engine.core.call(lambda scheduler: scheduler.pool.num_available) == engine_blocks(llm)
    assert (stats["num_preemptions"] > 0) == (workload == "crowded")
    assert stats["num_compiles_while_serving"] == 0
    assert compilations == []
    for (_, params), output in zip(work, outputs, strict=True):
        for choice in output.outputs:
            assert choice.finish_reason in ("stop", "length")
            assert len(choice.token_ids) <= params.max_tokens
            assert params.allowed_token_ids is None or set(choice.token_ids) <= set(params.allowed_token_ids)


def engine_blocks(llm):
    return llm.engine.core.scheduler.config.num_blocks


def compile_something(scheduler):
    return int(jax.jit(lambda x: x * 3 + scheduler.config.max_num_seqs)(np.ones(7919))[0])


def test_a_compilation_kills_a_strict_engine(tiny):
    with pytest.raises(EngineDeadError) as dead, tiny("llama").llm() as llm:
        llm.engine.core.call(compile_something)
        generate(llm, [[5, 6]])
    assert isinstance(dead.value.__cause__, CompileAfterWarmupError)


def test_a_compilation_is_a_counted_warning_otherwise(tiny, caplog):
    core = tiny("llama").engine.core
    core = EngineCore(Scheduler(core.scheduler.config), core.runner, check_invariants=True)
    core.start()
    logging.getLogger("jaxserve").propagate = True
    with caplog.at_level(logging.WARNING, "jaxserve"):
        assert core.call(compile_something) == 7
    assert core.stats()["num_compiles_while_serving"] >= 1
    assert "compiled while serving" in caplog.text
    core.check_health()
    core.shutdown()


def poison(leaf, rng):
    """NaNs in floats, random bits elsewhere, where the leaf lies."""
    if leaf.dtype == bool:
        value = rng.random(leaf.shape) < 0.5
    elif jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
        value = np.full(leaf.shape, np.nan, leaf.dtype)
    else:
        value = rng.integers(-(2**31), 2**31, leaf.shape, np.int64).astype(np.int32).view(leaf.dtype)
    return jax.device_put(value, leaf.sharding)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_poisoned_device_changes_nothing(tiny, reference, name):
    """Every pool, slot and scratch buffer full of rubbish: padding and former tenants are harmless by construction."""
    rng = np.random.default_rng(0)
    oracle = reference(name)
    runner = tiny(name).engine.core.runner
    prompts = [rng.integers(3, 131, n).tolist() for n in (1, 30, 9, 61, 17)]
    for scheduler in ({}, {"max_prefill_chunk_len": 7}):
        for part in ("_kv", "_slots", "_scratch"):
            setattr(runner, part, jax.tree.map(lambda leaf: poison(leaf, rng), getattr(runner, part)))
        with tiny(name).llm(**scheduler) as llm:
            outputs = generate(llm, prompts, GREEDY.with_changes(logprobs=1, prompt_logprobs=0))
        for prompt, output in zip(prompts, outputs, strict=True):
            want, lead = oracle.follow(prompt, GREEDY)
            assert lead > 2e-4
            assert ids([output]) == [want]
            assert all(np.isfinite(e.logprob) for row in output.outputs[0].logprobs for e in row.values())
            assert all(np.isfinite(e.logprob) for row in output.prompt_logprobs[1:] for e in row.values())
