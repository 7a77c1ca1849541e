"""GGUF models: metadata -> ``ModelConfig``, and tensors under Hugging Face names and in Hugging Face layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.config import LayerConfig, LinearScaling, Llama3Scaling, ModelConfig, RopeConfig
from jaxserve.models.rope import inverse_frequencies
from jaxserve.weights.gguf_file import GGUFFile

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
ROPE_FREQS = "rope_freqs.weight"

# Gemma 3's file says neither of these; they are the same in every published size.
GEMMA3_LOCAL_THETA = 10_000.0
GEMMA3_WINDOW_PATTERN = 6  # every sixth layer is global
GEMMA3_27B_LAYERS = 62  # the one size whose query scale is (E / Hq) ** -0.5 instead of D ** -0.5

# Llama 3's frequency bands: the file stores the resulting factor of each frequency and not these numbers.
LLAMA3_BANDS = (1.0, 4.0)
LLAMA3_ORIGINAL_CONTEXT = 8192

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_LAYER_NAMES = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class GGUFSource:
    """The tensors of a GGUF file as Hugging Face has them: q and k rows un-permuted, Gemma's norms without the 1."""

    fused = False
    dtype = "float32"  # of dequantised values

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self._file, self._config = file, config
        self._labels = {_hf_name(label, config): label for label in file.tensors if label != ROPE_FREQS}
        shapes = {name: file.tensors[label].shape for name, label in self._labels.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def read(self, name: str) -> np.ndarray:
        values = self._file.read(self._labels[name])
        if self._file.metadata["general.architecture"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            return _unpermute(values, self._config.head_dim)
        if self._config.architecture == "gemma3" and name.endswith("norm.weight"):
            return values - 1.0
        return values

    def label(self, name: str) -> str:
        """The file's own name; for a tensor that it lacks, the name that it would have."""
        return self._labels.get(name) or _gguf_name(name, self._config)


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The model's shape, from the metadata and the table of tensors.

    Raises:
        UnsupportedModelError: an architecture, rope scaling or mixture of experts that isn't known.
        CheckpointError: a value is missing or of the wrong type.
    """
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UnsupportedModelError(f"GGUF architecture {arch!r} isn't known; known: {', '.join(ARCHITECTURES)}")
    meta = _Metadata(file, arch)
    if meta.optional("expert_count", int, 0):
        raise UnsupportedModelError(f"{arch} with {meta.number('expert_count')} experts (MoE) isn't supported")
    if meta.optional("attn_logit_softcapping", float, 0.0):
        raise UnsupportedModelError("attn_logit_softcapping isn't supported")
    E, Hq, num_layers = meta.number("embedding_length"), meta.number("attention.head_count"), meta.number("block_count")
    Hk = meta.optional("attention.head_count_kv", int, Hq)
    if E <= 0 or Hq <= 0 or Hk <= 0 or Hq % Hk:
        raise CheckpointError(f"{str(file.path)!r} has {Hq} query heads, {Hk} KV heads and model dim {E}")
    D = meta.optional("attention.key_length", int, E // Hq)
    if (value_length := meta.optional("attention.value_length", int, D)) != D:
        raise UnsupportedModelError(f"{arch}.attention.value_length {value_length} isn't key_length {D}")
    if (rotated := meta.optional("rope.dimension_count", int, D)) != D:
        raise UnsupportedModelError(f"{arch}.rope.dimension_count {rotated} isn't the head dim {D} (partial rotary)")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{str(file.path)!r} has no tensor 'token_embd.weight'")
    window = meta.optional("attention.sliding_window", int, 0) or None
    gemma = arch == "gemma3"
    scale_dim = E // Hq if gemma and num_layers == GEMMA3_27B_LAYERS else D
    return ModelConfig(
        architecture="mistral" if arch == "llama" and window else arch,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        model_dim=E,
        ffn_dim=meta.number("feed_forward_length"),
        num_heads=Hq,
        num_kv_heads=Hk,
        head_dim=D,
        layers=_layers(meta, num_layers, D, window),
        max_position=meta.number("context_length"),
        norm_eps=meta.number("attention.layer_norm_rms_epsilon", float),
        tie_embeddings="output.weight" not in file.tensors,
        attention_scale=scale_dim**-0.5,
        activation="gelu_tanh" if gemma else "silu",
        qkv_bias=arch == "qwen2",
        qk_norm=arch in ("qwen3", "gemma3"),
        embedding_scale=E**0.5 if gemma else 1.0,
        logit_soft_cap=meta.optional("final_logit_softcapping", float, 0.0) or None,
    )


class _Metadata:
    """Metadata under the architecture's prefix, checked for type."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self.file, self._values, self._arch = file, file.metadata, arch

    def number(self, key: str, kind: type = int) -> Any:
        full = f"{self._arch}.{key}"
        if full not in self._values:
            raise CheckpointError(f"{str(self.file.path)!r} has no metadata {full!r}")
        value = self._values[full]
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one number a layer, all the same
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise CheckpointError(
                f"metadata {full!r} of {str(self.file.path)!r} is {value!r}; expected {kind.__name__}"
            )
        return value

    def optional(self, key: str, kind: type, default: Any) -> Any:
        return self.number(key, kind) if f"{self._arch}.{key}" in self._values else default


def _layers(meta: _Metadata, num_layers: int, head_dim: int, window: int | None) -> tuple[LayerConfig, ...]:
    gemma = meta.file.metadata["general.architecture"] == "gemma3"
    theta = float(meta.number("rope.freq_base", float) if gemma else meta.optional("rope.freq_base", float, 10_000.0))
    rope = RopeConfig(theta, _scaling(meta, theta, head_dim))
    if not gemma:
        return (LayerConfig(rope, window),) * num_layers
    local = LayerConfig(RopeConfig(float(meta.optional("rope.freq_base_swa", float, GEMMA3_LOCAL_THETA))), window)
    pattern = meta.file.metadata.get("gemma3.attention.sliding_window_pattern", GEMMA3_WINDOW_PATTERN)
    if isinstance(pattern, np.ndarray) and len(pattern) == num_layers:  # one flag a layer: does it have the window?
        return tuple(local if windowed else LayerConfig(rope) for windowed in pattern.tolist())
    if not isinstance(pattern, int) or pattern < 1:
        raise CheckpointError(f"gemma3.attention.sliding_window_pattern is {pattern!r}; expected a number of layers")
    return tuple(LayerConfig(rope) if (i + 1) % pattern == 0 else local for i in range(num_layers))


def _scaling(meta: _Metadata, theta: float, head_dim: int) -> LinearScaling | Llama3Scaling | None:
    values = meta.file.metadata
    arch = values["general.architecture"]
    kind = values.get(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise UnsupportedModelError(f"rope scaling {kind!r} isn't supported; known in GGUF: none, linear, rope_freqs")
    factor = meta.optional("rope.scaling.factor", float, 1.0) if kind == "linear" else 1.0
    factor = factor * meta.optional("rope.scale_linear", float, 1.0)  # the key of old files
    if ROPE_FREQS not in meta.file.tensors:
        return None if factor == 1.0 else LinearScaling(float(factor))
    if factor != 1.0:
        raise UnsupportedModelError(f"{ROPE_FREQS} together with linear rope scaling {factor} isn't supported")
    original = meta.optional("rope.scaling.original_context_length", int, LLAMA3_ORIGINAL_CONTEXT)
    return _llama3_scaling(meta.file.read(ROPE_FREQS), theta, head_dim, original)


def _llama3_scaling(
    factors: np.ndarray,  # float32[D // 2], what each frequency is divided by
    theta: float,
    head_dim: int,
    original: int,
) -> Llama3Scaling | None:
    """The scaling that gives exactly these factors.

    Raises:
        UnsupportedModelError: no Llama 3 scaling does.
    """
    if (factors == 1.0).all():
        return None
    scaling = Llama3Scaling(float(factors.max()), *LLAMA3_BANDS, original)
    plain, scaled = (np.array(inverse_frequencies(RopeConfig(theta, s), head_dim)) for s in (None, scaling))
    if factors.shape != (head_dim // 2,) or not np.allclose(plain / scaled, factors, rtol=1e-4):
        raise UnsupportedModelError(
            f"the tensor {ROPE_FREQS!r} isn't Llama 3's rope scaling (factor {scaling.factor:g}, original context "
            f"{original}); known: llama3"
        )
    return scaling


def _unpermute(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from interleaved pairs (0, D/2, 1, D/2+1, ...) back to halves; llama.cpp rotates pairs."""
    out, model_dim = weight.shape
    pairs = weight.reshape(out // head_dim, head_dim // 2, 2, model_dim)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(out, model_dim)


def _hf_name(label: str, config: ModelConfig) -> str:
    if label in _TOP_NAMES:
        return _TOP_NAMES[label]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", label)
    names = _GEMMA3_LAYER_NAMES if config.architecture == "gemma3" else _LAYER_NAMES
    if match and match[2] in names:
        return f"model.layers.{match[1]}.{names[match[2]]}.{match[3]}"
    return label


def _gguf_name(name: str, config: ModelConfig) -> str:
    names = _GEMMA3_LAYER_NAMES if config.architecture == "gemma3" else _LAYER_NAMES
    for label, top in _TOP_NAMES.items():
        if top == name:
            return label
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    for label, inner in names.items():
        if match and match[2] == inner:
            return f"blk.{match[1]}.{label}.{match[3]}"
    return name
