"""Acceptance, and that drafts, good or bad, change no token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import Limits
from jaxserve.sampling.host import host_row
from jaxserve.sampling.rows import make_rows
from jaxserve.sampling.sampler import sample
from jaxserve.sampling.state import commit_tokens, init_state, reset_rows
from jaxserve.sampling.tier import Tier, tier_for
from jaxserve.sampling_params import SamplingParams
from jaxserve.speculation.ngram import propose
from jaxserve.speculation.verify import accept

V, S, MAX_LEN, STEPS = 37, 8, 48, 30
LIMITS = Limits(max_stop_token_ids=4, max_logit_bias=3, max_bad_words=3, max_bad_word_len=3, max_logprobs=2)
EOS = (2,)

CHOICES = [  # settings, prompt, bad words
    (SamplingParams(temperature=0.0), [1, 2, 3], []),
    (SamplingParams(temperature=1.0), [4, 5], []),
    (SamplingParams(temperature=0.8, top_k=5, top_p=0.8, min_p=0.01), [4, 5], []),
    (SamplingParams(temperature=0.0, presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.2), [7, 7], []),
    (SamplingParams(temperature=1.2, frequency_penalty=-1.0, min_tokens=9, max_tokens=30), [8], []),
    (SamplingParams(temperature=0.0, bad_words=["x"], logit_bias={5: 2.0}), [9, 1], [[5, 5], [5, 6, 5], [30]]),
    (SamplingParams(temperature=0.9, allowed_token_ids=[2, 3, 5, 8, 13, 21, 34]), [1], []),
    (SamplingParams(temperature=0.7, repetition_penalty=0.8, logprobs=2), [20, 21, 22], []),
]


def start():
    rows = [
        host_row(
            params, seed=11, choice_index=i, eos_token_ids=EOS, prompt_len=len(prompt), bad_words_ids=bad_words,
            vocab_size=V, limits=LIMITS,
        )
        for i, (params, prompt, bad_words) in enumerate(CHOICES)
    ]  # fmt: skip
    tokens = np.full((S, MAX_LEN), 5, np.int32)
    for row, (_, prompt, _) in zip(tokens, CHOICES, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for _, prompt, _ in CHOICES], np.int32)
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    state = jax.jit(reset_rows)(init_state(S, V, LIMITS), np.arange(S), stacked, tokens, lengths)
    return state, jnp.asarray(tokens), jnp.asarray(lengths)


def toy_logits(tokens: jax.Array, ends: jax.Array) -> jax.Array:
    """A language model of two tokens of context; logits of the token at position ``ends`` [R, P] -> [R, P, V]."""
    table = jnp.asarray(np.random.default_rng(5).normal(0, 2.5, (64, V)).astype(np.float32))
    newest = jnp.take_along_axis(tokens, ends - 1, axis=1)
    older = jnp.take_along_axis(tokens, jnp.maximum(ends - 2, 0), axis=1)
    return table[(newest * 7 + older) % 64]


@functools.partial(jax.jit, static_argnames=("tier",))
def step(state, tokens, lengths, drafts, num_drafts, samples, tier=Tier.FULL):
    R, K = drafts.shape
    rows = jnp.arange(R)[:, None]
    positions = lengths[:, None] + jnp.arange(K)
    drafted = tokens.at[rows, positions].set(drafts, mode="drop")
    logits = toy_logits(drafted, jnp.minimum(lengths[:, None] + jnp.arange(K + 1), MAX_LEN))
    sample_rows = make_rows(state, jnp.arange(R), tokens, lengths, drafts)
    ids, logprobs = sample(
        logits.reshape(-1, V), sample_rows, state, tier=tier, vocab_size=V, max_logprobs=2, implementation="xla"
    )
    ids = ids.reshape(R, K + 1)
    emitted = accept(ids, drafts, num_drafts, samples)
    state = commit_tokens(state, jnp.arange(R), ids, emitted)
    where = jnp.where(jnp.arange(K + 1) < emitted[:, None], lengths[:, None] + jnp.arange(K + 1), MAX_LEN)
    tokens = tokens.at[rows, where].set(ids, mode="drop")
    token_logprob = None if logprobs is None else logprobs.token_logprob.reshape(R, K + 1)
    return state, tokens, lengths + emitted, emitted, token_logprob


def generate(drafter, K: int, tier: Tier = Tier.FULL):
    """STEPS tokens or more of every choice; tokens, their log-probabilities, and how many drafts were accepted."""
    state, tokens, lengths = start()
    first = np.asarray(lengths)
    logprobs = np.zeros((S, MAX_LEN + K + 1), np.float32)
    accepted = 0
    while (np.asarray(lengths) - first).min() < STEPS:
        drafts, num_drafts = drafter(np.asarray(tokens), np.asarray(lengths))
        room = MAX_LEN - 1 - np.asarray(lengths)
        num_drafts = np.clip(num_drafts, 0, np.minimum(K, np.maximum(room, 0)))
        old = np.asarray(lengths)
        state, tokens, lengths, emitted, found = step(state, tokens, lengths, drafts, num_drafts, room >= 0, tier=tier)
        emitted = np.asarray(emitted)
        accepted += int(np.maximum(emitted - 1, 0).sum())
        for r in range(S):
            if found is not None:
                logprobs[r, old[r] : old[r] + emitted[r]] = np.asarray(found)[r, : emitted[r]]
    ids = [np.asarray(tokens)[r, f : f + STEPS].tolist() for r, f in enumerate(first)]
    return ids, [logprobs[r, f : f + STEPS] for r, f in enumerate(first)], accepted, state, tokens, lengths


@functools.cache
def without_drafts():
    none = np.zeros((S, 0), np.int32)
    return generate(lambda tokens, lengths: (none, np.zeros(S, np.int32)), 0)


def drafters(K: int):
    truth, first = without_drafts()[0], [len(prompt) for _, prompt, _ in CHOICES]
    rng = np.random.default_rng(K)

    def oracle(tokens, lengths, wrong=0.0):
        drafts = np.zeros((S, K), np.int32)
        for r in range(S):
            done = lengths[r] - first[r]
            known = (truth[r] + [0] * K)[done : done + K]
            drafts[r, : len(known)] = known
        drafts = np.where(rng.random((S, K)) < wrong, rng.integers(0, V, (S, K)), drafts).astype(np.int32)
        return drafts, np.full(S, K)

    def garbage(tokens, lengths):
        return rng.choice([-(2**31), -2, -1, V, 2**31 - 1], (S, K)).astype(np.int32), rng.integers(-3, K + 9, S)

    def ngram(tokens, lengths):
        return jax.tree.map(np.asarray, propose(tokens, lengths, np.full(S, K), K=K, n_min=1, n_max=3))

    return {"oracle": oracle, "half wrong": functools.partial(oracle, wrong=0.5), "garbage": garbage, "ngram": ngram}


@pytest.mark.parametrize("K", [1, 2, 4, 8])
def test_drafts_change_no_token(K):
    want_ids, want_logprobs, *_ = without_drafts()
    for name, drafter in drafters(K).items():
        ids, logprobs, accepted, state, tokens, lengths = generate(drafter, K)
        assert ids == want_ids, name
        np.testing.assert_allclose(logprobs, want_logprobs, atol=1e-5, err_msg=name)
        assert accepted == 0 if name == "garbage" else accepted > 0, name
        for r, (_, prompt, _) in enumerate(CHOICES):
            output = np.asarray(tokens)[r, len(prompt) : int(lengths[r])]
            np.testing.assert_array_equal(state.output_counts[r], np.bincount(output, minlength=V))


def test_settings_hold_in_the_generated_text():
    ids = without_drafts()[0]
    assert 2 not in ids[4][:9]  # min_tokens
    assert set(ids[6]) <= {2, 3, 5, 8, 13, 21, 34}
    text = ids[5]
    assert 30 not in text and all(pair != (5, 5) for pair in zip(text, text[1:], strict=False))
    assert len(set(ids[3])) > len(set(ids[0]))  # penalties against a greedy loop


def test_counts_stay_right_when_tiers_alternate():
    plain = [i for i, (params, _, _) in enumerate(CHOICES) if Tier.TRUNCATED.covers(tier_for(params))]
    want = without_drafts()[0]
    state, tokens, lengths = start()
    first = np.asarray(lengths)
    none, zeros = np.zeros((S, 0), np.int32), np.zeros(S, np.int32)
    for turn in range(STEPS):
        simple = np.isin(np.arange(S), plain)
        # rows that need FULL run in FULL steps only; the others in whatever tier comes
        state, tokens, lengths, *_ = step(state, tokens, lengths, none, zeros, simple, tier=Tier.TRUNCATED)
        state, tokens, lengths, *_ = step(state, tokens, lengths, none, zeros, ~simple)
        assert int(state.output_counts.sum()) == S * (turn + 1)
    assert [np.asarray(tokens)[r, f : f + STEPS].tolist() for r, f in enumerate(first)] == want


def test_accept_equals_counting_by_hand():
    rng = np.random.default_rng(0)
    for K in (0, 1, 3):
        sampled = rng.integers(0, 2, (64, K + 1)).astype(np.int32)
        drafts = rng.integers(0, 2, (64, K)).astype(np.int32)
        num_drafts = rng.integers(-1, K + 3, 64).astype(np.int32)
        samples = rng.random(64) < 0.8
        got = np.asarray(accept(sampled, drafts, num_drafts, samples))
        for r in range(64):
            count = 0
            while count < min(num_drafts[r], K) and sampled[r, count] == drafts[r, count]:
                count += 1
            assert got[r] == (count + 1 if samples[r] else 0)
