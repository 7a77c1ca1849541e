"""The product with a weight: one plain matrix product, float32 where it is promised, packed weights by dispatch."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense_logits, random_params
from small_configs import LLAMA

from jaxserve.models.linear import einsum
from jaxserve.models.registry import build


@pytest.mark.parametrize(
    "spec, x, weight",
    [
        ("te,ehgd->thgd", (5, 6), (6, 2, 3, 4)),
        ("thgd,hgde->te", (5, 2, 3, 4), (2, 3, 4, 6)),
        ("te,ezf->tzf", (5, 6), (6, 2, 7)),
        ("me,ve->mv", (5, 6), (11, 6)),
    ],
)
def test_equals_einsum(spec, x, weight):
    x, weight = (np.random.default_rng(0).normal(size=shape) for shape in (x, weight))
    product = einsum(spec, jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32))
    np.testing.assert_allclose(product, np.einsum(spec, x, weight), atol=1e-5)


def test_float32_asks_for_highest_precision_and_bfloat16_for_a_float32_result():
    def jaxpr(dtype, out_dtype):
        operands = jnp.zeros((2, 3), dtype), jnp.zeros((5, 3), dtype)
        return str(jax.make_jaxpr(lambda x, w: einsum("me,ve->mv", x, w, out_dtype))(*operands))

    assert "HIGHEST" in jaxpr("float32", None)
    assert "HIGHEST" not in jaxpr("bfloat16", None)
    assert "preferred_element_type=float32" in jaxpr("bfloat16", jnp.float32)


@pytest.mark.parametrize("spec", ["thgd,ghde->te", "te,ehgd->tghd"])
def test_refuses_what_would_transpose_a_weight(spec):
    with pytest.raises(ValueError, match="isn't one plain matrix product"):
        einsum(spec, jnp.zeros((2,) * spec.index(",")), jnp.zeros((2, 2, 2, 2)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowScaled:
    """int8 with a scale for each row: the least that a packed weight can be."""

    values: jax.Array  # int8[V, E]
    scales: jax.Array  # float32[V]

    def einsum(self, spec, x, out_dtype):
        return einsum(spec, x, self.values.astype(x.dtype), out_dtype) * self.scales.astype(out_dtype)


def test_a_model_multiplies_with_a_packed_weight():
    model = build(LLAMA, dtype="float32", padded_vocab=131)
    params = random_params(model)
    values = jax.random.randint(jax.random.key(1), (131, 48), -127, 128)
    scales = jax.random.uniform(jax.random.key(2), (131,))
    packed = params | {"lm_head": {"weight": RowScaled(values.astype(jnp.int8), scales)}}
    plain = params | {"lm_head": {"weight": values * scales[:, None]}}
    logits = [dense_logits(model, tree, jnp.arange(7)) for tree in (packed, plain)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-3)
