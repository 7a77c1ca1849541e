"""EngineConfig checks the type and range of every field, before anything is loaded."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from jaxserve import LLM, AsyncEngine, ConfigError, EngineConfig, Limits
from jaxserve.config import SpeculativeConfig, read_toml
from jaxserve.sampling_params import RepetitionDetection

DUMMY = str(Path(__file__).parent / "engine" / "tiny_dummy.toml")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model": None}, "model is None; allowed: a path"),
        ({"model": ""}, "model is ''"),
        ({"model": b"m"}, "model is b'm'"),
        ({"tokenizer": 5}, "tokenizer is 5; allowed: a path, as a string or a Path, or None"),
        ({"compilation_cache_dir": True}, "compilation_cache_dir is True"),
        ({"limits": "x"}, "limits is 'x'; allowed: a Limits, a dict of its fields"),
        ({"limits": {"max_logprob": 5}}, "'max_logprob' of Limits"),
        ({"limits": {"max_logprobs": -5}}, r"^limits\.max_logprobs is -5; allowed: an integer of at least 1"),
        ({"speculative_config": "ngram"}, "speculative_config is 'ngram'; allowed: a SpeculativeConfig"),
        ({"speculative_config": {"adaptive": "x"}}, r"^speculative_config\.adaptive is 'x'; allowed: True, False"),
        ({"speculative_config": {"method": "draft_model", "model": 3}}, r"^speculative_config\.model is 3"),
        ({"speculative_config": {"method": "magic"}}, r"^speculative_config\.method is 'magic'"),
        ({"speculative_config": {"prompt_lookup_max": 0}}, r"\.prompt_lookup_max is 0; allowed: .* at least 1"),
        ({"speculative_config": {"prompt_lookup_min": "x"}}, r"\.prompt_lookup_min is 'x'"),
        ({"speculative_config": {"prompt_lookup_min": 4, "prompt_lookup_max": 3}}, "max is 3; allowed: .* at least 4"),
        (
            {"speculative_config": {"model": "x", "prompt_lookup_max": 3}},
            "max is 3 with method 'draft_model'; allowed: None",
        ),
        ({"speculative_config": {"method": "ngram", "model": "x"}}, "model is 'x' with method 'ngram'; allowed: None"),
        ({"repetition_detection": {"min_count": 1}}, r"^repetition_detection\.min_count is 1"),
        ({"repetition_detection": RepetitionDetection(min_count=1)}, r"^repetition_detection\.min_count is 1"),
        (
            {"num_gpu_blocks_override": 9, "kv_cache_memory_bytes": 9},
            "num_gpu_blocks_override is 9 with kv_cache_memory",
        ),
        (
            {"default_max_tokens": 9, "max_output_tokens": 8},
            r"default_max_tokens is 9; allowed: 1\.\.8 \(max_output_tok",
        ),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization is '0.9'"),
        ({"gpu_memory_utilization": None}, "gpu_memory_utilization is None"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization is True"),
        ({"gpu_memory_utilization": math.nan}, "gpu_memory_utilization is nan"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization is 1.1"),
        ({"seed": "abc"}, "seed is 'abc'"),
        ({"seed": 2**70}, r"seed is \d+; allowed: an integer in -9223372036854775808\.\.9223372036854775807"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching is 'no'; allowed: True, False"),
        ({"skip_tokenizer_init": 0}, "skip_tokenizer_init is 0"),
        ({"strict_compile": "yes"}, "strict_compile is 'yes'"),
        ({"watchdog_seconds": math.inf}, r"watchdog_seconds is inf; allowed: .* at most 1e\+09"),
        (
            {"repetition_detection": {"max_pattern_size": 513}},
            r"^repetition_detection\.max_pattern_size is 513; .* 512",
        ),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, named):
    with pytest.raises(ConfigError, match=named):
        EngineConfig(**{"model": "m", **settings})


@pytest.mark.parametrize("name", [f.name for f in fields(Limits)])
@pytest.mark.parametrize("value", ["x", 0, -5, 1.5, True, None])
def test_limits_are_numbers(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {re.escape(repr(value))}; allowed: an integer of at least 1"):
        Limits(**{name: value})


def test_configs_inside_may_be_dicts_of_their_fields():
    config = EngineConfig(model="m", limits={"max_logprobs": 5}, speculative_config={"prompt_lookup_max": 4})
    assert config.limits == Limits(max_logprobs=5)
    assert config.speculative_config == SpeculativeConfig(prompt_lookup_max=4)


@pytest.mark.parametrize(
    ("settings", "method", "lookup"),
    [
        ({}, "ngram", (2, 3)),
        ({"prompt_lookup_min": 4}, "ngram", (4, 4)),
        ({"prompt_lookup_max": 1}, "ngram", (1, 1)),
        ({"prompt_lookup_min": 1, "prompt_lookup_max": None}, "ngram", (1, 1)),
        ({"prompt_lookup_min": 1, "prompt_lookup_max": 5}, "ngram", (1, 5)),
        ({"model": "x"}, "draft_model", (None, None)),
        ({"quantization": "int8"}, "draft_model", (None, None)),
    ],
)
def test_what_speculation_leaves_open_follows_from_what_it_says(settings, method, lookup):
    config = SpeculativeConfig(**settings)
    assert (config.method, config.prompt_lookup_min, config.prompt_lookup_max) == (method, *lookup)
    assert replace(config, num_speculative_tokens=4) == config


def test_paths_become_strings_and_numpys_integers_pythons(tmp_path):
    config = EngineConfig(
        model=tmp_path, tokenizer=tmp_path / "t", compilation_cache_dir=tmp_path / "c", max_model_len=np.int64(64)
    )
    assert (config.model, config.tokenizer) == (str(tmp_path), str(tmp_path / "t"))
    assert (config.compilation_cache_dir, type(config.max_model_len)) == (str(tmp_path / "c"), int)


def test_a_longer_pattern_may_be_allowed():
    limits = Limits(max_repetition_pattern=600)
    config = EngineConfig(model="m", limits=limits, repetition_detection={"max_pattern_size": 600})
    assert config.repetition_detection.max_pattern_size == 600


@pytest.mark.parametrize("wrong", ["file", "file/below"])
def test_a_cache_directory_that_cant_be_made_is_refused_before_loading(tmp_path, monkeypatch, wrong):
    import jaxserve.engine.build as build

    def load_params(*_, **__):
        raise AssertionError("loading began")

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(build, "load_params", load_params)
    with pytest.raises(ConfigError, match="compilation_cache_dir is .*, which can't be made"):
        LLM(DUMMY, load_format="dummy", skip_tokenizer_init=True, compilation_cache_dir=tmp_path / wrong)


def test_an_async_engine_says_what_it_takes():
    with pytest.raises(ConfigError, match="config is 'x'; allowed: an EngineConfig"):
        AsyncEngine("x")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("# größe\nseed = 1".encode("latin-1"), "isn't valid TOML, which is UTF-8: .* byte 0xf6 in position 4"),
        ("seed = 1".encode("utf-16"), "isn't valid TOML, which is UTF-8"),
        (b"seed = ", "isn't valid TOML: Invalid value"),
    ],
)
def test_a_file_that_isnt_toml_is_named(tmp_path, content, says):
    (tmp_path / "f.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"f.toml' {says}"):
        read_toml(tmp_path / "f.toml")
