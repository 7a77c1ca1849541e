"""``speculative_config`` with method "draft_model" -> the model that drafts: a checkpoint, or a quantised twin."""

from __future__ import annotations

from typing import Any

import jax

from jaxserve.config import EngineConfig, Quantization, SpeculativeConfig
from jaxserve.engine.design import design
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import Model, Params
from jaxserve.models.sharding import named_shardings
from jaxserve.runner.attend import PagedAttention
from jaxserve.runner.draft import DraftModel
from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint
from jaxserve.weights.load import by_path, load_params
from jaxserve.weights.quantize import abstract_params, packing_of, params_bytes, quantize_params
from jaxserve.weights.tokenizer import load_tokenizer
from jaxserve.weights.tokenizer_files import has_tokenizer


def open_drafter(config: EngineConfig, target: ModelConfig, max_model_len: int, tokenizer: Any) -> Checkpoint | None:
    """The draft model's checkpoint, opened and compared with the target; None where there is none of its own.

    Raises:
        CheckpointError: it can't be read.
        ConfigError: it can't draft for the target; says why.
    """
    speculative = config.speculative_config
    if speculative is None or speculative.method != "draft_model":
        return None
    if speculative.model is None:
        if speculative.quantization == config.quantization:
            raise ConfigError(
                f"speculative_config.quantization is {speculative.quantization!r}, and so is the model's: a copy "
                "would cost as much as the model; allowed: another quantization, or a draft model"
            )
        return None
    checkpoint = open_checkpoint(speculative.model, "dummy" if config.load_format == "dummy" else "auto")
    name = f"the draft model {speculative.model!r}"
    if checkpoint.config.vocab_size != target.vocab_size:
        raise ConfigError(
            f"{name} has {checkpoint.config.vocab_size} token ids; allowed: the target's {target.vocab_size}"
        )
    if checkpoint.config.max_position < max_model_len:
        raise ConfigError(
            f"{name} has a context of {checkpoint.config.max_position}; allowed: at least max_model_len "
            f"({max_model_len})"
        )
    if tokenizer is not None and (checkpoint.gguf is not None or has_tokenizer(checkpoint.path)):
        own, theirs = load_tokenizer(checkpoint).get_vocab(), tokenizer.get_vocab()
        if own != theirs:
            token = next(iter(sorted(own.items() ^ theirs.items())))[0]
            raise ConfigError(
                f"{name} has another tokenizer: {token!r} is {own.get(token)} there and {theirs.get(token)} in the "
                "target's; allowed: the same tokenizer"
            )
    return checkpoint


def abstract_drafter(
    config: EngineConfig, checkpoint: Checkpoint | None, target: tuple[Model, PagedAttention]
) -> DraftModel | None:
    """What ``load_drafter`` will return, with shapes in place of parameters; None where no model drafts."""
    speculative = config.speculative_config
    if speculative is None or speculative.method != "draft_model":
        return None
    model, attention = target
    if checkpoint is not None:
        model, attention, _ = design(
            config, checkpoint.config, attention.specs[0].block_size, attention.mesh, drafts=True
        )
    shardings = named_shardings(model.param_axes, attention.mesh)
    return DraftModel(model, attention, abstract_params(model, shardings, speculative.quantization), share=0.0)


def load_drafter(
    config: EngineConfig,
    speculative: SpeculativeConfig,
    checkpoint: Checkpoint | None,
    target: tuple[Checkpoint, Model, PagedAttention, Params],
    *,
    progress: bool | None,
) -> DraftModel:
    """Loads the draft model, or copies the target, quantised if that was asked for.

    Args:
        checkpoint: what ``open_drafter`` opened; None: the target is copied.
        target: its checkpoint, and what was made of it.
        progress: as for ``load_params``.
    """
    source, model, attention, params = target
    target_bytes = params_bytes(model.trunk_params(params)["layers"]) + params_bytes(model.head_params(params))
    if checkpoint is not None:
        mesh, block_size = attention.mesh, attention.specs[0].block_size
        model, attention, _ = design(config, checkpoint.config, block_size, mesh, drafts=True)
        params = load_params(
            checkpoint,
            model,
            sharding=named_shardings(model.param_axes, mesh),
            seed=config.seed,
            quantization=speculative.quantization,
            progress=progress,
        )
    elif config.quantization is None and speculative.quantization is not None:
        params = quantize_params(model, params, speculative.quantization)
    else:
        params = load_params(
            source,
            model,
            sharding=named_shardings(model.param_axes, attention.mesh),
            seed=config.seed,
            quantization=speculative.quantization,
            known=_alike(model, params, config.quantization, speculative.quantization),
            progress=progress,
        )
    draft_bytes = params_bytes(model.trunk_params(params)["layers"]) + params_bytes(model.head_params(params))
    return DraftModel(model, attention, params, draft_bytes / target_bytes)


def _alike(model: Model, params: Params, one: Quantization | None, other: Quantization | None) -> dict[str, Any]:
    """The parameters, by path, that two quantisations of a model have in common."""
    paths = by_path(model.params)
    structure: Any = jax.tree.structure(model.params)  # the stubs lack the method
    leaves = structure.flatten_up_to(params)
    return {
        path: leaf
        for path, leaf in zip(paths, leaves, strict=True)
        if packing_of(model.config, path, one) == packing_of(model.config, path, other)
    }
