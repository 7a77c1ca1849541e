"""Loads a tokenizer: from a directory through transformers (without torch), or from inside a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jaxserve.errors import TokenizerError
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.generation import union
from jaxserve.weights.gguf_file import GGUFFile
from jaxserve.weights.gguf_tokenizer import gguf_tokenizer
from jaxserve.weights.hub import local_path
from jaxserve.weights.source import read_json
from jaxserve.weights.tokenizer_files import has_tokenizer
from jaxserve.weights.transformers_import import import_transformers


def load_tokenizer(checkpoint: Checkpoint, tokenizer: str | None = None) -> Any:
    """The checkpoint's tokenizer, or the one that ``tokenizer`` names (directory, ``.gguf`` file or cached hub id).

    Returns:
        A ``transformers.PreTrainedTokenizerFast`` or one of its kind.

    Raises:
        TokenizerError: there is none, it is damaged, of an unknown kind, or nothing says which token is EOS.
        CheckpointError: ``tokenizer`` names nothing on this machine.
    """
    if tokenizer is None and checkpoint.gguf is not None:
        loaded = gguf_tokenizer(checkpoint.gguf)
    else:
        path = checkpoint.path if tokenizer is None else local_path(tokenizer)
        if path.suffix == ".gguf" and path.is_file():
            loaded = gguf_tokenizer(GGUFFile(path))
        else:
            loaded = _from_directory(path)
    if not eos_token_ids(checkpoint, loaded):
        raise TokenizerError(
            f"nothing says which token ends an answer: {tokenizer or str(checkpoint.path)!r} has no EOS; set eos_token "
            "in tokenizer_config.json or eos_token_id in generation_config.json"
        )
    return loaded


def eos_token_ids(checkpoint: Checkpoint, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends an answer: the checkpoint's and the tokenizer's, which may come from elsewhere."""
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return union(checkpoint.eos_token_ids, own)


def _from_directory(directory: Path) -> Any:
    if not directory.is_dir() or not has_tokenizer(directory):
        raise TokenizerError(
            f"{str(directory)!r} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); pass tokenizer= a "
            "directory that has one"
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"):
        if (directory / name).exists():
            read_json(directory / name)  # transformers' own message for broken JSON names neither file nor remedy
    if (directory / "tokenizer.json").exists():
        _check_tokenizer_json(directory / "tokenizer.json")
    try:
        return import_transformers().AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise TokenizerError(f"the tokenizer in {str(directory)!r} can't be loaded: {error}") from error


def _check_tokenizer_json(path: Path) -> None:
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself, nothing narrower
        raise TokenizerError(
            f"{str(path)!r} isn't a tokenizer that the tokenizers package can read: {error}"
        ) from error
