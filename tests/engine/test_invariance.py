"""Promise 2: how a request is computed changes none of its tokens. All are held to one oracle, which knows nothing but
the prompt, the settings and the seed."""

import numpy as np
import pytest
from speculation_cases import SMALL
from speculation_cases import speculative as speculation
from tiny_engines import GREEDY, generate, ids, preemptions

from jaxserve import SamplingParams

LEAD = 2e-4  # rounding moves these logits by 1e-5; a smaller lead may go either way
LETTERS = [*range(97, 123)]
MIX = {  # name: (prompt length, settings)
    "greedy": (70, GREEDY),
    "plain": (1, SamplingParams(seed=11, max_tokens=16, ignore_eos=True)),
    "truncated": (16, SamplingParams(temperature=0.8, top_k=30, top_p=0.9, min_p=0.01, seed=2**40, max_tokens=16)),
    "processors": (
        33,
        SamplingParams(
            temperature=1.1, seed=-5, max_tokens=16, min_tokens=4, repetition_penalty=1.4, presence_penalty=0.5,
            frequency_penalty=0.7, logit_bias={5: 2.5, 9: -3.0, 2: 1.5}, stop_token_ids=[17], bad_words=["a", "bc"],
        ),
    ),
    "greedy with penalties": (5, GREEDY.with_changes(repetition_penalty=1.3, frequency_penalty=0.4)),
    "allowed": (40, SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_tokens=16, allowed_token_ids=LETTERS)),
    "greedy again": (11, GREEDY),
}  # fmt: skip
BAD_WORDS = [[97], [32, 97], [98, 99], [32, 98, 99]]


@pytest.fixture(scope="module")
def work(reference):
    """Prompts, settings, and what must come out: ids of each."""
    oracle = reference("llama")
    rng = np.random.default_rng(20)
    prompts = [rng.integers(3, oracle.vocab_size, length).tolist() for length, _ in MIX.values()]
    params = [settings for _, settings in MIX.values()]
    wanted = []
    for prompt, settings in zip(prompts, params, strict=True):
        tokens, lead = oracle.follow(prompt, settings, bad_words=BAD_WORDS if settings.bad_words else None)
        assert lead > LEAD, "this case can't tell right from wrong; take another"
        wanted.append(tokens)
    return prompts, params, wanted


