"""Writes any checkpoint that can be opened as an Orbax directory (the layout is in ``orbax.py``)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxserve.errors import CheckpointError
from jaxserve.models.registry import build
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.hub import local_path
from jaxserve.weights.load import by_path, load_params
from jaxserve.weights.orbax import MANIFEST, PARAMS, manifest
from jaxserve.weights.tokenizer import load_tokenizer
from jaxserve.weights.tokenizer_files import TOKENIZER_FILES, has_tokenizer


def convert(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    tokenizer: str | None = None,
    dtype: str | None = None,
    progress: bool | None = None,
) -> None:
    """Writes parameters, tokenizer files and, last, the manifest without which the directory is no checkpoint.

    Args:
        directory: made by this call; it must not hold anything.
        tokenizer: where the tokenizer is, if not in the checkpoint; a checkpoint without one is converted without.
        dtype: of the stored parameters; None is what holds the checkpoint's values exactly.
        progress: shows a bar; None: on a terminal.

    Raises:
        CheckpointError: dummy weights, or ``directory`` isn't empty.
        TokenizerError: the tokenizer can't be read.
    """
    import orbax.checkpoint as ocp  # here, because it takes a second to import

    if checkpoint.source is None:
        raise CheckpointError(f"{str(checkpoint.path)!r} was opened with dummy weights; there is nothing to convert")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{str(directory)!r} isn't an empty directory; choose another")
    write_tokenizer = _tokenizer_writer(checkpoint, tokenizer)
    config = checkpoint.config
    model = build(config, dtype=dtype or checkpoint.source.dtype, padded_vocab=config.vocab_size)
    params = by_path(load_params(checkpoint, model, progress=progress))
    directory.mkdir(parents=True, exist_ok=True)
    _write_params(ocp, params, directory)
    write_tokenizer(directory)
    settings = manifest(config, checkpoint.eos_token_ids, checkpoint.sampling_defaults)
    (directory / MANIFEST).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _write_params(ocp: Any, params: dict[str, jax.Array], directory: Path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save((directory / PARAMS).resolve(), args=ocp.args.PyTreeSave(params))


def _tokenizer_writer(checkpoint: Checkpoint, tokenizer: str | None) -> Callable[[Path], Any]:
    """What writes the tokenizer's files: copied as they are from a directory, made anew out of a GGUF file."""
    path = checkpoint.path if tokenizer is None else local_path(tokenizer)
    if path.is_dir():
        if tokenizer is None and not has_tokenizer(path):
            return lambda directory: None
        load_tokenizer(checkpoint, tokenizer)  # a damaged one is found before the weights are converted
        return partial(_copy_tokenizer, path)
    return load_tokenizer(checkpoint, tokenizer).save_pretrained


def _copy_tokenizer(source: Path, directory: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)
