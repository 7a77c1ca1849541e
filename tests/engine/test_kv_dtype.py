"""A KV cache in 8 bits: the tokens are those of a model whose keys and values are rounded so, however it is run."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from dense_reference import Reference
from speculation_cases import SMALL as FEW_EXECUTABLES
from tiny_engines import GREEDY, SMALL, Tiny, generate, ids, preemptions

from jaxserve import ConfigError, SamplingParams
from jaxserve.config import EngineConfig

# A key or value that lies between two of the cache's numbers goes either way with the last bit of its float32, so the
# least lead that counts is larger than without rounding.
LEAD = 5e-3
WAYS = {
    "at once": {},
    "chunks of 1": {"max_prefill_chunk_len": 1},
    "chunks of 7": {"max_prefill_chunk_len": 7},
    "small steps": {"max_num_batched_tokens": 9},
    "preempted": {"num_blocks": 25, "admission_headroom_len": 0},
    "preempted, in chunks, ahead": {
        "num_blocks": 23, "admission_headroom_len": 0, "max_prefill_chunk_len": 7, "run_ahead": 3,
    },
}  # fmt: skip


def to_fp8(x):
    return x.astype(jnp.float8_e4m3fn).astype(x.dtype)


def to_int8(x):
    """The largest magnitude of a token's head is 127."""
    step = jnp.abs(x).max(axis=-1, keepdims=True) / 127
    return jnp.round(x / jnp.where(step > 0, step, 1)) * step


ROUNDING = {"fp8": to_fp8, "fp8_e4m3": to_fp8, "int8": to_int8}


@pytest.fixture(scope="module")
def work():
    """``work(kv_cache_dtype)``: prompts, settings, and the ids that must come out."""

    @functools.cache
    def make(kv_cache_dtype):
        oracle = Reference("llama", round_kv=ROUNDING[kv_cache_dtype])
        rng = np.random.default_rng(3)
        prompts, params, wanted = [], [], []
        for i in range(200):
            prompt = rng.integers(3, oracle.vocab_size, int(rng.integers(1, 70))).tolist()
            settings = GREEDY if i % 2 else SamplingParams(temperature=0.9, seed=i, max_tokens=16, ignore_eos=True)
            tokens, lead = oracle.follow(prompt, settings)
            if lead > LEAD:
                prompts, params, wanted = [*prompts, prompt], [*params, settings], [*wanted, tokens]
            if len(prompts) == 8:
                return prompts, params, wanted
        raise AssertionError("hardly any request can tell right from wrong")

    return make


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "int8"])
def test_the_ids_of_the_rounded_model_whatever_the_way(tiny, work, kv_cache_dtype, way):
    """All in one batch; then again, with the prefix cache warm."""
    prompts, params, wanted = work(kv_cache_dtype)
    with tiny("llama", **FEW_EXECUTABLES, kv_cache_dtype=kv_cache_dtype).llm(**WAYS[way]) as llm:
        assert ids(generate(llm, prompts, params)) == wanted
        assert (preemptions(llm) > 0) == ("preempted" in way)
        warm = generate(llm, prompts, params)
    assert ids(warm) == wanted
    assert way.startswith("preempted") or any(o.metrics.num_cached_tokens for o in warm)


def test_the_rounding_is_seen(work, reference):
    """The unrounded model says something else, or these tests would hold for any cache."""
    prompts, params, wanted = work("fp8")
    plain = [reference("llama").follow(prompt, settings)[0] for prompt, settings in zip(prompts, params, strict=True)]
    assert plain != wanted


@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", pytest.param("int8", marks=pytest.mark.slow)])
def test_two_devices_say_the_same(byte_tokenizer_path, work, kv_cache_dtype):
    prompts, params, wanted = work("fp8" if kv_cache_dtype == "fp8_e4m3" else kv_cache_dtype)
    engine = Tiny(
        "llama", byte_tokenizer_path, **FEW_EXECUTABLES, kv_cache_dtype=kv_cache_dtype, tensor_parallel_size=2
    )
    with engine.llm() as llm:
        assert ids(generate(llm, prompts, params)) == wanted


@pytest.mark.parametrize(
    "kv_cache_dtype, dtype, bytes_a_head", [("fp8", "float8_e4m3fn", 12), ("int8", "int8", 12 + 4)]
)
def test_the_pool_holds_as_many_blocks_as_the_dtype_lets_it(tiny, kv_cache_dtype, dtype, bytes_a_head):
    engine = tiny("llama", **FEW_EXECUTABLES, kv_cache_dtype=kv_cache_dtype).engine
    config = engine.model_config
    block = config.num_layers * 2 * config.num_kv_heads * SMALL["block_size"] * bytes_a_head
    assert config.head_dim == 12
    assert engine.core.scheduler.config.num_blocks == SMALL["kv_cache_memory_bytes"] // block
    pools = engine.core.runner._kv[0]
    assert pools[0].values.dtype == dtype and (pools[0].scales is not None) == (kv_cache_dtype == "int8")


@pytest.mark.parametrize("wrong", ["fp8_e5m2", "fp8_inc", "float8_e4m3fn", "int4", "fp16", None])
def test_other_dtypes_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=rf"kv_cache_dtype is {wrong!r}; allowed: auto, .*fp8, fp8_e4m3, int8"):
        EngineConfig(model="m", kv_cache_dtype=wrong)
