"""Which Hugging Face tensors make up each parameter, and how they are fused.

The *canonical* parameter of a path has the checkpoint's own vocabulary and KV heads; ``fit`` then pads the vocabulary
and copies KV heads for a model that was built wider (tensor parallelism beyond the number of KV heads).

Letters: ``V`` vocabulary, ``E`` model dim, ``F`` ffn dim, ``Hq``/``Hk`` query/KV heads, ``G`` = Hq/Hk, ``D`` head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from jaxserve.errors import CheckpointError
from jaxserve.models.config import ModelConfig
from jaxserve.weights.source import TensorSource, shortened

Kind = Literal["vector", "vocab", "qkv", "qkv_bias", "o", "gate_up", "down"]


@dataclass(frozen=True)
class Param:
    """One parameter: its canonical shape and the tensors that it is made of."""

    kind: Kind
    shape: tuple[int, ...]
    sources: tuple[tuple[str, tuple[int, ...]], ...]  # (Hugging Face name, shape)
    fused: bool = False  # the one source is the canonical parameter itself


def canonical_params(config: ModelConfig, *, fused: bool = False) -> dict[str, Param]:
    """Every parameter of the model by its dotted path (``layers.0.attn.qkv.weight``).

    ``fused``: the checkpoint holds canonical parameters under these paths.
    """
    params = _params(config)
    if fused:
        return {path: Param(p.kind, p.shape, ((path, p.shape),), fused=True) for path, p in params.items()}
    return params


def _params(config: ModelConfig) -> dict[str, Param]:
    vocab, E = config.vocab_size, config.model_dim
    params = {"embed.weight": Param("vocab", (vocab, E), (("model.embed_tokens.weight", (vocab, E)),))}
    for i in range(config.num_layers):
        for path, param in _layer_params(config, f"model.layers.{i}.").items():
            params[f"layers.{i}.{path}"] = param
    params["final_norm.weight"] = _vector("model.norm.weight", E)
    if not config.tie_embeddings:
        params["lm_head.weight"] = Param("vocab", (vocab, E), (("lm_head.weight", (vocab, E)),))
    return params


def _layer_params(config: ModelConfig, prefix: str) -> dict[str, Param]:
    E, F, Hq, Hk, D = config.model_dim, config.ffn_dim, config.num_heads, config.num_kv_heads, config.head_dim
    G = Hq // Hk
    attn, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    heads = (("q", Hq), ("k", Hk), ("v", Hk))
    params = {
        "attn_norm.weight": _vector(f"{prefix}input_layernorm.weight", E),
        "attn.qkv.weight": Param(
            "qkv", (E, Hk, G + 2, D), tuple((f"{attn}{name}_proj.weight", (H * D, E)) for name, H in heads)
        ),
        "attn.o.weight": Param("o", (Hk, G, D, E), ((f"{attn}o_proj.weight", (E, Hq * D)),)),
        "mlp.gate_up.weight": Param(
            "gate_up", (E, 2, F), tuple((f"{mlp}{name}_proj.weight", (F, E)) for name in ("gate", "up"))
        ),
        "mlp.down.weight": Param("down", (F, E), ((f"{mlp}down_proj.weight", (E, F)),)),
    }
    if config.qkv_bias:
        sources = tuple((f"{attn}{name}_proj.bias", (H * D,)) for name, H in heads)
        params["attn.qkv.bias"] = Param("qkv_bias", (Hk, G + 2, D), sources)
    if config.qk_norm:
        params["attn.q_norm.weight"] = _vector(f"{attn}q_norm.weight", D)
        params["attn.k_norm.weight"] = _vector(f"{attn}k_norm.weight", D)
    if config.architecture == "gemma3":
        params["post_attn_norm.weight"] = _vector(f"{prefix}post_attention_layernorm.weight", E)
        params["mlp_norm.weight"] = _vector(f"{prefix}pre_feedforward_layernorm.weight", E)
        params["post_mlp_norm.weight"] = _vector(f"{prefix}post_feedforward_layernorm.weight", E)
    else:
        params["mlp_norm.weight"] = _vector(f"{prefix}post_attention_layernorm.weight", E)
    return params


def _vector(name: str, length: int) -> Param:
    return Param("vector", (length,), ((name, (length,)),))


def check_tensors(source: TensorSource, config: ModelConfig, where: str) -> None:
    """Compares the file's tensors with the model's.

    Raises:
        CheckpointError: tensors are missing, left over or misshapen; the message names them.
    """
    params = canonical_params(config, fused=source.fused)
    expected = dict(pair for param in params.values() for pair in param.sources)
    missing = [source.label(name) for name in expected if name not in source.shapes]
    # A tied model may still carry its head (a copy of the embedding), old files carry rope frequencies: both are
    # functions of what is loaded.
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    left_over = [
        source.label(name)
        for name in source.shapes
        if name not in expected and name not in ignored and not name.endswith(".rotary_emb.inv_freq")
    ]
    misshapen = [
        f"{source.label(name)} is {list(source.shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in source.shapes and source.shapes[name] != shape
    ]
    problems = [
        f"{len(names)} {what}: {shortened(names)}"
        for what, names in (("missing", missing), ("left over", left_over), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(f"the tensors of {where!r} don't match its config ({'; '.join(problems)})")


def fuse(kind: Kind, tensors: Sequence[Array], config: ModelConfig) -> Array:
    """The canonical parameter, from ``tensors`` in the order of ``Param.sources``. Traced under jit."""
    E, Hq, Hk, D = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
    G = Hq // Hk
    if kind == "qkv":
        per_head = [t.reshape(Hk, -1, D, E) for t in tensors]  # q [Hk, G, D, E], k and v [Hk, 1, D, E]
        return jnp.concatenate(per_head, axis=1).transpose(3, 0, 1, 2)
    if kind == "qkv_bias":
        return jnp.concatenate([t.reshape(Hk, -1, D) for t in tensors], axis=1)
    if kind == "o":
        return tensors[0].T.reshape(Hk, G, D, E)
    if kind == "gate_up":
        return jnp.stack(tensors).transpose(2, 0, 1)
    if kind == "down":
        return tensors[0].T
    return tensors[0]


def fitted_shape(param: Param, shape: tuple[int, ...]) -> bool:
    """Whether ``fit`` can turn the canonical parameter into ``shape``."""
    own = param.shape
    if param.kind == "vocab":
        return len(shape) == 2 and shape[0] >= own[0] and shape[1:] == own[1:]
    if param.kind in ("qkv", "qkv_bias", "o"):
        at = 1 if param.kind == "qkv" else 0
        kv, group = own[at], own[at + 1] - (0 if param.kind == "o" else 2)
        if len(shape) != len(own) or shape[at] % kv or group % (copies := shape[at] // kv):
            return False
        fitted = list(own)
        fitted[at : at + 2] = [kv * copies, group // copies + (0 if param.kind == "o" else 2)]
        return tuple(fitted) == shape
    return shape == own


def fit(kind: Kind, value: Array, shape: tuple[int, ...]) -> Array:
    """Pads the vocabulary with zero rows, or copies every KV head, so that ``value`` has ``shape``. Traced under jit.

    With ``c`` copies, KV head ``hk`` becomes heads ``hk*c .. hk*c+c-1``, which share its query heads in order.
    """
    if value.shape == shape:
        return value
    if kind == "vocab":
        return jnp.pad(value, ((0, shape[0] - value.shape[0]), (0, 0)))
    if kind == "o":
        return value.reshape(shape)
    at = 1 if kind == "qkv" else 0
    copies = shape[at] // value.shape[at]
    queries, keys_values = jnp.split(value, [value.shape[at + 1] - 2], axis=at + 1)
    queries = queries.reshape(*shape[: at + 1], shape[at + 1] - 2, shape[at + 2])
    return jnp.concatenate([queries, jnp.repeat(keys_values, copies, axis=at)], axis=at + 1)


def check_fits(params: dict[str, Param], abstract: dict[str, Any]) -> None:
    """Compares the canonical parameters with the model's own tree (by dotted path).

    Raises:
        CheckpointError: the model has other parameters, or of other shapes, than its config says.
    """
    wrong = sorted(set(params) ^ set(abstract))
    wrong += [
        f"{path} {list(params[path].shape)} -> {list(leaf.shape)}"
        for path, leaf in abstract.items()
        if path in params and not fitted_shape(params[path], leaf.shape)
    ]
    if wrong:
        raise CheckpointError(f"the model's parameters differ from its config's: {shortened(wrong)}")
