"""Our own spelling of a ``ModelConfig``: ``configs/models/*.toml`` for dummy weights, JSON beside Orbax parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jaxserve.config import read_toml
from jaxserve.errors import CheckpointError, ConfigError, UnsupportedModelError
from jaxserve.models.config import LayerConfig, LinearScaling, Llama3Scaling, ModelConfig, RopeConfig

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
_SCALINGS: dict[str, type[Llama3Scaling] | type[LinearScaling]] = {"llama3": Llama3Scaling, "linear": LinearScaling}
_OPTIONAL = {"qkv_bias", "qk_norm", "activation", "embedding_scale", "logit_soft_cap", "attention_scale"}
_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}


def read_model_toml(path: Path) -> ModelConfig:
    """The model that a TOML file describes, in ``ModelConfig``'s words.

    ``[rope]`` holds ``theta`` and optionally ``[rope.scaling]``. Layers are alike, ``num_layers`` of them, unless
    ``[local]`` gives ``theta``, ``sliding_window`` and ``pattern``: then every ``pattern``-th layer is global and the
    others have the window and the base of ``[local]``. ``sliding_window`` alone gives every layer the window.

    Raises:
        CheckpointError: the file can't be read; a key is unknown, missing, or of the wrong type.
    """
    try:
        settings = read_toml(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    where = str(path)
    num_layers = _take(settings, "num_layers", (int,), where)
    rope = _rope(_take(settings, "rope", (dict,), where), where)
    window = settings.pop("sliding_window", None)
    layers: tuple[LayerConfig, ...] = (LayerConfig(rope, window),) * num_layers
    if local := settings.pop("local", None):
        pattern = _take(local, "pattern", (int,), where)
        local_layer = LayerConfig(
            RopeConfig(float(_take(local, "theta", (int, float), where))), _take(local, "sliding_window", (int,), where)
        )
        layers = tuple(LayerConfig(rope) if (i + 1) % pattern == 0 else local_layer for i in range(num_layers))
        _refuse_rest(local, where)
    return _model(settings, layers, where)


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """A JSON object that ``config_from_json`` turns back into an equal ``ModelConfig``."""
    settings = asdict(config)
    settings["layers"] = list(settings["layers"])
    for layer, written in zip(config.layers, settings["layers"], strict=True):
        scaling = layer.rope.scaling
        if scaling is not None:
            written["rope"]["scaling"]["type"] = next(k for k, v in _SCALINGS.items() if isinstance(scaling, v))
    return settings


def config_from_json(settings: Mapping[str, Any], where: str) -> ModelConfig:
    """The inverse of ``config_to_json``.

    Raises:
        CheckpointError: a key is unknown, missing, or of the wrong type.
    """
    rest = dict(settings)
    layers = []
    for written in _take(rest, "layers", (list,), where):
        layer = dict(written)
        layers.append(
            LayerConfig(_rope(_take(layer, "rope", (dict,), where), where), layer.pop("sliding_window", None))
        )
        _refuse_rest(layer, where)
    return _model(rest, tuple(layers), where)


def _model(settings: dict[str, Any], layers: tuple[LayerConfig, ...], where: str) -> ModelConfig:
    values: dict[str, Any] = {}
    for field in fields(ModelConfig):
        if field.name == "layers" or (field.name in _OPTIONAL and settings.get(field.name) is None):
            settings.pop(field.name, None)
            continue
        kinds = _TYPES.get(str(field.type).removesuffix(" | None"), (str,))
        values[field.name] = _take(settings, field.name, kinds, where)
    _refuse_rest(settings, where)
    if values["architecture"] not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {values['architecture']!r} of {where!r} isn't known; known: {', '.join(ARCHITECTURES)}"
        )
    if bad := [k for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool) and not v > 0]:
        raise CheckpointError(f"{bad[0]} of {where!r} is {values[bad[0]]!r}; expected a positive number")
    if values["num_heads"] % values["num_kv_heads"] or not layers:
        raise CheckpointError(
            f"{where!r} has {len(layers)} layers, {values['num_heads']} query heads and {values['num_kv_heads']} KV "
            "heads; expected at least one layer, and query heads a multiple of KV heads"
        )
    values.setdefault("attention_scale", values["head_dim"] ** -0.5)
    return ModelConfig(layers=layers, **values)


def _rope(settings: Mapping[str, Any], where: str) -> RopeConfig:
    rest = dict(settings)
    theta = float(_take(rest, "theta", (int, float), where))
    scaling = rest.pop("scaling", None)
    _refuse_rest(rest, where)
    if scaling is None:
        return RopeConfig(theta)
    written = dict(scaling)
    kind = _take(written, "type", (str,), where)
    if kind not in _SCALINGS:
        raise UnsupportedModelError(f"rope scaling {kind!r} of {where!r} isn't known; known: {', '.join(_SCALINGS)}")
    values = {f.name: _take(written, f.name, _TYPES[str(f.type)], where) for f in fields(_SCALINGS[kind])}
    _refuse_rest(written, where)
    return RopeConfig(theta, _SCALINGS[kind](**values))


def _take(settings: dict[str, Any], key: str, kinds: tuple[type, ...], where: str) -> Any:
    if key not in settings:
        raise CheckpointError(f"{where!r} has no {key!r}")
    value = settings.pop(key)
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits:
        raise CheckpointError(f"{key!r} of {where!r} is {value!r}; expected {' or '.join(k.__name__ for k in kinds)}")
    return float(value) if float in kinds else value


def _refuse_rest(settings: Mapping[str, Any], where: str) -> None:
    if settings:
        raise CheckpointError(f"{where!r} has an unknown setting {next(iter(settings))!r}")
