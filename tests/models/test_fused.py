"""Layers in one op each: which models, and that the model hands the op what a layer of products computes with.

The op itself needs a GPU (tests/pallas_kernels/test_post_attention.py); here its reference stands for it.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense_attend, random_params
from small_configs import FAMILIES

from jaxserve.models import llama
from jaxserve.models.fused import GPU
from jaxserve.models.quantized import quantize_int8
from jaxserve.models.registry import build
from pallas_kernels.post_attention import reference

HOPPER = GPU("9.0", 132)
SIZES = {"model_dim": 64, "ffn_dim": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
PLAIN = ["llama", "mistral", "qwen3"]


def small(name, **changes):
    return replace(FAMILIES[name], **(SIZES | changes))


def hidden(model, params, num_tokens=8):
    token_ids = jnp.arange(num_tokens, dtype=jnp.int32) * 7 % 131
    run = jax.jit(
        lambda params: model.hidden(
            params, token_ids, token_ids * 0 + jnp.arange(num_tokens), (None,) * 3, dense_attend(model.config)
        )[0]
    )
    return np.asarray(run(params), np.float32)


@pytest.fixture
def launches(monkeypatch):
    """The op's reference in its place; the layers whose launches were traced."""
    seen = []

    def post_attention(attended, x, layer, following, words, spec, num_ctas):
        assert num_ctas == HOPPER.multiprocessors
        assert words.turn == len(seen), "each launch gets what the one before has left"
        seen.append(spec)
        return *reference.post_attention(attended, x, layer, following, spec), Turn(len(seen))

    class Turn(int):
        turn = property(int)

    monkeypatch.setattr(llama, "empty_words", lambda shape, num_ctas: Turn(0))
    monkeypatch.setattr(llama, "post_attention", post_attention)
    return seen


@pytest.mark.parametrize("name", PLAIN)
def test_a_fused_model_is_the_model(launches, name):
    """Same roundings, so the same bits: weights are those of the right layer, in the right order."""
    fused, plain = (build(small(name), dtype="bfloat16", padded_vocab=136, gpu=gpu) for gpu in (HOPPER, "none"))
    assert [n for n in range(1, 65) if fused.launches(n)] == [8, 16, 24, 32]
    params = random_params(plain)
    np.testing.assert_array_equal(hidden(fused, params), hidden(plain, params))
    assert len(launches) == 2, "the last layer has no next one"
    assert {(spec.eps, spec.norm_offset, spec.activation) for spec in launches} == {(1e-6, 0.0, "silu")}


def test_a_model_may_be_fused_with_more_tokens_only():
    """With 8 tokens 80 of 344 CTAs would come last."""
    large = small("llama", model_dim=4096, ffn_dim=22016, num_heads=32, num_kv_heads=8, head_dim=128)
    model = build(large, dtype="bfloat16", padded_vocab=136, gpu=HOPPER)
    assert [model.launches(n) for n in (8, 16, 24, 64, 72)] == [0, 0, 4, 4, 0]


@pytest.mark.parametrize("num_tokens", [1, 12, 40, 64])
def test_other_numbers_of_tokens_are_computed_by_products(launches, num_tokens):
    fused, plain = (build(small("llama"), dtype="bfloat16", padded_vocab=136, gpu=gpu) for gpu in (HOPPER, "none"))
    params = random_params(plain)
    np.testing.assert_array_equal(hidden(fused, params, num_tokens), hidden(plain, params, num_tokens))
    assert not launches


def test_packed_weights_are_computed_by_products(launches):
    """A quantised copy of a target is the same model with other weights."""
    model = build(small("llama"), dtype="bfloat16", padded_vocab=136, gpu=HOPPER)
    params = random_params(model)
    plain = hidden(build(small("llama"), dtype="bfloat16", padded_vocab=136), params)
    down = params["layers"][1]["mlp"]["down"]
    down["weight"] = quantize_int8(down["weight"], (0,))
    assert 0 < np.abs(hidden(model, params) - plain).max() < 0.2 * np.abs(plain).max()
    assert not launches


@pytest.mark.parametrize(
    ("name", "changes", "gpu", "dtype", "reason"),
    [
        ("llama", {}, "the device is a CPU", "bfloat16", "the device is a CPU"),
        ("llama", {}, HOPPER, "float32", "it computes in bfloat16, not float32"),
        ("llama", {}, GPU("8.0", 108), "bfloat16", "it is written for compute capability 9.0"),
        ("llama", {"ffn_dim": 76}, HOPPER, "bfloat16", "ffn dim is 76, no multiple of 64"),
        ("qwen2", {}, HOPPER, "bfloat16", "qkv has a bias"),
        ("gemma3", {}, HOPPER, "bfloat16", "layers of gemma3 have more norms"),
    ],
)
def test_models_that_are_not_fused_say_why(launches, name, changes, gpu, dtype, reason):
    model = build(replace(small(name), **changes), dtype=dtype, padded_vocab=136, gpu=gpu)
    assert model.fused == reason
    hidden(model, random_params(model))
    assert not launches
