"""GGUF models: what a converter wrote comes back as the Hugging Face checkpoint it was made of."""

import json
import math
from dataclasses import replace

import gguf
import jax
import numpy as np
import pytest
from checkpoint_files import TINY
from gguf_writing import write_gguf
from hf_tree import model_config, param_tree
from safetensors.numpy import load_file

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.config import LinearScaling, Llama3Scaling
from jaxserve.models.registry import build
from jaxserve.weights import load_params, open_checkpoint


def read_tiny(name):
    config = model_config(json.loads((TINY / name / "config.json").read_text()))
    return config, load_file(TINY / name / "model.safetensors")


def llama3_factors(config):
    """What llama.cpp's converter stores: by how much each frequency is divided."""
    scaling, theta = config.layers[0].rope.scaling, config.layers[0].rope.theta
    factors = []
    for i in range(config.head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / config.head_dim)
        if wavelength < scaling.original_max_position / scaling.high_freq_factor:
            factors.append(1.0)
        elif wavelength > scaling.original_max_position / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def write_tiny(path, name, *, metadata=None, **options):
    """The tiny model ``name`` as GGUF, and the config that GGUF can express of it."""
    config, tensors = read_tiny(name)
    metadata, extra = dict(metadata or {}), {}
    if isinstance(config.layers[0].rope.scaling, Llama3Scaling):
        original = config.layers[0].rope.scaling.original_max_position
        metadata.setdefault("llama.rope.scaling.original_context_length", original)
        extra["rope_freqs.weight"] = llama3_factors(config)
    if name == "gemma3":
        config = replace(config, attention_scale=config.head_dim**-0.5)  # the file has no query_pre_attn_scalar
        metadata |= {
            "gemma3.attention.sliding_window_pattern": [layer.sliding_window is not None for layer in config.layers],
            "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": 8.0,
        }
    write_gguf(path, config, tensors, metadata=metadata, extra=extra, **options)
    return config, tensors


def assert_equal_trees(tree, other, **tolerance):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, other)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma3"])
def test_config_and_parameters_come_back(tmp_path, name):
    config, tensors = write_tiny(tmp_path / "tiny.gguf", name)
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    assert checkpoint.config == config
    model = build(config, dtype="float32", padded_vocab=config.vocab_size + 3)
    params = load_params(checkpoint, model, progress=False)
    # Gemma's norms went through w + 1 - 1.
    assert_equal_trees(params, param_tree(tensors, config, model.padded_vocab), rtol=0, atol=2e-7)


def test_half_precision_tensors(tmp_path):
    config, tensors = write_tiny(tmp_path / "tiny.gguf", "qwen3", dtype=np.float16)
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    params = load_params(checkpoint, build(config, dtype="float32", padded_vocab=131), progress=False)
    rounded = {name: t.astype(np.float16).astype(np.float32) if t.ndim > 1 else t for name, t in tensors.items()}
    assert_equal_trees(params, param_tree(rounded, config, 131), rtol=0, atol=0)


def test_a_directory_with_one_gguf_file(tmp_path):
    config, _ = write_tiny(tmp_path / "tiny.gguf", "qwen3")
    assert open_checkpoint(str(tmp_path)).config == config
    (tmp_path / "tiny.gguf").rename(tmp_path / "one.gguf")
    write_tiny(tmp_path / "two.gguf", "qwen3")
    with pytest.raises(CheckpointError, match="several GGUF files"):
        open_checkpoint(str(tmp_path))


def test_linear_rope_scaling_is_honoured(tmp_path):
    metadata = {"qwen3.rope.scaling.type": "linear", "qwen3.rope.scaling.factor": 4.0}
    write_tiny(tmp_path / "tiny.gguf", "qwen3", metadata=metadata)
    assert open_checkpoint(str(tmp_path / "tiny.gguf")).config.layers[0].rope.scaling == LinearScaling(4.0)


def test_rope_frequencies_of_no_known_scaling_are_refused(tmp_path):
    config, tensors = read_tiny("llama_tied")
    factors = np.linspace(1, 8, config.head_dim // 2, dtype=np.float32)
    write_gguf(tmp_path / "tiny.gguf", config, tensors, extra={"rope_freqs.weight": factors})
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight.*isn't Llama 3's"):
        open_checkpoint(str(tmp_path / "tiny.gguf"))


def test_gemma3_sizes_without_pattern_and_the_27b_query_scale(tmp_path):
    """Real files write no pattern (every sixth layer is global); the size of 62 layers scales queries by E / Hq."""
    config, tensors = read_tiny("gemma3")
    layer = {name: t for name, t in tensors.items() if ".layers.0." in name}
    for i in range(62):
        tensors |= {name.replace(".layers.0.", f".layers.{i}."): t for name, t in layer.items()}
    write_gguf(
        tmp_path / "big.gguf",
        replace(config, layers=config.layers[:1] * 62),
        tensors,
        metadata={"gemma3.rope.freq_base": 1e6},
    )
    opened = open_checkpoint(str(tmp_path / "big.gguf")).config
    assert opened.attention_scale == (48 // 6) ** -0.5
    windowed = [layer.sliding_window is not None for layer in opened.layers]
    assert windowed == [(i + 1) % 6 != 0 for i in range(62)]
    assert {layer.rope.theta for layer in opened.layers} == {1e4, 1e6}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"qwen3.expert_count": 8}, "8 experts"),
        ({"qwen3.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ({"qwen3.attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"qwen3.rope.dimension_count": 6}, "partial rotary"),
        ({"qwen3.attention.value_length": 7}, "value_length 7"),
        ({"general.architecture": "mamba"}, "architecture 'mamba' isn't known; known: llama, qwen2, qwen3, gemma3"),
        ({"split.count": 3}, "one of 3 parts"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, metadata, message):
    config, tensors = read_tiny("qwen3")
    path = tmp_path / "tiny.gguf"
    if "general.architecture" in metadata:
        writer = gguf.GGUFWriter(path, metadata["general.architecture"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    else:
        write_gguf(path, config, tensors, metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"qwen3.block_count": None}, "has no metadata 'qwen3.block_count'"),
        ({"qwen3.context_length": "long"}, "'qwen3.context_length' of .* is 'long'; expected int"),
        ({"qwen3.attention.head_count_kv": 4}, "6 query heads, 4 KV heads"),
    ],
)
def test_bad_metadata_is_named(tmp_path, metadata, message):
    config, tensors = read_tiny("qwen3")
    write_gguf(tmp_path / "tiny.gguf", config, tensors, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path / "tiny.gguf"))


def test_tensors_are_named_as_the_file_names_them(tmp_path):
    config, tensors = read_tiny("gemma3")
    del tensors["model.layers.1.pre_feedforward_layernorm.weight"]
    extra = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 2), np.float32)}
    metadata = {"gemma3.attention.sliding_window_pattern": 2}
    write_gguf(tmp_path / "tiny.gguf", config, tensors, extra=extra, metadata=metadata)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path / "tiny.gguf"))
    assert "1 missing: blk.1.ffn_norm.weight" in str(caught.value)
    assert "1 left over: blk.0.ffn_gate_exps.weight" in str(caught.value)
