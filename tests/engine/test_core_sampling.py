"""Every sampling field, end to end on a tiny model: what comes out against transformers' logits and plain rules."""

import dataclasses
import time

import numpy as np
import pytest
from speculation_cases import SMALL as FEW_EXECUTABLES
from tiny_engines import GREEDY, Tiny, generate, ids

from jaxserve import LLM, SamplingParams
from jaxserve.runner import compiler

EOS = 2
LETTERS = [*range(97, 123)]
PROMPT = [72, 101, 108, 108, 111]


@pytest.fixture
def llm(tiny):
    """Not shared: two prefix caches over one pool would each believe the other's blocks."""
    with tiny("llama").llm() as llm:
        yield llm


@pytest.fixture(scope="module")
def oracle(reference):
    return reference("llama")


def one(llm, params, prompt=PROMPT):
    (output,) = generate(llm, [prompt], params)
    (choice,) = output.outputs
    return choice


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def check_row(row, token_id, expected, k):
    """One position's logprobs against float64 log-probabilities of all ids."""
    ranked = np.argsort(-expected, kind="stable")
    assert next(iter(row)) == token_id
    assert set(row) == {token_id, *ranked[:k].tolist()}
    for candidate, entry in row.items():
        assert entry.logprob == pytest.approx(expected[candidate], abs=1e-4)
        assert entry.rank == 1 + int(np.flatnonzero(ranked == candidate)[0])
        assert entry.decoded_token == (chr(candidate) if candidate < 128 else "\ufffd")


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 1.7, "seed": 4, "top_k": 50},
        {"temperature": 0.5, "seed": 5, "repetition_penalty": 1.9, "logit_bias": {9: 50.0}},
    ],
)
def test_logprobs_are_of_the_raw_distribution(llm, oracle, settings):
    """Whatever temperature, truncation, penalties and biases did to the choice; the first row is transformers'."""
    params = SamplingParams(max_tokens=6, logprobs=5, ignore_eos=True, **settings)
    choice = one(llm, params, oracle.prompt)
    expected = oracle.logprobs(oracle.prompt + choice.token_ids)[len(oracle.prompt) - 1 :]
    np.testing.assert_allclose(expected[0], log_softmax(oracle.hf_logits[-1]), atol=1e-4)
    for row, token_id, position in zip(choice.logprobs, choice.token_ids, expected, strict=False):
        check_row(row, token_id, position, 5)
    total = sum(expected[i, token_id] for i, token_id in enumerate(choice.token_ids))
    assert choice.cumulative_logprob == pytest.approx(total, abs=5e-4)
    if "logit_bias" in settings:
        assert choice.token_ids == [9] * 6


def test_logprobs_zero_gives_the_chosen_ones_and_none_gives_none(llm):
    choice = one(llm, SamplingParams(seed=1, max_tokens=4, logprobs=0, ignore_eos=True))
    assert [list(row) for row in choice.logprobs] == [[token_id] for token_id in choice.token_ids]
    choice = one(llm, GREEDY)
    assert choice.logprobs is None and choice.cumulative_logprob is None


@pytest.mark.parametrize(
    "scheduler",
    [{}, {"max_prefill_chunk_len": 1}, {"max_prefill_chunk_len": 7}, {"max_num_batched_tokens": 5, "run_ahead": 3}],
)
def test_prompt_logprobs_are_those_of_transformers(tiny, oracle, scheduler):
    expected = log_softmax(oracle.hf_logits)
    params = GREEDY.with_changes(prompt_logprobs=3, max_tokens=2)
    with tiny("llama").llm(**scheduler) as llm:
        generate(llm, [oracle.prompt])  # now the prefix cache holds the prompt, which must not be used
        others = [oracle.prompt[:9], oracle.prompt[3:]]
        outputs = generate(llm, [oracle.prompt, *others], [params, GREEDY, params.with_changes(prompt_logprobs=0)])
        short = generate(llm, [[5]], params)[0]
    output = outputs[0]
    assert output.metrics.num_cached_tokens == 0
    rows = output.prompt_logprobs
    assert rows[0] is None and len(rows) == len(oracle.prompt)
    for position, row in enumerate(rows[1:], start=1):
        check_row(row, oracle.prompt[position], expected[position - 1], 3)
    assert outputs[1].prompt_logprobs is None
    assert [list(row) for row in outputs[2].prompt_logprobs[1:]] == [[t] for t in oracle.prompt[4:]]
    assert short.prompt_logprobs == [None]


def test_prompt_logprobs_of_chunks_longer_than_one_call_scores(monkeypatch, byte_tokenizer_path, oracle):
    """The LM head runs over seven tokens at a time; a step brings up to 80."""
    monkeypatch.setattr(compiler, "PROMPT_SCORE_TOKENS", 7)
    engine = Tiny("llama", byte_tokenizer_path)  # all its other executables are those of the shared engine
    prompts = [np.random.default_rng(n).integers(3, 131, n).tolist() for n in (60, 36, 8)]
    with engine.llm() as llm:
        outputs = generate(llm, prompts, GREEDY.with_changes(prompt_logprobs=2, max_tokens=1))
    engine.close()
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = oracle.logprobs(prompt)
        assert len(output.prompt_logprobs) == len(prompt)
        for position, row in enumerate(output.prompt_logprobs[1:], start=1):
            check_row(row, prompt[position], expected[position - 1], 2)


