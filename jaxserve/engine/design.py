"""A model's shape -> the abstract model and how it attends, on a mesh: for the target and for a draft model."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.fused import GPU
from jaxserve.models.registry import Model, build
from jaxserve.models.sharding import kv_heads_for, padded_vocab_for
from jaxserve.runner.attend import PagedAttention, attention_specs
from pallas_kernels.ragged_paged_attention.api import (
    IMPLEMENTATIONS,
    Selection,
    UnsupportedAttentionError,
    select_implementation,
)
from pallas_kernels.ragged_paged_attention.types import AttentionSpec

_KV_DTYPE = {  # kv_cache_dtype -> how arrays call it
    "float32": "float32",
    "bfloat16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "int8": "int8",
}
_VOCAB_MULTIPLE = {"cpu": 1, "gpu": 64, "tpu": 128}  # by platform; a device's share of the vocabulary


def design(
    config: EngineConfig, shape: ModelConfig, block_size: int, mesh: Mesh, *, drafts: bool = False
) -> tuple[Model, PagedAttention, Selection]:
    """Builds nothing on a device. ``drafts``: it is a draft model that is designed.

    Raises:
        ConfigError: heads, ffn or attention don't fit the devices; says why.
    """
    shards = mesh.shape["tp"]
    try:
        num_kv_heads = kv_heads_for(shape, shards)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    specs = attention_specs(
        dataclasses.replace(shape, num_kv_heads=num_kv_heads),
        block_size=block_size,
        dtype=config.dtype,
        kv_dtype=_KV_DTYPE[config.kv_cache_dtype],
        shards=shards,
    )
    device = mesh.devices.flat[0]
    selection = _select(specs, config.attention_implementation, device)
    model = build(
        shape,
        dtype=config.dtype,
        padded_vocab=padded_vocab_for(shape.vocab_size, shards, _VOCAB_MULTIPLE[device.platform]),
        num_kv_heads=num_kv_heads,
        gpu=_gpu(config, selection.implementation, device, shards, drafts=drafts),
    )
    return model, PagedAttention(specs, selection.implementation, mesh), selection


def _gpu(config: EngineConfig, implementation: str, device: Any, shards: int, *, drafts: bool) -> GPU | str:
    """The GPU whose kernels may compute with a model's weights; or why none may."""
    if device.platform != "gpu":
        return f"the device is a {device.platform.upper()}"
    if implementation != "pallas_gpu":
        return f"attention is {implementation}"
    if shards > 1:
        return f"{shards} devices share a layer"
    if config.quantization is not None:
        return f"weights are {config.quantization}"
    if drafts:
        return "two models' launches could wait for each other"
    return GPU.of(device)


def _select(specs: tuple[AttentionSpec, ...], requested: str, device: Any) -> Selection:
    """One implementation for all layers: the most preferred that runs every one of them."""
    capability = getattr(device, "compute_capability", None)
    try:
        choices = [select_implementation(spec, device.platform, requested, capability) for spec in set(specs)]
    except UnsupportedAttentionError as error:
        raise ConfigError(str(error)) from error
    return max(choices, key=lambda choice: IMPLEMENTATIONS.index(choice.implementation))
