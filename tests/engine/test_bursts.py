"""Several steps in one call give what one step a call gives."""

import pytest
from core_world import FakeRunner, make_choice, make_core, next_token, run
from speculation_cases import CASES, LOOP, SMALL, answers, assert_same, prompts, speculative
from tiny_engines import preemptions

from jaxserve import ConfigError, SamplingParams
from jaxserve.config import EngineConfig, SpeculativeConfig
from jaxserve.engine.core import EngineCore
from jaxserve.runner import buckets

BURST = 3
DRAFTS = {  # those of test_speculation.py and test_speculation_model.py: only the bursts are compiled here
    "no drafts": None,
    "ngram": speculative(8),
    "twin": SpeculativeConfig(method="draft_model", quantization="int4", num_speculative_tokens=3, adaptive=False),
}
# Nothing that a burst doesn't do, and lengths that end in the middle of one.
PLAIN = [
    SamplingParams(temperature=(0, 0.5, 0.2)[i % 3], seed=i, max_tokens=11 + i, ignore_eos=i % 2 == 0) for i in range(7)
] + [CASES["n"], CASES["stop string"].with_changes(allowed_token_ids=None), SamplingParams(temperature=0, **LOOP)]


@pytest.fixture(scope="module", params=DRAFTS)
def bursting(request, tiny):
    return tiny("llama", **SMALL, steps_per_dispatch=BURST, speculative_config=DRAFTS[request.param])


@pytest.fixture
def short(bursting):
    """As many drafts as a burst has room for."""
    return {"adaptive_drafts": None, "max_drafts": 2} if bursting.config.speculative_config else {}


@pytest.fixture
def calls(bursting, monkeypatch):
    """How many plans each call brought to the device, of the bursting engine."""
    found = []
    runner = bursting.engine.core.runner
    one, burst = runner._dispatch_one, runner._dispatch_burst
    monkeypatch.setattr(runner, "_dispatch_one", lambda plan: found.append(1) or one(plan))
    monkeypatch.setattr(
        runner, "_dispatch_burst", lambda plans, bucket: found.append(len(plans)) or burst(plans, bucket)
    )
    return found


@pytest.fixture(scope="module")
def want(tiny):
    """Of the cases, then of the plain requests: an engine with one step a call."""
    with tiny("llama", **SMALL).llm() as llm:
        return answers(llm, prompts(), list(CASES.values())), answers(llm, prompts(1, len(PLAIN)), PLAIN)


@pytest.mark.parametrize("name", CASES)
def test_each_setting_alone(bursting, short, calls, want, reference, name):
    at = list(CASES).index(name)
    params = [CASES[name]]
    with bursting.llm(**short) as llm:
        assert_same(answers(llm, [prompts()[at]], params), [want[0][at]], params, reference("llama"))
    assert set(calls) <= {1, BURST}
    assert BURST in calls


def test_what_no_burst_samples_goes_step_by_step(bursting, short, calls):
    """Truncation and penalties together."""
    both = CASES["truncated"].with_changes(frequency_penalty=0.1)
    with bursting.llm(**short) as llm:
        answers(llm, prompts()[-1:], [both])
    assert set(calls) == {1}


@pytest.mark.parametrize(
    "way",
    [{}, {"max_num_seqs": 1}, {"num_blocks": 17, "admission_headroom_len": 0}, {"max_prefill_chunk_len": 4}],
    ids=["at once", "one slot", "preempted", "chunks of 4"],
)
def test_many_that_come_and_go(bursting, short, calls, want, reference, way):
    """Twice: the second time the prefixes are cached."""
    with bursting.llm(**short, **way) as llm:
        for _ in range(2):
            got = answers(llm, prompts(1, len(PLAIN)), PLAIN)
            assert_same(got, want[1], PLAIN, reference("llama"))
        assert (preemptions(llm) > 0) == ("num_blocks" in way)
    assert BURST in calls or (bursting.config.speculative_config and way.get("max_num_seqs") != 1), (
        "drafts fill a bucket"
    )