WAYS = {
    "at once": {},
    "chunks of 1": {"max_prefill_chunk_len": 1},
    "chunks of 7": {"max_prefill_chunk_len": 7},
    "chunks of 64": {"max_prefill_chunk_len": 64},
    "small steps": {"max_num_batched_tokens": 9},
    "run_ahead 0": {"run_ahead": 0},
    "run_ahead 1": {"run_ahead": 1},
    "run_ahead 3": {"run_ahead": 3},
    "two slots": {"max_num_seqs": 2},
    "no prefix cache": {"enable_prefix_caching": False},
    "preempted": {"num_blocks": 25, "admission_headroom_len": 0},
    "preempted, in chunks, ahead": {
        "num_blocks": 23, "admission_headroom_len": 0, "max_prefill_chunk_len": 7, "run_ahead": 3,
    },
    "preempted, without cache": {
        "num_blocks": 25, "admission_headroom_len": 0, "enable_prefix_caching": False, "run_ahead": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_row_50_the_same_ids_whatever_the_way(tiny, work, way):
    """All in one batch; then again, with the prefix cache warm."""
    prompts, params, wanted = work
    with tiny("llama").llm(**WAYS[way]) as llm:
        cold = generate(llm, prompts, params)
        assert (preemptions(llm) > 0) == ("preempted" in way)
        warm = generate(llm, prompts, params)
    assert ids(cold) == wanted
    assert ids(warm) == wanted
    cached = [output.metrics.num_cached_tokens for output in warm]
    if "num_blocks" in WAYS[way]:
        return  # what is still cached depends on what was evicted
    if way == "no prefix cache":
        assert cached == [0] * len(prompts)
    else:
        assert cached == [(len(prompt) - 1) // 4 * 4 for prompt in prompts]


def test_alone_and_in_any_order(tiny, work):
    prompts, params, wanted = work
    with tiny("llama").llm(enable_prefix_caching=False) as llm:
        assert [ids(generate(llm, [p], s))[0] for p, s in zip(prompts, params, strict=True)] == wanted
        assert ids(generate(llm, prompts[::-1], params[::-1])) == wanted[::-1]
        assert ids(generate(llm, prompts * 3, params * 3)) == wanted * 3


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_preemption_in_mid_output_keeps_what_the_processors_remember(tiny, reference, run_ahead):
    """Penalties, min_tokens, bad words and noise go on where they were, in whatever slot the choice comes back."""
    oracle = reference("llama")
    rng = np.random.default_rng(6)
    common = {"max_tokens": 36, "min_tokens": 30, "stop_token_ids": [*range(3, 20)], "bad_words": ["a", "bc"]}
    params = [
        SamplingParams(temperature=0.8, seed=1, frequency_penalty=1.5, repetition_penalty=1.5, **common),
        SamplingParams(temperature=0, presence_penalty=2.0, frequency_penalty=0.9, **common),
        SamplingParams(temperature=1.5, seed=2, top_k=60, repetition_penalty=2.0, **common),
        SamplingParams(temperature=0.5, seed=3, frequency_penalty=2.0, logit_bias={50: 6.0, 51: 5.0}, **common),
    ]
    prompts = [rng.integers(3, 131, n).tolist() for n in (14, 15, 17, 20)]
    resumed = {}

    def watch(plan):
        for admission in plan.admissions:
            if num_outputs := len(admission.token_ids) - admission.choice.prompt_len:
                resumed[admission.choice.prompt_len] = num_outputs

    with tiny("llama").llm(watch, num_blocks=22, admission_headroom_len=0, run_ahead=run_ahead) as llm:
        got = ids(generate(llm, prompts, params))
    assert set(resumed) >= {15, 17, 20} and max(resumed.values()) > 10, "hardly anybody came back in mid-output"
    for prompt, settings, tokens in zip(prompts, params, got, strict=True):
        want, lead = oracle.follow(prompt, settings, bad_words=BAD_WORDS)
        assert lead > LEAD
        assert tokens == want


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
@pytest.mark.parametrize("way", ["chunks of 7", "preempted, in chunks, ahead"])
def test_windows_too(tiny, reference, name, way):
    oracle = reference(name)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, oracle.vocab_size, n).tolist() for n in (66, 9, 31, 20, 50)]
    with tiny(name).llm(**WAYS[way]) as llm:
        cold, warm = ids(generate(llm, prompts)), ids(generate(llm, prompts))
        assert (preemptions(llm) > 0) == ("preempted" in way)
    for prompt, *got in zip(prompts, cold, warm, strict=True):
        want, lead = oracle.follow(prompt, GREEDY)
        assert lead > LEAD
        assert got == [want, want]


def test_a_salt_separates_and_an_equal_one_shares(tiny, work):
    prompts, _, wanted = work
    prompt = {"prompt_token_ids": prompts[0]}
    with tiny("llama").llm() as llm:
        outputs = [generate(llm, [prompt | salt])[0] for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"})]
        assert [o.metrics.num_cached_tokens for o in outputs] == [0, 0, 0]
        outputs += generate(llm, [prompt | {"cache_salt": "a"}]) + generate(llm, [prompt])
        assert [o.metrics.num_cached_tokens for o in outputs[3:]] == [68, 68]
        assert ids(outputs) == [wanted[0]] * 5


def test_a_shared_prefix_is_computed_once_and_serves_other_prompts(tiny, reference):
    oracle = reference("llama")
    prefix = np.random.default_rng(9).integers(3, 131, 41).tolist()
    prompts = [[*prefix, 7, 8, 9], [*prefix[:22], 50, 51], prefix[:40]]
    with tiny("llama").llm() as llm:
        generate(llm, [prefix])
        outputs = [generate(llm, [prompt])[0] for prompt in prompts]
    assert [o.metrics.num_cached_tokens for o in outputs] == [40, 20, 36]
    assert ids(outputs) == [oracle.follow(prompt, GREEDY)[0] for prompt in prompts]


@pytest.mark.parametrize("way", ["at once", "chunks of 7", "no prefix cache", "preempted"])
def test_n_choices_differ_and_share_the_prompts_blocks(tiny, reference, way):
    oracle = reference("llama")
    params = SamplingParams(n=4, seed=21, max_tokens=20, ignore_eos=True)
    prompt = np.random.default_rng(3).integers(3, 131, 61).tolist()  # 15 blocks can be shared
    tables = []

    def watch(plan):
        tables.append([list(choice.block_ids) for choice in plan.choices])

    with tiny("llama").llm(watch, **WAYS[way]) as llm:
        (output,) = generate(llm, [prompt], params)
        assert (preemptions(llm) > 0) == (way == "preempted")
    want = [oracle.follow(prompt, params, index=index) for index in range(4)]
    assert min(lead for _, lead in want) > LEAD
    assert ids([output]) == [tokens for tokens, _ in want]
    assert len({tuple(tokens) for tokens, _ in want}) == 4
    together = [table for table in tables if len(table) == 4 and all(len(blocks) > 16 for blocks in table)]
    assert together or way == "preempted"
    for table in together:
        assert len({tuple(blocks[:15]) for blocks in table}) == 1, "the prompt's blocks aren't shared"
        assert len({block for blocks in table for block in blocks[15:]}) == sum(len(b) - 15 for b in table)


def test_priority_decides_the_order_and_not_the_tokens(tiny, work):
    prompts, params, wanted = work
    priorities = [3, 1, 2, 0, 5, 4, 1]
    admitted = []

    def watch(plan):
        admitted.extend(admission.choice.priority for admission in plan.admissions)

    with tiny("llama").llm(watch, policy="priority", max_num_seqs=2, max_num_batched_tokens=40) as llm:
        outputs = generate(llm, prompts, params, priority=priorities)
        assert admitted == sorted(priorities)
        admitted.clear()
        assert ids(outputs) == wanted
        outputs = generate(llm, prompts, [p.with_changes(priority=-x) for p, x in zip(params, priorities, strict=True)])
        assert admitted == sorted(-x for x in priorities)
    assert ids(outputs) == wanted


def test_preemption_takes_the_least_important(tiny, work):
    """Three long outputs in a pool for about two."""
    prompts, _, _ = work
    params = GREEDY.with_changes(max_tokens=40)
    lost = set()

    def watch(plan):
        lost.update(admission.choice.priority for admission in plan.admissions if admission.choice.num_preemptions)

    with tiny("llama").llm(watch, policy="priority", num_blocks=24, admission_headroom_len=0) as llm:
        crowded = generate(llm, [prompts[3], prompts[2], prompts[6]], params, priority=[0, 2, 1])
        assert lost and 0 not in lost
    with tiny("llama").llm() as llm:
        assert ids(crowded) == ids(generate(llm, [prompts[3], prompts[2], prompts[6]], params))


def test_unseeded_requests_differ(tiny):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with tiny("llama").llm() as llm:
        outputs = ids(generate(llm, [[5, 6, 7]] * 6, params))
        again = ids(generate(llm, [[5, 6, 7]] * 6, params))
    assert len({tuple(tokens) for tokens in outputs + again}) == 12


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("way", ["at once", "chunks of 7", "run_ahead 0", "run_ahead 3", "preempted"])
def test_row_40_speculation_is_invisible(tiny, speculative, work, way, adaptive):
    """Also through the settings that are hard on drafts; some drafts must be accepted, and some rejected."""
    prompts, params, wanted = work
    rule = {} if adaptive else {"adaptive_drafts": None}
    with speculative.llm(**WAYS[way], max_drafts=3, **rule) as llm:
        cold, warm = generate(llm, prompts, params), generate(llm, prompts, params)
        assert (preemptions(llm) > 0) == ("preempted" in way)
        stats = llm.engine.core.stats()
    assert ids(cold) == wanted
    assert ids(warm) == wanted
    assert 0 < stats["num_accepted_tokens"] < stats["num_drafted_tokens"]
    drafted = sum(output.metrics.num_drafted_tokens for output in cold + warm)
    if way != "preempted":
        assert drafted == stats["num_drafted_tokens"]


@pytest.fixture(scope="module")
def speculative(byte_tokenizer_path):
    from tiny_engines import Tiny

    # the engine of test_speculation.py, whose executables needn't be compiled again
    engine = Tiny("llama", byte_tokenizer_path, **SMALL, speculative_config=speculation(8))
    yield engine
    engine.close()


def test_speculation_can_be_switched_off_by_request(speculative, work):
    prompts, params, wanted = work
    with speculative.llm() as llm:
        outputs = generate(llm, prompts, [p.with_changes(num_speculative_tokens=0) for p in params])
        assert ids(outputs) == wanted
        assert llm.engine.core.stats()["num_drafted_tokens"] == 0
        assert ids(generate(llm, prompts, [p.with_changes(num_speculative_tokens=1) for p in params])) == wanted
        assert llm.engine.core.stats()["num_drafted_tokens"] > 0
