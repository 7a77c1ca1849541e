"""Bad input is refused before anything is admitted, by an error that names field, value and range."""

import math
import pickle

import numpy as np
import pytest
from fakes import EOS, VOCAB_SIZE, fake_engine

from jaxserve.config import Limits
from jaxserve.engine.prompts import ParsedPrompt, split_prompts
from jaxserve.engine.requests import RequestBuilder
from jaxserve.errors import InvalidRequestError
from jaxserve.sampling_params import SamplingParams
from jaxserve.text.codec import Codec

CONTEXT = 64


def builder(**kwargs):
    engine = fake_engine(max_model_len=CONTEXT, **kwargs)
    return RequestBuilder(engine, Codec(engine.tokenizer))


def check(prompt="hello", params=None, *, priority=None, **kwargs):
    return builder(**kwargs).check(split_prompts(prompt)[0], params, priority)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("hi", [ParsedPrompt("hi", None)]),
        (["hi", "ho"], [ParsedPrompt("hi", None), ParsedPrompt("ho", None)]),
        ([1, 2], [ParsedPrompt(None, (1, 2))]),
        (np.array([1, 2]), [ParsedPrompt(None, (1, 2))]),
        ([[1, 2], [3]], [ParsedPrompt(None, (1, 2)), ParsedPrompt(None, (3,))]),
        ({"prompt": "hi"}, [ParsedPrompt("hi", None)]),
        ({"prompt": "hi", "multi_modal_data": None}, [ParsedPrompt("hi", None)]),
        ({"prompt_token_ids": [5], "cache_salt": "me"}, [ParsedPrompt(None, (5,), "me")]),
        (
            [{"prompt": "a"}, {"prompt": "b", "prompt_token_ids": [1]}],
            [ParsedPrompt("a", None), ParsedPrompt("b", (1,))],
        ),
        (["hi", [1], {"prompt": "x"}], [ParsedPrompt("hi", None), ParsedPrompt(None, (1,)), ParsedPrompt("x", None)]),
        ([], []),
    ],
)
def test_every_shape_of_prompt_is_understood(prompts, expected):
    assert split_prompts(prompts) == expected


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ("", "empty"),
        ([[]], "empty"),
        ({"prompt": ""}, "empty"),
        ({"prompt_token_ids": []}, "empty"),
        (5, "prompts is 5"),
        (None, "prompts is None"),
        (np.array(3), r"prompts is array\(3\) \(ndarray\); allowed"),
        ([np.array(3)], r"the prompt is array\(3\) \(ndarray\); allowed"),
        ({"prompt_token_ids": np.array(3)}, r"the prompt is array\(3\)"),
        ([None], "None"),
        ([1.5], "1.5"),
        ([1, "a"], "'a'"),
        ([1, True], "True"),
        ({"text": "x"}, "'text'"),
        ({}, "'prompt' or 'prompt_token_ids'"),
        ({"prompt": 3}, "3"),
        ({"prompt_token_ids": "abc"}, "abc"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "x", "cache_salt": "a\ud800"}, "cache_salt holds '.ud800' at index 1"),
        ("ab\ud800", "the prompt holds '.ud800' at index 2, half of a surrogate pair; allowed: Unicode text"),
        ({"prompt": "\udfff", "prompt_token_ids": [1]}, "the prompt holds '.udfff'"),
        ({"prompt": "x", "multi_modal_data": {"image": 1}}, "multi_modal_data"),
    ],
)
def test_other_shapes_are_refused(prompts, named):
    with pytest.raises(InvalidRequestError, match=named):
        split_prompts(prompts)


