"""Weights that are quantised while they are loaded: the same as those of a whole model that is quantised afterwards."""

import jax
import numpy as np
import pytest
from checkpoint_files import TINY
from gguf_writing import write_gguf
from hf_tree import model_config
from jax.sharding import Mesh
from safetensors.numpy import load_file

from jaxserve.errors import UnsupportedModelError
from jaxserve.models.registry import build
from jaxserve.models.sharding import kv_heads_for, named_shardings
from jaxserve.weights import load_params, open_checkpoint
from jaxserve.weights.load import by_path
from jaxserve.weights.quantize import bytes_on_a_device, quantize_params
from jaxserve.weights.source import read_json

FORMATS = ["int8", "int4", "fp8", "fp8_weight_only"]


def prepare(checkpoint, shards, dtype="float32"):
    config = checkpoint.config
    model = build(config, dtype=dtype, padded_vocab=132, num_kv_heads=kv_heads_for(config, shards))
    return model, named_shardings(model.param_axes, Mesh(np.array(jax.devices()[:shards]), ("tp",)))


def check(checkpoint, quantization, shards):
    model, shardings = prepare(checkpoint, shards)
    plain = load_params(checkpoint, model, sharding=shardings, seed=3, progress=False)
    want = quantize_params(model, plain, quantization)
    got = load_params(checkpoint, model, sharding=shardings, seed=3, quantization=quantization, progress=False)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for mine, its in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.dtype == its.dtype and mine.sharding.is_equivalent_to(its.sharding, its.ndim)
        np.testing.assert_array_equal(mine, its)
    assert bytes_on_a_device(got) < 0.7 * bytes_on_a_device(plain)


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_hugging_face_directory(name, quantization):
    check(open_checkpoint(str(TINY / name)), quantization, 1)


@pytest.mark.parametrize("quantization", FORMATS)
def test_on_two_devices(quantization):
    check(open_checkpoint(str(TINY / "qwen3")), quantization, 2)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_dummy_weights(quantization):
    check(open_checkpoint(str(TINY / "llama"), "dummy"), quantization, 1)


def test_a_gguf_file(tmp_path):
    config = model_config(read_json(TINY / "qwen2" / "config.json"))
    write_gguf(tmp_path / "model.gguf", config, load_file(TINY / "qwen2" / "model.safetensors"), metadata={})
    check(open_checkpoint(str(tmp_path / "model.gguf")), "int8", 1)


def test_a_bfloat16_model_is_quantised_from_the_files_own_precision():
    checkpoint = open_checkpoint(str(TINY / "llama"))
    loaded = []
    for dtype in ("float32", "bfloat16"):
        model, shardings = prepare(checkpoint, 1, dtype)
        loaded.append(load_params(checkpoint, model, sharding=shardings, quantization="int8", progress=False))
    wide, narrow = loaded
    for mine, its in zip(jax.tree.leaves(narrow["layers"]), jax.tree.leaves(wide["layers"]), strict=True):
        np.testing.assert_array_equal(mine, its.astype(mine.dtype))
    assert narrow["embed"]["weight"].dtype == "bfloat16"


def test_known_parameters_are_not_read():
    checkpoint = open_checkpoint(str(TINY / "llama"))
    model, shardings = prepare(checkpoint, 1)
    plain = load_params(checkpoint, model, sharding=shardings, progress=False)
    known = {path: leaf for path, leaf in by_path(plain).items() if "norm" in path or "embed" in path}
    packed = load_params(checkpoint, model, sharding=shardings, quantization="int4", known=known, progress=False)
    assert len(known) > 5
    paths = by_path(packed)
    assert all(paths[path] is leaf for path, leaf in known.items())


def test_a_quantised_checkpoint_is_refused_by_name(tiny):
    directory = tiny("llama", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModelError, match="fp8"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("progress, shown", [(True, True), (False, False), (None, False)])
def test_the_bar_shows_on_a_terminal_or_when_asked(capsys, progress, shown):
    checkpoint = open_checkpoint(str(TINY / "llama"), "dummy")
    model, _ = prepare(checkpoint, 1)
    load_params(checkpoint, model, progress=progress)
    assert ("Loading weights" in capsys.readouterr().err) == shown
