"""config.json of every family, as published and as transformers 5 writes it; what isn't known is refused by name."""

import math

import pytest

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.config import LayerConfig, LinearScaling, Llama3Scaling, ModelConfig, RopeConfig
from jaxserve.weights.hf_config import parse_config

LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MISTRAL_7B_V01 = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
GEMMA3_4B = {  # leaves most values to the family's defaults
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model"},
}


def test_llama_31():
    rope = RopeConfig(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert parse_config(LLAMA_31_8B) == ModelConfig(
        architecture="llama",
        vocab_size=128256,
        model_dim=4096,
        ffn_dim=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        layers=(LayerConfig(rope),) * 32,
        max_position=131072,
        norm_eps=1e-5,
        tie_embeddings=False,
        attention_scale=128**-0.5,
    )


def test_llama_2_has_as_many_kv_heads_and_the_old_base():
    config = parse_config(LLAMA_2_7B)
    assert (config.num_kv_heads, config.head_dim) == (32, 128)
    assert set(config.layers) == {LayerConfig(RopeConfig(10000.0))}


def test_mistral_window_and_its_absence():
    assert {layer.sliding_window for layer in parse_config(MISTRAL_7B_V01).layers} == {4096}
    assert {layer.sliding_window for layer in parse_config(MISTRAL_7B_V01 | {"sliding_window": None}).layers} == {None}
    assert parse_config(MISTRAL_7B_V01 | {"head_dim": 160}).head_dim == 160


def test_qwen2_has_a_bias_and_ignores_a_window_that_is_switched_off():
    config = parse_config(QWEN25_05B)
    assert (config.qkv_bias, config.qk_norm, config.tie_embeddings) == (True, False, True)
    assert {layer.sliding_window for layer in config.layers} == {None}


def test_qwen_window_layers():
    """Layers below max_window_layers see everything."""
    config = parse_config(QWEN25_05B | {"use_sliding_window": True, "sliding_window": 100})
    assert [layer.sliding_window for layer in config.layers] == [None] * 21 + [100] * 3
    kinds = ["sliding_attention", "full_attention"] * 12
    config = parse_config(QWEN25_05B | {"use_sliding_window": True, "sliding_window": 100, "layer_types": kinds})
    assert [layer.sliding_window for layer in config.layers] == [100, None] * 12


def test_qwen3():
    config = parse_config(QWEN3_06B)
    assert (config.head_dim, config.qk_norm, config.qkv_bias) == (128, True, False)
    assert config.num_heads * config.head_dim != config.model_dim
    assert set(config.layers) == {LayerConfig(RopeConfig(1e6))}


def test_gemma3_text():
    config = parse_config(GEMMA3_1B)
    local, whole = LayerConfig(RopeConfig(1e4), 512), LayerConfig(RopeConfig(1e6))
    assert config.layers == tuple(whole if i % 6 == 5 else local for i in range(26))
    assert config.embedding_scale == math.sqrt(1152)
    assert config.attention_scale == 1 / 16
    assert (config.activation, config.qk_norm, config.tie_embeddings) == ("gelu_tanh", True, True)
    assert config.logit_soft_cap is None
    assert parse_config(GEMMA3_1B | {"final_logit_softcapping": 30.0}).logit_soft_cap == 30.0
    assert parse_config(GEMMA3_1B | {"query_pre_attn_scalar": 168}).attention_scale == 168**-0.5


def test_gemma3_multimodal_takes_its_text_config_and_the_family_defaults():
    config = parse_config(GEMMA3_4B)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert config.layers[5] == LayerConfig(RopeConfig(1e6, LinearScaling(8.0)))
    assert config.layers[0] == LayerConfig(RopeConfig(1e4), 1024)  # windowed layers aren't scaled
    assert config.tie_embeddings


def as_transformers_5(settings):
    """The same model in the spelling of transformers 5: rope_parameters, dtype, layer_types."""
    new = dict(settings)
    theta, scaling = new.pop("rope_theta", 10000.0), new.pop("rope_scaling", None)
    rope = {"rope_theta": theta, "rope_type": "default"} | (scaling or {})
    if settings["model_type"] == "gemma3_text":
        local = {"rope_theta": new.pop("rope_local_base_freq"), "rope_type": "default"}
        rope = {"full_attention": rope, "sliding_attention": local}
        pattern = new.pop("sliding_window_pattern")
        new["_sliding_window_pattern"] = pattern
        kinds = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(26)]
        new["layer_types"] = kinds
    new.pop("torch_dtype", None)
    return new | {"rope_parameters": rope, "dtype": "bfloat16", "transformers_version": "5.23.0"}