@pytest.mark.parametrize(
    ("prompt", "settings", "named"),
    [
        ([0, VOCAB_SIZE], {}, rf"token id {VOCAB_SIZE}; allowed: 0\.\.{VOCAB_SIZE - 1}"),
        ([-1], {}, "token id -1"),
        ("x" * CONTEXT, {}, rf"{CONTEXT} tokens; allowed: 1\.\.{CONTEXT - 1}"),
        ("x" * (CONTEXT - 3), {"max_tokens": 4}, r"max_tokens is 4; allowed: 1\.\.3"),
        ("hello", {"max_tokens": CONTEXT}, "max_tokens is 64"),
        ("x" * (CONTEXT - 3), {"max_tokens": None, "min_tokens": 4}, r"min_tokens is 4; allowed: 0\.\.3"),
        ("hello", {"logprobs": 21}, r"logprobs is 21; allowed: 0\.\.20"),
        ("hello", {"prompt_logprobs": 21}, r"prompt_logprobs is 21; allowed: 0\.\.20"),
        ("hello", {"stop_token_ids": [VOCAB_SIZE]}, f"stop_token_ids holds token id {VOCAB_SIZE}"),
        ("hello", {"allowed_token_ids": [1, 999]}, "allowed_token_ids holds token id 999"),
        ("hello", {"logit_bias": {999: 1.0}}, "logit_bias holds token id 999"),
        ("hello", {"stop_token_ids": list(range(32))}, "33 ids; allowed: at most 32"),
        ("hello", {"logit_bias": dict.fromkeys(range(65), 1.0)}, "65 entries; allowed: at most 64"),
        ("hello", {"bad_words": ["much too long"]}, "'much too long', which is 13 tokens; allowed: at most 8"),
        ("hello", {"bad_words": list("abcdefghi")}, "18 token sequences .* at most 16"),
        ("hello", {"bad_words": [" "]}, "bad_words holds ' '"),
        ("hello", {"bad_words": ["\ud800"]}, "the text holds '.ud800' at index 0"),
        (
            "hello",
            {"repetition_detection": {"max_pattern_size": 513}},
            r"^repetition_detection\.max_pattern_size is 513; allowed: at most 512",
        ),
        ("hello", {"priority": 1}, "priority is 1; allowed: 0"),
        ("hello", {"num_speculative_tokens": 3}, "num_speculative_tokens is 3"),
    ],
)
def test_what_depends_on_the_engine_is_checked(prompt, settings, named):
    with pytest.raises(InvalidRequestError, match=named):
        check(prompt, SamplingParams(**settings))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": -2}, r"top_k is -2; allowed: an integer in -1\.\."),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": True}, "temperature is True"),
        ({"max_tokens": np.float32(3)}, "max_tokens is "),
        ({"skip_special_tokens": "no"}, "skip_special_tokens is 'no'; allowed: True, False"),
        ({"detokenize": None}, "detokenize is None"),
        ({"ignore_eos": 1}, "ignore_eos is 1"),
        ({"include_stop_str_in_output": 0}, "include_stop_str_in_output is 0"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5"),
        ({"n": 0}, "n is 0"),
        ({"stop": [""]}, "stop holds ''"),
        ({"stop": 3}, "stop is 3; allowed: a string, a list, or None"),
        ({"stop": "x", "detokenize": False}, "detokenize"),
        ({"stop_token_ids": 3}, "stop_token_ids is 3"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\]"),
        ({"logit_bias": {0: math.nan}}, "logit_bias has 0"),
        ({"logit_bias": {0: True}}, "logit_bias has 0"),
        ({"logit_bias": {1.7: 3}}, "logit_bias has key 1.7"),
        ({"logit_bias": {True: 3}}, "logit_bias has key True"),
        ({"logit_bias": {"1_0": 3}}, "logit_bias has key '1_0'"),
        ({"logit_bias": {-1: 3}}, "logit_bias has -1"),
        ({"logit_bias": {1: 100.5}}, r"logit_bias has 1: 100\.5; allowed: token ids, biases in -100\.\.100"),
        (
            {"logprobs": -1},
            r"^logprobs is -1; allowed: an integer in 0\.\.max_logprobs \(of the engine's limits\) or None$",
        ),
        ({"prompt_logprobs": -1}, r"^prompt_logprobs is -1; allowed: an integer in 0\.\.max_logprobs"),
        ({"repetition_detection": "x"}, "repetition_detection is 'x'; allowed: a RepetitionDetection"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"repetition_detection": {"size": 3}}, "'size'"),
        ({"repetition_detection": {"min_count": 0}}, r"^repetition_detection\.min_count is 0"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"temprature": 1}, "'temprature'"),
    ],
)
def test_what_depends_on_nothing_is_checked_at_once(settings, named):
    with pytest.raises(InvalidRequestError, match=named):
        SamplingParams(**settings)


