"""docs/vllm_compatibility.md and the code say the same, and scripts written for vLLM run."""

import ast
import inspect
import random
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from fakes import fake_engine

from jaxserve import LLM, ConfigError, EngineConfig, InvalidRequestError, Limits, SamplingParams
from jaxserve.llm import engine_config
from jaxserve.vllm_arguments import CHAT_NEUTRAL, GENERATE_NEUTRAL, LLM_NEUTRAL, SAMPLING_NEUTRAL

PAGE = (Path(__file__).parent.parent / "docs" / "vllm_compatibility.md").read_text()
# The signatures themselves, so that a row can't be forgotten.
VLLM_LLM = """
model runner convert tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code allowed_local_media_path
allowed_media_domains tensor_parallel_size dtype quantization revision tokenizer_revision chat_template seed
gpu_memory_utilization cpu_offload_gb offload_group_size offload_num_in_group offload_prefetch_step
offload_params enforce_eager enable_return_routed_experts disable_custom_all_reduce hf_token hf_overrides
mm_processor_kwargs pooler_config structured_outputs_config profiler_config attention_config
kv_cache_memory_bytes compilation_config logits_processors swap_space disable_log_stats max_model_len
max_num_seqs max_num_batched_tokens block_size enable_prefix_caching num_gpu_blocks_override load_format
"""
VLLM_GENERATE = "prompts sampling_params use_tqdm lora_request priority tokenization_kwargs mm_processor_kwargs"
VLLM_CHAT = """
messages sampling_params use_tqdm lora_request chat_template chat_template_content_format add_generation_prompt
continue_final_message tools chat_template_kwargs tokenization_kwargs mm_processor_kwargs
"""
VLLM_SAMPLING = """
n presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop stop_token_ids
ignore_eos max_tokens min_tokens logprobs prompt_logprobs prompt_logprob_token_ids prompt_logprob_start
logprob_token_ids flat_logprobs detokenize skip_special_tokens spaces_between_special_tokens
include_stop_str_in_output output_kind stream_interval skip_clone output_text_buffer_length structured_outputs
logit_bias allowed_token_ids extra_args bad_words skip_reading_prefix_cache thinking_token_budget
repetition_detection routed_experts_prompt_start trace_decode_token_ids
"""


