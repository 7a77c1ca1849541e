"""``speculative_config`` with method "draft_model" -> the model that drafts: a checkpoint, or a quantised twin."""

from __future__ import annotations

from typing import Any

from jaxserve.config import EngineConfig, SpeculativeConfig
from jaxserve.engine.design import design
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import Model, Params
from jaxserve.models.sharding import named_shardings
from jaxserve.runner.attend import PagedAttention
from jaxserve.runner.draft import DraftModel
from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint
from jaxserve.weights.load import load_params
from jaxserve.weights.quantize import params_bytes, quantize_params
from jaxserve.weights.tokenizer import load_tokenizer
from jaxserve.weights.tokenizer_files import has_tokenizer


def open_drafter(config: EngineConfig, target: ModelConfig, max_model_len: int, tokenizer: Any) -> Checkpoint | None:
    """The draft model's checkpoint, opened and compared with the target; None where there is none of its own.

    Raises:
        CheckpointError: it can't be read.
        ConfigError: it can't draft for the target; says why.
    """
    speculative = config.speculative_config
    if speculative is None or speculative.model is None:
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


def load_drafter(
    config: EngineConfig,
    speculative: SpeculativeConfig,
    checkpoint: Checkpoint | None,
    target: tuple[Model, PagedAttention, Params],
    *,
    progress: bool,
) -> DraftModel:
    """Loads the draft model, or copies the target, and quantises it if that was asked for."""
    model, attention, params = target
    target_bytes = params_bytes(model.trunk_params(params)["layers"]) + params_bytes(model.head_params(params))
    if checkpoint is not None:
        mesh, block_size = attention.mesh, attention.specs[0].block_size
        model, attention, _ = design(config, checkpoint.config, block_size, mesh)
        params = load_params(
            checkpoint,
            model,
            sharding=named_shardings(model.param_axes, mesh),
            seed=config.seed,
            progress=progress,
        )
    if speculative.quantization is not None:
        params = quantize_params(model, params, speculative.quantization)
    draft_bytes = params_bytes(model.trunk_params(params)["layers"]) + params_bytes(model.head_params(params))
    return DraftModel(model, attention, params, draft_bytes / target_bytes)
