"""Prompt lookup against a search in plain Python."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.speculation.ngram import propose

MAX_LEN, ROWS = 16, 3


def by_hand(tokens: list[int], max_drafts: int, K: int, n_min: int, n_max: int) -> list[int]:
    size = len(tokens)
    for n in range(n_max, n_min - 1, -1):
        if n >= size:
            continue
        suffix = tokens[size - n :]
        for begin in range(size - n - 1, -1, -1):
            if tokens[begin : begin + n] == suffix:
                return tokens[begin + n :][: max(0, min(K, max_drafts))]
    return []


@functools.cache
def compiled(K: int, n_min: int, n_max: int):
    return jax.jit(functools.partial(propose, K=K, n_min=n_min, n_max=n_max))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_equals_a_search_by_hand(data):
    K, n_min, n_max = data.draw(st.sampled_from([(4, 2, 3), (1, 1, 1), (3, 1, 4), (8, 3, 3)]))
    rubbish = data.draw(st.sampled_from([0, 1, 7]))
    rows = [data.draw(st.lists(st.integers(0, 2), max_size=MAX_LEN)) for _ in range(ROWS)]
    max_drafts = np.array([data.draw(st.integers(-1, K + 2)) for _ in range(ROWS)], np.int32)
    tokens = np.full((ROWS, MAX_LEN), rubbish, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in rows], np.int32)
    drafts, num_drafts = compiled(K, n_min, n_max)(tokens, lengths, max_drafts)
    assert drafts.shape == (ROWS, K) and drafts.dtype == num_drafts.dtype == np.int32
    for r in range(ROWS):
        want = by_hand(rows[r], int(max_drafts[r]), K, n_min, n_max)
        assert np.asarray(drafts)[r].tolist() == want + [-1] * (K - len(want))
        assert int(num_drafts[r]) == len(want)


@pytest.mark.parametrize(
    ("text", "drafts"),
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1, 2, 3]),
        ([1, 2, 5, 8, 1, 2, 6, 8, 1, 2], [6, 8, 1, 2]),  # the most recent of two
        ([4, 1, 2, 7, 1, 2, 3, 4, 1, 2], [7, 1, 2, 3]),  # a longer match beats a more recent one
        ([6, 6, 6, 6], [6]),  # may overlap the suffix itself; nothing is known past the end
        ([1, 2, 3, 4], []),
        ([1], []),
        ([], []),
    ],
)
def test_examples(text, drafts):
    tokens = np.zeros((1, 12), np.int32)
    tokens[0, : len(text)] = text
    found, count = compiled(4, 2, 3)(tokens, np.array([len(text)], np.int32), np.array([4], np.int32))
    assert np.asarray(found)[0, : int(count[0])].tolist() == drafts
