"""Runaway protection: lengths, wall clocks and loop detection by the engine's settings, and what they cost."""

import dataclasses
import gc
import time

import numpy as np
import pytest
from fakes import Clock
from serving import GREEDY, K, generate, idle, ids, serve

from jaxserve import ConfigError, EngineConfig, InvalidRequestError, SamplingParams
from jaxserve.engine import core as core_module
from jaxserve.engine import requests
from jaxserve.engine.requests import RequestBuilder
from jaxserve.sampling_params import RepetitionDetection
from jaxserve.scheduler import AdaptiveDrafts, Choice, Scheduler, SchedulerConfig, StepResult
from jaxserve.scheduler.repetition import LoopFinder

RULE = RepetitionDetection(max_pattern_size=3, min_count=5)


# ---- lengths and clocks ----


def builder_with(llm, **settings):
    config = dataclasses.replace(llm.engine.config, **settings)
    return RequestBuilder(dataclasses.replace(llm.engine, config=config), llm._codec)


def test_an_answer_without_a_limit_has_the_engines(engine, cases, monkeypatch):
    with serve(engine) as llm:
        monkeypatch.setattr(llm, "_builder", builder_with(llm, default_max_tokens=9, max_output_tokens=12))
        no_limit = GREEDY.with_changes(max_tokens=None)
        assert ids(llm, cases, no_limit) == [case.answer[:9] for case in cases]
        assert ids(llm, cases, GREEDY.with_changes(max_tokens=12)) == [case.answer[:12] for case in cases]
        with pytest.raises(InvalidRequestError, match=r"max_tokens is 13; allowed: 1\.\.12 .*max_output_tokens"):
            ids(llm, cases, GREEDY.with_changes(max_tokens=13))
        monkeypatch.setattr(llm, "_builder", builder_with(llm, max_output_tokens=7))
        assert ids(llm, cases, no_limit) == [case.answer[:7] for case in cases]


@pytest.mark.parametrize("where", ["request", "engine", "scheduler"])
def test_a_wall_clock_ends_an_answer(engine, cases, monkeypatch, where):
    """Steps that take 40 ms; who is slower than the clock gets what there is, the others all of theirs."""
    clock, seconds = Clock(), 0.6  # of the 1.1 that the answer would take
    for module in (core_module, requests):  # where answers are looked at, and where they are asked for
        monkeypatch.setattr(module, "time", clock)

    def before(plan):
        clock.now += 0.04

    settings = {"max_seconds": seconds} if where == "scheduler" else {}
    with serve(engine, **settings) as llm:
        llm.engine.core.runner.before = before
        if where == "engine":
            monkeypatch.setattr(llm, "_builder", builder_with(llm, max_seconds=seconds))
        slow = GREEDY.with_changes(num_speculative_tokens=0, max_seconds=seconds if where == "request" else 60.0)
        quick = GREEDY.with_changes(max_tokens=1)
        outputs = [output.outputs[0] for output in generate(llm, [c.prompt for c in cases[:2]], [slow, quick])]
        assert (outputs[0].finish_reason, outputs[1].finish_reason) == ("timeout", "length")
        assert outputs[0].token_ids == cases[0].answer[: len(outputs[0].token_ids)]
        assert 0 < len(outputs[0].token_ids) < GREEDY.max_tokens
        idle(llm)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), "1", True])
@pytest.mark.parametrize("name", ["max_seconds", "watchdog_seconds"])
def test_a_clock_must_be_above_0(name, seconds):
    with pytest.raises(ConfigError, match=f"{name} is .*; allowed: a number of seconds above 0"):
        EngineConfig(model="m", **{name: seconds})


# ---- loops ----


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"repetition": "sometimes"}, "repetition is 'sometimes'; allowed: off, warn, stop"),
        ({"repetition_detection": 3}, "repetition_detection is 3"),
        ({"repetition_detection": {"size": 3}}, "'size'"),
        ({"repetition_detection": {"min_count": 1}}, "min_count is 1; allowed: an integer of at least 2"),
        ({"repetition_detection": {"min_pattern_size": 0}}, "min_pattern_size is 0"),
        ({"repetition_detection": {"min_pattern_size": 9, "max_pattern_size": 8}}, "max_pattern_size is 8"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, named):
    with pytest.raises(ConfigError, match=named):
        EngineConfig(model="m", **settings)


