"""Opening a checkpoint: format, config and table of tensors, all checked before a device is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.weights.config_file import read_model_toml
from jaxserve.weights.generation import check_eos_ids, eos_ids, sampling_defaults, union
from jaxserve.weights.gguf import GGUFSource, gguf_config
from jaxserve.weights.gguf_file import GGUFFile
from jaxserve.weights.gguf_tokenizer import gguf_eos_ids
from jaxserve.weights.hf import SafetensorsSource
from jaxserve.weights.hf_config import parse_config
from jaxserve.weights.hub import local_path
from jaxserve.weights.mapping import check_tensors
from jaxserve.weights.orbax import MANIFEST, OrbaxSource, read_manifest
from jaxserve.weights.source import TensorSource, read_json
from jaxserve.weights.tokenizer_files import tokenizer_eos_ids

Format = Literal["safetensors", "gguf", "orbax", "dummy"]
LOAD_FORMATS = ("auto", "safetensors", "gguf", "orbax", "dummy")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: a directory, a ``.gguf`` file, or for dummy weights a ``.toml`` file.
        load_format: how the weights are read.
        config: the model's shape.
        eos_token_ids: union of generation_config.json, config.json and the checkpoint's own tokenizer.
        sampling_defaults: generation_config.json's settings, under their ``SamplingParams`` names.
        source: the tensors; None for dummy weights.
        gguf: the open file, where there is one: its tokenizer is inside.
    """

    path: Path
    load_format: Format
    config: ModelConfig
    eos_token_ids: tuple[int, ...] = ()
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    source: TensorSource | None = field(default=None, repr=False, compare=False)
    gguf: GGUFFile | None = field(default=None, repr=False, compare=False)


def open_checkpoint(model: str, load_format: str = "auto") -> Checkpoint:
    """Reads configs and the headers of the weight files, and compares every tensor's shape with the config.

    Args:
        model: a directory (Hugging Face or Orbax), a ``.gguf`` file, a model ``.toml`` (dummy weights only), or a hub
            id that is in the local cache.
        load_format: "auto" decides by what is there.

    Raises:
        ConfigError: ``load_format`` isn't known.
        CheckpointError: missing, truncated, corrupt, or tensors that don't match the config.
        UnsupportedModelError: an architecture, rope scaling or quantisation that isn't known.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"load_format is {load_format!r}; allowed: {', '.join(LOAD_FORMATS)}")
    path = local_path(model)
    if path.is_dir() and not (path / "config.json").exists() and len(ggufs := sorted(path.glob("*.gguf"))) == 1:
        path = ggufs[0]
    if load_format == "dummy":
        return _open_dummy(path)
    found = _format(path)
    if load_format not in ("auto", found):
        raise CheckpointError(f"load_format is {load_format!r}, but {str(path)!r} holds {found}")
    if found == "gguf":
        return _open_gguf(path)
    if found == "orbax":
        return _open_orbax(path)
    return _open_hf(path, with_weights=True)


def _format(path: Path) -> Format:
    if path.is_file():
        if path.suffix == ".toml":
            raise CheckpointError(f"{str(path)!r} describes a model and holds no weights; use load_format='dummy'")
        if path.suffix != ".gguf":
            raise CheckpointError(f"{str(path)!r} isn't a known checkpoint; expected a directory or a .gguf file")
        return "gguf"
    if (path / MANIFEST).exists():
        return "orbax"
    if next(path.glob("*.safetensors"), None) or (path / "config.json").exists():
        if not next(path.glob("*.safetensors"), None) and (old := next(path.glob("*.bin"), None)):
            raise CheckpointError(f"{str(path)!r} holds pickled weights ({old.name}); convert them to safetensors")
        return "safetensors"
    if next(path.glob("*.gguf"), None):
        raise CheckpointError(f"{str(path)!r} holds several GGUF files; name one of them")
    raise CheckpointError(
        f"{str(path)!r} is no checkpoint; expected config.json and *.safetensors, an Orbax directory that "
        "scripts/convert_checkpoint.py wrote, or a .gguf file"
    )


def _open_hf(path: Path, *, with_weights: bool) -> Checkpoint:
    settings = read_json(path / "config.json")
    config = parse_config(settings)
    generation_path = path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    text = settings.get("text_config")
    written = union(
        eos_ids(generation, str(generation_path)),
        eos_ids(settings, str(path / "config.json")),
        eos_ids(text, str(path / "config.json")) if isinstance(text, dict) else (),
    )
    check_eos_ids(written, config.vocab_size, str(path))  # a tokenizer may know more tokens than the model
    source = SafetensorsSource(path) if with_weights else None
    if source is not None:
        check_tensors(source, config, str(path))
    return Checkpoint(
        path=path,
        load_format="safetensors" if with_weights else "dummy",
        config=config,
        eos_token_ids=union(written, tokenizer_eos_ids(path)),
        sampling_defaults=sampling_defaults(generation, str(generation_path)),
        source=source,
    )


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    config = gguf_config(file)
    source = GGUFSource(file, config)
    check_tensors(source, config, str(path))
    return Checkpoint(path, "gguf", config, gguf_eos_ids(file), {}, source, file)


def _open_orbax(path: Path) -> Checkpoint:
    config, eos_token_ids, defaults = read_manifest(path)
    source = OrbaxSource(path)
    check_tensors(source, config, str(path))
    return Checkpoint(path, "orbax", config, eos_token_ids, defaults, source)


def _open_dummy(path: Path) -> Checkpoint:
    """The config alone: of a TOML file, an HF directory, or a whole checkpoint whose weights are then not used."""
    if path.suffix == ".toml":
        return Checkpoint(path, "dummy", read_model_toml(path))
    if path.suffix == ".gguf":
        file = GGUFFile(path)
        return Checkpoint(path, "dummy", gguf_config(file), gguf_eos_ids(file), {}, None, file)
    if (path / MANIFEST).exists():
        return Checkpoint(path, "dummy", *read_manifest(path))
    return _open_hf(path, with_weights=False)
