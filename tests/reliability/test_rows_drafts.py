"""Rows 38 to 40: drafts change neither a distribution nor a greedy answer, and are what a search by hand finds."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving import GREEDY, generate, idle, ids, serve
from test_rows_choices import copied

from jaxserve import EngineDeadError, SamplingParams

LETTERS = [97, 98]
DRAWS = SamplingParams(n=1000, seed=3, max_tokens=3, ignore_eos=True, allowed_token_ids=LETTERS)


def shares(oracle, tokens):
    """float64[2]: how often each letter follows."""
    likely = np.exp(oracle.logprobs(tokens)[-1][LETTERS])
    return likely / likely.sum()


def check_distribution(llm, oracle, prompt):
    """A thousand times three tokens, the second of them drafted: every triple within five standard deviations."""
    llm.engine.core.runner.draft = lambda choice, most: LETTERS[:1]
    (output,) = generate(llm, [prompt], DRAWS)
    counts, expected = np.zeros((2, 2, 2)), np.zeros((2, 2, 2))
    for choice in output.outputs:
        counts[tuple(LETTERS.index(token_id) for token_id in choice.token_ids)] += 1
    for a, b in itertools.product(range(2), repeat=2):
        before = shares(oracle, prompt)[a] * shares(oracle, [*prompt, LETTERS[a]])[b]
        expected[a, b] = before * shares(oracle, [*prompt, LETTERS[a], LETTERS[b]])
    assert np.all(np.abs(counts - 1000 * expected) < 5 * np.sqrt(1000 * expected * (1 - expected)) + 2)


def test_row_38_drafts_leave_the_distribution_as_it_is(engine, cases, oracle):
    with serve(engine, run_ahead=0, check=False) as llm:
        check_distribution(llm, oracle, cases[2].prompt)
        stats = idle(llm)
        assert 300 < stats["num_accepted_tokens"] < 700 and stats["num_drafted_tokens"] == 1000


def test_row_38_is_seen_where_a_rejected_draft_may_be_drawn_again(engine, cases, oracle):
    """Drawn anew after a rejection from the target's distribution, without taking the draft's share out of it."""
    prompt, rng = cases[2].prompt, np.random.default_rng(0)
    after = {letter: shares(oracle, [*prompt, letter]) for letter in LETTERS}

    def redraw(plan, result):
        result = copied(result)
        for row in np.flatnonzero((result.num_drafted == 1) & (result.num_emitted == 1)):
            (said,) = plan.choices[row].output_token_ids
            result.token_ids[row, 0] = rng.choice(LETTERS, p=after[said])
        return result

    with serve(engine, run_ahead=0, check=False) as llm, pytest.raises(AssertionError):
        llm.engine.core.runner.fetched = redraw
        check_distribution(llm, oracle, prompt)


def test_row_39_is_seen_where_a_step_that_verifies_rounds_otherwise(engine, cases, monkeypatch):
    """What is sampled from in 8 bits, where there are drafts: other argmaxes, in five of ten answers."""
    real = engine.engine.core.runner

    def rounding(sample):
        def run(head, slots, scratch):
            rounded = np.asarray(scratch.sampled).astype(jnp.float8_e4m3fn).astype(np.float32)
            placed = jax.device_put(rounded, scratch.sampled.sharding)
            return sample(head, slots, dataclasses.replace(scratch, sampled=placed))

        return run

    rounded = {key: rounding(run) if key.num_drafts else run for key, run in real.executables.sample.items()}
    monkeypatch.setattr(real, "executables", dataclasses.replace(real.executables, sample=rounded))
    with serve(engine, run_ahead=0) as llm:
        undrafted = GREEDY.with_changes(num_speculative_tokens=0)
        assert ids(llm, cases, undrafted) == [case.answer for case in cases]
        got = ids(llm, cases)
    assert sum(answer != case.answer for answer, case in zip(got, cases, strict=True)) > 2


def looked_up(tokens, most, ngram):
    """What followed the longest and then the latest text that ends as ``tokens`` do."""
    matches = [
        (size, at)
        for at in range(1, len(tokens))
        for size in range(ngram.min_len, min(ngram.max_len, at) + 1)
        if tokens[at - size : at] == tokens[-size:]
    ]
    return tokens[max(matches)[1] :][:most] if matches else []


def watch_drafts(llm):
    """Compares the drafts of every step with a search by hand; ``run_ahead=0``, so the host knows the text."""
    runner = llm.engine.core.runner

    def look(plan):
        staged = runner.slots.plan
        for row, choice in enumerate(plan.choices):
            most = int(plan.num_drafts[row])
            want = looked_up([*choice.prompt_token_ids, *choice.output_token_ids], most, runner.real.config.ngram)
            got = staged.drafts[row, : staged.num_drafts[row]].tolist()
            assert got == (want if most else []), (plan.step_id, row)

    runner.dispatched = look


def test_row_40_the_engine_verifies_what_a_search_by_hand_finds(engine, cases):
    """The whole way: history on the device, look-up, verification, in rows that come and go."""
    with serve(engine, run_ahead=0, max_prefill_chunk_len=6) as llm:
        watch_drafts(llm)
        for _ in range(2):  # then with prefix hits
            assert ids(llm, cases) == [case.answer for case in cases]
        stats = idle(llm)
        assert 0 < stats["num_accepted_tokens"] < stats["num_drafted_tokens"]


def test_row_40_is_seen_where_the_history_on_the_device_has_holes(engine, cases):
    """A silent one: with the beginning of its text gone a choice drafts worse, and says the same."""

    def forget(plan):
        slots = runner.slots
        known = np.arange(slots.tokens.shape[1]) >= slots.computed_len[:, None] - 3
        runner.replace_slots(tokens=np.where(known, slots.tokens, 1))

    with serve(engine, run_ahead=0) as llm:
        runner = llm.engine.core.runner
        runner.before = forget
        assert ids(llm, cases) == [case.answer for case in cases]
        watch_drafts(llm)
        with pytest.raises(EngineDeadError):
            ids(llm, cases)
