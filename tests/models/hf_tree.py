"""HF config and tensors -> ModelConfig and parameter tree, for tests only: written apart from jaxserve.weights, so that
the models are tested without it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.config import LayerConfig, LinearScaling, Llama3Scaling, ModelConfig, RopeConfig
from jaxserve.models.registry import Params


def _rope(rope: dict[str, Any]) -> RopeConfig:
    match rope["rope_type"]:
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(rope["factor"])
        case "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            scaling = Llama3Scaling(*(rope[name] for name in names))
    return RopeConfig(rope["rope_theta"], scaling)


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """From the JSON of config.json."""
    architecture = hf["model_type"].removesuffix("_text")
    is_gemma = architecture == "gemma3"
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    kinds = hf.get("layer_types") or ["full_attention"] * hf["num_hidden_layers"]
    if architecture == "mistral":
        kinds = ["sliding_attention"] * hf["num_hidden_layers"]
    ropes = hf["rope_parameters"]
    return ModelConfig(
        architecture=architecture,
        vocab_size=hf["vocab_size"],
        model_dim=hf["hidden_size"],
        ffn_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=head_dim,
        layers=tuple(
            LayerConfig(
                _rope(ropes[kind] if is_gemma else ropes),
                hf["sliding_window"] if kind == "sliding_attention" else None,
            )
            for kind in kinds
        ),
        max_position=hf["max_position_embeddings"],
        norm_eps=hf["rms_norm_eps"],
        tie_embeddings=hf["tie_word_embeddings"],
        attention_scale=(hf["query_pre_attn_scalar"] if is_gemma else head_dim) ** -0.5,
        activation="gelu_tanh" if is_gemma else "silu",
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture in ("qwen3", "gemma3"),
        embedding_scale=math.sqrt(hf["hidden_size"]) if is_gemma else 1.0,
    )


def param_tree(tensors: dict[str, np.ndarray], config: ModelConfig, padded_vocab: int) -> Params:
    """Names, fuses and turns HF tensors ([out, in]) into the tree that models read; fails on a tensor left over."""
    left = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    heads, group, dim = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim

    def padded(table):
        return np.pad(table, ((0, padded_vocab - len(table)), (0, 0)))

    def fused(prefix, kind):  # HF rows per head -> [..., Hk, G+2, D]
        parts = [np.moveaxis(left.pop(f"{prefix}.self_attn.{name}_proj.{kind}"), 0, -1) for name in "qkv"]
        q, k, v = (part.reshape(*part.shape[:-1], heads, -1, dim) for part in parts)
        assert q.shape[-2] == group
        return np.concatenate([q, k, v], axis=-2)

    def layer(prefix):
        def norm(name):
            return {"weight": left.pop(f"{prefix}.{name}.weight")}

        gate, up = (left.pop(f"{prefix}.mlp.{name}_proj.weight").T for name in ("gate", "up"))
        qkv = {"weight": fused(prefix, "weight")}
        if config.qkv_bias:
            qkv["bias"] = fused(prefix, "bias")
        output = left.pop(f"{prefix}.self_attn.o_proj.weight").T
        tree = {
            "attn_norm": norm("input_layernorm"),
            "attn": {"qkv": qkv, "o": {"weight": output.reshape(heads, group, dim, -1)}},
            "mlp": {
                "gate_up": {"weight": np.stack([gate, up], axis=1)},
                "down": {"weight": left.pop(f"{prefix}.mlp.down_proj.weight").T},
            },
        }
        if config.qk_norm:
            tree["attn"] |= {"q_norm": norm("self_attn.q_norm"), "k_norm": norm("self_attn.k_norm")}
        if config.architecture == "gemma3":
            tree["post_attn_norm"] = norm("post_attention_layernorm")
            tree["mlp_norm"] = norm("pre_feedforward_layernorm")
            tree["post_mlp_norm"] = norm("post_feedforward_layernorm")
        else:
            tree["mlp_norm"] = norm("post_attention_layernorm")
        return tree

    params = {
        "embed": {"weight": padded(left.pop("embed_tokens.weight"))},
        "layers": [layer(f"layers.{i}") for i in range(config.num_layers)],
        "final_norm": {"weight": left.pop("norm.weight")},
    }
    if not config.tie_embeddings:
        params["lm_head"] = {"weight": padded(left.pop("lm_head.weight"))}
    assert not left, sorted(left)
    return jax.tree.map(jnp.asarray, params)


def repeat_kv_heads(params: Params, num_kv_heads: int) -> Params:
    """The tree for a model built with more KV heads: each key and value head is copied, query heads are dealt out."""

    def repeat(layer):
        weights = {"qkv": {}, "o": {}}
        for kind, fused in layer["attn"]["qkv"].items():  # [E, Hk, G+2, D], or a bias without E
            copies = num_kv_heads // fused.shape[-3]
            q, kv = fused[..., :-2, :], fused[..., -2:, :]
            q = q.reshape(*q.shape[:-3], num_kv_heads, -1, q.shape[-1])
            weights["qkv"][kind] = jnp.concatenate([q, jnp.repeat(kv, copies, axis=-3)], axis=-2)
        output = layer["attn"]["o"]["weight"]
        weights["o"]["weight"] = output.reshape(num_kv_heads, -1, *output.shape[-2:])
        return layer | {"attn": layer["attn"] | weights}

    return params | {"layers": [repeat(layer) for layer in params["layers"]]}
