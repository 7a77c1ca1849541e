"""AsyncEngine: concurrent callers who fail, abort and are cancelled one by one."""

import asyncio
import time

import pytest
from fakes import EOS, FakeCore, fake_engine, few_letters

from jaxserve import LLM, AsyncEngine, EngineDeadError, InvalidRequestError, SamplingParams


def run(body, core=None, **kwargs):
    """Runs ``body(engine)`` on a new loop and shuts the engine down."""

    async def main():
        async with AsyncEngine.from_engine(fake_engine(core, **kwargs)) as engine:
            return await body(engine)

    return asyncio.run(main())


async def collect(engine, prompt, params=None, request_id=None, **kwargs):
    return [output async for output in engine.generate(prompt, params, request_id, **kwargs)]


async def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen within 10 s"
        await asyncio.sleep(0.001)


def test_concurrent_callers_get_what_llm_gives():
    prompts, params = [f"p{i}" for i in range(30)], SamplingParams(seed=4, max_tokens=12)

    async def body(engine):
        results = await asyncio.gather(*(collect(engine, p, params) for p in prompts))
        return [outputs[-1].outputs[0].text for outputs in results]

    with LLM.from_engine(fake_engine()) as llm:
        assert run(body) == [o.outputs[0].text for o in llm.generate(prompts, params, use_tqdm=False)]


def test_the_kinds_of_output_agree():
    params = SamplingParams(seed=4, max_tokens=12, n=2)

    core = FakeCore(halts_after=1)  # until somebody has heard of that step

    async def body(engine):
        cumulative = []
        async for output in engine.generate("x", params):
            cumulative.append(output)
            core.gate.set()
        return cumulative, *[await collect(engine, "x", params, output_kind=kind) for kind in ("delta", "final")]

    cumulative, deltas, final = run(body, core)
    assert len(final) == 1 and final[0].finished
    texts = [c.text for c in final[0].outputs]
    assert [c.text for c in cumulative[-1].outputs] == texts
    assert len(cumulative) > 1 and len(cumulative[0].outputs[0].text) < len(texts[0])
    joined = ["", ""]
    for delta in deltas:
        for choice in delta.outputs:
            joined[choice.index] += choice.text
    assert joined == texts


def test_an_earlier_output_doesnt_change_later():
    async def body(engine):
        return await collect(engine, "x", SamplingParams(max_tokens=6))

    outputs = run(body, FakeCore(step_seconds=0.002))
    lengths = [len(o.outputs[0].token_ids) for o in outputs]
    assert lengths == sorted(set(lengths))


def test_a_bad_request_fails_alone():
    async def body(engine):
        return await asyncio.gather(
            collect(engine, "x", SamplingParams(max_tokens=5)),
            collect(engine, "x", SamplingParams(logprobs=99)),
            collect(engine, ""),
            collect(engine, "x", output_kind="all"),
            collect(engine, "x", priority="high"),
            collect(engine, "y", SamplingParams(max_tokens=5)),
            return_exceptions=True,
        )

    good, *bad, also_good = run(body)
    assert good[-1].finished and also_good[-1].finished
    assert all(isinstance(error, InvalidRequestError) for error in bad)


def test_abort_ends_the_iteration():
    core = FakeCore(few_letters, step_seconds=0.001, pauses=True)

    async def body(engine):
        task = asyncio.create_task(collect(engine, "x", SamplingParams(max_tokens=4000), "mine"))
        await until(lambda: core.num_running == 1)
        await engine.abort("mine")
        await engine.abort("nobody")
        outputs = await task
        return outputs[-1].outputs[0]

    choice = run(body, core, max_model_len=4096)
    assert choice.finish_reason == "abort"
    assert choice.text == bytes(choice.token_ids).decode()


