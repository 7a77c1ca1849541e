"""A converted checkpoint is the checkpoint it was made of."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_files import TINY, edit_json
from test_tokenizer import write_tokenizer

from jaxserve.errors import CheckpointError, TokenizerError
from jaxserve.models.registry import build
from jaxserve.weights import load_params, load_tokenizer, open_checkpoint
from jaxserve.weights.convert import convert

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_checkpoint.py"


def params_of(checkpoint, dtype="float32", **options):
    model = build(checkpoint.config, dtype=dtype, padded_vocab=140, **options)
    return load_params(checkpoint, model, progress=False)


def assert_equal_trees(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_everything_comes_back(tmp_path, name):
    original = open_checkpoint(str(TINY / name))
    convert(original, tmp_path / "converted", progress=False)
    checkpoint = open_checkpoint(str(tmp_path / "converted"))
    assert checkpoint.load_format == "orbax"
    assert checkpoint.config == original.config
    assert checkpoint.eos_token_ids == original.eos_token_ids
    assert_equal_trees(params_of(checkpoint), params_of(original))
    assert_equal_trees(params_of(checkpoint, num_kv_heads=6), params_of(original, num_kv_heads=6))


def test_bfloat16_parameters_and_sampling_defaults(tmp_path, tiny):
    directory = tiny("qwen3")
    edit_json(directory / "generation_config.json", {"temperature": 0.6, "top_k": 20})
    original = open_checkpoint(str(directory))
    convert(original, tmp_path / "converted", dtype="bfloat16", progress=False)
    checkpoint = open_checkpoint(str(tmp_path / "converted"))
    assert checkpoint.sampling_defaults == {"temperature": 0.6, "top_k": 20}
    assert checkpoint.source.dtype == "bfloat16"
    assert_equal_trees(params_of(checkpoint, "bfloat16"), params_of(original, "bfloat16"))


def test_the_script_takes_the_tokenizer_along(tmp_path, tiny):
    directory = write_tokenizer(tiny("llama"))
    command = [sys.executable, str(SCRIPT), str(directory), str(tmp_path / "converted"), "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    checkpoint = open_checkpoint(str(tmp_path / "converted"))
    assert load_tokenizer(checkpoint).encode("a b") == [0, 1]
    assert checkpoint.eos_token_ids == (2, 5)

    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 1
    assert "isn't an empty directory" in again.stderr


def test_a_model_without_a_tokenizer_is_converted_without(tmp_path):
    convert(open_checkpoint(str(TINY / "llama")), tmp_path / "converted", progress=False)
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        load_tokenizer(open_checkpoint(str(tmp_path / "converted")))


def test_dummy_weights_are_not_converted(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to convert"):
        convert(open_checkpoint(str(TINY / "llama"), "dummy"), tmp_path / "converted")


@pytest.fixture
def converted(tmp_path):
    convert(open_checkpoint(str(TINY / "llama")), tmp_path / "converted", progress=False)
    return tmp_path / "converted"


def test_parameters_that_do_not_fit_the_manifest_are_named(converted):
    manifest = json.loads((converted / "jaxserve.json").read_text())
    manifest["config"]["ffn_dim"] = 80
    manifest["config"]["qk_norm"] = True
    (converted / "jaxserve.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(converted))
    assert "missing: layers.0.attn.q_norm.weight" in str(caught.value)
    assert "layers.0.mlp.down.weight is [76, 48], expected [80, 48]" in str(caught.value)


def test_damage_is_found_on_opening(converted):
    (converted / "params").rename(converted / "lost")
    with pytest.raises(CheckpointError, match="isn't a whole Orbax checkpoint"):
        open_checkpoint(str(converted))
    edit_json(converted / "jaxserve.json", {"version": 99})
    with pytest.raises(CheckpointError, match="has version 99; known: 1"):
        open_checkpoint(str(converted))
    (converted / "jaxserve.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"jaxserve\.json.*isn't valid JSON"):
        open_checkpoint(str(converted))


LOAD = """
import sys
from jaxserve.errors import CheckpointError
from jaxserve.models.registry import build
from jaxserve.weights import load_params, open_checkpoint
try:
    checkpoint = open_checkpoint(sys.argv[1])
    load_params(checkpoint, build(checkpoint.config, dtype="float32", padded_vocab=140), progress=False)
except CheckpointError as error:
    print(error)
"""


def test_lost_data_is_found(converted):
    """In a process of its own: reads that Orbax still has under way when one fails complain later, in other tests.

    They complain on stderr, at any time and from threads of their own, so what is looked for goes to stdout.
    """
    for path in (converted / "params").rglob("d/*"):
        path.write_bytes(b"")
    loading = subprocess.run([sys.executable, "-c", LOAD, str(converted)], capture_output=True, text=True, timeout=300)
    assert loading.stdout.startswith(f"'{converted / 'params'}' isn't a whole Orbax checkpoint"), loading.stderr