def test_prompt_logprobs_survive_preemption(tiny, oracle):
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, 131, n).tolist() for n in (30, 31, 29)]
    params = GREEDY.with_changes(prompt_logprobs=1, max_tokens=40, logprobs=1)
    with tiny("llama").llm(num_blocks=26, admission_headroom_len=0, max_prefill_chunk_len=6) as llm:
        outputs = generate(llm, prompts, params)
        assert llm.engine.core.stats()["num_preemptions"]
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = oracle.logprobs(prompt + output.outputs[0].token_ids)
        assert len(output.prompt_logprobs) == len(prompt)
        for position, row in enumerate(output.prompt_logprobs[1:], start=1):
            check_row(row, prompt[position], expected[position - 1], 1)
        assert len(output.outputs[0].logprobs) == 40
        for at, row in enumerate(output.outputs[0].logprobs):
            check_row(row, output.outputs[0].token_ids[at], expected[len(prompt) - 1 + at], 1)


def test_prompt_logprobs_come_once_for_n_choices(llm, oracle):
    params = SamplingParams(n=3, seed=1, prompt_logprobs=0, max_tokens=3)
    (output,) = generate(llm, [oracle.prompt], params)
    assert len(output.prompt_logprobs) == len(oracle.prompt) and len(output.outputs) == 3


def test_logit_bias_forces_and_forbids(llm):
    assert one(llm, GREEDY.with_changes(logit_bias={77: 100})).token_ids == [77] * 16
    banned = one(llm, GREEDY).token_ids[0]
    assert banned not in one(llm, GREEDY.with_changes(logit_bias={str(banned): -100})).token_ids


def test_allowed_token_ids_are_the_only_ones(llm):
    allowed = [65, 130, 7]
    outputs = generate(llm, [PROMPT] * 8, SamplingParams(temperature=5.0, max_tokens=16, allowed_token_ids=allowed))
    assert {token for tokens in ids(outputs) for token in tokens} == set(allowed)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p"])
def test_truncation_leaves_what_it_should(llm, oracle, name):
    """200 draws of a first token: all from the kept set, and from more than one of its ids."""
    settings = {
        "temperature": {"temperature": 1e-4},
        "top_k": {"top_k": 3},
        "top_p": {"top_p": 0.3},
        "min_p": {"min_p": 0.3},
    }
    logits = oracle.logits(PROMPT)[-1].astype(np.float64)
    probs = np.exp(log_softmax(logits))
    order = np.argsort(-probs)
    kept = {
        "temperature": {int(order[0])},
        "top_k": set(order[:3].tolist()),
        "top_p": set(order[: 1 + int(np.searchsorted(np.cumsum(probs[order]), 0.3))].tolist()),
        "min_p": set(np.flatnonzero(probs >= 0.3 * probs.max()).tolist()),
    }[name]
    params = SamplingParams(n=200, seed=8, max_tokens=1, ignore_eos=True, **settings[name])
    drawn = {tokens[0] for tokens in ids(generate(llm, [PROMPT], params))}
    assert drawn <= kept
    assert len(drawn) > 1 or len(kept) == 1


def test_draws_follow_the_distribution(llm, oracle):
    """600 first tokens against the exact probabilities: every id within five standard deviations."""
    num = 600
    params = SamplingParams(n=num, seed=31, max_tokens=1, temperature=0.7, ignore_eos=True)
    drawn = np.bincount([tokens[0] for tokens in ids(generate(llm, [PROMPT], params))], minlength=131)
    probs = np.exp(log_softmax(oracle.logits(PROMPT)[-1].astype(np.float64) / 0.7))
    assert np.all(np.abs(drawn - num * probs) < 5 * np.sqrt(num * probs * (1 - probs)) + 2)


def test_bad_words_never_appear(llm):
    """A sequence of two: the model may say each alone."""
    params = SamplingParams(temperature=3.0, max_tokens=60, seed=6, allowed_token_ids=[97, 98, 32])
    free = one(llm, params).text
    assert "ab" in free and " a" in free
    held = one(llm, params.with_changes(bad_words=["ab"])).text
    assert "ab" not in held and {*held} == {*"ab "}


def test_min_tokens_holds_back_eos_and_stop_ids(llm):
    eager = GREEDY.with_changes(ignore_eos=False, logit_bias={EOS: 100}, min_tokens=5)
    choice = one(llm, eager)
    assert EOS not in choice.token_ids[:5] and choice.token_ids[5:] == [EOS] and choice.finish_reason == "stop"
    stopping = GREEDY.with_changes(logit_bias={99: 100}, stop_token_ids=[99], min_tokens=3)
    choice = one(llm, stopping)
    assert 99 not in choice.token_ids[:3] and choice.token_ids[3:] == [99]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", 99)


