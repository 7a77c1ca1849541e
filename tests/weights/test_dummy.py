"""Dummy weights: random, repeatable, and the same however the model is padded, copied or sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import TINY

from jaxserve.models.registry import build
from jaxserve.weights import load_params, open_checkpoint
from jaxserve.weights.load import by_path

NAMES = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]


def dummy(name, *, dtype="float32", padding=0, seed=0, sharding=None, **options):
    checkpoint = open_checkpoint(str(TINY / name), "dummy")
    model = build(checkpoint.config, dtype=dtype, padded_vocab=checkpoint.config.vocab_size + padding, **options)
    return by_path(load_params(checkpoint, model, seed=seed, progress=False, sharding=sharding))


@pytest.mark.parametrize("name", NAMES)
def test_no_parameter_is_constant_or_like_another(name):
    params = dummy(name)
    values = {path: np.asarray(value).ravel() for path, value in params.items()}
    assert all(np.std(value) > 1e-3 and np.isfinite(value).all() for value in values.values())
    assert len({value[:8].tobytes() for value in values.values()}) == len(values)


def test_sizes_keep_activations_in_range():
    params = dummy("llama")
    assert np.std(params["layers.0.mlp.down.weight"]) == pytest.approx(76**-0.5, rel=0.1)
    assert np.std(params["layers.0.attn.o.weight"]) == pytest.approx(72**-0.5, rel=0.1)
    assert np.mean(params["final_norm.weight"]) == pytest.approx(1.0, abs=0.1)
    assert np.mean(dummy("gemma3")["final_norm.weight"]) == pytest.approx(0.0, abs=0.1)


def test_the_seed_decides():
    first, again, other = dummy("qwen2"), dummy("qwen2"), dummy("qwen2", seed=1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert all(not np.array_equal(first[path], other[path]) for path in first)


def test_bfloat16_is_the_same_rounded():
    exact, rounded = dummy("qwen3"), dummy("qwen3", dtype="bfloat16")
    assert all(value.dtype == jnp.bfloat16 for value in rounded.values())
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), exact, rounded)


def test_padding_and_copied_heads_change_no_value():
    plain, padded = dummy("qwen2"), dummy("qwen2", padding=5, num_kv_heads=6)
    vocab = plain["embed.weight"].shape[0]
    np.testing.assert_array_equal(padded["embed.weight"][:vocab], plain["embed.weight"])
    assert not np.any(padded["embed.weight"][vocab:])
    # [E, Hk, G+2, D]: two KV heads with three query heads each became six with one.
    qkv, copied = plain["layers.0.attn.qkv.weight"], padded["layers.0.attn.qkv.weight"]
    np.testing.assert_array_equal(copied[:, 4, 0], qkv[:, 1, 1])
    np.testing.assert_array_equal(copied[:, 4, 1:], qkv[:, 1, 3:])


def test_sharding_changes_no_value():
    mesh = jax.make_mesh((4,), ("tp",))
    checkpoint = open_checkpoint(str(TINY / "llama"), "dummy")
    model = build(checkpoint.config, dtype="float32", padded_vocab=132)

    def split_first(leaf):
        axes = ("tp",) if leaf.shape[0] % 4 == 0 else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    sharded = load_params(checkpoint, model, sharding=jax.tree.map(split_first, model.params), progress=False)
    whole = load_params(checkpoint, model, progress=False)
    assert len(sharded["embed"]["weight"].addressable_shards) == 4
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(sharded), jax.device_get(whole))


def test_weights_beside_the_config_are_not_needed(tiny):
    directory = tiny("llama")
    (directory / "model.safetensors").unlink()
    checkpoint = open_checkpoint(str(directory), "dummy")
    assert checkpoint.load_format == "dummy"
    assert checkpoint.source is None
