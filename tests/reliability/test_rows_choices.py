"""Rows 24 to 29, 37, 41, 43, 48: no answer depends on drafts, neighbours, preemption, aborts or padding."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from serving import CONTEXT, GREEDY, K, generate, idle, ids, knows, running, serve
from speculation_cases import SMALL, answers, assert_same, requests, speculative
from test_planted_bugs import (
    row26_results_of_an_older_epoch_are_applied,
    row37_the_last_rejection_is_not_counted,
    row43_a_resumed_choice_loses_its_output,
)
from tiny_engines import Tiny

from jaxserve import EngineDeadError, SamplingParams
from jaxserve.engine.core import EngineCore
from jaxserve.engine.prompts import split_prompts
from jaxserve.engine.submission import Submission
from jaxserve.runner import runner as runner_module

DRAFTS = [0, 1, 3, K]


def test_row_24_a_seed_says_the_same_beside_unseeded_rows_and_rows_without_drafts(engine, cases):
    """Unseeded neighbours, greedy ones, and ones that draft or not move no seeded row's noise."""
    seeded = [SamplingParams(seed=9, max_tokens=16, ignore_eos=True, num_speculative_tokens=k) for k in (None, 0, 2)]
    prompts = [case.prompt for case in cases[:3]]
    with serve(engine, enable_prefix_caching=False) as llm:
        alone = [generate(llm, [p], s)[0].outputs[0].token_ids for p in prompts for s in seeded]
        assert [alone[i] == alone[i - 1] for i in range(1, 9)].count(True) == 6, "drafts change nothing"
        unseeded = SamplingParams(max_tokens=9, ignore_eos=True)
        neighbours = [unseeded, unseeded.with_changes(num_speculative_tokens=0), GREEDY]
        params = [s for pair in zip(seeded * 3, neighbours * 3, strict=True) for s in pair]
        outputs = generate(llm, [p for prompt in prompts for p in [prompt] * 6], params)
        assert [o.outputs[0].token_ids for o in outputs[::2]] == alone


def test_row_24_is_seen_where_noise_hangs_on_the_order_of_admission(engine, cases, monkeypatch):
    correct, count = runner_module.host_row, itertools.count()

    def host_row(params, *, seed, **rest):
        return correct(params, seed=seed + next(count), **rest)

    monkeypatch.setattr(runner_module, "host_row", host_row)
    with pytest.raises(AssertionError):
        test_row_24_a_seed_says_the_same_beside_unseeded_rows_and_rows_without_drafts(engine, cases)


@pytest.fixture(scope="module")
def on_two_devices(engine):
    """The engine of test_speculation.py, whose executables needn't be compiled again."""
    shape = {**SMALL, "tensor_parallel_size": 2, "speculative_config": speculative(4)}
    tiny = Tiny("dummy", engine.config.tokenizer, **shape)
    yield tiny
    tiny.close()


def watch_devices(llm):
    """Looks after every step whether all devices hold the same tokens, and as many of them."""

    def look(plan):
        slots = llm.engine.core.runner.real._slots
        for known in (slots.tokens, slots.tokens_len, slots.computed_len):
            first, *others = (np.asarray(shard.data) for shard in known.addressable_shards)
            assert len(others) == 1 and all(np.array_equal(first, other) for other in others), plan.step_id

    llm.engine.core.runner.dispatched = look


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_row_25_all_devices_accept_the_same(on_two_devices, run_ahead):
    """Every setting in one batch, greedy and sampled: one acceptance, replicated by construction."""
    texts, params = requests()
    with serve(on_two_devices, run_ahead=run_ahead) as llm:
        watch_devices(llm)
        got = answers(llm, texts, params)
        stats = idle(llm)
        assert 0 < stats["num_accepted_tokens"] < stats["num_drafted_tokens"]
        want = answers(llm, texts, [settings.with_changes(num_speculative_tokens=0) for settings in params])
    assert_same(got, want, params)


def on_the_second(array, change):
    """A replicated array whose copy on the second device is another."""
    first, second = (shard.data for shard in array.addressable_shards)
    second = jax.device_put(change(np.asarray(second)), second.sharding)
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, [first, second])