def test_cancelling_a_task_aborts_its_request_and_no_other():
    core = FakeCore()
    core.gate.clear()

    async def body(engine):
        tasks = [asyncio.create_task(collect(engine, p, SamplingParams(max_tokens=4000))) for p in "ab"]
        other = asyncio.create_task(collect(engine, "c", SamplingParams(max_tokens=40)))
        await until(lambda: core.num_running == 3)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        core.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) for r in results)
        await until(lambda: len(core.ended) == 3)
        return (await other)[-1]

    assert run(body, core, max_model_len=4096).outputs[0].finish_reason == "length"
    assert sorted(reason for reason, _, _ in core.ended.values()) == ["abort", "abort", "length"]


def test_leaving_the_iteration_aborts():
    core = FakeCore(few_letters, step_seconds=0.001, pauses=True)

    async def body(engine):
        iterator = engine.generate("x", SamplingParams(max_tokens=4000))
        await anext(iterator)
        await iterator.aclose()
        await until(lambda: core.num_running == 0)

    run(body, core, max_model_len=4096)


@pytest.mark.parametrize("request_id", [[1], 1, "", b"x"])
def test_a_request_id_is_a_string(request_id):
    async def body(engine):
        with pytest.raises(InvalidRequestError, match="request_id is .*; allowed: a string that isn't empty, or None"):
            await collect(engine, "x", request_id=request_id)

    run(body)


def test_a_request_id_in_use_is_refused_and_free_afterwards():
    core = FakeCore()
    core.gate.clear()

    async def body(engine):
        first = asyncio.create_task(collect(engine, "x", SamplingParams(max_tokens=30), "mine"))
        await until(lambda: core.num_running == 1)
        with pytest.raises(InvalidRequestError, match="'mine' is in use"):
            await collect(engine, "y", SamplingParams(max_tokens=2), "mine")
        core.gate.set()
        assert (await first)[-1].request_id == "mine"
        return await collect(engine, "y", SamplingParams(max_tokens=2), "mine")

    assert run(body, core)[-1].finished


@pytest.mark.parametrize("silently", [False, True])
def test_a_dead_engine_tells_every_caller(silently):
    core = FakeCore(few_letters, step_seconds=0.001, pauses=True)

    async def body(engine):
        tasks = [asyncio.create_task(collect(engine, p, SamplingParams(max_tokens=4000))) for p in "abc"]
        await until(lambda: core.num_running == 3)
        core.fail(ValueError("device lost"), silently=silently)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, EngineDeadError) and "device lost" in str(r) for r in results)
        with pytest.raises(EngineDeadError):
            await collect(engine, "x")
        with pytest.raises(EngineDeadError):
            engine.check_health()

    run(body, core, max_model_len=4096)


def test_closing_tells_who_waits_and_who_comes_later_that_nothing_failed():
    core = FakeCore(few_letters, step_seconds=0.001, pauses=True)

    async def body(engine):
        waiting = asyncio.create_task(collect(engine, "x", SamplingParams(max_tokens=4000)))
        await until(lambda: core.num_running == 1)
        engine.close()
        for call in (waiting, collect(engine, "x")):
            with pytest.raises(EngineDeadError, match="^the engine was shut down; build another LLM or AsyncEngine"):
                await call
        with pytest.raises(EngineDeadError, match="^the engine was shut down"):
            engine.check_health()

    run(body, core, max_model_len=4096)


def test_a_stop_string_ends_the_choice_in_the_core():
    core = FakeCore(lambda choice: [*b"abcdef", EOS], tokens_per_step=4)

    async def body(engine):
        return (await collect(engine, "x", SamplingParams(max_tokens=30, stop="bc")))[-1].outputs[0]

    choice = run(body, core)
    assert (choice.text, bytes(choice.token_ids), choice.stop_reason) == ("a", b"abc", "bc")


def test_one_engine_serves_several_loops_in_turn():
    engine = AsyncEngine.from_engine(fake_engine())
    for _ in range(3):
        assert asyncio.run(collect(engine, "x", SamplingParams(max_tokens=3)))[-1].finished
    engine.close()