def table(heading):
    """name -> (answer, remark) of the rows under a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) ?\|$", section, re.MULTILINE)
    assert len({name for name, *_ in rows}) == len(rows)
    return {name: (answer, remark) for name, answer, remark in rows}


def names(heading, answer):
    return {name for name, (a, _) in table(heading).items() if a == answer}


def parameters(method):
    """name -> parameter, without self, in their order."""
    return dict(list(inspect.signature(method).parameters.items())[1:])


SETTINGS = {f.name for f in fields(EngineConfig)}
SAMPLING = {f.name for f in fields(SamplingParams)}
GENERATE = set(parameters(LLM.generate)) - set(GENERATE_NEUTRAL)
CHAT = set(parameters(LLM.chat)) - set(CHAT_NEUTRAL)


@pytest.mark.parametrize(
    ("heading", "signature", "neutral", "acted_on"),
    [
        ("LLM", VLLM_LLM, LLM_NEUTRAL, SETTINGS),
        ("LLM.generate", VLLM_GENERATE, GENERATE_NEUTRAL, GENERATE),
        ("LLM.chat", VLLM_CHAT, CHAT_NEUTRAL, CHAT),
        ("SamplingParams", VLLM_SAMPLING, SAMPLING_NEUTRAL, SAMPLING),
    ],
)
class TestTable:
    def test_covers_vllms_signature(self, heading, signature, neutral, acted_on):
        assert set(signature.split()) - set(table(heading)) == set()

    def test_neutral_rows_are_the_codes_with_the_same_values(self, heading, signature, neutral, acted_on):
        assert names(heading, "neutral") == set(neutral)
        for name, values in neutral.items():
            remark = table(heading)[name][1]
            listed = [ast.literal_eval(code) for code in re.findall(r"`([^`]*)`", remark.partition(";")[0])]
            assert listed == list(values), name

    def test_honoured_rows_and_own_names_are_what_the_code_acts_on(self, heading, signature, neutral, acted_on):
        section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        own = set(re.findall(r"`(\w+)`", section.partition("jaxserve's own:")[2].partition("(")[0]))
        assert names(heading, "honoured") | own == acted_on
        assert not set(neutral) & acted_on


@pytest.mark.parametrize("name", sorted(LLM_NEUTRAL))
def test_llm_takes_neutral_values_and_refuses_others_by_name(name):
    for value in LLM_NEUTRAL[name]:
        assert engine_config("m", {name: value}) == EngineConfig(model="m")
    with pytest.raises(ConfigError, match=f"{name} is 'something'.*allowed: "):
        engine_config("m", {name: "something"})


@pytest.mark.parametrize("name", sorted(SAMPLING_NEUTRAL))
def test_sampling_params_take_neutral_values_and_refuse_others_by_name(name):
    for value in SAMPLING_NEUTRAL[name]:
        assert SamplingParams(**{name: value}) == SamplingParams()
    with pytest.raises(InvalidRequestError, match=f"{name} is 'something'.*allowed: "):
        SamplingParams(**{name: "something"})


@pytest.mark.parametrize("name", sorted(names("LLM", "refused")))
def test_llm_refuses_other_names(name):
    with pytest.raises(ConfigError, match=f"'{name}'"):
        engine_config("m", {name: None})


@pytest.mark.parametrize("name", sorted(names("SamplingParams", "refused")))
def test_sampling_params_refuse_other_names(name):
    with pytest.raises(InvalidRequestError, match=f"'{name}'"):
        SamplingParams(**{name: None})


@pytest.mark.parametrize(("method", "signature"), [(LLM.generate, VLLM_GENERATE), (LLM.chat, VLLM_CHAT)])
def test_calls_have_vllms_signature(method, signature):
    """Its names are there; as many may be given by position, in the same order."""
    ours = parameters(method)
    assert set(signature.split()) <= set(ours)
    by_position = [name for name, parameter in ours.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert by_position == (signature.split()[:2] if method is LLM.generate else signature.split())


CALLS = {
    "LLM.generate": (GENERATE_NEUTRAL, lambda llm, **given: llm.generate("x", use_tqdm=False, **given)),
    "LLM.chat": (CHAT_NEUTRAL, lambda llm, **given: llm.chat(MESSAGES, use_tqdm=False, **given)),
}
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(("heading", "name"), [(call, name) for call, (known, _) in CALLS.items() for name in known])
def test_calls_take_neutral_values_and_refuse_others_by_name(llm, heading, name):
    neutral, call = CALLS[heading]
    for value in neutral[name]:
        assert len(call(llm, **{name: value})) == 1
    submitted = len(llm.engine.core.submitted)
    for value in ("something", {"truncation": True}, ["something"], 0):
        with pytest.raises(InvalidRequestError) as refused:
            call(llm, **{name: value})
        allowed = " or ".join(map(repr, neutral[name]))
        assert str(refused.value) == f"{name} is {value!r}, which jaxserve doesn't support; allowed: {allowed}"
    assert len(llm.engine.core.submitted) == submitted


@pytest.mark.parametrize("name", sorted(names("LLM.generate", "refused")))
def test_generate_refuses_other_names(llm, name):
    with pytest.raises(TypeError, match=f"'{name}'"):
        llm.generate("x", **{name: None})


@pytest.mark.parametrize(("name", "value"), [("enforce_eager", 0), ("cpu_offload_gb", False), ("hf_overrides", [])])
def test_neutral_means_the_same_kind_of_value(name, value):
    with pytest.raises(ConfigError, match=name):
        engine_config("m", {name: value})


@pytest.mark.parametrize("value", [np.array([1, 2]), np.array([])])
def test_arrays_ask_for_something(value):
    with pytest.raises(ConfigError, match="hf_overrides is array"):
        engine_config("m", {"hf_overrides": value})
    with pytest.raises(InvalidRequestError, match="extra_args is array"):
        SamplingParams(extra_args=value)


def test_max_logprobs_doesnt_contradict_the_limits():
    assert engine_config("m", {"max_logprobs": 20, "limits": {"max_bad_words": 5}}).limits.max_logprobs == 20
    with pytest.raises(ConfigError, match=r"max_logprobs is 20 with limits\.max_logprobs 5; allowed: the limit alone"):
        engine_config("m", {"max_logprobs": 20, "limits": {"max_logprobs": 5}})


def test_every_limit_is_on_the_page():
    assert [f.name for f in fields(Limits) if f"`limits.{f.name}`" not in PAGE] == []


def test_none_means_the_default():
    config = engine_config("m", {"seed": None, "max_model_len": None, "enable_prefix_caching": None, "swap_space": 4.0})
    assert config == EngineConfig(model="m")


@pytest.fixture
def llm():
    with LLM.from_engine(fake_engine(max_model_len=2048)) as llm:
        yield llm


def test_nano_vllms_benchmark_runs(llm):
    draw = random.Random(0)
    prompts = [[draw.randint(0, 255) for _ in range(draw.randint(10, 50))] for _ in range(16)]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=draw.randint(10, 40)) for _ in prompts]
    llm.generate(["Benchmark: "], SamplingParams())
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert sum(len(o.outputs[0].token_ids) for o in outputs) == sum(p.max_tokens for p in params)
    as_dicts = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    assert [o.prompt_token_ids for o in as_dicts] == prompts


def test_vllms_basic_example_runs(llm, capsys):
    prompts = ["Hello, my name is", "The president of the United States is"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.8, top_p=0.95))
    for output in outputs:
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
    assert capsys.readouterr().out.count("->") == 2


def test_vllms_chat_example_runs(llm):
    params = llm.get_default_sampling_params()
    conversation = [{"role": "system", "content": "You help."}, {"role": "user", "content": "Hello"}]
    outputs = llm.chat(conversation, params, use_tqdm=False)
    outputs += llm.chat([conversation for _ in range(3)], params, use_tqdm=False)
    outputs += llm.chat(conversation, params, False, None, "{{ messages[0].content }}", "auto", True, False, None, {})
    assert len(outputs) == 5 and all(len(o.outputs[0].token_ids) == 16 for o in outputs)


def test_vllms_logprobs_script_runs(llm):
    tokenizer = llm.get_tokenizer()
    params = SamplingParams(max_tokens=1, logprobs=5, prompt_logprobs=1, temperature=0)
    (output,) = llm.generate({"prompt_token_ids": tokenizer.encode("some text")}, params, use_tqdm=False)
    assert sum(next(iter(row.values())).logprob for row in output.prompt_logprobs[1:]) < 0
    assert max(output.outputs[0].logprobs[0].values(), key=lambda entry: entry.logprob).rank == 1
