"""Rows 10, 30 to 35, 44, 45, 49, 50: blocks that are shared, evicted, scarce; and nothing compiled meanwhile."""

import dataclasses
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving import BLOCK, CONTEXT, GREEDY, OUTPUT_LEN, K, generate, idle, ids, running, serve
from speculation_cases import SMALL
from test_planted_bugs import (
    row10_idle_hits_are_not_charged,
    row30_drafts_in_flight_are_published,
    row33_an_abort_keeps_the_last_block,
    row34_blocks_are_freed_twice,
    row35_a_held_block_is_evicted,
)
from test_rows_lengths import fill
from tiny_engines import GOLDEN, Tiny

from jaxserve import CompileAfterWarmupError, EngineDeadError
from jaxserve.config import SpeculativeConfig
from jaxserve.engine import core as core_module
from jaxserve.engine.prompts import split_prompts
from jaxserve.engine.submission import Submission
from jaxserve.scheduler.planner import Planner
from jaxserve.scheduler.prefix_cache import PrefixCache
from jaxserve.scheduler.scheduler import Scheduler

LONGEST = -(-(CONTEXT - 1) // BLOCK)  # blocks that the longest choice needs alone
SCARCE = {"num_blocks": LONGEST + 4, "admission_headroom_len": 0, "run_ahead": 3}


def storm(llm, cases, seed, count=40):
    """Many requests that share prefixes and end in every way, at once; each that ends by itself has its own answer."""
    rng = random.Random(seed)
    work = [(rng.choice(cases), rng.randint(1, OUTPUT_LEN)) for _ in range(count)]
    params = []
    for case, num_tokens in work:
        stop = [case.answer[rng.randrange(OUTPUT_LEN)]] if rng.random() < 0.4 else []
        seconds = rng.choice([None, None, None, 0.05])
        params.append(GREEDY.with_changes(max_tokens=num_tokens, stop_token_ids=stop, max_seconds=seconds))
    requests = llm._admit(llm._check(split_prompts([case.prompt for case, _ in work]), params, None))
    with Submission(llm.engine.core, llm._codec, requests) as submission:
        submission.submit()
        llm.engine.core.finish(requests[-1].choices[0].choice_id, "abort")  # it still waits for a slot
        for _ in submission.updates():
            if rng.random() < 0.05:
                llm.engine.core.finish(rng.choice(requests).choices[0].choice_id, "abort")
        outputs = [collector.output().outputs[0] for collector in submission.collectors]
    for (case, num_tokens), settings, output in zip(work, params, outputs, strict=True):
        stop = settings.stop_token_ids
        length = min(num_tokens, case.answer.index(stop[0]) + 1 if stop else OUTPUT_LEN)
        if output.finish_reason in ("abort", "timeout"):
            length = len(output.token_ids)
        assert output.token_ids == case.answer[:length]
    return {output.finish_reason for output in outputs}


@pytest.mark.parametrize("settings", [{}, SCARCE, {**SCARCE, "enable_prefix_caching": False, "run_ahead": 1}])
def test_row_33_34_35_a_storm_leaves_every_block_in_its_place(engine, cases, settings):
    """Aborts, timeouts, stops, preemptions and evictions; conservation is checked after every step and at the end."""
    ends = set()
    with serve(engine, **settings) as llm:
        for seed in range(4):
            ends |= storm(llm, cases, seed)
            stats = idle(llm)
        assert ends >= {"stop", "length", "abort"}
        assert (stats["num_preemptions"] > 0) == ("num_blocks" in settings)
        assert stats["num_compiles_while_serving"] == 0


@pytest.mark.parametrize(
    "plant",
    [
        row10_idle_hits_are_not_charged,
        row33_an_abort_keeps_the_last_block,
        row34_blocks_are_freed_twice,
        row35_a_held_block_is_evicted,
    ],
)
def test_row_10_33_34_35_are_seen_when_planted(engine, cases, monkeypatch, plant):
    plant(monkeypatch)
    with serve(engine, **SCARCE) as llm, pytest.raises((EngineDeadError, AssertionError)):
        for seed in range(6):
            storm(llm, cases, seed)
            idle(llm)


def test_row_33_is_seen_by_the_engine_itself_when_it_falls_idle(engine, cases, monkeypatch):
    """Without the tests' check after every step: the core looks before it waits for work, in no time."""
    scheduler = Scheduler(dataclasses.replace(engine.engine.core.scheduler.config, num_blocks=200_000))
    seconds = []
    for _ in range(20):  # one quiet moment is enough
        before = time.thread_time()
        scheduler.check_idle()
        seconds.append(time.thread_time() - before)
    assert min(seconds) < 0.02
    row33_an_abort_keeps_the_last_block(monkeypatch)
    with serve(engine, check=False) as llm:
        with pytest.raises(EngineDeadError, match="blocks leaked"):
            for _ in range(50):
                ids(llm, cases[-1:])
        with pytest.raises(EngineDeadError, match="blocks leaked"):
            llm.engine.core.check_health()


def test_row_34_is_seen_by_the_engine_itself_while_it_waits_for_work(engine, cases, monkeypatch):
    """What only the full check sees: a free list that holds a block twice and lacks another."""
    monkeypatch.setattr(core_module, "_IDLE_CHECK_SECONDS", 0.02)
    with serve(engine, check=False) as llm:
        assert ids(llm, cases) == [case.answer for case in cases]

        def double(scheduler):
            scheduler.pool.evict_idle()
            scheduler.pool._free[0] = scheduler.pool._free[1]

        llm.engine.core.call(double)
        deadline = time.monotonic() + 20
        with pytest.raises(EngineDeadError, match="blocks lost"):
            while time.monotonic() < deadline:
                llm.engine.core.check_health()
                time.sleep(0.01)


@pytest.mark.parametrize("run_ahead", [0, 3])
def test_row_10_hits_that_nobody_holds_are_charged(engine, cases, run_ahead):
    """Every prompt is cached, and a pool of 16 to 21 blocks is full of such hits when the longest ones come again."""
    hits = 0
    for num_more in range(6):
        scarce = {"num_blocks": LONGEST + num_more, "admission_headroom_len": 0, "run_ahead": run_ahead}
        with serve(engine, **scarce) as llm:
            for case in cases:
                assert ids(llm, [case]) == [case.answer]
            before = llm.engine.core.stats()["num_prefix_hits"]
            assert ids(llm, cases[::-1]) == [case.answer for case in cases[::-1]]
            hits += idle(llm)["num_prefix_hits"] - before
    assert hits


def test_row_10_is_seen_where_such_hits_are_not_charged(engine, cases, monkeypatch):
    row10_idle_hits_are_not_charged(monkeypatch)
    with pytest.raises(EngineDeadError, match="the pool promised more than it had"):
        test_row_10_hits_that_nobody_holds_are_charged(engine, cases, 0)


@pytest.mark.parametrize("run_ahead", [0, 3])
def test_row_30_accepted_tokens_are_cached_and_drafts_are_not(engine, cases, run_ahead):
    """A prompt that goes on from an answer hits all of it, and hits nothing that was only drafted."""
    with serve(engine, run_ahead=run_ahead) as llm:
        assert ids(llm, cases) == [case.answer for case in cases]
        for case in cases:
            for said in (5, 12, 20):
                params = GREEDY.with_changes(max_tokens=OUTPUT_LEN - said)
                (output,) = generate(llm, [case.prompt + case.answer[:said]], params)
                assert output.outputs[0].token_ids == case.answer[said:]
                length = len(case.prompt) + said
                assert output.metrics.num_cached_tokens == (length - 1) // BLOCK * BLOCK


def test_row_30_is_seen_when_planted(engine, cases, monkeypatch):
    row30_drafts_in_flight_are_published(monkeypatch)
    with pytest.raises((EngineDeadError, AssertionError)):
        test_row_30_accepted_tokens_are_cached_and_drafts_are_not(engine, cases, 3)


@pytest.fixture(scope="module")
def drafting_itself(engine):
    """Its draft model is the target, so each draft is right: the engine of test_speculation_model.py."""
    config = SpeculativeConfig(method="draft_model", model=str(GOLDEN / "tiny" / "llama"), num_speculative_tokens=K)
    tiny = Tiny("llama", engine.config.tokenizer, **SMALL, speculative_config=config)
    yield tiny
    tiny.close()


def change_pools(llm, change, models=slice(None)):
    """Overwrites the KV pools of some models, [0] is the target; nothing may be in flight."""
    real = llm.engine.core.runner.real
    pools = list(real._kv)
    pools[models] = jax.tree.map(lambda pool: jax.device_put(change(np.asarray(pool)), pool.sharding), pools[models])
    real._kv = tuple(pools)


def check_hits(llm, cases, between=lambda: None):
    """Prompts that go on from cached answers: what is found in the cache, and what is accepted after it."""
    assert ids(llm, cases) == [case.answer for case in cases]
    before = idle(llm)
    between()
    prompts = [case.prompt + case.answer[:12] for case in cases]
    outputs = generate(llm, prompts, GREEDY.with_changes(max_tokens=OUTPUT_LEN - 12))
    after = idle(llm)
    assert [o.outputs[0].token_ids for o in outputs] == [case.answer[12:] for case in cases]
    drafted, accepted = (after[name] - before[name] for name in ("num_drafted_tokens", "num_accepted_tokens"))
    assert accepted == drafted > 100
    found = sum(output.metrics.num_cached_tokens for output in outputs)
    assert found >= 0.9 * sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts)


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_row_31_drafts_after_a_prefix_hit_are_as_right_as_before(drafting_itself, cases, run_ahead):
    """A hit brings the draft model's keys as well: all drafts are right, nine tenths of all whole blocks are found."""
    with serve(drafting_itself, run_ahead=run_ahead) as llm:
        check_hits(llm, cases)