def plant(llm_engine, monkeypatch, change):
    """``change(slots)`` after every plan has been staged."""
    real = llm_engine.engine.core.runner
    stage = real.executables.stage
    planted = dataclasses.replace(real.executables, stage=lambda slots, packet: change(stage(slots, packet)))
    monkeypatch.setattr(real, "executables", planted)


def test_row_25_is_seen_where_devices_compare_with_other_drafts(on_two_devices, monkeypatch):
    """The second device holds drafts of its own, so it accepts fewer."""

    def other_drafts(slots):
        drafts = on_the_second(slots.plan.drafts, np.zeros_like)
        return dataclasses.replace(slots, plan=dataclasses.replace(slots.plan, drafts=drafts))

    plant(on_two_devices, monkeypatch, other_drafts)
    with serve(on_two_devices, run_ahead=0) as llm:
        watch_devices(llm)
        with pytest.raises(EngineDeadError) as death:
            answers(llm, *requests())
    assert isinstance(death.value.__cause__, AssertionError)


def test_row_25_devices_agree_even_where_their_noise_differs(on_two_devices, monkeypatch):
    """vLLM #17498: each rank draws its own. Here a token is chosen once, among all shares of the vocabulary."""
    texts, params = requests()
    params = [settings.with_changes(temperature=1.0) for settings in params]
    with serve(on_two_devices, run_ahead=0) as llm:
        want = answers(llm, texts, params)

    def other_noise(slots):
        key = on_the_second(slots.sampling.key, lambda key: key ^ 1)
        return dataclasses.replace(slots, sampling=dataclasses.replace(slots.sampling, key=key))

    plant(on_two_devices, monkeypatch, other_noise)
    with serve(on_two_devices, run_ahead=0) as llm:
        watch_devices(llm)
        got = answers(llm, texts, params)
        assert idle(llm)["num_accepted_tokens"] > 0
    with pytest.raises(AssertionError):  # the plant is there
        assert_same(got, want, params)


WATCHED = GREEDY.with_changes(stop="never said")  # a stop string: the caller hears of every step


def preempt_in_flight(llm, every):
    """After each ``every``-th dispatch, with its step in flight, the choice that was planned first is preempted."""
    scheduler, count = llm.engine.core.scheduler, itertools.count(1)

    def preempt(plan):
        alive = [choice for choice in running(llm, plan) if choice.num_preemptions < 4]
        if alive and next(count) % every == 0:
            scheduler.state.preempt(alive[0])

    llm.engine.core.runner.dispatched = preempt


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
@pytest.mark.parametrize("num_drafts", DRAFTS)
def test_row_26_43_preempted_between_dispatch_and_return(engine, cases, num_drafts, run_ahead):
    """In prefill and decode, with results of older epochs coming in late: the answer is that of a run undisturbed."""
    for every in (2, 3):
        with serve(engine, run_ahead=run_ahead, max_drafts=num_drafts, max_prefill_chunk_len=6) as llm:
            preempt_in_flight(llm, every)
            assert ids(llm, cases, WATCHED) == [case.answer for case in cases]
            stats = idle(llm)
            assert stats["num_preemptions"] > 10 and stats["num_dropped_rows"] >= stats["num_preemptions"]


@pytest.mark.parametrize(
    "plant", [row26_results_of_an_older_epoch_are_applied, row43_a_resumed_choice_loses_its_output]
)
def test_row_26_43_are_seen_when_planted(engine, cases, monkeypatch, plant):
    plant(monkeypatch)
    with serve(engine, run_ahead=1) as llm, pytest.raises((EngineDeadError, AssertionError)):
        preempt_in_flight(llm, 2)
        assert ids(llm, cases, WATCHED) == [case.answer for case in cases]


