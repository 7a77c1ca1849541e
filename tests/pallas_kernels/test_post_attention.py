"""A layer's products in one launch: how the work is shared, what is refused, and on a GPU what comes out."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from post_attention_operands import SPEC, check_errors, make_operands

from pallas_kernels.post_attention import api
from pallas_kernels.post_attention.plan import COLUMNS, ITEM_ROWS, Phase, Shape, phases, word_places
from pallas_kernels.post_attention.types import LayerWeights, NextWeights, PostAttentionSpec, Words

QWEN3 = Shape(M=8, A=2048, E=1024, F=3072, Q=4096)
SMOLLM2 = Shape(M=16, A=576, E=576, F=1536, Q=960)  # no multiples of 128
LEAST = Shape(M=8, A=64, E=64, F=64, Q=64)

lines = st.builds(
    lambda columns, steps, parts, ctas: Phase(columns, steps, 128, parts, min(ctas, columns * steps)),
    *(st.integers(1, most) for most in (40, 30, 2, 140)),
)


# -- how the work is shared -------------------------------------------------------------------------------------------


@given(lines)
def test_shares_are_equal_and_every_unit_is_in_one(line: Phase) -> None:
    begins = [line.begin(cta) for cta in range(line.num_ctas + 1)]
    lengths = [b - a for a, b in pairwise(begins)]
    assert begins[0] == 0 and begins[-1] == line.num_units
    assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1
    for cta, (begin, end) in enumerate(pairwise(begins)):
        assert {line.cta_of(unit) for unit in range(begin, end)} == {cta}


@given(lines)
def test_a_column_is_the_sum_of_its_pieces(line: Phase) -> None:
    """Each share's pieces of ones, added as an item adds them: every column counts all its units once."""
    pieces, slots = {}, set()
    for cta in range(line.num_ctas):
        for unit in range(line.begin(cta), line.begin(cta + 1)):
            column = unit // line.num_slices
            slot = cta * line.max_cta_pieces + column - line.first_column(cta)
            pieces[slot] = pieces.get(slot, 0) + 1
            slots.add((slot, column))
    assert len(slots) == len(pieces), "a slot holds one column's piece"
    assert max(pieces) < line.num_ctas * line.max_cta_pieces
    for column in range(line.num_columns):
        first = line.cta_of(column * line.num_slices)
        owners = range(first, first + line.num_pieces(column))
        assert line.num_pieces(column) <= line.max_column_pieces
        found = [pieces[owner * line.max_cta_pieces + column - line.first_column(owner)] for owner in owners]
        assert sum(found) == line.num_slices


@given(lines, st.data())
def test_the_kernel_reckons_as_the_host_does(line: Phase, data: st.DataObject) -> None:
    unit = data.draw(st.integers(0, line.num_units - 1))
    cta = line.cta_of(unit)
    for method, value in ((line.begin, cta), (line.cta_of, unit), (line.first_column, cta)):
        assert int(method(jnp.int32(value))) == method(value)
    column = line.first_column(cta)
    assert int(line.num_pieces(jnp.int32(column))) == line.num_pieces(column)


@pytest.mark.parametrize("shape", [QWEN3, SMOLLM2, replace(QWEN3, M=32)])
@pytest.mark.parametrize("num_ctas", [1, 78, 132])
def test_words_have_places_of_their_own(shape: Shape, num_ctas: int) -> None:
    places = word_places(shape, num_ctas)
    line = phases(shape, num_ctas)
    pieces = [p.num_ctas * p.max_cta_pieces * p.num_parts * shape.M * COLUMNS for p in line]
    activations = [shape.M * p.slice_len * p.num_slices // 2 for p in line[1:]]
    squares = [shape.M * places.square_stride] * 2
    for begins, sizes, end in (
        (places.pieces, pieces, places.num_piece_words),
        ((*places.activations, *places.squares), activations + squares, places.num_words),
    ):
        assert [a + size for a, size in zip(begins, sizes, strict=True)] == [*begins[1:], end]
        assert all(begin % 4 == 0 for begin in begins), "chunks of 16 bytes"
    assert places.square_stride % 4 == 0 and places.square_stride >= shape.E // COLUMNS


def test_phases_cover_their_matrices() -> None:
    for shape, depth in ((QWEN3, 128), (SMOLLM2, 64)):
        sizes = [(p.num_slices * p.slice_len, p.num_parts * p.num_columns * COLUMNS) for p in phases(shape, 132)]
        A, E, F, Q = shape.A, shape.E, shape.F, shape.Q
        assert sizes == [(A, E), (E, 2 * F), (F, E), (E, Q)]
        assert {p.slice_len for p in phases(shape, 132)} == {depth}


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"M": 4}, "multiples of 8, not 4"),
        ({"M": 0}, "multiples of 8, not 0"),
        ({"M": 72}, "in one launch: 72 rows, above 32; in four: 72 rows, above 64"),
        ({"M": 40, "Q": 64}, "in four: a product of 1024 x 64 for only 8 CTAs"),
        ({"E": 1000}, "model dim is 1000, no multiple of 64"),
        (
            {"A": 4096, "E": 4160, "F": 14336, "Q": 6144},
            "a layer has 422 MiB, above 64; in four: a product of 4160 x 14336",
        ),
    ],
)
def test_shapes_that_it_does_not_take(changes: dict[str, int], reason: str) -> None:
    assert reason in (api.supports(replace(QWEN3, **changes), SPEC, jnp.bfloat16, num_ctas=132) or "")