def test_row_31_is_seen_where_a_hit_brings_no_keys_of_the_draft_model(drafting_itself, cases):
    """vLLM #47930: the answers stay right, the drafts don't."""
    with serve(drafting_itself) as llm, pytest.raises(AssertionError, match=r"^assert \d+ == \d+"):
        check_hits(llm, cases, lambda: change_pools(llm, np.zeros_like, slice(1, 2)))


def test_row_31_is_seen_where_hits_are_cut_short(drafting_itself, cases, monkeypatch):
    correct = PrefixCache.match

    def match(self, root, token_ids):
        return correct(self, root, token_ids[: 2 * BLOCK])

    monkeypatch.setattr(PrefixCache, "match", match)
    with serve(drafting_itself) as llm, pytest.raises(AssertionError, match=r"0\.9"):
        check_hits(llm, cases)


def draft_up_to(llm, cases, limit):
    """Where drafts were verified: lengths of the text before them. Every draft must be right."""
    lengths = set()

    def look(plan, result):
        for row in np.flatnonzero(result.num_drafted):
            assert result.num_emitted[row] == 1 + result.num_drafted[row], plan.choices[row].tokens_len
            lengths.add(plan.choices[row].tokens_len)
        return result

    llm.engine.core.runner.fetched = look
    fill(llm, cases, limit)
    return lengths