def watch_ids(llm):
    """Looks at every step whether a token or draft that the device may embed lies outside the vocabulary."""
    runner = llm.engine.core.runner
    vocab_size = llm.engine.model_config.vocab_size

    def look(plan):
        slots = runner.slots
        for row, slot in enumerate(plan.slots):
            known = slots.tokens[slot, : slots.tokens_len[slot]]
            drafts = slots.plan.drafts[row, : slots.plan.num_drafts[row]]
            for token_ids in (known, drafts):
                assert ((token_ids >= 0) & (token_ids < vocab_size)).all(), (plan.step_id, row, token_ids)

    runner.dispatched = look


def test_row_27_no_placeholder_reaches_the_device(engine, cases):
    """Also where rows sit out steps for lack of blocks, tokens or sampling rows."""
    for settings in (
        {"run_ahead": 3, "num_blocks": 20, "admission_headroom_len": 0},
        {"run_ahead": 2, "max_num_batched_tokens": 5, "max_sample_rows": 5},
    ):
        with serve(engine, **settings) as llm:
            watch_ids(llm)
            assert ids(llm, cases) == [case.answer for case in cases]


def test_row_27_is_seen_when_a_placeholder_is_drafted(engine, cases):
    with serve(engine, run_ahead=0) as llm, pytest.raises(EngineDeadError):
        watch_ids(llm)
        llm.engine.core.runner.draft = lambda choice, most: [-1]
        ids(llm, cases)


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_row_29_rows_with_and_without_drafts_in_every_batch(engine, cases, run_ahead):
    """No drafts asked for, none found, none accepted, all accepted: side by side, in every order."""
    for turn in range(3):
        params = [GREEDY.with_changes(num_speculative_tokens=(0, None, 1)[(i + turn) % 3]) for i in range(len(cases))]
        with serve(engine, run_ahead=run_ahead) as llm:
            if run_ahead == 0:
                drafters = [
                    knows(cases),
                    knows(cases, lambda most: 0),
                    lambda choice, most: [],
                    knows(cases, lambda m: 1),
                ]
                llm.engine.core.runner.draft = lambda choice, most, drafters=drafters: drafters[choice.choice_id % 4](
                    choice, most
                )
            assert ids(llm, cases, params) == [case.answer for case in cases]
            stats = idle(llm)
            assert 0 < stats["num_accepted_tokens"] < stats["num_drafted_tokens"]


def test_row_29_is_seen_where_results_are_taken_from_the_next_row(engine, cases):
    """ROCm's and Gaudi's orphan rows: a row without drafts shifts the results behind it."""

    def shift(plan, result):
        if plan.num_drafts.any() and not plan.num_drafts.all():
            result.token_ids[:] = np.roll(result.token_ids, 1, axis=0)
        return result

    with serve(engine, run_ahead=0) as llm:
        llm.engine.core.runner.fetched = lambda plan, result: shift(plan, copied(result))
        params = [GREEDY.with_changes(num_speculative_tokens=(0, None)[i % 2]) for i in range(len(cases))]
        assert ids(llm, cases, params) != [case.answer for case in cases]


def copied(result):
    """A result whose arrays can be written to."""
    return dataclasses.replace(result, token_ids=np.array(result.token_ids))


@pytest.mark.parametrize("right", range(K + 1))
def test_row_37_the_rejected_candidate_at_every_place(engine, cases, right):
    """Of K drafts the first ``right`` are true; at K - 1 only the last is rejected, which dropped a word elsewhere."""
    with serve(engine, run_ahead=0) as llm:
        llm.engine.core.runner.draft = knows(cases, lambda most: right)
        assert ids(llm, cases) == [case.answer for case in cases]
        stats = idle(llm)
        drafted, accepted = stats["num_drafted_tokens"], stats["num_accepted_tokens"]
        assert accepted == (drafted if right == K else 0 if right == 0 else accepted)
        assert 0 < accepted < drafted or right in (0, K)


def test_row_37_is_seen_when_planted(engine, cases, monkeypatch):
    row37_the_last_rejection_is_not_counted(monkeypatch)
    with serve(engine, run_ahead=0) as llm, pytest.raises(EngineDeadError):
        llm.engine.core.runner.draft = knows(cases, lambda most: K - 1)
        ids(llm, cases)


PHASES = ["before", "dispatched", "fetched"]


