"""A model split over virtual devices gives the logits of one device, with two sums a layer and no gathered weight."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense_attend, dense_logits, random_params
from hf_tree import repeat_kv_heads
from jax.sharding import Mesh, PartitionSpec
from small_configs import FAMILIES, LLAMA

from jaxserve.models.registry import build
from jaxserve.models.sharding import kv_heads_for, named_shardings, padded_vocab_for, partition_specs

VOCAB = 131  # odd: shards hold padding
needs_devices = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")


def sharded_attend(config, mesh):
    """Dense attention on each device's own heads, as a paged kernel would run."""
    heads = PartitionSpec(None, "tp")

    def attend(layer, qkv, rope, norm, pool):
        def local(qkv, rope, norm):
            return dense_attend(config)(layer, qkv, rope, norm, None)[0]

        specs = heads, PartitionSpec(), PartitionSpec()
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads)(qkv, rope, norm), pool

    return attend


def split_logits(config, params, tp, token_ids):
    mesh = Mesh(np.array(jax.devices()[:tp]), ("tp",))
    model = build(
        config, dtype="float32", padded_vocab=padded_vocab_for(VOCAB, tp), num_kv_heads=kv_heads_for(config, tp)
    )
    padding = model.padded_vocab - VOCAB
    tables = [name for name in ("embed", "lm_head") if name in params]
    params = params | {name: {"weight": jnp.pad(params[name]["weight"], ((0, padding), (0, 0)))} for name in tables}
    params = repeat_kv_heads(params, model.config.num_kv_heads)
    params = jax.device_put(params, named_shardings(model.param_axes, mesh))
    return dense_logits(model, params, token_ids, sharded_attend(model.config, mesh))


@needs_devices
@pytest.mark.parametrize(
    "name, tied, kv_heads, tp",
    [
        ("llama", False, 4, 2),
        ("llama", False, 4, 4),
        ("llama", True, 2, 4),  # fewer KV heads than devices: copied
        ("qwen2", True, 1, 4),
        ("qwen3", False, 2, 2),
        ("gemma3", True, 1, 2),
    ],
)
def test_logits_equal_one_device(name, tied, kv_heads, tp):
    config = replace(FAMILIES[name], num_heads=8, num_kv_heads=kv_heads, tie_embeddings=tied)
    one = build(config, dtype="float32", padded_vocab=VOCAB)
    params, token_ids = random_params(one), jnp.arange(19) * 7 % VOCAB
    expected = dense_logits(one, params, token_ids)
    logits = split_logits(config, params, tp, token_ids)
    np.testing.assert_allclose(logits[:, :VOCAB], expected, atol=2e-4, rtol=1e-5)
    assert np.all(np.isneginf(logits[:, VOCAB:]))


@needs_devices
def test_split_step_sums_twice_a_layer_and_gathers_no_weight():
    config = replace(LLAMA, num_heads=8, num_kv_heads=4)
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    model = build(config, dtype="float32", padded_vocab=132)
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.params,
        named_shardings(model.param_axes, mesh),
    )

    def step(params, token_ids, positions):
        hidden, _ = model.hidden(params, token_ids, positions, (None,) * 3, sharded_attend(config, mesh))
        return model.logits(params, hidden)

    ids = jax.ShapeDtypeStruct((16,), jnp.int32)
    text = jax.jit(step).lower(shapes, ids, ids).compile().as_text()
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 2 * 3 + 1  # and one for the embedding
    assert not re.findall(r" (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text)


def test_specs_follow_the_axes():
    specs = partition_specs(build(LLAMA, dtype="float32", padded_vocab=132).param_axes)
    assert specs["embed"]["weight"] == PartitionSpec("tp", None)
    assert specs["layers"][0]["attn"]["qkv"]["weight"] == PartitionSpec(None, "tp", None, None)
    assert specs["layers"][0]["attn"]["o"]["weight"] == PartitionSpec("tp", None, None, None)
    assert specs["layers"][0]["mlp"]["gate_up"]["weight"] == PartitionSpec(None, None, "tp")
    assert specs["layers"][0]["mlp"]["down"]["weight"] == PartitionSpec("tp", None)
    assert specs["final_norm"]["weight"] == PartitionSpec(None)


@pytest.mark.parametrize("kv_heads, tp, expected", [(4, 1, 4), (4, 2, 4), (4, 4, 4), (2, 4, 4), (1, 4, 4), (2, 8, 8)])
def test_kv_heads_for(kv_heads, tp, expected):
    config = replace(LLAMA, num_heads=8, num_kv_heads=kv_heads, ffn_dim=80)
    assert kv_heads_for(config, tp) == expected


@pytest.mark.parametrize(
    "change, tp, message",
    [
        ({}, 3, "size 3 doesn't divide the ffn dimension 76"),
        ({}, 4, "size 4 doesn't divide the 6 query heads"),
        ({"num_heads": 12, "num_kv_heads": 3}, 4, "size 4 is neither a divisor nor a multiple of the 3 KV heads"),
    ],
)
def test_sizes_that_cannot_divide_are_refused(change, tp, message):
    with pytest.raises(ValueError, match=message):
        kv_heads_for(replace(LLAMA, **change), tp)


@pytest.mark.parametrize("tp, multiple, expected", [(1, 1, 131), (2, 1, 132), (4, 1, 132), (4, 8, 160)])
def test_padded_vocab_for(tp, multiple, expected):
    assert padded_vocab_for(VOCAB, tp, multiple) == expected
