"""The sampler as a whole: processors, tiers, distribution, padding, sharding."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sampling_reference import LIMITS, Case, gumbel_of, history, noise_bits, processed, state_of, target

from jaxserve.sampling import bitmask
from jaxserve.sampling.processors import process
from jaxserve.sampling.rows import make_rows
from jaxserve.sampling.sampler import sample
from jaxserve.sampling.tier import Tier, tier_for
from jaxserve.sampling_params import SamplingParams

V = 37
C = LIMITS.max_logprobs

CASES = [
    Case(SamplingParams(temperature=0.8), [1, 2, 3], [4, 5]),
    Case(
        SamplingParams(presence_penalty=0.7, frequency_penalty=-0.4, repetition_penalty=1.7, temperature=0.9),
        [9, 9, 8, 30],
        [4, 4, 8, 11],
    ),
    Case(SamplingParams(repetition_penalty=0.6), [1], []),
    Case(SamplingParams(min_tokens=4, stop_token_ids=[11, 12], max_tokens=9), [5], [6, 7, 8], eos=(2, 36)),
    Case(SamplingParams(min_tokens=3, ignore_eos=True, max_tokens=9), [5], [], eos=(0,)),
    Case(SamplingParams(logit_bias={3: 5.0, 36: -100.0, 0: 1.5}), [1, 2], [3]),
    Case(SamplingParams(allowed_token_ids=[0, 5, 31, 32, 36], logit_bias={5: -3.0}), [1], [2]),
    Case(SamplingParams(bad_words=["x"]), [7, 4], [4, 5], bad_words=[[4], [4, 5, 6], [5, 20]]),
    Case(SamplingParams(bad_words=["x"]), [6, 7], [], bad_words=[[6, 7, 8], [7, 9], [10]]),  # the prompt doesn't count
    Case(SamplingParams(temperature=0.0, presence_penalty=2.0, top_k=3), [3], [4, 4, 7]),
    # After 4 its bad word forbids 5, which is all that is left but for 11, and that stops too early.
    Case(
        SamplingParams(
            allowed_token_ids=[5, 11], stop_token_ids=[11], min_tokens=4, max_tokens=9, logit_bias={5: -2.0}
        ),
        [1],
        [4],
        bad_words=[[4, 5]],
    ),
    # 5 is forbidden twice, and 11 is left.
    Case(SamplingParams(allowed_token_ids=[5, 11], presence_penalty=0.5), [1], [4], bad_words=[[4, 5], [5]]),
]


def logits_for(rows: int, width: int = V, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, width)).astype(np.float32)


draw = functools.partial(sample, max_logprobs=C, implementation="xla")


@functools.partial(jax.jit, static_argnames=("tier", "vocab_size"))
def run(logits, state, slots, tokens, lengths, drafts, tier=Tier.FULL, vocab_size=V, token_mask=None):
    rows = make_rows(state, slots, tokens, lengths, drafts)
    return draw(logits, rows, state, tier=tier, vocab_size=vocab_size, token_mask=token_mask)


@jax.jit
def run_process(logits, state, slots, tokens, lengths, drafts):
    rows = make_rows(state, slots, tokens, lengths, drafts)
    return process(logits, rows, state), rows.output_index


def run_cases(cases, logits, *, drafts=None, **options):
    tokens, lengths = history(cases, 16, rubbish=5)
    drafts = np.zeros((len(cases), 0), np.int32) if drafts is None else drafts
    return run(logits, state_of(cases, V), np.arange(len(cases)), tokens, lengths, drafts, **options)


def test_processors_equal_the_reference_at_every_position():
    K = 3
    drafts = np.array([[4, 5, 6], [8, 8, 1], [5, 5, 20], [11, 2, 9], [4, 4, 4]], np.int32)
    drafts = np.concatenate([drafts, drafts[::-1], [[3, 4, 5], [11, 4, 5]]])
    tokens, lengths = history(CASES, 16, rubbish=4)
    state = state_of(CASES, V)
    logits = logits_for(len(CASES) * (K + 1))
    ours, output_index = run_process(logits, state, np.arange(len(CASES)), tokens, lengths, drafts)
    for c, case in enumerate(CASES):
        for j in range(K + 1):
            m = c * (K + 1) + j
            assert int(output_index[m]) == len(case.output) + j
            want = processed(logits[m], case, case.output + drafts[c, :j].tolist())
            np.testing.assert_allclose(ours[m], want, rtol=1e-5, atol=1e-5, err_msg=f"case {c} position {j}")


def test_neutral_settings_change_no_bit():
    cases = [Case(SamplingParams(), [1, 2], [3, 3, 4])]
    tokens, lengths = history(cases, 16)
    state = state_of(cases, V)
    logits = logits_for(1)
    ours, _ = run_process(logits, state, np.arange(1), tokens, lengths, np.zeros((1, 0), np.int32))
    np.testing.assert_array_equal(ours, logits)


def test_sampled_distribution_is_the_exact_target():
    draws = 4000
    for case in (
        Case(SamplingParams(temperature=0.7), [1], [2]),
        Case(SamplingParams(temperature=1.3, top_k=9, top_p=0.8, min_p=0.02), [1], [2]),
        Case(
            SamplingParams(temperature=1.5, top_p=0.9, repetition_penalty=1.4, presence_penalty=1, logit_bias={3: 2}),
            [3, 4],
            [8, 8],
            bad_words=[[8, 9]],
        ),
    ):  # fmt: skip
        logits = logits_for(1, seed=3) / 2
        # one slot a draw: every draw has its own seed
        cases = [Case(case.params, case.prompt, case.output, case.bad_words, seed=s) for s in range(draws)]
        ids, _ = run_cases(cases, np.repeat(logits, draws, axis=0))
        seen = np.bincount(np.asarray(ids), minlength=V)
        want = target(logits[0], case, case.output) * draws
        assert not seen[want == 0].any()
        common = want >= 5
        chi2 = ((seen - want)[common] ** 2 / want[common]).sum()
        dof = common.sum() - 1
        assert chi2 < dof + 3.1 * np.sqrt(2 * dof) + 4, (chi2, dof)  # about 1e-3


def test_the_draw_is_the_documented_function_of_seed_choice_and_position():
    K = 2
    cases = [
        Case(SamplingParams(temperature=t), [1] * p, [2] * g, seed=s, index=i)
        for s, i, p, g, t in [(3, 0, 1, 0, 1.0), (3, 1, 1, 0, 1.0), (4, 0, 2, 5, 0.5), (4, 0, 3, 5, 2.0)]
    ]
    logits = np.tile(logits_for(1), (len(cases) * (K + 1), 1))
    ids, _ = run_cases(cases, logits, drafts=np.full((len(cases), K), 9, np.int32), tier=Tier.PLAIN)
    for m, got in enumerate(np.asarray(ids)):
        case, j = cases[m // (K + 1)], m % (K + 1)
        noise = gumbel_of(noise_bits(case.seed, case.index, len(case.output) + j, V))
        assert got == np.argmax(logits[m] + case.params.temperature * noise)


def test_every_tier_gives_the_same_token_where_it_suffices():
    truncated = [Case(SamplingParams(temperature=0.6, top_k=4), [1], [2], seed=s) for s in range(8)] + [
        Case(SamplingParams(top_p=0.5, min_p=0.05), [1], [2], seed=s) for s in range(8)
    ]
    plain = [Case(SamplingParams(temperature=t), [1], [2], seed=s) for s, t in enumerate([0.3, 1.0, 2.0, 1e-6])]
    greedy = [Case(SamplingParams(temperature=0.0, top_k=k), [1], [2]) for k in (0, 1, 5)]
    cases = greedy + plain + truncated
    logits = logits_for(len(cases))
    by_tier = {tier: np.asarray(run_cases(cases, logits, tier=tier)[0]) for tier in Tier}
    for c, case in enumerate(cases):
        needed = tier_for(case.params)
        assert len({int(by_tier[tier][c]) for tier in by_tier if tier.covers(needed)}) == 1
    np.testing.assert_array_equal(by_tier[Tier.FULL][:3], logits[:3].argmax(axis=1))


@pytest.mark.parametrize(
    ("params", "tier"),
    [
        (SamplingParams(temperature=0.0), Tier.GREEDY),
        (SamplingParams(temperature=0.0, top_p=0.5, top_k=3, min_p=0.1), Tier.GREEDY),
        (SamplingParams(), Tier.PLAIN),
        (SamplingParams(top_k=3), Tier.TRUNCATED),
        (SamplingParams(top_p=0.99), Tier.TRUNCATED),
        (SamplingParams(min_p=0.1), Tier.TRUNCATED),
        (SamplingParams(temperature=0.0, logprobs=0), Tier.SCORED),
        (SamplingParams(temperature=0.0, min_tokens=1, top_k=2), Tier.SCORED),
        (SamplingParams(logit_bias={1: 1.0}), Tier.SCORED),
        (SamplingParams(allowed_token_ids=[1]), Tier.SCORED),
        (SamplingParams(bad_words=["a"]), Tier.SCORED),
        (SamplingParams(presence_penalty=0.1), Tier.SCORED),
        (SamplingParams(frequency_penalty=0.1), Tier.SCORED),
        (SamplingParams(repetition_penalty=1.1), Tier.SCORED),
        (SamplingParams(repetition_penalty=1.1, top_p=0.9), Tier.FULL),
        (SamplingParams(logprobs=3, min_p=0.1), Tier.FULL),
    ],
)
def test_tier_for(params, tier):
    assert tier_for(params) is tier


def test_padding_batch_and_slots_change_nothing():
    logits = logits_for(len(CASES))
    alone = np.asarray(run_cases(CASES, logits)[0])
    # twice the slots in another order, a wider vocabulary of rubbish, padding rows among the real ones
    slot_of = np.array([13, 4, 0, 17, 9, 2, 11, 19, 6, 15, 8, 1])
    filler = Case(SamplingParams(temperature=2.0, presence_penalty=-1.0), [8], [8, 8], seed=99)
    spread = [filler] * 20
    for case, slot in zip(CASES, slot_of, strict=True):
        spread[slot] = case
    tokens, lengths = history(spread, 16)
    wide = np.full((len(CASES) + 2, 64), 1e4, np.float32)
    wide[1:-1, :V] = logits
    wide[0], wide[-1] = np.nan, np.inf
    slots = np.concatenate([[20], slot_of, [25]])
    ids, logprobs = run(wide, state_of(spread, V), slots, tokens, lengths, np.zeros((len(wide), 0), np.int32))
    np.testing.assert_array_equal(np.asarray(ids)[1:-1], alone)
    assert (np.asarray(ids) >= 0).all() and (np.asarray(ids) < V).all()
    assert (np.asarray(logprobs.top_ids)[1:-1] < V).all()


def test_state_and_logits_may_have_any_width():
    logits = logits_for(len(CASES))
    tokens, lengths = history(CASES, 16)
    drafts = np.zeros((len(CASES), 0), np.int32)
    want = np.asarray(run_cases(CASES, logits)[0])
    padded_state = state_of(CASES, 64)  # counts and masks of a padded vocabulary
    for width in (V, 40, 64, 70):
        wide = np.pad(logits, ((0, 0), (0, width - V)), constant_values=-np.inf)
        ids, _ = run(wide, padded_state, np.arange(len(CASES)), tokens, lengths, drafts)
        np.testing.assert_array_equal(ids, want)


def test_bad_words_give_way_where_they_forbid_all_that_is_allowed():
    """Token 0 would come out otherwise, which neither setting allows."""
    cases = [Case(SamplingParams(allowed_token_ids=[5]), [1], [2], bad_words=[[2, 5]])]
    ids, logprobs = run_cases(cases, logits_for(1))
    assert int(ids[0]) == 5 and np.isfinite(float(logprobs.token_logprob[0]))


def test_a_row_with_every_id_masked_gives_id_0():
    cases = [Case(SamplingParams(), [1], [2])]
    for tier in (Tier.TRUNCATED, Tier.FULL):
        ids, _ = run_cases(cases, np.full((1, V), -np.inf, np.float32), tier=tier)
        assert int(ids[0]) == 0


@pytest.mark.parametrize("tier", list(Tier))
def test_a_token_mask_holds_in_every_tier(tier):
    allowed = [[3, 36], [0]]
    mask = np.stack([bitmask.from_ids(ids, V) for ids in allowed])
    cases = [Case(SamplingParams(temperature=5.0), [1], [2], seed=s) for s in range(2)]
    ids, _ = run_cases(cases, logits_for(2), tier=tier, token_mask=mask)
    assert int(ids[0]) in allowed[0] and int(ids[1]) == 0


def test_a_sharded_vocabulary_gives_the_same_tokens():
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",))
    split = NamedSharding(mesh, PartitionSpec(None, "tp"))
    whole = NamedSharding(mesh, PartitionSpec())
    logits = np.pad(logits_for(len(CASES)), ((0, 0), (0, 64 - V)), constant_values=-np.inf)
    tokens, lengths = history(CASES, 16)
    drafts = np.tile(np.array([[4, 5]], np.int32), (len(CASES), 1))
    logits = np.repeat(logits, 3, axis=0)
    state = state_of(CASES, 64)
    want = run(logits, state, np.arange(len(CASES)), tokens, lengths, drafts)
    placed = replace(jax.device_put(state, whole), output_counts=jax.device_put(state.output_counts, split))
    got = run(
        jax.device_put(logits, split), placed, *jax.device_put((np.arange(len(CASES)), tokens, lengths, drafts), whole)
    )
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1].top_ids, want[1].top_ids)
    np.testing.assert_allclose(got[1].top_logprobs, want[1].top_logprobs, rtol=1e-5)


def test_logprobs_are_of_the_raw_logits():
    logits = logits_for(len(CASES))
    ids, logprobs = run_cases(CASES, logits)
    raw = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    chosen = raw[np.arange(len(CASES)), np.asarray(ids)]
    np.testing.assert_allclose(logprobs.token_logprob, chosen, atol=1e-5)
    np.testing.assert_array_equal(logprobs.token_rank, 1 + (raw > chosen[:, None]).sum(axis=1))
    np.testing.assert_array_equal(logprobs.top_ids, np.argsort(-raw, axis=1)[:, :C])
