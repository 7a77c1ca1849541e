"""Our own spelling of a model's shape: published models as TOML, and any config as JSON."""

from pathlib import Path

import pytest
from checkpoint_files import TINY
from test_hf_config import GEMMA3_1B, LLAMA_31_8B, MISTRAL_7B_V01, QWEN3_06B, QWEN25_05B

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.registry import build
from jaxserve.weights import load_tokenizer, open_checkpoint
from jaxserve.weights.config_file import config_from_json, config_to_json, read_model_toml
from jaxserve.weights.hf_config import parse_config
from jaxserve.weights.load import by_path

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"
PUBLISHED = {
    "llama-3.1-8b": LLAMA_31_8B,
    "mistral-7b": MISTRAL_7B_V01,
    "qwen2.5-0.5b": QWEN25_05B,
    "qwen3-0.6b": QWEN3_06B,
    "gemma-3-1b": GEMMA3_1B,
}
# Parameters of the published checkpoints (tied embeddings counted once).
NUM_PARAMS = {
    "smollm2-135m": 134_515_008,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-3-1b": 999_885_952,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_toml_equals_the_published_config(name):
    assert read_model_toml(CONFIGS / f"{name}.toml") == parse_config(PUBLISHED[name])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_toml_has_the_published_number_of_parameters(path):
    config = open_checkpoint(str(path), "dummy").config
    model = build(config, dtype="bfloat16", padded_vocab=config.vocab_size)
    assert sum(leaf.size for leaf in by_path(model.params).values()) == NUM_PARAMS[path.stem]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_json_round_trip(name):
    config = open_checkpoint(str(TINY / name)).config
    assert config_from_json(config_to_json(config), "x") == config


def test_a_toml_has_neither_weights_nor_tokenizer():
    path = str(CONFIGS / "qwen3-0.6b.toml")
    with pytest.raises(CheckpointError, match="holds no weights; use load_format='dummy'"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(open_checkpoint(path, "dummy"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_heads = 16\n", "", "has no 'num_heads'"),
        ("num_heads = 16", "num_heads = 16.0", "'num_heads' .* is 16.0; expected int"),
        ("num_heads = 16", "num_heads = true", "'num_heads' .* is True; expected int"),
        ("num_heads = 16", "num_heads = -16", "num_heads .* is -16; expected a positive number"),
        ("num_heads = 16", "num_heads = 12", "12 query heads and 8 KV heads"),
        ("num_layers = 28", "num_layers = 0", "has 0 layers"),
        ("qk_norm = true", "qk_norms = true", "unknown setting 'qk_norms'"),
        ("theta = 1_000_000.0", "theta = 'big'", "'theta' .* is 'big'; expected int or float"),
        ("theta = 1_000_000.0", "theta = 1e6\nfactor = 2", "unknown setting 'factor'"),
        ("[rope]", "rope", "isn't valid TOML"),
    ],
)
def test_bad_settings_are_named(tmp_path, old, new, message):
    text = (CONFIGS / "qwen3-0.6b.toml").read_text()
    assert old in text
    (tmp_path / "bad.toml").write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path / "bad.toml"), "dummy")


def test_a_model_file_that_isnt_utf_8_is_named(tmp_path):
    (tmp_path / "bad.toml").write_bytes("# größe\n".encode("latin-1") + (CONFIGS / "qwen3-0.6b.toml").read_bytes())
    with pytest.raises(CheckpointError, match="bad.toml' isn't valid TOML, which is UTF-8"):
        open_checkpoint(str(tmp_path / "bad.toml"), "dummy")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"qwen3"', '"qwen9"', "architecture 'qwen9' .* isn't known; known: llama"),
        (
            "[rope]",
            '[rope.scaling]\ntype = "yarn"\n[rope]',
            "rope scaling 'yarn' .* isn't known; known: llama3, linear",
        ),
    ],
)
def test_unknown_things_are_refused_by_name(tmp_path, old, new, message):
    text = (CONFIGS / "qwen3-0.6b.toml").read_text()
    (tmp_path / "bad.toml").write_text(text.replace(old, new))
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(str(tmp_path / "bad.toml"), "dummy")
