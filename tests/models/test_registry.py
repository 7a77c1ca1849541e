"""What a build promises: names, axes, no arrays, refusals; and that the compiled step is lean."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense_attend, dense_logits, random_params
from small_configs import FAMILIES, LLAMA

from jaxserve.models.config import LayerConfig, LinearScaling, RopeConfig
from jaxserve.models.registry import build
from pallas_kernels.qkv_prologue.reference import heads

LLAMA_LAYER = {
    "attn_norm.weight": (48,),
    "attn.qkv.weight": (48, 2, 5, 12),
    "attn.o.weight": (2, 3, 12, 48),
    "mlp_norm.weight": (48,),
    "mlp.gate_up.weight": (48, 2, 76),
    "mlp.down.weight": (76, 48),
}
QK_NORM = {"attn.q_norm.weight": (12,), "attn.k_norm.weight": (12,)}
OWN_NAMES = {
    "qwen2": {"attn.qkv.bias": (2, 5, 12)},
    "qwen3": QK_NORM,
    "gemma3": QK_NORM | {"post_attn_norm.weight": (48,), "post_mlp_norm.weight": (48,)},
}


def flat(tree):
    leaves, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path): leaf for path, leaf in leaves
    }


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_parameter_names_shapes_and_axes(name, tied):
    model = build(replace(FAMILIES[name], tie_embeddings=tied), dtype="bfloat16", padded_vocab=136)
    expected = {"embed.weight": (136, 48), "final_norm.weight": (48,)}
    expected |= {} if tied else {"lm_head.weight": (136, 48)}
    expected |= {
        f"layers.{i}.{key}": shape for i in range(3) for key, shape in (LLAMA_LAYER | OWN_NAMES.get(name, {})).items()
    }
    params = flat(model.params)
    assert {key: leaf.shape for key, leaf in params.items()} == expected
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == jnp.bfloat16 for leaf in params.values())
    assert {key: len(axes) for key, axes in flat(model.param_axes).items()} == {k: len(s) for k, s in expected.items()}
    assert model.param_axes["layers"][0]["attn"]["qkv"]["weight"] == ("embed", "kv_heads", "q_group", "head_dim")


@pytest.mark.parametrize(
    "change, settings, message",
    [
        (
            {"architecture": "mixtral"},
            {},
            "unknown architecture 'mixtral'; known: llama, mistral, qwen2, qwen3, gemma3",
        ),
        ({}, {"padded_vocab": 130}, "padded_vocab is 130; allowed: at least the vocabulary's 131"),
        ({}, {"num_kv_heads": 3}, "num_kv_heads is 3; allowed: a multiple of 2 that divides 6"),
        ({}, {"num_kv_heads": 4}, "num_kv_heads is 4"),
    ],
)
def test_refusals(change, settings, message):
    with pytest.raises(ValueError, match=message):
        build(replace(LLAMA, **change), **{"dtype": "float32", "padded_vocab": 131} | settings)


@pytest.mark.parametrize("tied", [False, True])
def test_trunk_and_head_read_their_own_part_of_the_params(tied):
    model = build(replace(LLAMA, tie_embeddings=tied), dtype="float32", padded_vocab=131)
    params, token_ids = random_params(model), jnp.arange(7)
    hidden, _ = model.hidden(
        model.trunk_params(params), token_ids, jnp.arange(7), (None,) * 3, dense_attend(model.config)
    )
    logits = model.logits(model.head_params(params), hidden)
    np.testing.assert_allclose(logits, dense_logits(model, params, token_ids), atol=1e-5)
    assert set(model.trunk_params(params)) | set(model.head_params(params)) == set(params)


def test_soft_cap_bounds_logits():
    model = build(replace(LLAMA, logit_soft_cap=0.5), dtype="float32", padded_vocab=131)
    capped = dense_logits(model, random_params(model), jnp.arange(7))
    raw_model = build(LLAMA, dtype="float32", padded_vocab=131)
    raw = np.asarray(dense_logits(raw_model, random_params(raw_model), jnp.arange(7)), np.float64)
    np.testing.assert_allclose(capped, 0.5 * np.tanh(raw / 0.5), atol=1e-5)


@pytest.mark.parametrize("token_id", [-7, 131, 2**31 - 1])
def test_a_padding_token_may_hold_any_id(token_id):
    model = build(LLAMA, dtype="float32", padded_vocab=131)
    params = random_params(model)
    plain = dense_logits(model, params, jnp.array([5, 6, 7, 0]))
    padded = dense_logits(model, params, jnp.array([5, 6, 7, token_id]))
    np.testing.assert_array_equal(plain[:3], padded[:3])
    assert np.all(np.isfinite(padded))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_step_copies_no_weight_and_computes_angles_once(dtype):
    ropes = (RopeConfig(1e4), RopeConfig(1e6, LinearScaling(8.0)))
    layers = tuple(LayerConfig(ropes[i % 2]) for i in range(4))
    config = replace(FAMILIES["gemma3"], layers=layers, model_dim=128, ffn_dim=256, head_dim=32)
    model = build(config, dtype=dtype, padded_vocab=136)

    def step(params, token_ids, positions):
        def attend(layer, qkv, rope, norm, pool):
            q, k, v = heads(qkv, rope, norm)
            return q * jnp.repeat(k + v, 3, axis=1), pool

        return model.logits(params, model.hidden(params, token_ids, positions, (None,) * 4, attend)[0])

    ids = jax.ShapeDtypeStruct((16,), jnp.int32)
    text = jax.jit(step).lower(model.params, ids, ids).compile().as_text()
    assert len(re.findall(r" cosine\(", text)) == len(ropes)
    assert not re.findall(r" transpose\(", text)
    assert not re.findall(r" copy\(", text)