def test_warn_is_the_default_and_settings_reach_the_scheduler(engine):
    config = EngineConfig(model="m", repetition_detection={"min_count": 5})
    assert (config.repetition, config.repetition_detection) == ("warn", RepetitionDetection(min_count=5))
    used = engine.engine.core.scheduler.config  # built with settings of its own, see serving.py
    assert (used.repetition, used.repetition_detection) == ("off", RepetitionDetection(max_pattern_size=7))


@pytest.mark.parametrize("num_drafts", [0, K])
@pytest.mark.parametrize("run_ahead", [0, 2])
def test_a_loop_is_stopped_warned_of_or_left(engine, cases, num_drafts, run_ahead):
    """cases[0] says one token forever. Drafts, which follow a loop eagerly, don't change where it's stopped."""
    loop, others = cases[0], cases[1:]
    assert len(set(loop.answer)) == 1
    settings = {"repetition_detection": RULE, "max_drafts": num_drafts, "run_ahead": run_ahead}
    with serve(engine, repetition="stop", **settings) as llm:
        outputs = [output.outputs[0] for output in generate(llm, [case.prompt for case in cases])]
        assert outputs[0].token_ids == loop.answer[:16]
        assert (outputs[0].finish_reason, outputs[0].stop_reason) == ("repetition", "repetition_detected")
        stopped = sum(output.finish_reason == "repetition" for output in outputs)
        assert stopped < len(cases)
        for output, case in zip(outputs[1:], others, strict=True):
            assert output.token_ids == case.answer[: 16 if output.finish_reason == "repetition" else None]
        assert idle(llm)["num_finished"]["repetition"] == stopped
    for repetition, warnings in (("warn", stopped), ("off", 0)):
        with serve(engine, repetition=repetition, **settings) as llm:
            assert ids(llm, cases) == [case.answer for case in cases]
            assert idle(llm)["num_repetition_warnings"] == warnings
            assert generate(llm, [loop.prompt], GREEDY.with_changes(repetition_detection=RULE))[0].outputs[
                0
            ].finish_reason == ("repetition"), "a request that asks for it is stopped in any mode"


def make_choice(number, prompt_len, max_tokens, **settings):
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **settings)
    prompt = [(number * 7 + i) % 1000 for i in range(prompt_len)]
    return Choice(choice_id=number, prompt_token_ids=prompt, params=params)


def spans(scheduler, choices, late):
    """choice -> (step of its first token, of its last); choice 0 has all its drafts accepted, everybody else none."""
    for choice in choices:
        scheduler.add(choice)
    found, step = {}, 0
    while scheduler.has_work:
        if step == 5:
            for choice in late:
                scheduler.add(choice)
        plan = scheduler.schedule()
        step += 1
        token_ids = np.full((len(plan.choices), scheduler.config.max_drafts + 1), 7, np.int32)
        loops = np.array([choice.choice_id == 0 for choice in plan.choices])
        emitted = np.where(plan.samples, 1 + plan.num_drafts * loops, 0).astype(np.int32)
        for commit in scheduler.commit(plan, StepResult(plan.step_id, token_ids, emitted, plan.num_drafts)):
            number = commit.choice.choice_id
            found[number] = (found.get(number, (step,))[0], step)
    return found


@pytest.mark.parametrize("budget", [8, 16, 40, 512])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_runaway_holds_up_nobody(budget, adaptive):
    """One loop that drafts follow perfectly, up to the context; seven others, and four that come later. In steps."""
    found = []
    for num_drafts in (None, 0):
        settings = {} if adaptive else {"adaptive_drafts": None}
        scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=8, max_model_len=2000, max_num_batched_tokens=budget, block_size=16, num_blocks=600,
                max_drafts=K, run_ahead=0, repetition="off", **settings,
            )
        )  # fmt: skip
        runaway = make_choice(0, 10, 1900, num_speculative_tokens=num_drafts)
        others = [make_choice(i, 10, 20 + i, num_speculative_tokens=0) for i in range(1, 8)]
        late = [make_choice(i, 60, 20, num_speculative_tokens=0) for i in range(8, 12)]
        found.append(spans(scheduler, [runaway, *others], late))
        assert scheduler.stats.num_preemptions == 0
        for choice in [*others, *late]:
            first, last = found[-1][choice.choice_id]
            assert last - first == choice.params.max_tokens - 1, "a token in every step, whoever runs beside"
    beside_runaway, beside_quiet = found
    assert beside_runaway[0][1] * 3 < beside_quiet[0][1]
    for number in range(1, 12):  # drafts take at most half of the tokens that plain decoding leaves to waiting prompts
        slow, quick = beside_runaway[number][0], beside_quiet[number][0]
        assert slow <= (2 * quick if budget < 40 else quick + 3)


