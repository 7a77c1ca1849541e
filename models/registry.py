"""``ModelConfig`` -> ``Model``: the abstract build of a family, split once into a static graph and a tree of shapes.

Shape letters: T packed tokens, M rows of the LM head, E model dim, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.ragged_paged_attention.types import KVPool

from .config import ModelConfig
from .fused import GPU, FusedLayers, fuse_layers
from .gemma3 import Gemma3
from .layers import Attend, LMHead
from .llama import Llama
from .mistral import Mistral
from .qwen2 import Qwen2
from .qwen3 import Qwen3

Params = dict[str, Any]  # nested dict (``layers`` is a list) whose leaves are weights

_FAMILIES: dict[str, type[Llama]] = {
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "gemma3": Gemma3,
}


@dataclass(frozen=True, eq=False)
class Model:
    """A model without weights, hashed by identity: a jitted step closes over it, or takes it as a static argument.

    Attributes:
        config: as built, so with the number of KV heads that the build was asked for.
        dtype: of parameters and activations.
        padded_vocab: rows of ``embed.weight`` and ``lm_head.weight``.
        fused: how layers run in one launch or four each where there are few tokens; or why they don't.
        params: tree of ``jax.ShapeDtypeStruct``; ``params["layers"]`` is a list, all else are dicts.
        param_axes: the same tree with a tuple of logical axis names at every leaf.
    """

    config: ModelConfig
    dtype: jnp.dtype
    padded_vocab: int
    params: Params
    param_axes: Params
    fused: FusedLayers | str
    trunk: nnx.GraphDef
    head: nnx.GraphDef

    @property
    def layer_size(self) -> float:
        """Weights of a layer, the mean over all."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params["layers"])) / self.config.num_layers

    def launches(self, num_tokens: int) -> int:
        """Of our kernels between two layers' attention, in a step of so many tokens, padding included: 0, 1 or 4."""
        return 0 if isinstance(self.fused, str) else self.fused.launches(num_tokens)

    def hidden(
        self,
        params: Params,
        token_ids: jax.Array,  # int32[T]
        positions: jax.Array,  # int32[T], absolute
        kv: tuple[KVPool, ...],  # one a layer
        attend: Attend,
    ) -> tuple[jax.Array, tuple[KVPool, ...]]:
        """Runs embedding and layers; returns hidden states [T, E] before the final norm, and the written pools.

        ``attend`` (``layers.Attend``) gets a layer's qkv as it was projected: it applies qk-norm and rope, writes k and
        v, then attends with the scale and window of ``config.layers[layer]``. ``params`` may be the whole tree or
        ``trunk_params`` of it.
        """
        trunk = self.trunk_params(params)
        module = nnx.merge(self.trunk, {**trunk, "layers": dict(enumerate(trunk["layers"]))})
        return module(token_ids, positions, kv, attend)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:  # [M, E] -> float32[M, V]
        """Final norm, LM head and soft cap; padded ids are -inf. ``params``: whole tree or ``head_params`` of it."""
        with jax.named_scope("lm_head"):
            return nnx.merge(self.head, self.head_params(params))(hidden)

    def trunk_params(self, params: Params) -> Params:
        """The part of ``params`` that ``hidden`` reads: fewer arguments make a cheaper dispatch."""
        return {name: params[name] for name in ("embed", "layers")}

    def head_params(self, params: Params) -> Params:
        """The part of ``params`` that ``logits`` reads."""
        return {name: params[name] for name in ("final_norm", "embed" if self.config.tie_embeddings else "lm_head")}


def build(
    config: ModelConfig,
    *,
    dtype: Any,
    padded_vocab: int,
    num_kv_heads: int | None = None,
    gpu: GPU | str = "no GPU was named",
) -> Model:
    """Builds a model abstractly: no array is made.

    Args:
        dtype: of parameters and activations, "float32" or "bfloat16".
        padded_vocab: rows of the vocabulary's tables, at least ``config.vocab_size``.
        num_kv_heads: KV heads to build with, a multiple of the config's own: each is repeated so that more devices than
            KV heads can share the model (``sharding.kv_heads_for``).
        gpu: that has the whole model to itself, so that a kernel may compute more than attention; or why there is none.

    Raises:
        ValueError: an unknown architecture, or sizes that don't fit together.
    """
    if config.architecture not in _FAMILIES:
        raise ValueError(f"unknown architecture {config.architecture!r}; known: {', '.join(_FAMILIES)}")
    if padded_vocab < config.vocab_size:
        raise ValueError(f"padded_vocab is {padded_vocab}; allowed: at least the vocabulary's {config.vocab_size}")
    heads = config.num_kv_heads if num_kv_heads is None else num_kv_heads
    if heads % config.num_kv_heads or config.num_heads % heads:
        raise ValueError(
            f"num_kv_heads is {heads}; allowed: a multiple of {config.num_kv_heads} that divides {config.num_heads}"
        )
    config = dataclasses.replace(config, num_kv_heads=heads)
    dtype = jnp.dtype(dtype)
    family = _FAMILIES[config.architecture]
    layer_type = family.layer_type
    fused = fuse_layers(config, norm_offset=layer_type.norm_type.offset, plain=layer_type.plain, dtype=dtype, gpu=gpu)
    graph, trunk_state = nnx.split(family(config, dtype, padded_vocab, None if isinstance(fused, str) else fused))
    head, head_state = nnx.split(LMHead(config, dtype, padded_vocab, layer_type.norm_type))
    return Model(
        config=config,
        dtype=dtype,
        padded_vocab=padded_vocab,
        params=_tree(trunk_state, head_state, lambda variable: variable.get_value()),
        param_axes=_tree(trunk_state, head_state, lambda variable: variable.get_metadata("axes")),
        fused=fused,
        trunk=graph,
        head=head,
    )


def _tree(trunk: nnx.State, head: nnx.State, leaf: Any) -> Params:
    """Both states as one tree; a tied head's table is the embedding and falls on it."""

    def convert(node: Any) -> Any:
        return leaf(node) if isinstance(node, nnx.Variable) else {name: convert(child) for name, child in node.items()}

    tree = {**convert(head), **convert(trunk)}
    return tree | {"layers": [tree["layers"][i] for i in range(len(tree["layers"]))]}
