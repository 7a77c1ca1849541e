"""Bad input: an error of the right class that names what was wrong and what is allowed, before anything is allocated;
the engine goes on serving the others."""

import json
import math
import shutil

import pytest
from tiny_engines import GOLDEN, GREEDY, SMALL, generate, ids

from jaxserve import LLM, InvalidRequestError, SamplingParams
from jaxserve.engine import build
from jaxserve.errors import CheckpointError, ConfigError, KVCacheTooSmallError, TokenizerError, UnsupportedModelError
from pallas_kernels.ragged_paged_attention.api import select_implementation
from pallas_kernels.ragged_paged_attention.types import AttentionSpec

PROMPT = [72, 101, 108, 108, 111]
BAD_REQUESTS = {  # name: (prompt, settings, what the message holds)
    "empty text": ("", {}, "prompt is empty"),
    "empty list in a dict": ({"prompt_token_ids": []}, {}, "empty"),
    "too long": ([5] * 96, {}, r"96 tokens; allowed: 1\.\.95"),
    "id too large": ([5, 131], {}, r"token id 131; allowed: 0\.\.130"),
    "id negative": ([5, -1], {}, r"token id -1; allowed: 0\.\.130"),
    "id of text past the vocabulary": ("é", {}, r"token id 195; allowed: 0\.\.130"),
    "not an id": ([5, "x"], {}, "'x'"),
    "NaN temperature": (PROMPT, {"temperature": math.nan}, r"temperature is nan; allowed"),
    "negative temperature": (PROMPT, {"temperature": -0.1}, r"temperature is -0.1; allowed"),
    "infinite temperature": (PROMPT, {"temperature": math.inf}, r"temperature is inf; allowed"),
    "negative top_k": (PROMPT, {"top_k": -2}, r"top_k is -2; allowed"),
    "top_p 0": (PROMPT, {"top_p": 0.0}, r"top_p is 0.0; allowed"),
    "min_p": (PROMPT, {"min_p": 1.1}, r"min_p is 1.1; allowed"),
    "max_tokens 0": (PROMPT, {"max_tokens": 0}, r"max_tokens is 0; allowed"),
    "max_tokens beyond the context": (PROMPT, {"max_tokens": 92}, r"max_tokens is 92; allowed: 1\.\.91"),
    "min_tokens": (PROMPT, {"max_tokens": 3, "min_tokens": 4}, r"min_tokens is 4; allowed: 0\.\."),
    "n 0": (PROMPT, {"n": 0}, "n is 0; allowed"),
    "stop id": (PROMPT, {"stop_token_ids": [131]}, r"stop_token_ids holds token id 131; allowed: 0\.\.130"),
    "bias id": (PROMPT, {"logit_bias": {131: 1}}, r"logit_bias holds token id 131; allowed: 0\.\.130"),
    "bias value": (PROMPT, {"logit_bias": {1: 101}}, "logit_bias"),
    "allowed id": (PROMPT, {"allowed_token_ids": [131]}, r"allowed_token_ids holds token id 131; allowed: 0\.\.130"),
    "allowed empty": (PROMPT, {"allowed_token_ids": []}, "allowed_token_ids is empty"),
    "bad word past the vocabulary": (PROMPT, {"bad_words": ["é"]}, r"bad_words.*195; allowed: 0\.\.130"),
    "bad word too long": (PROMPT, {"bad_words": ["a" * 9]}, "bad_words.*at most 8 "),
    "too many bad words": (PROMPT, {"bad_words": [*"abcdefghi"]}, "bad_words.*at most 16"),
    "too many stop ids": (PROMPT, {"stop_token_ids": [*range(3, 35)]}, "stop_token_ids.*at most 32"),
    "too many biases": (PROMPT, {"logit_bias": dict.fromkeys(range(65), 1.0)}, "logit_bias.*at most 64"),
    "logprobs": (PROMPT, {"logprobs": 21}, r"logprobs is 21; allowed: 0\.\.20"),
    "prompt_logprobs": (PROMPT, {"prompt_logprobs": 21}, r"prompt_logprobs is 21; allowed: 0\.\.20"),
    "stop without text": (PROMPT, {"stop": "x", "detokenize": False}, "detokenize"),
    "empty stop": (PROMPT, {"stop": ""}, "stop holds ''"),
    "drafts without a drafter": (PROMPT, {"num_speculative_tokens": 1}, "num_speculative_tokens is 1; allowed"),
}  # fmt: skip