@pytest.mark.parametrize("limit", [17, 32, 33])
def test_row_32_the_draft_model_is_right_up_to_the_limit_and_after_it(drafting_itself, cases, limit):
    """The last draft is for the context's last place but one; whoever comes after that is drafted for as before."""
    with serve(drafting_itself, max_model_len=limit, run_ahead=0, enable_prefix_caching=False) as llm:
        for _ in range(2):
            lengths = draft_up_to(llm, cases, limit)
            assert max(lengths) <= limit - 2 and lengths & {limit - 4, limit - 3, limit - 2}


def test_row_32_is_seen_where_drafts_are_dead_behind_a_position(drafting_itself, cases, monkeypatch):
    """vLLM #22935: garbage from there on. The answers stay right."""
    with serve(drafting_itself, max_model_len=33, run_ahead=0) as llm, pytest.raises(EngineDeadError):
        for key, propose in llm.engine.core.runner.real.executables.propose.items():

            def blind(params, kv, slots, propose=propose):
                kv, slots = propose(params, kv, slots)
                drafts = slots.plan.drafts
                if np.asarray(slots.tokens_len).max() > 25:
                    drafts = jax.device_put(np.zeros_like(drafts), drafts.sharding)
                return kv, dataclasses.replace(slots, plan=dataclasses.replace(slots.plan, drafts=drafts))

            monkeypatch.setitem(llm.engine.core.runner.real.executables.propose, key, blind)
        draft_up_to(llm, cases, 33)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_row_44_preemptions_are_few(engine, cases, policy):
    """A pool for about one long choice and a half, ten that want it: no thrashing between them."""
    with serve(engine, policy=policy, **SCARCE) as llm:
        priorities = [len(cases) - i for i in range(len(cases))] if policy == "priority" else None
        outputs = generate(llm, [case.prompt for case in cases], GREEDY, priority=priorities)
        assert [o.outputs[0].token_ids for o in outputs] == [case.answer for case in cases]
        stats = idle(llm)
        assert stats["num_preemptions"] <= 2 * len(cases) < stats["num_emitted_tokens"] / 10


