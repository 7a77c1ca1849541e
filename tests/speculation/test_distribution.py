"""The distribution of what is emitted is the target's, whatever drafts; and how often coupled drafts are accepted.

Tens of thousands of choices that differ in their seed only, one sampled pair of tokens each, against the exact
probabilities of all pairs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import Limits
from jaxserve.sampling.host import host_row
from jaxserve.sampling.noise import choice_key
from jaxserve.sampling.rows import make_rows
from jaxserve.sampling.sampler import sample
from jaxserve.sampling.state import init_state, reset_rows
from jaxserve.sampling.tier import Tier
from jaxserve.sampling_params import SamplingParams
from jaxserve.speculation.verify import accept

V, S = 7, 20_000
LIMITS = Limits(max_stop_token_ids=1, max_logit_bias=1, max_bad_words=1, max_bad_word_len=1, max_logprobs=1)
PARAMS = {
    "plain": SamplingParams(temperature=1.0),
    "truncated": SamplingParams(temperature=0.8, top_k=5, top_p=0.9),
    "penalised": SamplingParams(temperature=1.2, presence_penalty=0.8, repetition_penalty=1.3, logit_bias={3: 1.0}),
}
TIERS = {"plain": Tier.PLAIN, "truncated": Tier.TRUNCATED, "penalised": Tier.FULL}
PROMPT = 2
TABLE = np.random.default_rng(3).normal(0, 1.2, (V, V)).astype(np.float32)  # logits of the token after each token
OTHER = TABLE + np.random.default_rng(4).normal(0, 0.5, (V, V)).astype(np.float32)  # a draft model's


@functools.cache
def start(params):
    row = host_row(
        params, seed=0, choice_index=0, eos_token_ids=(), prompt_len=1, bad_words_ids=[], vocab_size=V, limits=LIMITS
    )
    rows = {name: np.broadcast_to(value, (S, *value.shape)).copy() for name, value in row.items()}
    rows["key"] = np.stack([choice_key(seed, 0) for seed in range(S)])
    tokens = np.zeros((S, 4), np.int32)
    tokens[:, 0] = PROMPT
    state = jax.jit(reset_rows)(init_state(S, V, LIMITS), np.arange(S), rows, tokens, np.ones(S, np.int32))
    return state, jnp.asarray(tokens)


@functools.partial(jax.jit, static_argnames="tier")
def sampled(state, tokens, table, drafts, tier):
    """int32[S, 1 + drafts]: what follows the prompt, and what follows each draft."""
    before = jnp.concatenate([tokens[:, :1], jnp.clip(drafts, 0, V - 1)], axis=1)
    rows = make_rows(state, jnp.arange(S), tokens, jnp.ones(S, jnp.int32), drafts)
    logits = jnp.asarray(table)[before].reshape(-1, V)
    ids, _ = sample(logits, rows, state, tier=tier, vocab_size=V, max_logprobs=1, implementation="xla")
    return ids.reshape(before.shape)


def pairs(state, tokens, drafts, tier):
    """The first two emitted tokens of every choice, and whether the draft was accepted."""
    both = sampled(state, tokens, TABLE, drafts, tier)
    emitted = accept(both, drafts, jnp.ones(S, jnp.int32), jnp.ones(S, bool))
    # A choice whose draft was wrong samples its second token in another step, after the first.
    again = sampled(state, tokens, TABLE, both[:, :1], tier)
    second = jnp.where(emitted == 2, both[:, 1], again[:, 1])
    return np.asarray(both[:, 0]), np.asarray(second), np.asarray(emitted == 2)


def probabilities(params, seen, table=TABLE):
    """float64[V] after ``seen`` (the prompt's token first), by the definitions."""
    scores = table[seen[-1]].astype(np.float64).copy()
    output = seen[1:]
    for token, bias in (params.logit_bias or {}).items():
        scores[token] += bias
    for token in set(seen):
        scores[token] *= params.repetition_penalty if scores[token] <= 0 else 1 / params.repetition_penalty
    for token in set(output):
        scores[token] -= params.presence_penalty
    scores /= params.temperature
    order = np.argsort(-scores)
    shares = np.exp(scores - scores.max())
    if params.top_k:
        shares[order[params.top_k :]] = 0
    shares /= shares.sum()
    before = np.cumsum(shares[order]) - shares[order]
    shares[order[before >= params.top_p]] = 0
    return shares / shares.sum()


def chi_square(counts, expected):
    """The statistic, and a bound that it passes once in about a million times."""
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    degrees = kept.sum() - 1
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    # Wilson and Hilferty's normal approximation, 4.9 deviations out
    return statistic, degrees * (1 - 2 / (9 * degrees) + 4.9 * np.sqrt(2 / (9 * degrees))) ** 3


DRAFTERS = ("none right", "constant", "random", "a coupled model", "the target")


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", PARAMS)
def test_row_38_the_distribution_is_the_targets(name, drafter):
    params, tier = PARAMS[name], TIERS[name]
    state, tokens = start(params)
    none = jnp.zeros((S, 0), jnp.int32)
    drafts = {
        "none right": lambda: jnp.full((S, 1), V + 5),
        "constant": lambda: jnp.full((S, 1), 3),
        "random": lambda: jax.random.randint(jax.random.key(0), (S, 1), 0, V),
        "a coupled model": lambda: sampled(state, tokens, OTHER, none, tier),
        "the target": lambda: sampled(state, tokens, TABLE, none, tier),
    }[drafter]()
    first, second, accepted = pairs(state, tokens, drafts, tier)
    counts = np.zeros((V, V))
    np.add.at(counts, (first, second), 1)
    p = probabilities(params, [PROMPT])
    expected = S * p[:, None] * np.stack([probabilities(params, [PROMPT, token]) for token in range(V)])
    statistic, bound = chi_square(counts, expected)
    assert statistic < bound
    if drafter == "the target":
        assert accepted.all()
    elif drafter == "none right":
        assert not accepted.any()
    elif drafter == "constant":  # as rejection sampling: with the target's probability of the draft
        assert abs(accepted.mean() - p[3]) <= 5 * np.sqrt(p[3] / S)
    elif drafter == "a coupled model":
        distance = 0.5 * np.abs(p - probabilities(params, [PROMPT], OTHER)).sum()
        noise = 5 * np.sqrt(0.25 / S)
        assert (1 - distance) / (1 + distance) - noise <= accepted.mean() <= 1 - distance + noise


def test_the_chi_square_notices_a_wrong_distribution():
    """What a verifier gives that draws anew after a rejection, without taking the draft's share out."""
    state, tokens = start(PARAMS["plain"])
    first, _, accepted = pairs(state, tokens, jnp.full((S, 1), 3), Tier.PLAIN)
    p = probabilities(PARAMS["plain"], [PROMPT])
    redrawn = np.where(accepted, first, np.random.default_rng(0).choice(V, S, p=p))
    statistic, bound = chi_square(np.bincount(redrawn, minlength=V), S * p)
    assert statistic > bound
