"""Hugging Face directories: parameters equal to a second, independent reading; damage is named."""

import json
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import TINY, edit_json
from hf_tree import model_config, param_tree, repeat_kv_heads
from safetensors.numpy import load_file, save_file

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.registry import build
from jaxserve.weights import load_params, open_checkpoint

NAMES = ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma3"]
PADDING = 5


def load(directory, *, dtype="float32", padding=PADDING, **options):
    checkpoint = open_checkpoint(str(directory))
    model = build(checkpoint.config, dtype=dtype, padded_vocab=checkpoint.config.vocab_size + padding, **options)
    return checkpoint, load_params(checkpoint, model, progress=False)


def expected(name, dtype="float32"):
    config = model_config(json.loads((TINY / name / "config.json").read_text()))
    tensors = {key: tensor.astype(dtype) for key, tensor in load_file(TINY / name / "model.safetensors").items()}
    return config, param_tree(tensors, config, config.vocab_size + PADDING)


def assert_equal_trees(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("name", NAMES)
def test_config_and_parameters_equal_the_independent_reading(name):
    config, params = expected(name)
    checkpoint, loaded = load(TINY / name)
    assert checkpoint.config == config
    assert checkpoint.load_format == "safetensors"
    assert_equal_trees(loaded, params)


def test_bfloat16_is_rounded_once():
    _, params = expected("qwen2", "bfloat16")
    _, loaded = load(TINY / "qwen2", dtype="bfloat16")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(loaded))
    assert_equal_trees(loaded, params)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_kv_heads_are_copied(name):
    config, params = expected(name)
    _, loaded = load(TINY / name, num_kv_heads=config.num_heads)
    assert_equal_trees(loaded, repeat_kv_heads(params, config.num_heads))