def test_row_45_everybody_is_admitted_in_the_end(engine, cases):
    """A pool that holds one choice at its longest: a long prompt isn't overtaken forever, nor holds it up the rest."""
    settings = {**SCARCE, "num_blocks": LONGEST}
    with serve(engine, **settings) as llm:
        full = [97, 98, 99] * CONTEXT
        prompts = [p for case in cases for p in (case.prompt, full[: CONTEXT - 1])]
        params = [p for _ in cases for p in (GREEDY, GREEDY.with_changes(max_tokens=1))]
        outputs = generate(llm, prompts, params)
        assert [o.outputs[0].token_ids for o in outputs[::2]] == [case.answer for case in cases]
        idle(llm)


def test_row_45_is_seen_where_nothing_is_admitted(engine, cases, monkeypatch):
    """Work, and no step for it: the engine says so and ends, instead of spinning with a green health check."""
    monkeypatch.setattr(Planner, "_reserve_prefill", lambda self, choice: False)
    with serve(engine) as llm, pytest.raises(EngineDeadError, match="no progress"):
        ids(llm, cases)


def test_row_49_an_executable_born_while_serving_is_seen(engine, cases):
    def compile_something(scheduler):
        jax.jit(lambda x: x * random.random())(np.ones(3)).block_until_ready()

    with serve(engine, strict=False) as llm:
        llm.engine.core.call(compile_something)
        assert ids(llm, cases) == [case.answer for case in cases]
        assert idle(llm)["num_compiles_while_serving"] == 1
    with serve(engine, strict=True) as llm:
        llm.engine.core.call(compile_something)
        with pytest.raises(EngineDeadError, match="strict_compile") as death:
            ids(llm, cases)
        assert isinstance(death.value.__cause__, CompileAfterWarmupError)


def test_row_49_every_shape_that_a_schedule_can_reach_was_compiled(engine, cases):
    """Each number of rows with each kind of sampling, drafts and prefill chunk; ``strict`` makes a miss an error."""
    seen = set()
    with serve(engine, run_ahead=1) as llm:
        llm.engine.core.runner.before = lambda plan: seen.add(
            (len(running(llm, plan)), bool(plan.num_drafts.any()), bool((~plan.samples).any()))
        )
        for num_rows in range(1, 5):
            for params in (
                GREEDY,
                GREEDY.with_changes(temperature=0.5, seed=1),
                GREEDY.with_changes(temperature=0.5, seed=1, top_k=5, logprobs=2, prompt_logprobs=1),
                GREEDY.with_changes(num_speculative_tokens=0),
            ):
                generate(llm, [case.prompt for case in cases[-num_rows:]], params)
        assert idle(llm)["num_compiles_while_serving"] == 0
    assert {rows for rows, *_ in seen} == {1, 2, 3, 4} and {drafts for _, drafts, _ in seen} == {True, False}


def check_hit_lengths(llm, cases, between=lambda: None):
    """Each prompt behind every number of its cached blocks."""
    work = [case for case in cases if len(case.prompt) > BLOCK]
    for case in work:
        for num_blocks in range((len(case.prompt) - 1) // BLOCK + 1):
            llm.reset_prefix_cache()
            if num_blocks:
                generate(llm, [case.prompt[: num_blocks * BLOCK + 1]], GREEDY.with_changes(max_tokens=1))
            between()
            (output,) = generate(llm, [case.prompt])
            assert output.metrics.num_cached_tokens == num_blocks * BLOCK
            assert output.outputs[0].token_ids == case.answer


def test_row_50_a_prompt_gets_one_answer_whatever_is_cached_of_it(engine, cases):
    with serve(engine) as llm:
        check_hit_lengths(llm, cases)


def test_row_50_is_seen_where_cached_keys_are_rounded_otherwise(engine, cases):
    with serve(engine) as llm, pytest.raises(AssertionError, match=r"^assert \["):
        check_hit_lengths(
            llm,
            cases,
            lambda: idle(llm) and change_pools(llm, lambda pool: pool.astype(jnp.bfloat16).astype(pool.dtype)),
        )
