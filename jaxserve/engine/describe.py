"""What an engine says of itself to people: ``jaxserve info``, and ``Engine.info``."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.config import EngineConfig
from jaxserve.models.registry import Model
from jaxserve.runner.executables import Executables
from jaxserve.runner.memory import MemoryPlan
from jaxserve.weights.checkpoint import Checkpoint
from pallas_kernels.ragged_paged_attention.api import Selection


def describe(
    config: EngineConfig,
    checkpoint: Checkpoint,
    eos: tuple[int, ...],
    mesh: Mesh,
    model: Model,
    selection: Selection,
    memory: MemoryPlan,
    executables: Executables,
    sampler: str,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Name -> value of what was chosen and found.

    ``config`` has every None resolved, ``sampler`` is its implementation, ``seconds`` are start-up's.
    """
    devices = mesh.devices.flat
    return {
        "model": f"{checkpoint.path} ({checkpoint.config.architecture}, {checkpoint.load_format})",
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "dtype": f"{jnp.dtype(config.dtype).name}, KV {config.kv_cache_dtype}",
        "quantization": config.quantization or "none",
        "attention": selection.implementation,
        "attention choice": selection.explanation,
        "layers": _layers(model, executables),
        "sampler": sampler,
        "memory": memory.describe(),
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "block_size": config.block_size,
        "steps per dispatch": _bursts(executables),
        "drafts": _drafts(config),
        "executables": executables.num_executables,
        "executables from the cache": executables.num_from_cache,
        "executables of the draft model": len(executables.propose),
        "start-up seconds": {name: round(value, 2) for name, value in seconds.items()},
        "EOS token ids": list(eos),
        "generation defaults": dict(checkpoint.sampling_defaults) or "SamplingParams()",
    }


def _layers(model: Model, executables: Executables) -> str:
    if isinstance(model.fused, str):
        return f"XLA's products: {model.fused}"
    sizes = sorted({tokens for tokens, _ in executables.forward})
    found = []
    for launches, name in ((1, "one launch"), (4, "four launches")):
        alike = [str(tokens) for tokens in sizes if model.launches(tokens) == launches]
        found += [f"in {name} each in steps of {' or '.join(alike)} tokens"] if alike else []
    if not found:
        return "XLA's products: no step is small enough"
    return f"all but the last {', '.join(found)}, padding included"


def _bursts(executables: Executables) -> str:
    if not executables.burst:
        return "1"
    most = {key.num_steps: key.num_rows for key in executables.burst}  # ascending
    return ", ".join(f"{length} where at most {rows} requests run" for length, rows in most.items()) + ", else 1"


def _drafts(config: EngineConfig) -> str:
    drafts = config.speculative_config
    if drafts is None:
        return "none"
    if drafts.method == "ngram":
        what = f"looked up after {drafts.prompt_lookup_max}..{drafts.prompt_lookup_min} equal tokens"
    else:
        kind = f", {drafts.quantization}" if drafts.quantization else ""
        what = f"of {drafts.model or 'a copy of the model'}{kind}"
    return f"up to {drafts.num_speculative_tokens}, {what}{', adaptive' if drafts.adaptive else ''}"
