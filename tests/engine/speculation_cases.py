"""Requests that draft well and are hard on drafts, and what "the same answer" means."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from tiny_engines import generate

from jaxserve import LLM, SamplingParams
from jaxserve.config import Limits, SpeculativeConfig
from jaxserve.outputs import CompletionOutput, RequestOutput, TokenLogprobs

GAP = 1e-3  # promise 2: where the best two are nearer than this, rounding may decide
BAD_WORDS = [[98], [32, 98], [99, 100], [32, 99, 100]]  # "b" and "cd", with and without a space before
SMALL = {  # few executables, so that several engines fit into the time of a test run
    "max_model_len": 94,  # no multiple of the block size
    "max_num_seqs": 3,
    "max_num_batched_tokens": 28,
    "limits": Limits(max_stop_token_ids=6, max_logit_bias=4, max_bad_words=4, max_bad_word_len=3, max_logprobs=3),
}
LOOP = {"max_tokens": 24, "ignore_eos": True}
CASES = {  # name: settings; temperatures are low enough for the sampled text to repeat itself
    "greedy": SamplingParams(temperature=0, **LOOP),
    "penalties": SamplingParams(
        temperature=0, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=-0.1, **LOOP
    ),
    "min_tokens": SamplingParams(temperature=0.2, seed=1, max_tokens=24, min_tokens=9, stop_token_ids=[97, 104, 110]),
    "bias": SamplingParams(temperature=0.3, seed=2, logit_bias={97: 3.0, 98: 2.5, 2: -100}, **LOOP),
    "bad words": SamplingParams(temperature=0, bad_words=["b", "cd"], logit_bias={98: 4.0, 100: 3.0, 99: 3.0}, **LOOP),
    "allowed ids": SamplingParams(temperature=0.5, seed=3, allowed_token_ids=[97, 98, 99], **LOOP),
    "stop string": SamplingParams(temperature=0.6, seed=4, allowed_token_ids=[97, 98], stop=["abba", "bbb"], **LOOP),
    "stop id": SamplingParams(
        temperature=0.8, seed=5, allowed_token_ids=[*range(97, 104)], stop_token_ids=[98], **LOOP
    ),
    "logprobs": SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2, **LOOP),
    "sampled logprobs": SamplingParams(temperature=0.3, seed=6, logprobs=1, prompt_logprobs=0, **LOOP),
    "n": SamplingParams(n=3, temperature=0.25, seed=7, **LOOP),
    "plain": SamplingParams(temperature=1.0, seed=8, **LOOP),
    "truncated": SamplingParams(temperature=0.9, top_k=4, top_p=0.9, min_p=0.05, seed=2**40, **LOOP),
}


def speculative(K: int, **more: Any) -> SpeculativeConfig:
    """n-gram drafts after a single token: as many as possible, most of them wrong."""
    return SpeculativeConfig(num_speculative_tokens=K, prompt_lookup_min=1, prompt_lookup_max=3, **more)


def prompts(seed: int = 0, count: int = len(CASES)) -> list[list[int]]:
    """Repetitive: a pattern of some letters several times over, cut anywhere."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        pattern = rng.integers(97, 123, rng.integers(1, 9)).tolist()
        made.append((pattern * 40)[: 2 + (7 * i) % 41])
    return made


def requests(seed: int = 0) -> tuple[list[list[int]], list[SamplingParams]]:
    return prompts(seed), list(CASES.values())


def answers(llm: LLM, prompts: Sequence[list[int]], params: Any) -> list[RequestOutput]:
    """In an order that mixes short and long."""
    return generate(llm, prompts, params)


def assert_same(
    got: Sequence[RequestOutput], want: Sequence[RequestOutput], params: Sequence[SamplingParams], oracle: Any = None
) -> None:
    """The same tokens, ends, texts, and log-probabilities up to rounding.

    With an oracle (``dense_reference.Reference``), a choice may part where its best two are nearer than ``GAP``, at one
    of a thousand positions at most.
    """
    num_positions = num_ties = 0
    for request, (one, other, settings) in enumerate(zip(got, want, params, strict=True)):
        assert one.prompt_token_ids == other.prompt_token_ids
        for mine, its in zip(one.outputs, other.outputs, strict=True):
            num_positions += len(its.token_ids)
            if mine.token_ids != its.token_ids and oracle is not None:
                assert_tie(oracle, one.prompt_token_ids, settings, mine, its)
                num_ties += 1
                continue
            where = f"request {request} ({settings}), choice {mine.index}"
            assert mine.token_ids == its.token_ids, where
            assert (mine.finish_reason, mine.stop_reason, mine.text) == (its.finish_reason, its.stop_reason, its.text)
            assert_close(mine.logprobs, its.logprobs, where)
        assert_close(one.prompt_logprobs, other.prompt_logprobs, f"prompt of request {request}")
    assert num_ties <= num_positions / 1000


def assert_tie(
    oracle: Any, prompt: list[int], params: SamplingParams, got: CompletionOutput, want: CompletionOutput
) -> None:
    """The first token in which two answers differ was as good as decided by rounding, and nothing before it differs."""
    at = next(i for i, pair in enumerate(zip(got.token_ids, want.token_ids, strict=False)) if pair[0] != pair[1])
    bad_words = BAD_WORDS if params.bad_words else None
    output, leads = oracle.leads(
        prompt, dataclasses.replace(params, max_tokens=at + 1, min_tokens=min(params.min_tokens, at + 1)),
        index=got.index, bad_words=bad_words,
    )  # fmt: skip
    where = f"{params}: token {at} is {got.token_ids[at]}, not {want.token_ids[at]}"
    assert output[:at] == want.token_ids[:at] and len(leads) == at + 1, where
    assert leads[at] <= GAP, f"{where}, with a lead of {leads[at]}"
    assert_close((got.logprobs or [])[:at], (want.logprobs or [])[:at], where)


def assert_close(
    got: Sequence[TokenLogprobs | None] | None, want: Sequence[TokenLogprobs | None] | None, where: str
) -> None:
    assert (got is None) == (want is None)
    for mine, its in zip(got or (), want or (), strict=True):
        if mine is None or its is None:
            assert mine is its
            continue
        assert [(i, x.rank) for i, x in mine.items()] == [(i, x.rank) for i, x in its.items()], where
        np.testing.assert_allclose(
            [x.logprob for x in mine.values()], [x.logprob for x in its.values()], atol=2e-4, err_msg=where
        )
