"""Quantised weights, served: the ids are those of a model with the rounded weights, however it is run."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from dense_reference import Reference
from speculation_cases import SMALL
from tiny_engines import GREEDY, Tiny, generate, ids, preemptions

from jaxserve import ConfigError, KVCacheTooSmallError, SamplingParams
from jaxserve.config import EngineConfig, SpeculativeConfig
from jaxserve.engine import build

CONTRACTED = {"qkv": (0,), "o": (0, 1, 2), "gate_up": (0,), "down": (0,)}
WAYS = {
    "at once": {},
    "chunks of 7": {"max_prefill_chunk_len": 7},
    "preempted": {"num_blocks": 25, "admission_headroom_len": 0, "max_prefill_chunk_len": 7, "run_ahead": 3},
}
# The least lead of a token that counts. Activations in fp8 go either way with the last bit of a float32.
LEAD = {"int8": 1e-3, "int4": 1e-3, "fp8_weight_only": 1e-3, "fp8": 3e-2}
FEW = ["int8", "fp8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int4", "fp8_weight_only"))]
TWIN = SpeculativeConfig(method="draft_model", quantization="int4", num_speculative_tokens=3, adaptive=False)


def int8(weight, axes):
    step = np.abs(weight).max(axis=axes, keepdims=True) / 127
    return np.round(weight / step) * step


def fp8(x, axes):
    scale = np.maximum(np.abs(x).max(axis=axes, keepdims=True), 1e-30) / np.float32(448)
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def int4(weight, axes):
    """Groups of the longest length up to 64 that divides the last of the axes."""
    at = axes[-1]
    length = max(n for n in range(1, 65) if weight.shape[at] % n == 0)
    rows = np.moveaxis(weight, at, -1)
    groups = rows.reshape(*rows.shape[:-1], -1, length)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = ((high - low) / 15).astype(ml_dtypes.bfloat16).astype(np.float32)
    offset = low.astype(ml_dtypes.bfloat16).astype(np.float32)
    rounded = np.clip(np.round((groups - offset) / scale), 0, 15) * scale + offset
    return np.moveaxis(rounded.reshape(rows.shape), -1, at)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundsItsInputs:
    """A weight in front of which each token is rounded to fp8."""

    weight: jax.Array

    def einsum(self, spec, x, out_dtype):
        axes = tuple(range(1, x.ndim))
        scale = jnp.maximum(jnp.abs(x).max(axis=axes, keepdims=True), 1e-30) / 448
        rounded = (x / scale).astype(jnp.float8_e4m3fn).astype(jnp.float32) * scale
        return jnp.einsum(spec, rounded, self.weight, precision="highest")


ROUND = {"int8": int8, "int4": int4, "fp8_weight_only": fp8, "fp8": fp8}


def rounding(quantization):
    """What the oracle's weights become; the LM head is int8 in the integer formats and whole in fp8."""

    def convert(node, name=None):
        if isinstance(node, list):
            return [convert(child) for child in node]
        if not isinstance(node, dict):
            return node
        done = {key: convert(child, key) for key, child in node.items()}
        if name in CONTRACTED:
            weight = jnp.asarray(ROUND[quantization](np.asarray(node["weight"]), CONTRACTED[name]))
            done["weight"] = RoundsItsInputs(weight) if quantization == "fp8" else weight
        return done

    def change(model, params):
        params = convert(params)
        if quantization.startswith("int"):
            params["lm_head"] = {"weight": jnp.asarray(int8(np.asarray(params["lm_head"]["weight"]), (1,)))}
        return params

    return change


@pytest.fixture(scope="module")
def oracle():
    return functools.cache(lambda quantization: Reference("llama", change=rounding(quantization)))


@pytest.fixture(scope="module")
def work(oracle):
    """``work(quantization)``: prompts, settings, and the ids that must come out."""

    @functools.cache
    def make(quantization):
        rng = np.random.default_rng(5)
        found = []
        for i in range(300):
            prompt = rng.integers(3, oracle(quantization).vocab_size, int(rng.integers(1, 70))).tolist()
            settings = GREEDY if i % 2 else SamplingParams(temperature=0.9, seed=i, max_tokens=12, ignore_eos=True)
            tokens, lead = oracle(quantization).follow(prompt, settings)
            if lead > LEAD[quantization]:
                found.append((prompt, settings, tokens))
            if len(found) == 7:
                return tuple(zip(*found, strict=True))
        raise AssertionError("hardly any request can tell right from wrong")

    return make


def check(llm, work):
    prompts, params, wanted = work
    for _ in range(2):  # then again, with the prefix cache warm
        assert tuple(ids(generate(llm, prompts, params))) == wanted


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quantization", FEW)
def test_the_ids_of_the_rounded_model(tiny, work, quantization, way):
    engine = tiny("llama", **SMALL, quantization=quantization)
    assert engine.engine.info["quantization"] == quantization
    with engine.llm(**WAYS[way]) as llm:
        check(llm, work(quantization))
        assert (preemptions(llm) > 0) == (way == "preempted")