def test_bad_requests_are_refused_and_the_others_served(tiny):
    """All on one engine, while a good request runs."""
    with tiny("llama").llm() as llm:
        want = ids(generate(llm, [PROMPT]))
        running = llm.stream(PROMPT, GREEDY.with_changes(max_tokens=90))
        next(running)
        for name, (prompt, settings, message) in BAD_REQUESTS.items():
            with pytest.raises(InvalidRequestError, match=message):
                pytest.fail(f"{name} was served: {llm.generate(prompt, SamplingParams(**settings), use_tqdm=False)}")
        assert ids(generate(llm, [PROMPT])) == want
        list(running)
        assert len(running.output().outputs[0].token_ids) == 90, "the running request noticed"
        finished = llm.engine.core.stats()["num_finished"]
        assert {reason: count for reason, count in finished.items() if count} == {"length": 3}


def test_one_bad_prompt_refuses_the_call_before_any_is_admitted(tiny):
    with tiny("llama").llm() as llm:
        with pytest.raises(InvalidRequestError, match="token id 131"):
            generate(llm, [PROMPT, PROMPT, [131]])
        for params in ([GREEDY] * 2, []):
            with pytest.raises(InvalidRequestError, match="entries for 3 prompts"):
                generate(llm, [PROMPT] * 3, params)
        with pytest.raises(InvalidRequestError, match="priority"):
            generate(llm, [PROMPT], priority=1)
        stats = llm.engine.core.stats()
        assert (stats["num_admissions"], stats["num_steps"]) == (0, 0)


@pytest.fixture
def nothing_loads(monkeypatch):
    """Refusals come before weights are read or memory is taken."""

    def refuse(*args, **kwargs):
        pytest.fail("weights were loaded before the setting was refused")

    monkeypatch.setattr(build, "load_params", refuse)


@pytest.fixture
def model(tmp_path, byte_tokenizer_path):
    """A copy of a checkpoint with its tokenizer, to be damaged."""
    path = tmp_path / "model"
    shutil.copytree(byte_tokenizer_path, path)
    shutil.copytree(GOLDEN / "tiny" / "llama", path, dirs_exist_ok=True)
    return path


def refused(model, kind, message, **settings):
    with pytest.raises(kind, match=message):
        LLM(str(model), **{**SMALL, **settings})


