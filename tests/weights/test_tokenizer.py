"""Tokenizers of directories: loaded without torch, and refused with what would be right."""

import json
import subprocess
import sys

import pytest
from checkpoint_files import TINY, edit_json
from gguf_writing import byte_level_vocabulary, write_metadata
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxserve.errors import CheckpointError, TokenizerError
from jaxserve.weights import eos_token_ids, load_tokenizer, open_checkpoint

EOS = 5


def write_tokenizer(directory, *, eos="<eos>"):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 3, "?": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    edit_json(directory / "tokenizer_config.json", settings | ({"eos_token": eos} if eos else {}))
    return directory


@pytest.fixture
def directory(tiny):
    return write_tokenizer(tiny("llama"))


def test_a_directory(directory):
    checkpoint = open_checkpoint(str(directory))
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.encode("a b c") == [0, 1, 2]
    assert tokenizer.eos_token_id == EOS
    assert checkpoint.eos_token_ids == (2, EOS)  # generation_config and config say 2


def test_a_tokenizer_from_elsewhere_adds_its_eos(directory):
    other = open_checkpoint(str(TINY / "llama"))
    assert other.eos_token_ids == (2,)
    tokenizer = load_tokenizer(other, str(directory))
    assert eos_token_ids(other, tokenizer) == (2, EOS)


def test_a_tokenizer_from_a_gguf_file(tmp_path):
    values = byte_level_vocabulary(["h e"], ("<eos>",))
    values |= {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 257}
    path = write_metadata(tmp_path / "tokenizer.gguf", values)
    tokenizer = load_tokenizer(open_checkpoint(str(TINY / "llama")), str(path))
    assert tokenizer.encode("he") == [256]


def test_no_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match=r"has no tokenizer .*; pass tokenizer="):
        load_tokenizer(open_checkpoint(str(TINY / "llama")))
    with pytest.raises(CheckpointError, match="no such file or directory"):
        load_tokenizer(open_checkpoint(str(TINY / "llama")), str(tmp_path / "missing"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_corrupt_json_is_named(directory, name):
    checkpoint = open_checkpoint(str(directory))
    (directory / name).write_text("{")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_tokenizer(checkpoint)


def test_a_tokenizer_json_that_is_no_tokenizer(directory):
    checkpoint = open_checkpoint(str(directory))
    (directory / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(TokenizerError, match="isn't a tokenizer that the tokenizers package can read"):
        load_tokenizer(checkpoint)


def test_no_eos_anywhere_is_an_error(tiny):
    directory = write_tokenizer(tiny("llama", eos_token_id=None), eos=None)
    (directory / "generation_config.json").unlink()
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.eos_token_ids == ()
    with pytest.raises(TokenizerError, match=r"no EOS; set eos_token in tokenizer_config\.json or eos_token_id"):
        load_tokenizer(checkpoint)


def test_an_eos_that_only_the_generation_config_names_will_do(tiny):
    directory = write_tokenizer(tiny("llama", eos_token_id=None), eos=None)
    edit_json(directory / "generation_config.json", {"eos_token_id": [3, 4]})
    checkpoint = open_checkpoint(str(directory))
    assert eos_token_ids(checkpoint, load_tokenizer(checkpoint)) == (3, 4)


@pytest.mark.parametrize("spelling", ["string", "object", "decoder", "vocab"])
def test_where_a_tokenizer_writes_its_eos(directory, spelling):
    path = directory / "tokenizer_config.json"
    token, expected = {"vocab": ("d", 3)}.get(spelling, ("<eos>", EOS))
    edit_json(path, {"eos_token": {"content": token} if spelling == "object" else token})
    if spelling == "decoder":
        edit_json(path, {"added_tokens_decoder": {"5": {"content": "<eos>"}}})
        (directory / "tokenizer.json").unlink()
    assert open_checkpoint(str(directory)).eos_token_ids == (2, expected)


def test_no_word_about_torch_and_no_transformers_before_it_is_needed(directory):
    """A user without PyTorch isn't told to install it; opening a checkpoint doesn't import transformers."""
    code = f"""
import json, sys
import jaxserve
assert "transformers" not in sys.modules and "jax" not in sys.modules, "import jaxserve"
from jaxserve.weights import load_tokenizer, open_checkpoint
checkpoint = open_checkpoint({str(directory)!r})
assert "transformers" not in sys.modules and "orbax.checkpoint" not in sys.modules, "open_checkpoint"
print(json.dumps(load_tokenizer(checkpoint).encode("a")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [0]
    assert result.stderr == ""
