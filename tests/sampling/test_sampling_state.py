"""Slots: what a reset writes, what a commit counts, what the host refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_reference import LIMITS, Case, history, state_of

from jaxserve.errors import InvalidRequestError
from jaxserve.sampling import bitmask
from jaxserve.sampling.host import host_row, row_spec
from jaxserve.sampling.state import commit_tokens, init_state, reset_rows
from jaxserve.sampling_params import SamplingParams

V = 37
BUSY = Case(
    SamplingParams(
        temperature=0.3, top_k=4, top_p=0.5, min_p=0.1, presence_penalty=1.0, frequency_penalty=1.0,
        repetition_penalty=2.0, stop_token_ids=[1, 3], min_tokens=5, logit_bias={4: 1.0}, allowed_token_ids=[1, 4],
    ),
    [1, 1, 36],
    [4, 4, 0],
    bad_words=[[1, 2]],
)  # fmt: skip
PLAIN = Case(SamplingParams(), [7], [], seed=3, index=1)


def stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def poisoned(num_slots: int):
    rng = np.random.default_rng(0)
    state = init_state(num_slots, V, LIMITS)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.integers(-(2**31), 2**31, x.shape).astype(np.int32).view(x.dtype)), state
    )


def test_a_reset_leaves_nothing_behind():
    clean = state_of([BUSY, PLAIN], V)
    reset = state_of([BUSY, PLAIN], V, state=poisoned(2))
    for field in dataclasses.fields(clean):
        np.testing.assert_array_equal(getattr(reset, field.name), getattr(clean, field.name), err_msg=field.name)


def test_a_reset_writes_its_slots_only():
    before = poisoned(6)
    tokens, lengths = history([BUSY, PLAIN, PLAIN], 16, rubbish=V + 5)
    rows = stack([case.row(V) for case in (BUSY, PLAIN, PLAIN)])
    after = jax.jit(reset_rows)(before, np.array([4, 6, 1]), rows, tokens, lengths)  # slot 6 of 6 is dropped
    clean = state_of([BUSY, PLAIN], V)
    for field in dataclasses.fields(clean):
        old, new, want = (np.asarray(getattr(s, field.name)) for s in (before, after, clean))
        assert np.array_equal(new[[0, 2, 3, 5]].view(np.int32), old[[0, 2, 3, 5]].view(np.int32)), field.name
        np.testing.assert_array_equal(new[[4, 1]], want, err_msg=field.name)


def test_counts_and_prompt_mask_come_from_the_tokens():
    state = state_of([BUSY, PLAIN], V)
    counts = np.zeros((2, V), int)
    counts[0, 4], counts[0, 0] = 2, 1
    np.testing.assert_array_equal(state.output_counts, counts)
    np.testing.assert_array_equal(bitmask.unpack(state.prompt_mask, V)[0].nonzero()[0], [1, 36])


def test_commit_counts_what_was_emitted():
    state = state_of([BUSY, PLAIN, PLAIN], V)
    ids = np.array([[4, 9, 9], [5, 5, 5], [8, 8, 8], [1, 2, 3]], np.int32)
    after = jax.jit(commit_tokens, donate_argnums=0)(state, np.array([0, 2, 3, 1]), ids, np.array([2, 3, 3, 0]))
    counts = np.zeros((3, V), int)
    counts[0, [4, 0, 9]] = 3, 1, 1
    counts[2, 5] = 3
    np.testing.assert_array_equal(after.output_counts, counts)


def test_a_resumed_choice_has_the_counts_it_had():
    straight = jax.jit(commit_tokens)(state_of([PLAIN], V), np.array([0]), np.array([[5, 6, 5]]), np.array([3]))
    resumed = state_of([dataclasses.replace(PLAIN, output=[5, 6, 5])], V)
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


def test_rows_have_the_shapes_they_promise():
    for case in (BUSY, PLAIN):
        row = case.row(V)
        assert {name: (x.shape, x.dtype) for name, x in row.items()} == row_spec(V, LIMITS)
        assert all(x.dtype.itemsize == 4 for x in row.values())


@pytest.mark.parametrize(
    ("settings", "bad_words", "field"),
    [
        ({"stop_token_ids": [3, 4, 5, 6]}, [], "stop_token_ids"),
        ({"logit_bias": {1: 1, 2: 1, 3: 1, 4: 1}}, [], "logit_bias"),
        ({"logit_bias": {37: 1}}, [], "logit_bias"),
        ({"allowed_token_ids": [37]}, [], "allowed_token_ids"),
        ({}, [[1]] * 4, "bad_words"),
        ({}, [[1, 2, 3, 4]], "bad_words"),
        ({}, [[37]], "bad_words"),
    ],
)
def test_nothing_is_dropped_silently(settings, bad_words, field):
    with pytest.raises(InvalidRequestError, match=f"^{field}"):
        host_row(
            SamplingParams(**settings), seed=0, choice_index=0, eos_token_ids=[2], prompt_len=1,
            bad_words_ids=bad_words, vocab_size=V, limits=LIMITS,
        )  # fmt: skip


def test_bit_masks_round_trip():
    flags = np.random.default_rng(0).random((3, 64)) < 0.5
    words = bitmask.pack(flags)
    np.testing.assert_array_equal(bitmask.unpack(words, 64), flags)
    np.testing.assert_array_equal(bitmask.unpack(words, 37), flags[:, :37])
    assert not bitmask.unpack(words, 70)[:, 64:].any()
    np.testing.assert_array_equal(words[1], bitmask.from_ids(np.flatnonzero(flags[1]).tolist(), 64))
