"""A quantised copy of a model: which parameters are packed, which are shared, and how they are sharded."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from dense_attention import random_params
from jax.sharding import Mesh, PartitionSpec
from small_configs import FAMILIES, LLAMA

from jaxserve.models.quantized import Fp8Weight, Int4Weight, ScaledWeight
from jaxserve.models.registry import build
from jaxserve.models.sharding import named_shardings
from jaxserve.weights.quantize import abstract_params, bytes_on_a_device, params_bytes, quantize_params

KINDS = {"int8": ScaledWeight, "int4": Int4Weight, "fp8": Fp8Weight, "fp8_weight_only": ScaledWeight}


def is_packed(node):
    return isinstance(node, tuple(KINDS.values()))


def make(config, shards=1):
    model = build(config, dtype="float32", padded_vocab=132)
    mesh = Mesh(np.array(jax.devices()[:shards]), ("tp",))
    return model, jax.device_put(random_params(model), named_shardings(model.param_axes, mesh))


@pytest.mark.parametrize(
    "config",
    [LLAMA, FAMILIES["qwen2"], replace(FAMILIES["gemma3"], tie_embeddings=True)],
    ids=["llama", "qwen2", "gemma3"],
)
@pytest.mark.parametrize("quantization", KINDS)
def test_products_are_packed_and_all_else_is_the_same_array(config, quantization):
    model, params = make(config)
    packed = quantize_params(model, params, quantization)
    kinds = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(packed, is_leaf=is_packed)
    }
    plain = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(params)
    }
    assert kinds.keys() == plain.keys()
    table = "embed.weight" if config.tie_embeddings else "lm_head.weight"
    for path, leaf in kinds.items():
        integer = quantization.startswith("int")
        product = any(f".{name}.weight" in path for name in ("qkv", "o", "gate_up", "down"))
        if not product and not (integer and path == table):  # fp8 leaves the LM head whole
            assert leaf is plain[path], path
            continue
        assert isinstance(leaf, ScaledWeight if path == table else KINDS[quantization]), path
        assert sorted(leaf.values.shape) == sorted(plain[path].shape)
        wanted = {"int8": "int8", "int4": "uint4"}.get(quantization, "float8_e4m3fn")
        assert leaf.values.dtype == ("int8" if path == table else wanted)
    if quantization == "int8":
        weight = np.asarray(plain["layers.0.attn.o.weight"])
        np.testing.assert_allclose(
            kinds["layers.0.attn.o.weight"].scales, np.abs(weight).max(axis=(0, 1, 2)) / 127, rtol=1e-6
        )


def test_bytes_count_four_bits_as_four():
    model, params = make(LLAMA)
    sizes = [params_bytes(tree["layers"]) for tree in (params, quantize_params(model, params, "int8"))]
    four = params_bytes(quantize_params(model, params, "int4")["layers"])
    assert 3.5 < sizes[0] / sizes[1] < 4
    assert 5 < sizes[0] / four < 8


@pytest.mark.parametrize("quantization", KINDS)
def test_sharded_as_the_target_is(quantization):
    model, params = make(LLAMA, shards=2)
    packed = quantize_params(model, params, quantization)
    one = quantize_params(*make(LLAMA), quantization)
    for sharded, whole in zip(jax.tree.leaves(packed), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(sharded, whole)
    attn, mlp = packed["layers"][0]["attn"], packed["layers"][0]["mlp"]
    assert attn["qkv"]["weight"].values.sharding.spec[0 if quantization == "fp8" else 1] == "tp"
    assert mlp["down"]["weight"].values.sharding.spec[1 if quantization == "fp8" else 0] == "tp"  # fp8: [E, F]
    if quantization != "int4":
        assert attn["qkv"]["weight"].scales.sharding.spec[0] == "tp"  # [Hk, G+2, D]
        assert attn["o"]["weight"].scales.sharding.spec == PartitionSpec(None)
    if quantization.startswith("int"):
        assert packed["lm_head"]["weight"].scales.sharding.spec == PartitionSpec("tp")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("quantization", [None, *KINDS])
def test_shapes_and_bytes_are_known_before_anything_is_read(quantization, shards):
    model, params = make(LLAMA, shards)
    if quantization is not None:
        params = quantize_params(model, params, quantization)
    shardings = named_shardings(model.param_axes, Mesh(np.array(jax.devices()[:shards]), ("tp",)))
    planned = abstract_params(model, shardings, quantization)
    assert jax.tree.structure(planned) == jax.tree.structure(params)
    for made, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(planned), strict=True):
        assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype)
        assert made.sharding.is_equivalent_to(wanted.sharding, made.ndim)
    held = sum(
        (shard.data.size + 1) // 2 if leaf.dtype.name == "uint4" else shard.data.nbytes
        for leaf in jax.tree.leaves(params)
        for shard in leaf.addressable_shards[:1]
    )
    assert bytes_on_a_device(planned) == bytes_on_a_device(params)
    assert abs(bytes_on_a_device(planned) - held) <= len(jax.tree.leaves(params))  # odd numbers of 4-bit values
