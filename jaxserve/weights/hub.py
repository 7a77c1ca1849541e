"""Finds a checkpoint on this machine: a path, or a hub id in the local Hugging Face cache. Nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from jaxserve.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def local_path(model: str) -> Path:
    """The directory or file that ``model`` names.

    Raises:
        CheckpointError: there is no such path, and no such hub id in the cache; the message has the download command.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(model) or model.endswith((".gguf", ".toml", ".safetensors")):
        raise CheckpointError(f"no such file or directory: {model!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{model!r} is neither a file or directory here nor in the local Hugging Face cache; "
            f"to download it: hf download {model}"
        ) from error