@pytest.mark.parametrize("run_ahead", [0, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_row_41_aborted_at_every_phase_of_every_step(engine, cases, phase, run_ahead):
    """One choice is aborted at step 0, 1, 2, ... of its life; all others, and who comes next, get their answers."""
    ended = set()
    for step in range(0, 14, 2):
        with serve(engine, run_ahead=run_ahead, max_prefill_chunk_len=8) as llm:
            core, count = llm.engine.core, itertools.count()

            def hook(plan, result=None, core=core, count=count, step=step):
                victim = core.scheduler.choices.get(4)
                if next(count) == step and victim is not None:
                    core.scheduler.finish(victim, "abort")  # at once, while its step is being planned, run or committed
                    core.callers.forget(4)  # nobody is told: the front has left
                    core.finish(4, "abort")  # and once more, of one that's gone
                return result

            setattr(core.runner, phase, hook)
            requests = llm._admit(llm._check(split_prompts([case.prompt for case in cases]), GREEDY, None))
            submission = Submission(core, llm._codec, requests)
            submission.submit()
            pending = {id(c) for i, c in enumerate(submission.collectors) if i != 4}
            for collector in submission.updates():
                if collector.finished:
                    pending.discard(id(collector))
                if not pending:
                    break
            got = [c.output().outputs[0] for c in submission.collectors]
            for i, (output, case) in enumerate(zip(got, cases, strict=True)):
                assert (
                    output.token_ids == case.answer
                    if i != 4
                    else output.token_ids == case.answer[: len(output.token_ids)]
                )
            ended.add(got[4].finish_reason)
            idle(llm)
            assert ids(llm, cases[:2]) == [case.answer for case in cases[:2]]
    assert None in ended


def test_row_41_is_seen_where_a_request_that_left_is_looked_up(engine, cases, monkeypatch):
    """vLLM's KeyError: an abort that comes after the end."""

    def finish(self, item):
        self.scheduler.finish(self.scheduler.choices[item.choice_id], item.reason, item.stop_reason)

    monkeypatch.setattr(EngineCore, "_finish", finish)
    with pytest.raises(EngineDeadError, match="the engine failed: 4"):
        test_row_41_aborted_at_every_phase_of_every_step(engine, cases, "before", 0)


def scramble(llm):
    """What no choice owns is garbage: lengths, tables and ids of idle slots, and the staged rows past the plan's."""
    runner = llm.engine.core.runner
    slots = runner.slots
    rng = np.random.default_rng(1)
    runner.replace_slots(
        tokens=rng.integers(-(2**31), 2**31 - 1, slots.tokens.shape, dtype=np.int32),
        tokens_len=np.full_like(slots.tokens_len, CONTEXT - 1),
        computed_len=np.full_like(slots.computed_len, CONTEXT - 2),
        block_table=rng.integers(
            0, llm.engine.core.scheduler.config.num_blocks, slots.block_table.shape, dtype=np.int32
        ),
    )


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
def test_row_48_padding_rows_and_idle_slots_do_no_harm(engine, cases, num_rows):
    """Steps of fewer rows than their bucket, beside slots full of garbage; what runs already is not written to."""
    with serve(engine, run_ahead=2) as llm:
        for start in range(0, len(cases) - num_rows + 1, 3):
            idle(llm)
            scramble(llm)
            some = cases[start : start + num_rows]
            assert ids(llm, some) == [case.answer for case in some]


def test_row_48_is_seen_where_an_admission_resets_less(engine, cases, monkeypatch):
    """A slot that doesn't learn how much of its choice is computed."""
    correct = runner_module.pack_admissions

    def pack_admissions(admissions, rows, fields, config, size):
        words = correct(admissions, rows, fields, config, size)
        at = next(i for i, (name, *_) in enumerate(fields.items) if name == "computed_len")
        words[:, at] = 0
        return words

    monkeypatch.setattr(runner_module, "pack_admissions", pack_admissions)
    with serve(engine) as llm:
        ids(llm, cases)
        assert ids(llm, cases) != [case.answer for case in cases]  # of prefix hits some is computed already
