"""The fronts on the real engine: a tiny random model, a byte tokenizer. What it says is noise, how it is served not."""

import asyncio
import itertools
import json
import pickle
import signal
import threading
import time

import pytest
from fakes import EOS, VOCAB_SIZE, fast_byte_tokenizer

from jaxserve import LLM, AsyncEngine, EngineDeadError, InvalidRequestError, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": EOS,
}
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}assistant: "
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(CONFIG))
    fast_byte_tokenizer(chat_template=TEMPLATE).save_pretrained(path)
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "kv_cache_memory_bytes": 1 << 20, "dtype": "float32"}
    with LLM(str(path), load_format="dummy", strict_compile=True, **settings) as llm:
        yield llm


def run(llm, prompts, params=None, **kwargs):
    return llm.generate(prompts, params, use_tqdm=False, **kwargs)


def idle(llm):
    """Waits until nothing runs: then all blocks are back, which the core checks when it falls idle."""
    deadline = time.monotonic() + 20
    while (stats := llm.engine.core.stats())["num_running"] or stats["num_waiting"]:
        assert time.monotonic() < deadline, stats
        time.sleep(0.01)
    llm.engine.core.check_health()


def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_in_a_stream(llm):
    params = SamplingParams(seed=3, max_tokens=20, ignore_eos=True)
    prompts = [f"prompt {i} " * (i + 1) for i in range(9)]
    alone = [run(llm, p, params)[0].outputs[0].token_ids for p in prompts]
    assert [o.outputs[0].token_ids for o in run(llm, prompts, params)] == alone
    assert [i for d in llm.stream(prompts[4], params) for i in d.outputs[0].token_ids] == alone[4]


def test_n_choices_differ_and_logprobs_are_those_of_the_tokens(llm):
    (output,) = run(
        llm, "abc", SamplingParams(n=3, seed=1, max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    )
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3
    for choice in output.outputs:
        rows = choice.logprobs
        assert [next(iter(row)) for row in rows] == choice.token_ids
        assert choice.cumulative_logprob == pytest.approx(sum(next(iter(r.values())).logprob for r in rows), rel=1e-5)
    assert [next(iter(row)) for row in output.prompt_logprobs[1:]] == [*b"bc"]
    assert pickle.loads(pickle.dumps(output)) == output
    json.dumps([c.token_ids for c in output.outputs])


def test_a_stop_string_cuts_the_same_tokens(llm):
    params = SamplingParams(seed=5, max_tokens=30, allowed_token_ids=[*b"abc"])
    whole = run(llm, "x", params)[0].outputs[0]
    stop = whole.text[7:10]
    cut = run(llm, "x", params.with_changes(stop=stop))[0].outputs[0]
    end = whole.text.index(stop) + len(stop)
    assert (cut.text, cut.token_ids) == (whole.text[: end - len(stop)], whole.token_ids[:end])
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    idle(llm)


def test_lengths_are_exact(llm):
    context = llm.engine.max_model_len
    outputs = run(llm, [[1] * (context - 1), [1] * 10], SamplingParams(max_tokens=None, ignore_eos=True))
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, context - 10]
    with pytest.raises(InvalidRequestError, match="allowed: 1..255"):
        run(llm, [[1] * context])


def test_chat_and_defaults(llm):
    (output,) = llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)
    assert output.prompt == "user: hi\nassistant: " and 1 <= len(output.outputs[0].token_ids) <= 16


def test_closing_a_stream_and_ctrl_c_leave_the_engine_usable(llm):
    with llm.stream("abc", LONG) as stream:
        next(stream)
    idle(llm)
    timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        run(llm, ["a"] * 200, LONG)
    timer.join()
    idle(llm)
    assert run(llm, "x", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].finish_reason == "length"


def test_asyncio_callers_fail_and_are_cancelled_one_by_one(llm, monkeypatch):
    core, num_fetched, cancelling = llm.engine.core, itertools.count(), threading.Event()
    fetch = core.runner.fetch

    def held(step):  # nobody is done before one is cancelled
        assert next(num_fetched) < 3 or cancelling.wait(20)
        return fetch(step)

    monkeypatch.setattr(core.runner, "fetch", held)

    async def one(engine, prompt, params):
        return [o async for o in engine.generate(prompt, params)][-1].outputs[0].token_ids

    async def main():
        engine = AsyncEngine.from_engine(llm.engine)
        params = SamplingParams(seed=2, max_tokens=10, ignore_eos=True)
        cancelled = asyncio.create_task(one(engine, "c", LONG))
        good = [asyncio.create_task(one(engine, p, params)) for p in "abd"]
        bad = asyncio.create_task(one(engine, "", params))
        async with asyncio.timeout(20):
            while len(core.callers) < 4:
                await asyncio.sleep(0.001)
        cancelled.cancel()
        cancelling.set()
        results = await asyncio.gather(*good, bad, cancelled, return_exceptions=True)
        engine._finalizer.detach()  # the engine is the LLM's
        return results

    *good, bad, cancelled = asyncio.run(main())
    params = SamplingParams(seed=2, max_tokens=10, ignore_eos=True)
    assert good == [o.outputs[0].token_ids for o in run(llm, [*"abd"], params)]
    assert isinstance(bad, InvalidRequestError) and isinstance(cancelled, asyncio.CancelledError)
    idle(llm)


def test_a_dead_engine_tells_every_caller(llm, monkeypatch):
    """Last in the file: the engine is gone afterwards."""
    fetch, num_fetched = llm.engine.core.runner.fetch, itertools.count()

    def fail(step):
        if next(num_fetched) == 6:
            raise ValueError("device lost")
        return fetch(step)

    monkeypatch.setattr(llm.engine.core.runner, "fetch", fail)
    stream = llm.stream("abc", LONG)
    with pytest.raises(EngineDeadError, match="device lost"):
        list(stream)
    with pytest.raises(EngineDeadError, match="device lost"):
        run(llm, "x")
