"""Every family gives HF transformers' logits: on committed goldens, and live where torch is installed."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense_attend, dense_logits
from hf_tree import model_config, param_tree
from safetensors.numpy import load_file

from jaxserve.models.registry import build

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "golden" / "tiny"
NAMES = ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma3"]
PADDING = 5  # rows past the vocabulary


def load_golden(name, dtype="float32"):
    config = model_config(json.loads((TINY / name / "config.json").read_text()))
    model = build(config, dtype=dtype, padded_vocab=config.vocab_size + PADDING)
    tensors = {key: tensor.astype(dtype) for key, tensor in load_file(TINY / name / "model.safetensors").items()}
    golden = np.load(TINY / name / "golden.npz")
    return model, param_tree(tensors, config, model.padded_vocab), golden["prompt"], golden["logits"]


@pytest.mark.parametrize("name", NAMES)
def test_golden_logits(name):
    model, params, prompt, expected = load_golden(name)
    logits = dense_logits(model, params, prompt)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[:, :-PADDING], expected, atol=1e-4, rtol=0)
    assert np.all(np.isneginf(logits[:, -PADDING:]))


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_goldens_depend_on_the_window(name):
    model, params, prompt, expected = load_golden(name)
    windowless = tuple(replace(layer, sliding_window=None) for layer in model.config.layers)
    logits = dense_logits(model, params, prompt, dense_attend(replace(model.config, layers=windowless)))
    assert abs(logits[-1, :-PADDING] - expected[-1]).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near(name):
    model, params, prompt, expected = load_golden(name, jnp.bfloat16)
    logits = dense_logits(model, params, prompt)
    assert logits.dtype == jnp.float32
    error = np.asarray(logits[:, :-PADDING]) - expected
    assert np.sqrt(np.mean(error**2)) < 0.03 * np.sqrt(np.mean(expected**2)) + 0.03


@pytest.mark.parametrize("name", NAMES)
def test_live_logits(name):
    pytest.importorskip("torch", reason="needs torch")
    spec = importlib.util.spec_from_file_location("make_golden", ROOT / "scripts" / "make_golden.py")
    make_golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_golden)

    hf_model, prompt, expected = make_golden.run_tiny(make_golden.tiny_configs()[name], seed=1234)
    config = model_config(hf_model.config.to_dict())
    tensors = {key: tensor.numpy() for key, tensor in hf_model.state_dict().items()}
    if config.tie_embeddings:
        del tensors["lm_head.weight"]
    model = build(config, dtype="float32", padded_vocab=config.vocab_size)
    logits = dense_logits(model, param_tree(tensors, config, model.padded_vocab), prompt)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
