"""Hugging Face directories: one or many safetensors files, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.weights.source import read_json, shortened

INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")

# Where a text model sits inside a multimodal checkpoint, old and new; the other tensors belong to the vision tower.
TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.lm_head.")
VISION_PREFIXES = (
    "vision_tower.",
    "model.vision_tower.",
    "multi_modal_projector.",
    "model.multi_modal_projector.",
)


class SafetensorsSource:
    """The tensors of a Hugging Face directory, under their Hugging Face names.

    Opening reads the headers of all files only, and finds a truncated or missing file.

    Raises:
        CheckpointError: no weights, a file of the index is missing or damaged, or a tensor is in two files.
        UnsupportedModelError: a tensor isn't floating point (a quantised checkpoint).
    """

    fused = False

    def __init__(self, directory: Path) -> None:
        self.shapes: Mapping[str, tuple[int, ...]]
        shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        self._labels: dict[str, str] = {}
        odd: list[str] = []
        dtypes: set[str] = set()
        for path in _weight_files(directory):
            for label, shape, dtype in _header(path):
                if label.startswith(VISION_PREFIXES):
                    continue
                name = _text_name(label)
                if name in shapes:
                    raise CheckpointError(f"tensor {label!r} is in {self._files[name].name!r} and in {path.name!r}")
                dtypes.add(dtype)
                if dtype not in FLOATS:
                    odd.append(f"{label} ({dtype})")
                shapes[name], self._files[name], self._labels[name] = shape, path, label
        if odd:
            raise UnsupportedModelError(
                f"{str(directory)!r} holds quantised tensors: {shortened(odd)}; known dtypes: {', '.join(FLOATS)}"
            )
        self.shapes = shapes
        self.dtype = "bfloat16" if dtypes == {"BF16"} else "float32"

    def read(self, name: str) -> np.ndarray:
        """One tensor, copied out of its file.

        Raises:
            CheckpointError: the file has gone or changed since it was opened.
        """
        try:
            with safe_open(self._files[name], framework="numpy") as file:
                return file.get_tensor(self._labels[name])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._labels[name]!r} of {str(self._files[name])!r}: {error}") from error

    def label(self, name: str) -> str:
        return self._labels.get(name, name)


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold the model: those of the index where there is one, else every safetensors file."""
    if (index := directory / INDEX).exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{str(index)!r} has no 'weight_map' of tensor names to file names")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        if missing := [path.name for path in files if not path.exists()]:
            raise CheckpointError(f"{str(directory)!r} lacks files that its index names: {shortened(missing)}")
        return files
    if (single := directory / "model.safetensors").exists():
        return [single]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{str(directory)!r} has no *.safetensors file")
    return files


def _header(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118 (not a dict)
            return [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged or truncated ({error}); copy it again") from error


def _text_name(label: str) -> str:
    for prefix in TEXT_PREFIXES:
        if label.startswith(prefix):
            rest = label.removeprefix(prefix)
            return f"lm_head.{rest}" if "lm_head" in prefix else f"model.{rest}"
    return label