def test_eos_ends_and_ignore_eos_doesnt(llm):
    eager = GREEDY.with_changes(logit_bias={EOS: 100})
    choice = one(llm, eager.with_changes(ignore_eos=False))
    assert (choice.token_ids, choice.finish_reason, choice.stop_reason, choice.text) == ([EOS], "stop", None, "")
    choice = one(llm, eager)
    assert (choice.token_ids, choice.finish_reason) == ([EOS] * 16, "length")


@pytest.mark.parametrize("include", [False, True])
def test_stop_token_ids(llm, include):
    whole = one(llm, GREEDY)
    stop = whole.token_ids[6]
    end = whole.token_ids.index(stop) + 1
    choice = one(llm, GREEDY.with_changes(stop_token_ids=[stop, 1], include_stop_str_in_output=include))
    assert (choice.token_ids, choice.finish_reason, choice.stop_reason) == (whole.token_ids[:end], "stop", stop)
    assert choice.text == whole.text[: end if include else end - 1]


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_tokens_and_steps(tiny, run_ahead, include):
    """A token a character and a step a token: every stop string of more than one character spans both."""
    params = SamplingParams(seed=14, max_tokens=40, allowed_token_ids=LETTERS, temperature=1.0)
    with tiny("llama").llm(run_ahead=run_ahead) as llm:
        whole = one(llm, params).text
        for size in (1, 2, 5):
            stop = whole[17 : 17 + size]
            end = whole.index(stop) + size
            stopping = params.with_changes(stop=["never", stop], include_stop_str_in_output=include)
            choice = one(llm, stopping)
            assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
            assert choice.text == whole[: end if include else end - size]
            assert bytes(choice.token_ids).decode() == whole[:end]
            streamed = list(llm.stream(PROMPT, stopping))
            assert "".join(delta.outputs[0].text for delta in streamed) == choice.text
            assert [t for delta in streamed for t in delta.outputs[0].token_ids] == choice.token_ids


def test_max_tokens_is_exact_up_to_the_context(llm):
    lengths = [1, 2, 15, 16, 17, 91]
    outputs = generate(llm, [PROMPT] * 6, [GREEDY.with_changes(max_tokens=n) for n in lengths])
    assert [len(tokens) for tokens in ids(outputs)] == lengths
    assert {o.outputs[0].finish_reason for o in outputs} == {"length"}
    assert all(ids(outputs)[-1][:n] == tokens for n, tokens in zip(lengths, ids(outputs), strict=True))


def test_max_seconds_ends_one_request_and_not_the_others(llm):
    began = time.monotonic()
    params = [GREEDY.with_changes(max_tokens=91, max_seconds=1e-4), GREEDY]
    slow, quick = generate(llm, [PROMPT, PROMPT], params)
    assert slow.outputs[0].finish_reason == "timeout" and len(slow.outputs[0].token_ids) < 91
    assert quick.outputs[0].finish_reason == "length"
    assert time.monotonic() - began < 30


def test_repetition_detection_stops_a_loop(llm):
    params = GREEDY.with_changes(
        max_tokens=80,
        logit_bias={77: 100},
        repetition_detection={"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 8},
    )
    choice = one(llm, params)
    assert choice.finish_reason == "repetition" and len(choice.token_ids) == 16
    assert one(llm, params.with_changes(repetition_detection=None)).finish_reason == "length"  # a warning only


def test_detokenize_false_gives_ids_and_no_text(llm):
    choice = one(llm, GREEDY.with_changes(detokenize=False))
    assert choice.text == "" and choice.token_ids == one(llm, GREEDY).token_ids


def test_special_tokens_are_shown_where_asked(tiny):
    """The model's vocabulary ends before the byte tokenizer's special tokens: a wider dummy model has them."""
    with tiny("dummy", **FEW_EXECUTABLES).llm() as llm:
        params = GREEDY.with_changes(max_tokens=2, logit_bias={258: 100})
        assert one(llm, params).text == ""
        assert one(llm, params.with_changes(skip_special_tokens=False)).text == "<start><start>"


def test_penalties_follow_their_formulas(llm, oracle):
    """Greedy with huge penalties never repeats; numpy says which ids instead (test_invariance holds mixtures)."""
    params = GREEDY.with_changes(presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=8.0, max_tokens=30)
    tokens = one(llm, params).token_ids
    want, lead = oracle.follow(PROMPT, params)
    assert lead > 2e-4 and tokens == want
    assert tokens != one(llm, GREEDY.with_changes(max_tokens=30)).token_ids


def test_the_defaults_of_the_checkpoint_apply_without_sampling_params(tiny):
    with tiny("llama").llm() as plain:
        dressed = LLM.from_engine(dataclasses.replace(plain.engine, sampling_defaults={"temperature": 0.0}))
        assert ids(generate(dressed, [PROMPT], None))[0] == ids(generate(plain, [PROMPT], GREEDY))[0]
        assert dressed.get_default_sampling_params() == SamplingParams(temperature=0)
        dressed._finalizer.detach()
