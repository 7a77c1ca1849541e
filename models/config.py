"""The shape and options of one decoder-only transformer: frozen, hashable, and all that a model file builds from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency-dependent rope scaling (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by ``factor`` (``rope_type: linear``; Gemma 3's global layers)."""

    factor: float


@dataclass(frozen=True)
class RopeConfig:
    theta: float
    scaling: Llama3Scaling | LinearScaling | None = None


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer."""

    rope: RopeConfig
    sliding_window: int | None = None  # tokens a query sees, itself included; None = all


@dataclass(frozen=True)
class ModelConfig:
    """One model. ``layers`` has one entry a layer; everything else is shared by all layers."""

    architecture: Literal["llama", "mistral", "qwen2", "qwen3", "gemma3"]
    vocab_size: int
    model_dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_position: int  # the longest context that the checkpoint was made for
    norm_eps: float
    tie_embeddings: bool
    attention_scale: float  # multiplies q.k; usually head_dim ** -0.5
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    embedding_scale: float = 1.0
    logit_soft_cap: float | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)
