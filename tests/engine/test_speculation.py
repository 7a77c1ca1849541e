"""Promise 2 for drafts that are looked up in the text: with them or without, the same request gives the same answer.

Every way of running is held to the answers of an engine without speculation, which test_invariance.py holds to an
oracle of its own. K is compiled in: the ends of its range are engines of their own, what lies between is asked of the
longest by a lower cap (and compiled in as well in the sweep).
"""

import itertools

import numpy as np
import pytest
from speculation_cases import CASES, LOOP, SMALL, answers, assert_same, prompts, requests, speculative
from tiny_engines import ids, preemptions

from jaxserve import SamplingParams

LONGEST = 8
EAGER = {"adaptive_drafts": None}


@pytest.fixture(scope="module")
def plain(tiny):
    """An engine that doesn't speculate."""
    return tiny("llama", **{**SMALL})


@pytest.fixture(scope="module")
def drafting(tiny):
    """``drafting(K)``"""
    return lambda K: tiny("llama", **SMALL, speculative_config=speculative(K))


@pytest.fixture(scope="module")
def want(plain):
    with plain.llm() as llm:
        return answers(llm, *requests())


def num_drafts(llm):
    """Drafted and accepted."""
    stats = llm.engine.core.stats()
    return stats["num_drafted_tokens"], stats["num_accepted_tokens"]


@pytest.mark.parametrize("rule", [EAGER, {}], ids=["always", "adaptive"])
@pytest.mark.parametrize("K", [1, 2, 4, 8])
def test_row_39_every_setting_in_one_batch(drafting, want, reference, K, rule):
    """Then again with a warm prefix cache. Drafts must have been accepted, and rejected."""
    texts, params = requests()
    with drafting(1 if K == 1 else LONGEST).llm(max_drafts=K, **rule) as llm:
        for turn in range(2):
            got = answers(llm, texts, params)
            assert_same(got, want, params, reference("llama"))
            drafted, accepted = num_drafts(llm)
            assert 0 < accepted < drafted
            if turn:
                assert all(o.num_cached_tokens for o in got if len(o.prompt_token_ids) > 4 and not o.prompt_logprobs)
        # the adaptive rule has few drafts in so many rows on a CPU
        assert sum(o.metrics.num_accepted_tokens for o in got) > (20 if rule == EAGER else 5)


@pytest.mark.parametrize("name", CASES)
def test_row_15_16_17_18_each_setting_alone(drafting, want, reference, name):
    """One row: its step is the narrowest that is compiled."""
    at = list(CASES).index(name)
    params = [CASES[name]]
    with drafting(LONGEST).llm(**EAGER) as llm:
        assert_same(answers(llm, [prompts()[at]], params), [want[at]], params, reference("llama"))
        assert num_drafts(llm)[0] > 0