def test_parameters_land_where_the_sharding_says(tiny):
    checkpoint = open_checkpoint(str(TINY / "llama"))
    model = build(checkpoint.config, dtype="float32", padded_vocab=136)
    mesh = jax.make_mesh((2,), ("tp",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tp"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sharding = jax.tree.map(lambda leaf: rows if leaf.shape[0] == 136 else whole, model.params)
    params = load_params(checkpoint, model, sharding=sharding, progress=False)
    assert params["embed"]["weight"].sharding == rows
    assert params["final_norm"]["weight"].sharding == whole
    _, unsharded = expected("llama")
    assert_equal_trees(jax.device_get(params), jax.device_get(unsharded))


def shard(directory, num_files):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i in range(num_files):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::num_files]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded_files_load_as_one(tiny):
    directory = tiny("qwen3")
    shard(directory, 3)
    assert_equal_trees(load(directory)[1], expected("qwen3")[1])


def test_host_memory_never_holds_the_whole_model():
    checkpoint = open_checkpoint(str(TINY / "llama"))
    read, alive, held = checkpoint.source.read, [], []

    def watched(name):
        held.append(sum(ref() is not None for ref in alive))
        tensor = read(name)
        alive.append(weakref.ref(tensor))
        return tensor

    checkpoint.source.read = watched
    model = build(checkpoint.config, dtype="float32", padded_vocab=131)
    load_params(checkpoint, model, progress=False)
    assert len(alive) > 20
    assert max(held) <= 6  # this parameter's and, until the runtime lets go of them, the one before's


def test_a_file_that_vanishes_after_opening_is_named(tiny):
    directory = tiny("llama")
    checkpoint = open_checkpoint(str(directory))
    (directory / "model.safetensors").unlink()
    model = build(checkpoint.config, dtype="float32", padded_vocab=131)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_params(checkpoint, model, progress=False)


def test_a_file_of_the_index_that_is_missing_is_named(tiny):
    directory = tiny("qwen3")
    shard(directory, 3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks files.*model-00002-of-00003"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("keep", [4, 200, -7])
def test_a_truncated_file_is_found_on_opening(tiny, keep):
    path = tiny("llama") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*damaged or truncated"):
        open_checkpoint(str(path.parent))


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_missing_left_over_and_misshapen_tensors_are_named_together(tiny):
    directory = tiny("llama")

    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.ones(7, np.float32)

    change_tensors(directory, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(directory))
    message = str(caught.value)
    assert "1 missing: model.layers.1.mlp.up_proj.weight" in message
    assert "1 left over: model.layers.0.self_attn.q_proj.bias" in message
    assert "1 misshapen: model.norm.weight is [7], expected [48]" in message


def test_a_long_list_of_names_is_shortened(tiny):
    directory = tiny("llama", num_hidden_layers=40)
    with pytest.raises(CheckpointError, match=r"missing: .* and \d+ more"):
        open_checkpoint(str(directory))


def test_a_tied_models_extra_head_and_old_rope_tables_are_ignored(tiny):
    directory = tiny("llama_tied")

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)

    change_tensors(directory, change)
    assert_equal_trees(load(directory)[1], expected("llama_tied")[1])


def test_quantised_tensors_are_refused_by_name(tiny):
    directory = tiny("llama")
    change_tensors(directory, lambda tensors: tensors.update(weight_scale=np.ones(2, np.int8)))
    with pytest.raises(UnsupportedModelError, match=r"weight_scale \(I8\)"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize(
    "prefixes", [("language_model.model.", "vision_tower."), ("model.language_model.", "model.vision_tower.")]
)
def test_the_text_model_of_a_multimodal_checkpoint(tiny, prefixes):
    directory = tiny("gemma3")
    text = json.loads((directory / "config.json").read_text())
    (directory / "config.json").unlink()
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    edit_json(directory / "config.json", whole | {"eos_token_id": [1, 106]})

    def change(tensors):
        for name in list(tensors):
            tensors[prefixes[0] + name.removeprefix("model.")] = tensors.pop(name)
        tensors[f"{prefixes[1]}encoder.weight"] = np.ones((2, 2), np.float32)

    change_tensors(directory, change)
    checkpoint, params = load(directory)
    assert_equal_trees(params, expected("gemma3")[1])
    assert checkpoint.eos_token_ids[:2] == (2, 1)  # generation_config's first


def test_generation_settings_are_checked_on_opening(tiny):
    directory = tiny("llama")
    for changes, message in (
        ({"top_k": 1.5}, "generation_config.json' has a sampling default .*: top_k is 1.5"),
        ({"eos_token_id": 131}, r"eos_token_id 131 of .* is outside the vocabulary; expected 0\.\.130"),
    ):
        before = (directory / "generation_config.json").read_text()
        edit_json(directory / "generation_config.json", changes)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(directory))
        (directory / "generation_config.json").write_text(before)


def test_what_is_not_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_checkpoint(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="is no checkpoint; expected"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="pickled weights"):
        open_checkpoint(str(tmp_path))


def test_a_config_without_weights_is_refused(tiny):
    directory = tiny("llama")
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ['{"model_type": ', "[1]", "\xff"])
def test_corrupt_json_is_named(tiny, name, text):
    directory = tiny("llama")
    Path(directory / name).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        open_checkpoint(str(directory))


def test_load_format_must_be_known_and_fit(tiny):
    with pytest.raises(ValueError, match=r"load_format is 'pt'; allowed: auto, safetensors"):
        open_checkpoint(str(TINY / "llama"), "pt")
    with pytest.raises(CheckpointError, match="load_format is 'gguf', but .* holds safetensors"):
        open_checkpoint(str(TINY / "llama"), "gguf")


def test_a_model_of_other_sizes_is_refused():
    checkpoint = open_checkpoint(str(TINY / "llama"))
    other = open_checkpoint(str(TINY / "qwen3")).config
    with pytest.raises(CheckpointError, match="the model's parameters differ"):
        load_params(checkpoint, build(other, dtype="float32", padded_vocab=other.vocab_size), progress=False)
