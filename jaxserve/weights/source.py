"""What every checkpoint format offers to the loader: named tensors with known shapes, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jax import Array

from jaxserve.errors import CheckpointError

MAX_NAMES = 8  # names that an error lists before it says how many more there are


class TensorSource(Protocol):
    """Tensors under Hugging Face names and in Hugging Face layout (linear weights are ``[out, in]``).

    Attributes:
        fused: the names are dotted parameter paths instead, the tensors canonical parameters (``mapping``).
        shapes: every tensor in the file; one that has no Hugging Face name keeps its own.
        dtype: "float32" or "bfloat16", whichever holds the file's values exactly.
    """

    fused: bool
    dtype: str

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray | Array:
        """One tensor, floating point, not shared with the file; in host memory unless it is made on the device."""

    def label(self, name: str) -> str:
        """What the file itself calls tensor ``name``, for error messages."""


def shortened(names: Iterable[str]) -> str:
    """``a, b, c and 12 more``."""
    listed = list(names)
    more = f" and {len(listed) - MAX_NAMES} more" if len(listed) > MAX_NAMES else ""
    return ", ".join(listed[:MAX_NAMES]) + more


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        CheckpointError: the file can't be read, isn't JSON, or isn't an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"can't read {str(path)!r}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{str(path)!r} isn't valid JSON ({error}); copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{str(path)!r} holds a JSON {type(value).__name__}; expected an object")
    return value