def test_numbers_of_numpy_become_pythons():
    params = SamplingParams(
        max_tokens=np.int64(5), temperature=np.float32(0.5), top_k=np.int32(-1), stop_token_ids=np.array([3, 4]),
        allowed_token_ids=[np.int64(7)], logit_bias={np.int64(8): np.float32(1.5), "9": 2},
        repetition_detection={"max_pattern_size": np.int64(3)},
    )  # fmt: skip
    assert params == SamplingParams(
        max_tokens=5, temperature=0.5, stop_token_ids=[3, 4], allowed_token_ids=[7], logit_bias={8: 1.5, 9: 2.0},
        repetition_detection={"max_pattern_size": 3},
    )  # fmt: skip
    values = [params.max_tokens, params.temperature, params.top_k, *params.stop_token_ids, *params.allowed_token_ids]
    values += [*params.logit_bias, *params.logit_bias.values(), params.repetition_detection.max_pattern_size]
    assert {type(value) for value in values} == {int, float}


def test_params_cant_be_changed_from_outside():
    """They are read again on the core's thread while the request waits and runs."""
    given = {5: 1.0}
    params = SamplingParams(logit_bias=given, stop=["a"])
    given[6] = 101.0
    assert params.logit_bias == {5: 1.0}
    with pytest.raises(TypeError):
        params.logit_bias[6] = 101.0
    with pytest.raises(AttributeError, match=r"params = params\.with_changes\(max_tokens=\.\.\.\)"):
        params.max_tokens = 5
    assert hash(params) == hash(params.clone()) and params == params.clone() and params is not params.clone()
    copy = pickle.loads(pickle.dumps(params))
    assert copy == params and hash(copy) == hash(params)


def test_something_else_than_sampling_params_is_refused():
    with pytest.raises(InvalidRequestError, match="dict"):
        check("hello", {"temperature": 0})


def test_max_tokens_of_none_is_what_the_context_leaves():
    assert check("hello", SamplingParams(max_tokens=None)).params.max_tokens == CONTEXT - 5
    assert check("hello", SamplingParams(max_tokens=None), default_max_tokens=7).params.max_tokens == 7
    assert check("x" * 60, SamplingParams(max_tokens=None), default_max_tokens=7).params.max_tokens == 4
    assert check("hello", SamplingParams(max_tokens=None), max_output_tokens=9).params.max_tokens == 9


def test_the_ceiling_holds_for_explicit_lengths():
    with pytest.raises(InvalidRequestError, match=r"max_tokens is 10; allowed: 1\.\.9"):
        check("hello", SamplingParams(max_tokens=10), max_output_tokens=9)


def test_the_shorter_wall_clock_counts():
    assert check("hello", SamplingParams(max_seconds=5.0), max_seconds=2.0).params.max_seconds == 2.0
    assert check("hello", SamplingParams(max_seconds=1.0), max_seconds=2.0).params.max_seconds == 1.0
    assert check("hello", SamplingParams(), max_seconds=2.0).params.max_seconds == 2.0


def test_no_params_means_the_models_defaults_cut_to_the_context():
    defaults = {"temperature": 0.6, "top_k": 20}
    params = check("hello", None, sampling_defaults=defaults).params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.6, 20, 16)
    assert check("x" * 60, None, sampling_defaults=defaults).params.max_tokens == 4