WAYS = {
    "chunks of 1": {"max_prefill_chunk_len": 1},
    "chunks of 5": {"max_prefill_chunk_len": 5},
    "small steps": {"max_num_batched_tokens": 7},
    "no room for all drafts": {"max_num_batched_tokens": 3},
    "few sampled rows": {"max_sample_rows": 5},
    "run_ahead 0": {"run_ahead": 0},
    "run_ahead 1": {"run_ahead": 1},
    "run_ahead 3": {"run_ahead": 3},
    "one slot": {"max_num_seqs": 1},
    "no prefix cache": {"enable_prefix_caching": False},
    "priority": {"policy": "priority", "max_num_seqs": 2},
    "preempted": {"num_blocks": 19, "admission_headroom_len": 0},
    "preempted, in chunks, ahead": {
        "num_blocks": 18, "admission_headroom_len": 0, "max_prefill_chunk_len": 3, "run_ahead": 3,
    },
    "preempted, without cache": {
        "num_blocks": 19, "admission_headroom_len": 0, "enable_prefix_caching": False, "run_ahead": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_row_19_whatever_the_way(drafting, want, reference, way):
    texts, params = requests()
    if way == "priority":
        params = [p.with_changes(priority=-i % 5) for i, p in enumerate(params)]
    with drafting(LONGEST).llm(**WAYS[way], **EAGER) as llm:
        for _ in range(2):
            assert_same(answers(llm, texts, params), want, params, reference("llama"))
        assert (preemptions(llm) > 0) == ("preempted" in way)
        assert num_drafts(llm)[1] > 0


@pytest.mark.parametrize("asked", [0, 1, 3, LONGEST])
def test_a_request_may_ask_for_fewer(drafting, want, reference, asked):
    texts, params = requests()
    widths = []
    params = [p.with_changes(num_speculative_tokens=asked) for p in params]
    with drafting(LONGEST).llm(lambda plan: widths.append(plan.num_drafts.max()), **EAGER) as llm:
        assert_same(answers(llm, texts, params), want, params, reference("llama"))
        assert max(widths) == asked
        assert (num_drafts(llm)[1] > 0) == (asked > 0)


def test_requests_that_draft_beside_requests_that_do_not(drafting, want, reference):
    texts, params = requests()
    mixed = [p.with_changes(num_speculative_tokens=(0, 2, None)[i % 3]) for i, p in enumerate(params)]
    with drafting(LONGEST).llm(**EAGER) as llm:
        got = answers(llm, texts, mixed)
        assert_same(got, want, mixed, reference("llama"))
        assert not any(o.metrics.num_drafted_tokens for o in got[::3])


def test_an_abort_leaves_the_others_alone(drafting, want, reference):
    """Streams that are closed at every phase of others' steps, with several steps in flight."""
    texts, params = requests()
    text = prompts()[-1]
    with drafting(LONGEST).llm(run_ahead=3, **EAGER) as llm:
        for turn in range(6):
            with llm.stream({"prompt_token_ids": text}, SamplingParams(temperature=0, **LOOP)) as stream:
                list(itertools.islice(stream, turn))  # it may be done before
            some = slice(turn, turn + 3)
            assert_same(answers(llm, texts[some], params[some]), want[some], params[some], reference("llama"))


@pytest.mark.parametrize("max_model_len", [2, 9, 32, 33])
@pytest.mark.parametrize("K", [1, 4, 8])
def test_up_to_the_context_limit(plain, drafting, reference, K, max_model_len):
    """vLLM #16151: drafts that reach past the limit. Prompts of all lengths fill the context to the last token."""
    texts = [prompts(1, 40)[-n][:n] for n in range(1, max_model_len)]
    texts = [(text * max_model_len)[:n] for n, text in enumerate(texts, 1)]
    params = [SamplingParams(temperature=0, max_tokens=max_model_len - len(t), ignore_eos=True) for t in texts]
    with plain.llm() as llm:
        want = answers(llm, texts, params)
    assert [len(o.outputs[0].token_ids) for o in want] == [max_model_len - len(t) for t in texts]
    with drafting(1 if K == 1 else LONGEST).llm(max_model_len=max_model_len, max_drafts=K, **EAGER) as llm:
        assert_same(answers(llm, texts, params), want, params, reference("llama"))
        assert num_drafts(llm)[1] > 0 or max_model_len < 32


def test_up_to_the_end_of_the_devices_arrays(plain, drafting, reference):
    """The same where the token history and the block table end there too; blocks of 4 don't divide it."""
    limit = SMALL["max_model_len"]
    lengths = [1, 40, *range(limit - 20, limit)]
    texts = [(text * limit)[:n] for n, text in zip(lengths, prompts(2, len(lengths)), strict=True)]
    params = [SamplingParams(temperature=0.3 * (n % 2), seed=n, max_tokens=limit - n, ignore_eos=True) for n in lengths]
    with plain.llm() as llm:
        want = answers(llm, texts, params)
    scarce = {"num_blocks": -(-limit // 4), "admission_headroom_len": 0}
    for settings in ({}, {"max_drafts": 4}, scarce, {"run_ahead": 0}, {"run_ahead": 3}):
        with drafting(LONGEST).llm(**EAGER, **settings) as llm:
            assert_same(answers(llm, texts, params), want, params, reference("llama"))
            assert num_drafts(llm)[1] > 0


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize("K", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("limit", [32, 33, 48, 63, 64])
def test_limits_block_sizes_and_lengths(plain, tiny, reference, limit, block_size, K):
    texts = [(text * limit)[:n] for n, text in enumerate(prompts(K, limit - 1), 1)]
    params = [SamplingParams(temperature=0, max_tokens=limit - n, ignore_eos=True) for n in range(1, limit)]
    with plain.llm() as llm:
        want = answers(llm, texts, params)
    settings = {**SMALL, "max_model_len": limit, "block_size": block_size, "speculative_config": speculative(K)}
    engine = tiny("llama", **settings)
    with engine.llm(**EAGER) as llm:
        assert_same(answers(llm, texts, params), want, params, reference("llama"))
    with engine.llm(**EAGER, num_blocks=-(-limit // block_size), admission_headroom_len=0) as llm:
        assert_same(answers(llm, texts, params), want, params, reference("llama"))


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize("K", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma3"])
def test_families_and_draft_lengths(tiny, reference, name, K):
    """K compiled in, many prompts, all ways."""
    with tiny(name, **SMALL).llm() as llm:
        wanted = [answers(llm, *requests(seed)) for seed in range(4)]
    engine = tiny(name, **SMALL, speculative_config=speculative(K))
    for way, settings in WAYS.items():
        with engine.llm(**settings, **EAGER) as llm:
            for seed in range(4):
                params = requests(seed)[1]
                assert_same(answers(llm, *requests(seed)), wanted[seed], params, reference(name))
            assert num_drafts(llm)[1] > 0, way


@pytest.mark.parametrize("tp", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_row_25_over_several_devices(tiny, tp):
    """Sharded and drafting against one device without drafts. Two devices that draft are also in reliability/."""
    texts, params = requests()
    with tiny("dummy", **SMALL).llm() as llm:
        want = answers(llm, texts, params)
    engine = tiny("dummy", **SMALL, tensor_parallel_size=tp, speculative_config=speculative(4))
    with engine.llm(**EAGER) as llm:
        assert_same(answers(llm, texts, params), want, params)
        assert num_drafts(llm)[1] > 0


def test_two_turns_give_the_same_drafts(drafting):
    """Drafting is a function of the text: the same answers in the same number of steps."""
    texts, params = requests()
    counts = []
    for _ in range(2):
        with drafting(LONGEST).llm(enable_prefix_caching=False, run_ahead=0, **EAGER) as llm:
            assert np.size(ids(answers(llm, texts[:1], params[:1])))
            counts.append((*num_drafts(llm), llm.engine.core.stats()["num_steps"]))
    assert counts[0] == counts[1]
