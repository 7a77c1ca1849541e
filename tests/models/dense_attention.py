"""Attention over the tokens of one sequence, at once and without a cache: the oracle that models are tested with."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Attend
from jaxserve.models.registry import Model, Params
from pallas_kernels.qkv_prologue.reference import heads


def dense_attend(config: ModelConfig, round_kv: Callable[[jax.Array], jax.Array] | None = None) -> Attend:
    """An ``attend`` for tokens at positions 0, 1, ...; pools pass through untouched.

    ``round_kv`` is what a cache makes of keys and of values, each [T, Hk, D].
    """

    def attend(layer, qkv, rope, norm, pool):  # [T, Hk, G+2, D]
        q, k, v = heads(qkv, rope, norm)  # [T, Hq, D], [T, Hk, D], [T, Hk, D]
        if round_kv is not None:
            k, v = round_kv(k), round_kv(v)
        group = q.shape[1] // k.shape[1]
        k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
        scores = jnp.einsum("thd,shd->hts", q, k, precision="highest", preferred_element_type=jnp.float32)
        distance = jnp.arange(q.shape[0])[:, None] - jnp.arange(q.shape[0])
        visible = distance >= 0
        if config.layers[layer].sliding_window is not None:
            visible &= distance < config.layers[layer].sliding_window
        shares = jax.nn.softmax(jnp.where(visible, scores * config.attention_scale, -jnp.inf), axis=-1)
        out = jnp.einsum("hts,shd->thd", shares, v.astype(jnp.float32), precision="highest")
        return out.astype(q.dtype), pool

    return attend


def dense_logits(model: Model, params: Params, token_ids: jax.Array, attend: Attend | None = None) -> jax.Array:
    """float32[T, V] of one sequence, compiled."""

    @jax.jit
    def run(params, token_ids):
        positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
        pools = (None,) * model.config.num_layers
        hidden, _ = model.hidden(params, token_ids, positions, pools, attend or dense_attend(model.config))
        return model.logits(params, hidden)

    return run(params, token_ids)


def random_params(model: Model, seed: int = 0) -> Params:
    """Normal weights scaled by 1/sqrt(fan in), norms and biases around zero to one."""
    leaves, tree = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    scaled = [
        jax.random.normal(key, leaf.shape, leaf.dtype) * (leaf.shape[0] ** -0.5 if len(leaf.shape) > 1 else 1.0)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, scaled)