@pytest.mark.parametrize("settings", [LLAMA_31_8B, LLAMA_2_7B, MISTRAL_7B_V01, QWEN25_05B, QWEN3_06B, GEMMA3_1B])
def test_both_spellings_give_the_same_model(settings):
    assert parse_config(as_transformers_5(settings)) == parse_config(settings)


def test_a_llama_without_architectures_goes_by_model_type():
    settings = {key: value for key, value in LLAMA_31_8B.items() if key != "architectures"}
    assert parse_config(settings) == parse_config(LLAMA_31_8B)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (
            LLAMA_31_8B,
            {"architectures": ["PhiForCausalLM"]},
            r"'PhiForCausalLM' isn't supported; known: LlamaForCausalLM",
        ),
        (LLAMA_31_8B, {"architectures": ["MixtralForCausalLM"]}, r"'MixtralForCausalLM' \(a mixture of experts\)"),
        (QWEN3_06B, {"architectures": ["Qwen3MoeForCausalLM"]}, r"'Qwen3MoeForCausalLM' \(a mixture of experts\)"),
        (
            LLAMA_31_8B,
            {"architectures": None, "model_type": "phi3"},
            r"model_type 'phi3' isn't supported; known: llama",
        ),
        (LLAMA_31_8B, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (LLAMA_31_8B, {"num_local_experts": 8}, "num_local_experts 8"),
        (LLAMA_31_8B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        (QWEN3_06B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' isn't supported; known: default"),
        (LLAMA_2_7B, {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        (LLAMA_31_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (LLAMA_31_8B, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config 'gptq'"),
        (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        (GEMMA3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        (LLAMA_31_8B, {"attention_bias": True}, "attention_bias True isn't supported; known: False"),
        (LLAMA_31_8B, {"mlp_bias": True}, "mlp_bias True"),
        (LLAMA_31_8B, {"hidden_act": "relu"}, "hidden_act 'relu' isn't known; known: silu"),
        (LLAMA_31_8B, {"layer_types": ["sliding_attention"] * 32}, "layer type 'sliding_attention'"),
        (GEMMA3_1B, {"layer_types": ["chunked_attention"] * 26}, "layer type 'chunked_attention'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(base, changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        parse_config(base | changes)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LLAMA_31_8B, {"hidden_size": None}, "hidden_size of the model's config is None; expected an integer"),
        (LLAMA_31_8B, {"num_hidden_layers": "32"}, "num_hidden_layers .* is '32'"),
        (LLAMA_31_8B, {"num_key_value_heads": 5}, "32 isn't a multiple of num_key_value_heads 5"),
        (LLAMA_31_8B, {"rms_norm_eps": 0}, "rms_norm_eps .* is 0; expected a positive number"),
        (LLAMA_31_8B, {"tie_word_embeddings": "no"}, "tie_word_embeddings .* is 'no'"),
        (LLAMA_31_8B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (LLAMA_31_8B, {"rope_scaling": 8}, "rope_scaling is 8; expected an object"),
        (LLAMA_2_7B, {"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
        (GEMMA3_1B, {"layer_types": ["full_attention"]}, "expected a list of 26 names"),
        (LLAMA_31_8B, {"architectures": "LlamaForCausalLM"}, "architectures .* is 'LlamaForCausalLM'; expected a list"),
        (
            LLAMA_31_8B,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_type is 'llama3' in rope_scaling and 'default' in rope_parameters",
        ),
        (
            GEMMA3_1B,
            {
                "rope_scaling": {"type": "linear", "factor": 8.0},
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}},
            },
            "factor is 8.0 in rope_scaling and 4.0 in rope_parameters",
        ),
    ],
)
def test_bad_values_are_named(base, changes, message):
    with pytest.raises(CheckpointError, match=message):
        parse_config(base | changes)