def test_a_runaway_does_not_widen_the_steps_of_others_where_that_costs_them():
    """Steps hold 1, 8 or 64 tokens and cost as on a CPU: it is drafted for where they hold its drafts anyway."""
    rule = AdaptiveDrafts(token_cost=0.05, step_costs=((1, 1.0), (8, 1.9), (64, 3.4)))
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=8, max_model_len=2000, max_num_batched_tokens=64, block_size=16, num_blocks=600,
            max_drafts=K, run_ahead=0, repetition="off", adaptive_drafts=rule,
        )
    )  # fmt: skip
    for number in range(8):
        scheduler.add(
            make_choice(
                number, 4, 30 + 20 * number if number else 600, num_speculative_tokens=None if number == 0 else 0
            )
        )
    longest = {}
    while scheduler.has_work:
        plan = scheduler.schedule()
        if plan.samples.all() and not plan.admissions:
            longest.setdefault(len(plan.choices), set()).update(plan.num_drafts.tolist())
        token_ids = np.full((len(plan.choices), K + 1), 7, np.int32)
        emitted = np.where(plan.samples, 1 + plan.num_drafts, 0).astype(np.int32)
        scheduler.commit(plan, StepResult(plan.step_id, token_ids, emitted, plan.num_drafts))
    assert {rows: max(drafts) for rows, drafts in longest.items()} == {8: 0, 7: 1, 6: 2, 5: 3, 4: 4, 3: 4, 2: 4, 1: 4}


class Busy:
    """256 choices that emit 1 to 5 tokens a step, the same ones in every run."""

    def __init__(self, repetition):
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=256, max_model_len=4096, max_num_batched_tokens=2048, block_size=64, num_blocks=16384,
                max_drafts=4, adaptive_drafts=None, run_ahead=0, repetition=repetition,
            )
        )  # fmt: skip
        self.rng = np.random.default_rng(0)
        for number in range(256):
            self.scheduler.add(make_choice(number, 4, 2000))

    def step(self):
        """Seconds of this thread that the commit took."""
        plan = self.scheduler.schedule()
        emitted = np.where(plan.samples, 1 + self.rng.integers(0, plan.num_drafts + 1), 0).astype(np.int32)
        token_ids = self.rng.integers(0, 50, (len(emitted), 5), dtype=np.int32)  # few ids: a token often recurs
        result = StepResult(plan.step_id, token_ids, emitted, plan.num_drafts)
        before = time.thread_time()
        self.scheduler.commit(plan, result)
        return time.thread_time() - before


def step_seconds(repeats):
    """Mean seconds of a step's commit in warn mode and in off mode, of each step the quickest of its repeats.

    Whoever else uses the machine makes some of them slow: one quiet moment for each step is enough.
    """
    times = np.empty((repeats, 2, 64))
    gc.collect()
    gc.disable()
    try:
        for repeat in times:
            runs = Busy("warn"), Busy("off")
            for step in range(64):
                repeat[:, step] = [run.step() for run in runs]
    finally:
        gc.enable()
    return times.min(axis=0)[:, 16:].mean(axis=1)


def costs_little(warn, off):
    """The bar is 100 us; twice that is for slower machines, and where all of a commit is slow so is this part."""
    return warn - off < max(200e-6, off / 2)


def test_looking_for_loops_costs_little():
    """256 choices of up to 5 tokens a step, warn mode against off: 90 to 97 us beside the 450 of a step's commit."""
    warn, off = step_seconds(repeats=8)
    assert costs_little(warn, off), (warn, off)


def test_a_costly_look_would_be_seen(monkeypatch):
    """Thirty looks for each one: far more than whatever else the machine does adds to both."""
    look = LoopFinder.pattern_len
    monkeypatch.setattr(LoopFinder, "pattern_len", lambda *args: [look(*args) for _ in range(30)][0])
    warn, off = step_seconds(repeats=3)
    assert not costs_little(warn, off), (warn, off)
