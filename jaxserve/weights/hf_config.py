"""config.json -> ``ModelConfig``. What isn't known is refused by name; absent keys take the family's own defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.config import LayerConfig, ModelConfig
from jaxserve.weights.hf_rope import GLOBAL, LOCAL, rope_configs


@dataclass(frozen=True)
class Family:
    """A model type: the architecture that runs it, and the defaults that its config.json may leave out."""

    name: Literal["llama", "mistral", "qwen2", "qwen3", "gemma3"]
    class_name: str
    defaults: Mapping[str, Any]
    theta: float = 10_000.0
    local_theta: float | None = None


_COMMON = {"tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-6}
_GEMMA3_TEXT = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
_GEMMA3 = Family("gemma3", "Gemma3ForCausalLM", _GEMMA3_TEXT, theta=1e6, local_theta=1e4)

FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", _COMMON | {"max_position_embeddings": 2048}),
    "mistral": Family("mistral", "MistralForCausalLM", _COMMON | {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _COMMON),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _COMMON | {"head_dim": 128}),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,  # the multimodal model: its text_config
}
CLASS_NAMES = {family.class_name: kind for kind, family in FAMILIES.items()} | {
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3",
}
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
QWEN_WINDOW_LAYERS = 28  # default of max_window_layers
GEMMA3_WINDOW_PATTERN = 6

# Settings that change the numbers and that no family here implements: any value but these is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_bidirectional_attention": (None, False),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "n_routed_experts": (None, 0, 1),
}


def parse_config(settings: Mapping[str, Any]) -> ModelConfig:
    """The model's shape from a config.json of transformers 4 or 5.

    Raises:
        UnsupportedModelError: an architecture, rope scaling, quantisation or option that jaxserve doesn't know.
        CheckpointError: a value is missing or of the wrong type.
    """
    family = _family(settings)
    _refuse_unsupported(settings)
    if isinstance(text := settings.get("text_config"), Mapping):
        _refuse_unsupported(text)
        settings = dict(text) | {k: settings[k] for k in ("tie_word_embeddings",) if k in settings and k not in text}
    reader = _Reader(settings, family)
    Hq = reader.integer("num_attention_heads")
    Hk = reader.integer("num_key_value_heads", Hq)
    E = reader.integer("hidden_size")
    if Hq % Hk:
        raise CheckpointError(f"num_attention_heads {Hq} isn't a multiple of num_key_value_heads {Hk}")
    D = reader.integer("head_dim", E // Hq)
    gemma = family.name == "gemma3"
    act_key = "hidden_activation" if gemma else "hidden_act"
    activation = reader.value(act_key)
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(f"{act_key} {activation!r} isn't known; known: {', '.join(ACTIVATIONS)}")
    cap = reader.value("final_logit_softcapping") if gemma else None
    return ModelConfig(
        architecture=family.name,
        vocab_size=reader.integer("vocab_size"),
        model_dim=E,
        ffn_dim=reader.integer("intermediate_size"),
        num_heads=Hq,
        num_kv_heads=Hk,
        head_dim=D,
        layers=_layers(reader, family),
        max_position=reader.integer("max_position_embeddings"),
        norm_eps=reader.positive("rms_norm_eps"),
        tie_embeddings=reader.flag("tie_word_embeddings"),
        attention_scale=(reader.positive("query_pre_attn_scalar") if gemma else D) ** -0.5,
        activation=ACTIVATIONS[activation],
        qkv_bias=family.name == "qwen2",
        qk_norm=family.name in ("qwen3", "gemma3"),
        embedding_scale=E**0.5 if gemma else 1.0,
        logit_soft_cap=None if cap is None else reader.positive("final_logit_softcapping"),
    )


def _family(settings: Mapping[str, Any]) -> Family:
    known = ", ".join(CLASS_NAMES)
    kind = settings.get("model_type")
    classes = settings.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"architectures of the model's config is {classes!r}; expected a list of names")
    for name in classes:
        if name not in CLASS_NAMES:
            what = " (a mixture of experts)" if "moe" in name.lower() or "mixtral" in name.lower() else ""
            raise UnsupportedModelError(f"architecture {name!r}{what} isn't supported; known: {known}")
    if classes:
        kind = CLASS_NAMES[classes[0]] if CLASS_NAMES[classes[0]] != "gemma3" else kind or "gemma3"
    if kind not in FAMILIES:
        what = " (a mixture of experts)" if "moe" in str(kind) or "mixtral" in str(kind) else ""
        raise UnsupportedModelError(f"model_type {kind!r}{what} isn't supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def _refuse_unsupported(settings: Mapping[str, Any]) -> None:
    for key, neutral in _NEUTRAL.items():
        if (value := settings.get(key)) not in neutral:
            if key == "quantization_config" and isinstance(value, Mapping):
                value = value.get("quant_method", value)
            allowed = " or ".join(str(v) for v in neutral[1:]) or "none"
            raise UnsupportedModelError(f"{key} {value!r} isn't supported; known: {allowed}")


def _layers(reader: _Reader, family: Family) -> tuple[LayerConfig, ...]:
    """One entry a layer: which layers have the window, and the rope of each."""
    num_layers = reader.integer("num_hidden_layers")
    ropes = rope_configs(reader.settings, theta=family.theta, local_theta=family.local_theta)
    kinds = _layer_types(reader, family, num_layers)
    window = reader.integer("sliding_window") if LOCAL in kinds else None
    return tuple(LayerConfig(ropes[kind], window if kind == LOCAL else None) for kind in kinds)


def _layer_types(reader: _Reader, family: Family, num_layers: int) -> list[str]:
    known = {"llama": [GLOBAL]}.get(family.name, [GLOBAL, LOCAL])
    kinds = reader.settings.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise CheckpointError(f"layer_types is {kinds!r}; expected a list of {num_layers} names")
        if unknown := sorted({str(kind) for kind in kinds} - set(known)):
            raise UnsupportedModelError(f"layer type {unknown[0]!r} isn't supported; known: {', '.join(known)}")
    if family.name == "llama":
        return [GLOBAL] * num_layers
    if family.name == "mistral":
        return [GLOBAL if reader.value("sliding_window") is None else LOCAL] * num_layers
    if family.name in ("qwen2", "qwen3") and not reader.settings.get("use_sliding_window"):
        return [GLOBAL] * num_layers
    if kinds is not None:
        return kinds
    if family.name == "gemma3":
        pattern = reader.integer(
            "sliding_window_pattern", reader.integer("_sliding_window_pattern", GEMMA3_WINDOW_PATTERN)
        )
        return [LOCAL if (i + 1) % pattern else GLOBAL for i in range(num_layers)]
    first = reader.integer("max_window_layers", QWEN_WINDOW_LAYERS, low=0)
    windowed = reader.value("sliding_window") is not None
    return [LOCAL if windowed and i >= first else GLOBAL for i in range(num_layers)]


class _Reader:
    """Typed access to a config.json, with the family's defaults for absent keys."""

    def __init__(self, settings: Mapping[str, Any], family: Family) -> None:
        self.settings, self._defaults = settings, family.defaults

    def value(self, key: str, default: Any = None) -> Any:
        """The value; null counts where the key is written, the default where it isn't."""
        return self.settings.get(key, self._defaults.get(key, default))

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        value = self.value(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise CheckpointError(f"{key} of the model's config is {value!r}; expected an integer of at least {low}")
        return value

    def positive(self, key: str) -> float:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CheckpointError(f"{key} of the model's config is {value!r}; expected a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            raise CheckpointError(f"{key} of the model's config is {value!r}; expected true or false")
        return value
