"""Orbax checkpoints: canonical parameters by dotted path, beside a manifest and the tokenizer's files.

::

    DIR/
      jaxserve.json      model config, EOS ids, sampling defaults
      params/            Orbax, a flat dict: {"layers.0.attn.qkv.weight": array, ...}
      tokenizer.json ... the tokenizer's files

Parameters are stored fused but not padded and with the model's own KV heads, so one checkpoint serves every mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.models.config import ModelConfig
from jaxserve.weights.config_file import config_from_json, config_to_json
from jaxserve.weights.generation import eos_ids, sampling_defaults
from jaxserve.weights.source import read_json

MANIFEST = "jaxserve.json"
PARAMS = "params"
FORMAT_VERSION = 1


def read_manifest(directory: Path) -> tuple[ModelConfig, tuple[int, ...], dict[str, float | int]]:
    """Config, EOS ids and sampling defaults.

    Raises:
        CheckpointError: the manifest is damaged or of another version.
    """
    path = directory / MANIFEST
    manifest = read_json(path)
    if manifest.get("version") != FORMAT_VERSION or not isinstance(manifest.get("config"), dict):
        raise CheckpointError(f"{str(path)!r} has version {manifest.get('version')!r}; known: {FORMAT_VERSION}")
    config = config_from_json(manifest["config"], str(path))
    defaults = sampling_defaults(manifest.get("sampling_defaults", {}), str(path))
    return config, eos_ids({"eos_token_id": manifest.get("eos_token_ids")}, str(path)), defaults


def manifest(config: ModelConfig, eos_token_ids: tuple[int, ...], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What ``read_manifest`` reads, as a JSON object."""
    return {
        "version": FORMAT_VERSION,
        "config": config_to_json(config),
        "eos_token_ids": list(eos_token_ids),
        "sampling_defaults": dict(defaults),
    }


class OrbaxSource:
    """The parameters of a converted checkpoint, by dotted path and already fused.

    Raises:
        CheckpointError: the Orbax part is missing or damaged.
    """

    fused = True

    def __init__(self, directory: Path) -> None:
        import orbax.checkpoint as ocp  # here, because it takes a second to import

        self._path = (directory / PARAMS).resolve()
        self._orbax = ocp
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        try:
            metadata = self._checkpointer.metadata(self._path).item_metadata
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{str(self._path)!r} isn't a whole Orbax checkpoint: {error}") from error
        if metadata is None or metadata.tree is None:
            raise CheckpointError(f"{str(self._path)!r} isn't a whole Orbax checkpoint: it has no metadata")
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(m.shape) for name, m in metadata.tree.items()}
        dtypes = {str(m.dtype) for m in metadata.tree.values()}
        self.dtype = "bfloat16" if dtypes == {"bfloat16"} else "float32"

    def read(self, name: str) -> np.ndarray:
        """One parameter in host memory.

        Raises:
            CheckpointError: its data is missing or damaged.
        """
        arguments = self._orbax.args.PyTreeRestore(
            item={name: 0},
            restore_args={name: self._orbax.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        )
        try:
            return self._checkpointer.restore(self._path, args=arguments)[name]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{name!r} of {str(self._path)!r} can't be read: {error}") from error

    def label(self, name: str) -> str:
        return name
