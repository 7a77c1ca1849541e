"""Rows 15 to 19: every processor and every log-probability sees the prefix of its own position, with drafts in it."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from serving import GAP, GREEDY, Case, K, generate, idle, ids, knows, serve
from test_core_sampling import check_row

from jaxserve import SamplingParams
from jaxserve.runner import runner as runner_module

HARD = {  # settings that mean something else at each position of a verified run; one per case in turn
    "min_tokens": [
        GREEDY.with_changes(min_tokens=least, stop_token_ids=[97], logit_bias={97: 100}) for least in (1, 4, 6, 7)
    ],
    "penalties": [
        GREEDY.with_changes(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4),
        GREEDY.with_changes(frequency_penalty=1.5),
    ],
    "min_p": [SamplingParams(seed=seed, min_p=0.6, max_tokens=16, ignore_eos=True) for seed in (1, 2)],
    "logit_bias": [GREEDY.with_changes(logit_bias={97: 0.9, 98: 0.8, 99: 0.7})],
}


@pytest.fixture(scope="module")
def hard(cases, oracle):
    """``hard(name)``: cases of those settings, and the settings of each."""

    @functools.cache
    def make(name):
        found = []
        for case, params in zip(cases, itertools.cycle(HARD[name])):
            answer, lead = oracle.follow(case.prompt, params)
            if lead > GAP:
                found.append((Case(case.prompt, answer), params))
        assert len(found) >= len(cases) / 2
        return [case for case, _ in found], [params for _, params in found]

    return make


@pytest.mark.parametrize("right", [0, 2, K])
@pytest.mark.parametrize("name", HARD)
def test_row_15_16_17_processors_see_the_prefix_of_each_position(engine, hard, name, right):
    """Of K drafts the first ``right`` are true: min_tokens end, counts grow and biases hold inside a verified run."""
    mine, params = hard(name)
    with serve(engine, run_ahead=0) as llm:
        llm.engine.core.runner.draft = knows(mine, lambda most: right)
        assert ids(llm, mine, params) == [case.answer for case in mine]
        assert (idle(llm)["num_accepted_tokens"] > 0) == (right > 0)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("min_tokens", lambda row: {"min_len": row["min_len"] + 1}),  # masked too long
        ("min_tokens", lambda row: {"min_len": row["min_len"] - 1}),  # EOS too early
        ("min_p", lambda row: {"min_p": np.zeros_like(row["min_p"])}),
        ("logit_bias", lambda row: {"bias_values": np.zeros_like(row["bias_values"])}),
    ],
)
def test_row_15_17_are_seen_where_the_device_gets_other_settings(engine, hard, monkeypatch, name, spoil):
    """Off by one, or silently dropped."""
    correct = runner_module.host_row

    def host_row(params, **rest):
        row = correct(params, **rest)
        return row | spoil(row)

    monkeypatch.setattr(runner_module, "host_row", host_row)
    with pytest.raises(AssertionError):
        test_row_15_16_17_processors_see_the_prefix_of_each_position(engine, hard, name, K)


def test_row_16_is_seen_where_only_a_runs_last_token_is_counted(engine, hard):
    """vLLM #18902: penalties that are as good as divided by the accepted length."""
    mine, params = hard("penalties")
    with serve(engine, run_ahead=0) as llm:
        runner = llm.engine.core.runner

        def forget(plan, result):
            sampling = runner.real._slots.sampling
            counts = np.array(sampling.output_counts)
            for slot, token_ids, num_emitted in zip(plan.slots, result.token_ids, result.num_emitted, strict=True):
                np.subtract.at(counts[slot], token_ids[: max(num_emitted - 1, 0)], 1)
            counts = jax.device_put(counts, sampling.output_counts.sharding)
            sampling = dataclasses.replace(sampling, output_counts=counts)
            runner.real._slots = dataclasses.replace(runner.real._slots, sampling=sampling)
            return result

        runner.draft, runner.fetched = knows(mine), forget
        assert ids(llm, mine, params) != [case.answer for case in mine]


SCORED = GREEDY.with_changes(logprobs=2, prompt_logprobs=1)


def check_logprobs(llm, cases, oracle, right):
    """Of every token, emitted or given, against float64 log-probabilities after the prefix before it."""
    llm.engine.core.runner.draft = knows(cases, lambda most: right)
    for case, output in zip(cases, generate(llm, [case.prompt for case in cases], SCORED), strict=True):
        (choice,) = output.outputs
        assert choice.token_ids == case.answer and len(choice.logprobs) == len(case.answer)
        expected = oracle.logprobs(case.prompt + case.answer)
        for row, token_id, position in zip(
            choice.logprobs, case.answer, expected[len(case.prompt) - 1 :], strict=False
        ):
            check_row(row, token_id, position, 2)
        assert len(output.prompt_logprobs) == len(case.prompt) and output.prompt_logprobs[0] is None
        for row, token_id, position in zip(output.prompt_logprobs[1:], case.prompt[1:], expected, strict=False):
            check_row(row, token_id, position, 1)


@pytest.mark.parametrize("right", [0, 2, K])
@pytest.mark.parametrize("chunk", [1, 3, 40])
def test_row_18_19_logprobs_are_those_of_their_own_position(engine, cases, oracle, chunk, right):
    """In runs accepted whole, in part or not at all, beside prompts in chunks of ``chunk``."""
    with serve(engine, run_ahead=0, max_prefill_chunk_len=chunk) as llm:
        check_logprobs(llm, cases, oracle, right)
        assert (idle(llm)["num_accepted_tokens"] > 0) == (right > 0)


def rolled(logprobs, axis):
    fields = dataclasses.asdict(logprobs)
    return dataclasses.replace(logprobs, **{name: np.roll(field, 1, axis) for name, field in fields.items()})


@pytest.mark.parametrize(
    "roll",
    [
        lambda result: {"logprobs": result.logprobs and rolled(result.logprobs, 1)},
        lambda result: {"prompt_logprobs": {r: (at, rolled(x, 0)) for r, (at, x) in result.prompt_logprobs.items()}},
    ],
    ids=["18", "19"],
)
def test_row_18_19_are_seen_where_drafts_shift_the_rows(engine, cases, oracle, roll):
    def shift(plan, result):
        return dataclasses.replace(result, **roll(result)) if plan.num_drafts.any() else result

    with serve(engine, run_ahead=0, max_prefill_chunk_len=3) as llm, pytest.raises(AssertionError):
        llm.engine.core.runner.fetched = shift
        check_logprobs(llm, cases, oracle, K)
