"""The tokenizer files of a directory: which are there, and which token is EOS, read without transformers."""

from __future__ import annotations

from pathlib import Path

from jaxserve.weights.source import read_json

# What a conversion copies beside the weights; transformers may look for the tokenizer's class in config.json.
TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def has_tokenizer(directory: Path) -> bool:
    """Whether a fast tokenizer can be made of the directory's files."""
    pair = (directory / "vocab.json").exists() and (directory / "merges.txt").exists()
    return (directory / "tokenizer.json").exists() or pair


def tokenizer_eos_ids(directory: Path) -> tuple[int, ...]:
    """The id of tokenizer_config.json's ``eos_token``; empty where there is none.

    Raises:
        CheckpointError: a file isn't valid JSON.
    """
    config_path = directory / "tokenizer_config.json"
    if not config_path.exists():
        return ()
    settings = read_json(config_path)
    token = settings.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return ()
    for token_id, added in settings.get("added_tokens_decoder", {}).items():
        if added.get("content") == token:
            return (int(token_id),)
    if not (directory / "tokenizer.json").exists():
        return ()
    tokenizer = read_json(directory / "tokenizer.json")
    ids = {added["content"]: added["id"] for added in tokenizer.get("added_tokens", ())}
    vocab = tokenizer.get("model", {}).get("vocab")
    if token not in ids and isinstance(vocab, dict) and token in vocab:
        return (vocab[token],)
    return (ids[token],) if token in ids else ()