def test_bad_words_are_forbidden_with_and_without_a_space():
    checked = check("hello", SamplingParams(bad_words=["no", " no"]))
    assert checked.bad_words_ids == (tuple(b"no"), tuple(b" no"))


def test_priority_is_accepted_where_the_engine_schedules_by_it():
    kwargs = {"scheduling_policy": "priority"}
    assert check("hello", SamplingParams(priority=-3), **kwargs).priority == -3
    assert check("hello", SamplingParams(priority=-3), priority=2, **kwargs).priority == 2
    assert type(check("hello", SamplingParams(), priority=np.int64(2), **kwargs).priority) is int


@pytest.mark.parametrize("priority", ["high", math.nan, 1.5, True, 2**31, -(2**31) - 1, [1]])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_priority_beside_the_params_is_checked_as_theirs_is(priority, policy):
    """Ranks are compared on the core's thread, where an error ends the engine for everybody."""
    with pytest.raises(InvalidRequestError, match=r"priority is .*; allowed: an integer in -2147483648\.\."):
        check("hello", SamplingParams(), priority=priority, scheduling_policy=policy)


def test_limits_are_the_engines():
    assert check("hello", SamplingParams(logprobs=30), limits=Limits(max_logprobs=30)).params.logprobs == 30


def test_choices_share_the_request_and_differ_in_index_and_id():
    b = builder()
    request = b.admit(b.check(ParsedPrompt("hi", None, "salt"), SamplingParams(n=3, seed=5)), "mine")
    assert [c.index for c in request.choices] == [0, 1, 2]
    assert len({c.choice_id for c in request.choices}) == 3
    first = request.choices[0].choice_id
    assert {(c.group_id, c.seed, c.cache_salt, c.eos_token_ids) for c in request.choices} == {
        (first, 5, "salt", (EOS,))
    }
    assert all(c.prompt_token_ids == (104, 105) for c in request.choices)


def test_seeds_are_drawn_once_a_request_from_the_engines_seed():
    def seeds(engine_seed):
        b = builder(seed=engine_seed)
        requests = [b.admit(b.check(ParsedPrompt("hi", None), SamplingParams(n=2))) for _ in range(3)]
        assert all(r.choices[0].seed == r.choices[1].seed for r in requests)
        return [r.choices[0].seed for r in requests]

    assert seeds(1) == seeds(1) != seeds(2)
    assert len(set(seeds(1))) == 3


def test_a_seed_of_minus_one_is_none_as_in_vllm():
    assert SamplingParams(seed=-1) == SamplingParams(seed=np.int64(-1)) == SamplingParams()
    assert SamplingParams(seed=-2).seed == -2


def test_a_refused_request_draws_nothing():
    one, two = builder(), builder()
    with pytest.raises(InvalidRequestError):
        one.check(ParsedPrompt("hi", None), SamplingParams(logprobs=99))
    admitted = [b.admit(b.check(ParsedPrompt("hi", None), SamplingParams())) for b in (one, two)]
    assert admitted[0].choices[0].seed == admitted[1].choices[0].seed
    assert admitted[0].request_id == admitted[1].request_id


@pytest.mark.parametrize(
    "settings",
    [
        {"allowed_token_ids": [104], "bad_words": ["h"]},
        {"allowed_token_ids": [EOS], "min_tokens": 2},
        {"allowed_token_ids": [EOS], "min_tokens": 2, "ignore_eos": True},
        {"allowed_token_ids": [7, 104], "bad_words": ["h"], "stop_token_ids": [7], "min_tokens": 1},
    ],
)
def test_an_allowed_id_must_be_left(settings):
    """Otherwise every id would be forbidden, and the first of the vocabulary would come out."""
    with pytest.raises(InvalidRequestError, match=r"allowed_token_ids is \[.*forbid all of it; allowed: at least one"):
        check(params=SamplingParams(**settings, max_tokens=5))
    check(
        params=SamplingParams(**{**settings, "allowed_token_ids": [*settings["allowed_token_ids"], 99]}, max_tokens=5)
    )