@pytest.mark.parametrize(
    "platform, requested, level", [("cpu", "auto", "INFO"), ("gpu", "auto", "WARNING"), ("gpu", "xla", "INFO")]
)
def test_a_refused_kernel_is_told_once(caplog, platform, requested, level):
    """A warning only where the platform has a kernel of its own that somebody might have counted on."""
    spec = AttentionSpec(4, 2, 96, 64, "bfloat16", "bfloat16", 0.1)
    with caplog.at_level("INFO", logger="jaxserve"):
        build._tell_choice(select_implementation(spec, platform, requested, "9.0"), requested, platform)
    assert [(record.levelname, "attention runs on xla" in record.message) for record in caplog.records] == [
        (level, True)
    ]
    if level == "WARNING":
        assert "not pallas_gpu: head_dim is 96" in caplog.text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dtype": "float17"}, "dtype is 'float17'; allowed: auto, float32, bfloat16"),
        ({"load_format": "pt"}, "load_format is 'pt'; allowed"),
        ({"max_model_len": 257}, r"max_model_len is 257; allowed: 2\.\.256"),
        ({"max_model_len": 1}, "max_model_len is 1; allowed"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0; allowed"),
        ({"max_num_batched_tokens": 3}, r"max_num_batched_tokens is 3; allowed: at least max_num_seqs \(4\)"),
        ({"tensor_parallel_size": 9}, r"tensor_parallel_size is 9; allowed: 1\.\.8"),
        ({"tensor_parallel_size": 4}, "4 doesn't divide the 6 query heads"),
        ({"tensor_parallel_size": 3}, "3 doesn't divide the ffn dimension 76"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization is 0.0; allowed"),
        ({"attention_implementation": "pallas_gpu"}, "pallas_gpu"),
        ({"scheduling_policy": "random"}, "scheduling_policy is 'random'; allowed"),
        ({"run_ahead": -1}, "run_ahead is -1; allowed"),
        ({"watchdog_seconds": 0}, "watchdog_seconds is 0; allowed"),
        ({"max_seconds": -1.0}, "max_seconds is -1.0; allowed"),
        ({"quantization": "awq"}, "quantization"),
        ({"kv_cache_memory_bytes": 10**15}, "kv_cache_memory_bytes gives .*; allowed: at most"),
    ],
)
def test_bad_settings(nothing_loads, model, settings, message):
    refused(model, ConfigError, message, **settings)


@pytest.mark.parametrize(
    "settings, fits",
    [
        ({"num_gpu_blocks_override": 23, "kv_cache_memory_bytes": None}, 92),
        ({"num_gpu_blocks_override": 1, "kv_cache_memory_bytes": None}, 4),
        ({"kv_cache_memory_bytes": 20_000}, 32),  # of 2304 bytes a block
    ],
)
def test_a_pool_too_small_says_the_largest_context_that_fits(nothing_loads, model, settings, fits):
    refused(
        model, KVCacheTooSmallError, f"max_model_len 96 .*the largest max_model_len that fits is {fits}", **settings
    )


def test_missing_and_damaged_files(nothing_loads, model, tmp_path):
    refused(tmp_path / "nowhere", CheckpointError, "nowhere")
    weights, config, tokenizer = (model / n for n in ("model.safetensors", "config.json", "tokenizer.json"))
    data, text, words = weights.read_bytes(), config.read_text(), tokenizer.read_text()
    for cut in (len(data) - 100, 100, 4, 0):
        weights.write_bytes(data[:cut])
        refused(model, CheckpointError, "model.safetensors")
    weights.write_bytes(data)
    config.write_text(text[:50])
    refused(model, CheckpointError, "config.json.*isn't valid JSON")
    config.write_text(json.dumps(json.loads(text) | {"architectures": ["OtherForCausalLM"], "model_type": "other"}))
    refused(model, UnsupportedModelError, "OtherForCausalLM.*known: Llama")
    config.write_text(text)
    tokenizer.write_text(words[:100])
    refused(model, CheckpointError, "tokenizer.json")
    tokenizer.unlink()
    refused(model, TokenizerError, "no tokenizer")


def test_a_tokenizer_without_an_eos(nothing_loads, model):
    """Nor may the checkpoint name one elsewhere."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({k: v for k, v in settings.items() if not k.startswith("eos_token")}))
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    refused(model, TokenizerError, "EOS")


def test_a_truncated_gguf(nothing_loads, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    refused(path, CheckpointError, "model.gguf")
    path.write_bytes(b"not a model")
    refused(path, CheckpointError, "model.gguf")


def test_eos_is_the_union_of_all_that_say_so(tiny):
    """The dummy model says nothing; the checkpoint of the tiny llama says 2; the tokenizer 257."""
    assert set(tiny("dummy").engine.eos_token_ids) == {257}
    assert set(tiny("llama").engine.eos_token_ids) == {2, 257}
