"""Packed weights: how far off they may be, and that a product with them is the product with what they stand for."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from dense_attention import dense_logits, random_params
from small_configs import LLAMA

from jaxserve.models.linear import einsum, take
from jaxserve.models.quantized import (
    GROUP_LEN,
    group_len,
    quantize_fp8,
    quantize_fp8_products,
    quantize_int4,
    quantize_int8,
)
from jaxserve.models.registry import build

PRODUCTS = {  # spec: x, weight, contracted axes of the weight
    "te,ehgd->thgd": ((5, 128), (128, 2, 3, 4), (0,)),
    "thgd,hgde->te": ((5, 2, 3, 64), (2, 3, 64, 6), (0, 1, 2)),
    "te,ezf->tzf": ((5, 192), (192, 2, 7), (0,)),
    "tf,fe->te": ((5, 76), (76, 9), (0,)),
    "me,ve->mv": ((5, 48), (11, 48), (1,)),
}


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def widened8(packed, shape, contracted):
    return np.asarray(packed.values, np.float64) * np.expand_dims(np.asarray(packed.scales, np.float64), contracted)


def widened4(packed, shape, contracted):
    """Each value with its group's scale and offset, element by element."""
    values, scales, offsets = (np.asarray(x, np.float64) for x in (packed.values, packed.scales, packed.offsets))
    length = shape[contracted[-1]] // scales.shape[contracted[-1]]
    repeat = (np.repeat(x, length, axis=contracted[-1]) for x in (scales, offsets))
    scale, offset = repeat
    return values * scale + offset


BOTH = [(quantize_int8, widened8), (quantize_fp8, widened8), (quantize_int4, widened4)]


@pytest.mark.parametrize("quantize, widened", BOTH)
@pytest.mark.parametrize("spec", PRODUCTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_is_that_of_the_widened_weight(spec, quantize, widened, dtype):
    x_shape, shape, contracted = PRODUCTS[spec]
    x = jnp.asarray(draw(x_shape, 1), dtype)
    packed = quantize(jnp.asarray(draw(shape)), contracted)
    got = einsum(spec, x, packed, jnp.float32)
    assert got.dtype == jnp.float32
    want = np.einsum(spec, np.asarray(x, np.float64), widened(packed, shape, contracted))
    tolerance = 1e-5 if dtype == "float32" else 0.02
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())
    assert einsum(spec, x, packed).dtype == dtype


@pytest.mark.parametrize("spec", PRODUCTS)
def test_int8_is_off_by_half_a_step(spec):
    _, shape, contracted = PRODUCTS[spec]
    weight = draw(shape)
    packed = quantize_int8(jnp.asarray(weight), contracted)
    step = np.abs(weight).max(axis=contracted, keepdims=True) / 127
    assert packed.values.dtype == jnp.int8
    assert (np.abs(widened8(packed, shape, contracted) - weight) <= step * 0.5001).all()
    assert (np.abs(np.asarray(packed.values)).max(axis=contracted) == 127).all()