def test_the_rounding_is_seen(tiny, oracle, reference):
    """In log-probabilities, which show what is too small to change an id."""
    prompt = np.random.default_rng(6).integers(3, 131, 60).tolist()
    with tiny("llama", **SMALL, quantization="int8").llm() as llm:
        (output,) = generate(llm, [prompt], GREEDY.with_changes(prompt_logprobs=0, max_tokens=1))
    got = [row[token].logprob for row, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    rounded, plain = (model.logprobs(prompt)[range(59), prompt[1:]] for model in (oracle("int8"), reference("llama")))
    np.testing.assert_allclose(got, rounded, atol=1e-3)
    assert np.abs(got - plain).max() > 1e-2


@pytest.mark.parametrize(
    "quantization", ["int8", *(pytest.param(q, marks=pytest.mark.slow) for q in LEAD if q != "int8")]
)
def test_two_devices_and_a_copy_in_4_bits_that_drafts(byte_tokenizer_path, work, quantization):
    """Both models' weights are packed and sharded; parameters that both have in common are the same arrays."""
    drafts = dataclasses.replace(TWIN, quantization="int8") if quantization == "int4" else TWIN
    engine = Tiny(
        "llama", byte_tokenizer_path, **SMALL, quantization=quantization, tensor_parallel_size=2,
        speculative_config=drafts,
    )  # fmt: skip
    compiler = engine.engine.core.runner.compiler()
    target, twin = compiler.params, compiler.drafter.params
    assert twin["layers"][0]["attn_norm"]["weight"] is target["layers"][0]["attn_norm"]["weight"]
    assert twin["embed"]["weight"] is target["embed"]["weight"]
    assert (twin["lm_head"]["weight"] is target["lm_head"]["weight"]) == quantization.startswith("int")
    assert twin["layers"][0]["attn"]["o"]["weight"] is not target["layers"][0]["attn"]["o"]["weight"]
    with engine.llm(adaptive_drafts=None) as llm:
        check(llm, work(quantization))
        stats = llm.engine.core.stats()
    engine.close()
    assert 0 < stats["num_accepted_tokens"] < stats["num_drafted_tokens"]


def test_a_copy_in_the_models_own_format_is_refused(byte_tokenizer_path):
    with pytest.raises(ConfigError, match="'int4', and so is the model's"):
        Tiny("llama", byte_tokenizer_path, quantization="int4", speculative_config=TWIN)


@pytest.mark.parametrize("wrong", ["awq", "gptq", "bitsandbytes", "fp8_e4m3", 8, True])
def test_other_formats_are_refused_by_name(wrong):
    for make in (EngineConfig, lambda model, **s: SpeculativeConfig(method="draft_model", **s)):
        with pytest.raises(ConfigError, match=f"quantization is {wrong!r}; allowed: int8, int4, fp8, fp8_weight_only"):
            make(model="m", quantization=wrong)


def test_weights_that_leave_no_room_are_refused_before_they_are_read():
    """On a device of 600 MiB, 512 of them reserved; the longest request takes four blocks of 10 MiB."""
    config = EngineConfig(
        model="m", max_model_len=64, block_size=16, num_gpu_blocks_override=None, kv_cache_memory_bytes=None
    )
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 600 << 20})
    attention = SimpleNamespace(
        mesh=SimpleNamespace(devices=np.array([device], object)), bytes_per_block=lambda: 10 << 20
    )
    build._check_room(config, attention, 15 << 20)
    with pytest.raises(KVCacheTooSmallError, match="the memory that is left gives 2"):
        build._check_room(config, attention, 60 << 20)


@pytest.mark.parametrize("drafts", [None, TWIN], ids=["alone", "with a copy that drafts"])
def test_temporaries_are_measured_before_the_pool_is_sized(byte_tokenizer_path, monkeypatch, drafts):
    """On a device that says how much memory it has: what a trial found is kept free beside weights and state."""
    monkeypatch.setattr(build, "_memory_stats", lambda mesh: {"bytes_limit": 560 << 20})
    small = SMALL | {"max_num_seqs": 1, "max_num_batched_tokens": 8}
    tiny = Tiny("llama", byte_tokenizer_path, **small, kv_cache_memory_bytes=None, speculative_config=drafts)
    memory = tiny.engine.info["memory"]
    assert "from the memory that is left" in memory["kv cache"] and not memory["temporaries"].startswith("0 ")
    with tiny.llm() as llm:
        assert len(ids(generate(llm, [[1, 2, 3]], GREEDY))[0]) > 0