def test_large_bursts_are_shorter_than_small_ones(tiny, want, reference, monkeypatch):
    """Of the longest 3 steps for one row, of 2 for more."""
    monkeypatch.setattr(buckets, "_LONG_BURST_ROWS", 1)
    engine = tiny("llama", **{**SMALL, "max_num_batched_tokens": 33}, steps_per_dispatch=BURST)  # an engine of its own
    runner, found = engine.engine.core.runner, set()
    burst = runner._dispatch_burst
    monkeypatch.setattr(
        runner, "_dispatch_burst", lambda plans, key: found.add((key.num_rows, len(plans))) or burst(plans, key)
    )
    several = prompts(1, len(PLAIN))
    with engine.llm() as llm:
        assert_same(answers(llm, several, PLAIN), want[1], PLAIN, reference("llama"))
        assert (3, 2) in found  # and (1, 3), if the last of them is alone for so long
        found.clear()
        assert_same(answers(llm, several[:1], PLAIN[:1]), want[1][:1], PLAIN[:1], reference("llama"))
    assert found == {(1, 3)}


def test_rows_of_several_tokens_burst_only_beside_drafts(bursting, short, monkeypatch):
    """A prompt's last chunk samples and admits nobody, as a burst's steps do. Attention of a burst without drafts is
    fast for rows of one token only."""
    runner, widths = bursting.engine.core.runner, []
    burst = runner._dispatch_burst
    monkeypatch.setattr(
        runner, "_dispatch_burst", lambda plans, key: widths.extend(p.widths.max() for p in plans) or burst(plans, key)
    )
    chunked = []
    with bursting.llm(
        watch=lambda plan: chunked.append(plan.widths.max() == 2 and not plan.admissions),
        max_prefill_chunk_len=2,
        **short,
    ) as llm:
        llm.generate([{"prompt_token_ids": [1, 2, 3, 4]}], SamplingParams(temperature=0, max_tokens=9), use_tqdm=False)
    assert any(chunked)
    if not bursting.config.speculative_config:
        assert len(widths) > 0 and max(widths) == 1


def test_drafts_are_accepted_in_bursts(bursting, short, calls):
    if not bursting.config.speculative_config:
        pytest.skip("an engine without drafts")
    with bursting.llm(**short) as llm:
        (output,) = answers(llm, [prompts()[-1]], [SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)])
    assert output.metrics.num_accepted_tokens > 10
    assert BURST in calls


def test_a_burst_is_planned_while_another_is_in_flight():
    runner = FakeRunner(burst_len=4)
    choice = make_choice(prompt_len=5, max_tokens=30)
    core = make_core(runner, run_ahead=7)
    core = EngineCore(core.scheduler, runner, run_ahead=2, check_invariants=True)
    sink = run(core, [choice])
    tokens = list(choice.prompt_token_ids)
    for _ in range(30):
        tokens.append(next_token(tokens))
    assert sink.tokens(choice) == tokens[5:]
    assert runner.calls == [4] * 7 + [2]
    for first in range(0, 24, 4):  # the burst after the next isn't sent before the first of this one was read
        read = runner.log.index(("fetch", first))
        assert runner.log.index(("dispatch", first + 7)) < read < runner.log.index(("dispatch", first + 8))


def test_the_end_of_a_choice_in_a_burst_frees_nothing_that_the_burst_still_writes():
    """Tokens that are computed past a stop go nowhere, and the next choice in that slot isn't disturbed."""
    runner = FakeRunner(burst_len=4)
    first = make_choice(prompt_len=6, max_tokens=30)
    tokens = list(first.prompt_token_ids)
    for _ in range(6):
        tokens.append(next_token(tokens))
    first = make_choice(prompt_len=6, max_tokens=30, stop_token_ids=[tokens[11]])
    others = [make_choice(prompt_len=3 + i, max_tokens=9 + i) for i in range(5)]
    core = make_core(runner, run_ahead=7, max_num_seqs=1, num_blocks=16)
    sink = run(EngineCore(core.scheduler, runner, run_ahead=1, check_invariants=True), [first, *others])
    for choice in others:
        expected = list(choice.prompt_token_ids)
        for _ in range(choice.params.max_tokens):
            expected.append(next_token(expected))
        assert sink.tokens(choice) == expected[choice.prompt_len :]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps_per_dispatch": 0}, "steps_per_dispatch is 0; allowed"),
        ({"steps_per_dispatch": 2, "run_ahead": 0}, "steps_per_dispatch is 2 with run_ahead 0; allowed: 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(model="x", **settings)
