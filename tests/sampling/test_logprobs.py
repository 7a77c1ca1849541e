"""Log-probabilities, ranks and candidates against numpy."""

import functools

import jax
import numpy as np
import pytest

from jaxserve.sampling.logprobs import compute, prompt_logprobs, top_candidates


def expected(logits: np.ndarray, token_ids: np.ndarray, count: int):
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    logprobs = wide - (top + np.log(np.exp(wide - top).sum(axis=1, keepdims=True)))
    order = np.stack([np.lexsort((np.arange(len(row)), -row)) for row in wide])
    rank = np.array([int(np.flatnonzero(o == t)[0]) + 1 for o, t in zip(order, token_ids, strict=True)])
    take = order[:, :count]
    return logprobs[np.arange(len(wide)), token_ids], rank, take, np.take_along_axis(logprobs, take, axis=1)


@pytest.mark.parametrize(("width", "count"), [(37, 5), (37, 37), (101, 0), (1031, 20), (1031, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_numpy(width, count, ties):
    rng = np.random.default_rng(width + count)
    logits = rng.normal(0, 3, (6, width)).astype(np.float32)
    if ties:
        logits = np.round(logits / 3) * 3
    logits[0, 1:] = -np.inf
    token_ids = rng.integers(0, width, 6).astype(np.int32)
    token_ids[0] = 0
    ours = jax.jit(compute, static_argnums=2)(logits, token_ids, count)
    logprob, rank, top_ids, top = expected(logits, token_ids, count)
    np.testing.assert_allclose(ours.token_logprob, logprob, atol=1e-5)
    np.testing.assert_array_equal(ours.token_rank, rank)
    np.testing.assert_array_equal(ours.top_ids, top_ids)
    np.testing.assert_allclose(ours.top_logprobs, top, atol=1e-5)


def test_candidates_from_few_chunks_are_exact():
    # all of the largest in one chunk; one in each chunk; equal values across chunk borders
    logits = np.zeros((3, 1031), np.float32)
    logits[0, 256:276] = np.arange(20, 0, -1)
    logits[1, ::128] = np.arange(9, 0, -1)
    logits[2, 120:136] = 1
    values, ids = top_candidates(logits, 20)
    np.testing.assert_array_equal(ids[0], np.arange(256, 276))
    np.testing.assert_array_equal(ids[1], [*range(0, 1031, 128), *range(1, 12)])
    np.testing.assert_array_equal(ids[2], [*range(120, 136), 0, 1, 2, 3])
    assert values.shape == (3, 20)


def test_more_candidates_than_ids():
    logits = np.random.default_rng(0).normal(size=(2, 7)).astype(np.float32)
    values, ids = top_candidates(logits, 20)
    np.testing.assert_array_equal(ids[:, :7], np.argsort(-logits, axis=1))
    assert np.isneginf(np.asarray(values)[:, 7:]).all()


@pytest.mark.parametrize("chunk_rows", [1, 4, 64])
def test_prompt_logprobs_in_chunks(chunk_rows):
    rng = np.random.default_rng(4)
    hidden, head = rng.normal(size=(11, 8)).astype(np.float32), rng.normal(size=(8, 40)).astype(np.float32)
    targets = rng.integers(0, 37, 11).astype(np.int32)
    ours = jax.jit(
        functools.partial(
            prompt_logprobs, lm_head=lambda h: h @ head, vocab_size=37, max_logprobs=5, chunk_rows=chunk_rows
        )
    )(hidden, targets)
    logprob, rank, top_ids, top = expected((hidden @ head)[:, :37], targets, 5)
    np.testing.assert_allclose(ours.token_logprob, logprob, atol=1e-4)
    np.testing.assert_array_equal(ours.token_rank, rank)
    np.testing.assert_array_equal(ours.top_ids, top_ids)
    np.testing.assert_allclose(ours.top_logprobs, top, atol=1e-4)