def test_what_else_it_does_not_take() -> None:
    def why(shape: Shape = QWEN3, spec: PostAttentionSpec = SPEC, dtype: str = "bfloat16", **gpu: str) -> str:
        return api.supports(shape, spec, dtype, num_ctas=132, **gpu) or "none"

    assert why() == why(SMOLLM2, replace(SPEC, activation="gelu_tanh")) == "none"
    assert "capability 9.0" in why(capability="8.0") and "capability 9.0" in why(capability="10.0")
    assert "float32" in why(dtype="float32")
    assert "not relu" in why(spec=replace(SPEC, activation="relu"))
    assert "in 132 pieces" in why(Shape(M=8, A=8448, E=64, F=64, Q=64))


def test_operands_that_do_not_fit_are_named() -> None:
    tiny = Shape(M=8, A=64, E=128, F=192, Q=64)
    attended, x, layer, following = make_operands(tiny)
    words = api.empty_words(tiny, 4)
    with pytest.raises(ValueError, match=r"gate_up is bfloat16\[128, 383\]; expected bfloat16\[128, 384\]"):
        odd = layer._replace(gate_up=layer.gate_up[:, 1:])
        api.post_attention(attended, x, odd, following, words, SPEC, 4)
    with pytest.raises(ValueError, match=r"qkv is float32\[128, 64\]; expected bfloat16"):
        odd = following._replace(qkv=following.qkv.astype(jnp.float32))
        api.post_attention(attended, x, layer, odd, words, SPEC, 4)
    with pytest.raises(api.UnsupportedPostAttentionError, match="multiples of 8, not 3"):
        api.post_attention(attended[:3], x[:3], layer, following, words, SPEC, 4)


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [QWEN3, SMOLLM2, replace(QWEN3, M=32)])
def test_the_kernel_is_traced_anywhere(shape: Shape) -> None:
    """Without a GPU as well, so that what JAX warns of is seen; that it compiles is a gate's matter."""
    operands = jax.eval_shape(lambda: make_operands(shape))
    words = jax.eval_shape(lambda: api.empty_words(shape, 132))
    run = jax.jit(api.post_attention, static_argnums=(5, 6))
    x, qkv, left = run.trace(*operands, words, SPEC, 132).out_info
    assert (x.shape, qkv.shape) == ((shape.M, shape.E), (shape.M, shape.Q))
    assert [line.shape for line in left] == [line.shape for line in words]


@pytest.mark.gpu
class TestOnHopper:
    """Against the reference in float32, whose rounding errors in bfloat16 are the yardstick."""

    @staticmethod
    def run(
        operands: tuple[jax.Array, jax.Array, LayerWeights, NextWeights],
        spec: PostAttentionSpec = SPEC,
        words: Words | None = None,
    ) -> tuple[jax.Array, jax.Array, Words]:
        attended, x, layer, following = operands
        num_ctas = jax.devices()[0].core_count
        if words is None:
            shape = Shape(len(x), attended.shape[1], x.shape[1], layer.down.shape[0], following.qkv.shape[1])
            words = api.empty_words(shape, num_ctas)
        return jax.jit(api.post_attention, static_argnums=(5, 6))(attended, x, layer, following, words, spec, num_ctas)

    @pytest.mark.parametrize("rows", [8, 16, 24, 32])
    @pytest.mark.parametrize("shape", [QWEN3, SMOLLM2, LEAST], ids=["qwen3", "smollm2", "least"])
    @pytest.mark.parametrize("spec", [SPEC, PostAttentionSpec(1e-5, 1.0, "gelu_tanh")], ids=["silu", "gelu_from_one"])
    def test_it_errs_no_more_than_xla_does(self, rows: int, shape: Shape, spec: PostAttentionSpec) -> None:
        operands = make_operands(replace(shape, M=rows), spec)
        got = self.run(operands, spec)
        check_errors(got[:2], operands, spec)

    @pytest.mark.parametrize("rows", [8, 32])
    @pytest.mark.parametrize("shape", [QWEN3, SMOLLM2, LEAST], ids=["qwen3", "smollm2", "least"])
    def test_launches_pass_words_on_and_are_equal(self, rows: int, shape: Shape) -> None:
        """Twenty in a row, of three inputs in turn: bit for bit what the first of its kind was, and all emptied."""
        cases = [make_operands(replace(shape, M=rows), seed=seed) for seed in range(3)]
        first, words = {}, None
        for number in range(20):
            x, qkv, words = self.run(cases[number % 3], words=words)
            assert all(bool((line == -1).all()) for line in (words.pieces, words.current))
            want = first.setdefault(number % 3, (x, qkv))
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(want[0], np.float32))
            np.testing.assert_array_equal(np.asarray(qkv, np.float32), np.asarray(want[1], np.float32))

    @pytest.mark.parametrize("bits", [0xFFFF, 0x7FC0, 0xFF80], ids=["empty_word", "nan", "infinity"])
    def test_no_number_stops_it(self, bits: int) -> None:
        """Rows of NaN, with the bits of a word that isn't written too: they spoil their own row, and nothing waits."""
        attended, x, layer, following = make_operands(QWEN3)
        bad = jax.lax.bitcast_convert_type(jnp.uint16(bits), jnp.bfloat16)
        want = self.run((attended, x, layer, following))
        got = self.run((attended.at[2].set(bad), x.at[5].set(bad), layer, following))
        spoiled = np.isin(np.arange(ITEM_ROWS), (2, 5))
        for mine, clean in zip(got[:2], want[:2], strict=True):
            mine, clean = (np.asarray(a, np.float32) for a in (mine, clean))
            np.testing.assert_array_equal(mine[~spoiled], clean[~spoiled])
            assert np.isnan(mine[spoiled]).any(axis=1).all()