def near(x, axes):
    """Rounded to float8_e4m3fn with the largest magnitude along the axes at 448, in float64."""
    scale = np.abs(x).max(axis=axes, keepdims=True) / 448.0
    return (x / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


@pytest.mark.parametrize("spec", PRODUCTS)
def test_fp8_is_off_by_half_a_step_of_three_bits(spec):
    _, shape, contracted = PRODUCTS[spec]
    weight = draw(shape)
    packed = quantize_fp8(jnp.asarray(weight), contracted)
    assert packed.values.dtype == jnp.float8_e4m3fn
    smallest = np.abs(weight).max(axis=contracted, keepdims=True) / 448 * 2.0**-10  # half the least subnormal
    error = np.abs(widened8(packed, shape, contracted) - weight)
    assert (error <= np.maximum(np.abs(weight) * 2.0**-4, smallest) * 1.0001).all()
    assert (np.abs(np.asarray(packed.values, np.float32)).max(axis=contracted) == 448).all()


@pytest.mark.parametrize("spec", PRODUCTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_in_fp8_round_each_token_too(spec, dtype):
    x_shape, shape, contracted = PRODUCTS[spec]
    x = jnp.asarray(draw(x_shape, 1) * 10.0 ** np.arange(5).reshape(5, *[1] * (len(x_shape) - 1)), dtype)
    x = x.at[3].set(0)
    weight = draw(shape)
    packed = quantize_fp8_products(jnp.asarray(weight), contracted)
    assert packed.values.dtype == jnp.float8_e4m3fn
    got = einsum(spec, x, packed, jnp.float32)
    wide = np.asarray(x, np.float64)
    rounded = near(np.where(wide == 0, 1e-30, wide), tuple(range(1, x.ndim)))
    want = np.einsum(spec, rounded, near(weight.astype(np.float64), contracted))
    each = np.abs(want).reshape(5, -1).max(axis=1).reshape(5, *[1] * (want.ndim - 1))
    # A few values lie so near the middle between two that the division's last bit decides.
    assert (np.abs(np.asarray(got, np.float64) - want) <= 0.02 * each + 1e-20).all()
    assert (np.abs(np.asarray(got, np.float64) - want) <= 1e-4 * each + 1e-20).mean() > 0.9
    assert (np.asarray(got[3]) == 0).all()
    assert einsum(spec, x, packed).dtype == dtype


@pytest.mark.parametrize("spec", PRODUCTS)
def test_int4_is_off_by_half_a_step_and_the_rounding_of_its_scale(spec):
    _, shape, contracted = PRODUCTS[spec]
    weight = draw(shape) + 0.3  # affine: what is off centre costs nothing
    packed = quantize_int4(jnp.asarray(weight), contracted)
    assert packed.values.dtype == jnp.uint4
    axis = contracted[-1]
    length = group_len(shape[axis])
    grouped = np.moveaxis(weight, axis, -1).reshape(-1, length)
    spread = grouped.max(axis=1) - grouped.min(axis=1)
    error = np.abs(np.moveaxis(widened4(packed, shape, contracted) - weight, axis, -1).reshape(-1, length))
    assert (error <= (spread / 15 * 0.51 + 0.006 * np.abs(grouped).max(axis=1))[:, None] + spread[:, None] * 4e-3).all()


def test_groups_divide_the_axis():
    assert [group_len(size) for size in (1, 12, 64, 76, 128, 576, 131)] == [1, 12, 64, 38, 64, 64, 1]
    assert all(size % group_len(size) == 0 and group_len(size) <= GROUP_LEN for size in range(1, 300))


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4, quantize_fp8, quantize_fp8_products])
def test_weights_of_zeros_stay_zeros(quantize):
    packed = quantize(jnp.zeros((128, 4)), (0,))
    np.testing.assert_array_equal(einsum("te,ef->tf", jnp.ones((2, 128)), packed), 0)


@pytest.mark.parametrize("quantize, widened", BOTH)
def test_rows_of_a_table(quantize, widened):
    table = draw((11, 128))
    packed = quantize(jnp.asarray(table), (1,))
    rows = take(packed, jnp.array([3, 0, 10, 99, -5]), jnp.float32)
    want = widened(packed, table.shape, (1,))[[3, 0, 10, 10, 0]]  # clipped
    np.testing.assert_allclose(rows, want, atol=1e-6)
    assert take(packed, jnp.array([1]), jnp.bfloat16).dtype == jnp.bfloat16


def test_rows_of_a_plain_table_are_clipped():
    table = jnp.asarray(draw((11, 6)))
    np.testing.assert_array_equal(
        take(table, jnp.array([-(2**31), 4, 2**31 - 1]), table.dtype), table[np.array([0, 4, 10])]
    )


@pytest.mark.parametrize("quantize, widened", BOTH)
def test_a_whole_model_runs_on_packed_weights(quantize, widened):
    """Every layer's projections, against the same model on the widened weights."""
    model = build(LLAMA, dtype="float32", padded_vocab=LLAMA.vocab_size)
    params = random_params(model)
    axes = {"qkv": (0,), "o": (0, 1, 2), "gate_up": (0,), "down": (0,)}

    def convert(pack):
        layers = [
            {
                group: {
                    name: node | {"weight": pack(node["weight"], axes[name])} if name in axes else node
                    for name, node in parts.items()
                }
                if group in ("attn", "mlp")
                else parts
                for group, parts in layer.items()
            }
            for layer in params["layers"]
        ]
        return params | {"layers": layers}

    packed = convert(quantize)
    plain = convert(lambda w, axes: jnp.asarray(widened(quantize(w, axes), w.shape, axes), jnp.float32))
    ids = jnp.arange(9)
    got, want, exact = (dense_logits(model, tree, ids) for tree in (packed, plain, params))
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, atol=1e-4 * scale)
    assert float(jnp.abs(got - exact).max()) > 1e-4 * scale
    assert jax.tree.structure(packed) != jax.tree.structure(params)
