"""Promise 2 for drafts of a second model, whatever it is: the target itself, a quantised copy, or a stranger.

A drafter that *is* the target makes the sharpest test: with the same noise, settings and prefix it must draft exactly
what the target then samples, however the request is run. One wrong entry of its KV, and a draft is rejected.
"""

import dataclasses

import jax
import numpy as np
import pytest
from speculation_cases import CASES, SMALL, answers, assert_same, prompts, requests
from test_speculation import EAGER, WAYS, num_drafts
from tiny_engines import GOLDEN, ids, preemptions

from jaxserve import LLM, SamplingParams
from jaxserve.config import SpeculativeConfig
from jaxserve.errors import ConfigError
from jaxserve.runner.executables import propose_keys, sample_keys
from jaxserve.scheduler import AdaptiveDrafts

LLAMA = str(GOLDEN / "tiny" / "llama")
DRAFTERS = {
    "itself": {"model": LLAMA, "num_speculative_tokens": 4},
    "int4 twin": {"quantization": "int4", "num_speculative_tokens": 3},
}
MORE_DRAFTERS = {
    "a stranger with windows": {"model": str(GOLDEN / "tiny" / "gemma3"), "num_speculative_tokens": 2},
    "int8 twin": {"quantization": "int8", "num_speculative_tokens": 8},
    "int4 stranger": {"model": str(GOLDEN / "tiny" / "qwen3"), "quantization": "int4", "num_speculative_tokens": 1},
}


@pytest.fixture(scope="module")
def drafting(tiny):
    """``drafting(name)``: an engine whose drafts come from that model."""

    def make(name):
        config = SpeculativeConfig(method="draft_model", adaptive=False, **(DRAFTERS | MORE_DRAFTERS)[name])
        return tiny("llama", **SMALL, speculative_config=config)

    return make


@pytest.fixture(scope="module")
def plain(tiny):
    return tiny("llama", **SMALL)


@pytest.fixture(scope="module")
def want(plain):
    with plain.llm() as llm:
        return answers(llm, *requests())


@pytest.mark.parametrize("rule", [EAGER, {"adaptive_drafts": AdaptiveDrafts()}], ids=["always", "adaptive"])
@pytest.mark.parametrize("name", [*DRAFTERS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_DRAFTERS)])
def test_row_31_every_setting_in_one_batch(drafting, want, reference, name, rule):
    """Then again with a warm prefix cache, whose blocks hold both models' keys and values: no fewer are accepted."""
    texts, params = requests()
    with drafting(name).llm(**rule) as llm:
        for turn in range(2):
            got = answers(llm, texts, params)
            assert_same(got, want, params, reference("llama"))
            # every whole block of a prompt, but for its last token, and for prompts whose log-probabilities are wanted
            found = [o.num_cached_tokens for o in got]
            whole = [(len(t) - 1) // 4 * 4 * (p.prompt_logprobs is None) for t, p in zip(texts, params, strict=True)]
            assert turn == 0 or sum(found) >= 0.9 * sum(whole)
        drafted, accepted = num_drafts(llm)
    if name == "itself":
        assert drafted > 100 and wrong_drafts(drafted, accepted) == 0
    else:
        assert 0 < accepted < drafted


def wrong_drafts(drafted, accepted):
    """Drafts that were rejected, up to one in a hundred forgiven: logits of other shapes are rounded otherwise."""
    return max(drafted - accepted - drafted // 100, 0)


@pytest.mark.parametrize("name", CASES)
def test_the_target_drafts_what_it_samples(drafting, want, reference, name):
    """With every setting alone: drafts see the same processors and the same noise as samples do."""
    at = list(CASES).index(name)
    params = [CASES[name]]
    with drafting("itself").llm(**EAGER) as llm:
        assert_same(answers(llm, [prompts()[at]], params), [want[at]], params, reference("llama"))
        drafted, accepted = num_drafts(llm)
    assert drafted and wrong_drafts(drafted, accepted) == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["itself", "int4 twin", pytest.param("a stranger with windows", marks=pytest.mark.slow)]
)
def test_whatever_the_way(drafting, want, reference, name, way):
    texts, params = requests()
    if way == "priority":
        params = [p.with_changes(priority=-i % 5) for i, p in enumerate(params)]
    with drafting(name).llm(**WAYS[way], **EAGER) as llm:
        for _ in range(2):
            assert_same(answers(llm, texts, params), want, params, reference("llama"))
        assert (preemptions(llm) > 0) == ("preempted" in way)
        drafted, accepted = num_drafts(llm)
    assert drafted
    if name == "itself" and "preempted" not in way:  # drafts of rows that were preempted meanwhile are not counted
        assert wrong_drafts(drafted, accepted) == 0


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_a_request_may_ask_for_fewer(drafting, want, reference, asked):
    texts, params = requests()
    mixed = [p.with_changes(num_speculative_tokens=asked if i % 2 else None) for i, p in enumerate(params)]
    with drafting("itself").llm(**EAGER) as llm:
        got = answers(llm, texts, mixed)
        assert_same(got, want, mixed, reference("llama"))
        drafted, accepted = num_drafts(llm)
        assert wrong_drafts(drafted, accepted) == 0
    if not asked:
        assert not any(o.metrics.num_drafted_tokens for o in got[1::2])


@pytest.mark.parametrize("max_model_len", [2, 9, 32, 33])
def test_row_32_up_to_the_context_limit(plain, drafting, reference, max_model_len):
    texts = [(text * max_model_len)[:n] for n, text in enumerate(prompts(1, max_model_len - 1), 1)]
    params = [SamplingParams(temperature=0, max_tokens=max_model_len - len(t), ignore_eos=True) for t in texts]
    with plain.llm() as llm:
        want = answers(llm, texts, params)
    for settings in ({}, {"num_blocks": -(-max_model_len // 4), "admission_headroom_len": 0}):
        with drafting("itself").llm(max_model_len=max_model_len, **settings, **EAGER) as llm:
            got = answers(llm, texts, params)
            assert_same(got, want, params, reference("llama"))
            assert [len(tokens) for tokens in ids(got)] == [p.max_tokens for p in params]


GARBAGE = [-(2**31), -1, 131, 2**31 - 1]


def test_a_drafter_gone_mad_changes_nothing(drafting, want, reference):
    """Ids outside the vocabulary, and half of the drafts repeated ids inside it."""
    engine = drafting("itself")
    runner = engine.engine.core.runner
    slots = runner._slots
    shape = slots.plan.drafts.shape
    ids_of_any_kind = np.resize(np.array([*GARBAGE, 97, 98], np.int32), shape)

    def propose(params, kv, slots):
        return kv, dataclasses.replace(slots, plan=dataclasses.replace(slots.plan, drafts=ids_of_any_kind + 0))

    args = (runner._drafter.params, runner._kv[1], slots)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (runner._kv[1], slots))
    mad = jax.jit(propose, out_shardings=shardings).lower(*args).compile()
    sane = dict(runner.executables.propose)
    runner.executables.propose.update(dict.fromkeys(sane, mad))
    try:
        with engine.llm(**EAGER) as llm:
            texts, params = requests()
            assert_same(answers(llm, texts, params), want, params, reference("llama"))
            drafted, accepted = num_drafts(llm)
            assert drafted > 0 and accepted < drafted / 4
    finally:
        runner.executables.propose.update(sane)


def test_pools_are_twins_and_memory_counts_both(plain, drafting):
    runner = drafting("itself").engine.core.runner
    target, draft = runner._kv
    assert target[0].values.shape[0] == draft[0].values.shape[0] == runner.config.num_blocks
    assert runner.config.num_blocks == plain.engine.core.runner.config.num_blocks // 2  # of the same memory
    twin = drafting("int4 twin").engine
    twin_params, params = twin.core.runner._drafter.params, twin.core.runner._params
    assert twin_params["final_norm"]["weight"] is params["final_norm"]["weight"]
    assert twin_params["embed"]["weight"] is params["embed"]["weight"]  # untied: looked up, never multiplied
    assert "copy of the model, int4" in twin.info["drafts"]


def test_the_set_of_executables_is_small(drafting):
    engine = drafting("itself").engine
    executables = engine.core.runner.executables
    assert len(executables.forward) + len(executables.sample) <= 24
    assert engine.info["executables of the draft model"] == len(executables.propose)
    big = dataclasses.replace(engine.core.runner.config, row_buckets=(8, 32, 64, 128, 256))
    keys = sample_keys(big)
    assert len(keys) <= 16
    assert [key.cost for key in keys] == sorted(key.cost for key in keys)
    for tier in {key.tier for key in keys}:
        for rows in (1, 8, 9, 200, 256):
            for drafts in (0, big.max_drafts):
                key = next(key for key in keys if key.serves(tier, drafts, rows))
                assert key.cost == min(k.cost for k in keys if k.serves(tier, drafts, rows))
            assert any(key.serves(tier, big.max_drafts, rows) for key in propose_keys(big))


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("quantization", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_row_25_over_several_devices(tiny, tp, quantization):
    """Tied tables, and KV heads that are copied: the twin is sharded as the target is."""
    texts, params = requests()
    with tiny("dummy", **SMALL).llm() as llm:
        want = answers(llm, texts, params)
    config = SpeculativeConfig(method="draft_model", quantization=quantization, adaptive=False)
    engine = tiny("dummy", **SMALL, tensor_parallel_size=tp, speculative_config=config)
    with engine.llm(**EAGER) as llm:
        assert_same(answers(llm, texts, params), want, params)
        assert num_drafts(llm)[1] > 0


REFUSED = {
    "no model": ({"method": "draft_model"}, r"speculative_config\.model is None, and so is quantization"),
    "ngram with a model": (
        {"method": "ngram", "model": LLAMA},
        r"speculative_config\.model is '.*' with method 'ngram'",
    ),
    "ngram, quantised": ({"method": "ngram", "quantization": "int8"}, "quantization is 'int8' with method 'ngram'"),
    "unknown quantization": ({"method": "draft_model", "quantization": "int3"}, "'int3'; allowed: int8, int4, fp8"),
    "unknown method": ({"method": "eagle"}, "'ngram', 'draft_model', or None"),
    "another vocabulary": ({"method": "draft_model", "model": "tiny_dummy.toml"}, "261 token ids; allowed: the"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(request, name):
    config, message = REFUSED[name]
    settings = {"skip_tokenizer_init": True, "load_format": "dummy"}
    if config.get("model") == "tiny_dummy.toml":
        config = config | {"model": str(request.path.with_name("tiny_dummy.toml"))}
    with pytest.raises(ConfigError, match=message):
        LLM(LLAMA, speculative_config=config, **settings)


def test_a_context_shorter_than_the_targets_is_refused(request, tmp_path):
    text = request.path.with_name("tiny_dummy.toml").read_text()
    short, long = tmp_path / "short.toml", tmp_path / "long.toml"
    short.write_text(text)
    long.write_text(text.replace("max_position = 96", "max_position = 97"))
    with pytest.raises(ConfigError, match=r"context of 96; allowed: at least max_model_len \(97\)"):
        LLM(
            str(long), load_format="dummy", skip_tokenizer_init=True,
            speculative_config={"method": "draft_model", "model": str(short)},
        )  # fmt: skip


def test_another_tokenizer_is_refused(tmp_path, byte_tokenizer_path):
    from fakes import fast_byte_tokenizer

    from jaxserve.config import EngineConfig
    from jaxserve.engine.drafter import open_drafter
    from jaxserve.models.config import ModelConfig
    from jaxserve.weights.checkpoint import open_checkpoint

    (tmp_path / "config.json").write_text((GOLDEN / "tiny" / "llama" / "config.json").read_text())
    other = fast_byte_tokenizer()
    other.add_tokens(["unheard of"])
    other.save_pretrained(tmp_path)
    config = EngineConfig(
        model=LLAMA, load_format="dummy", speculative_config={"method": "draft_model", "model": str(tmp_path)}
    )
    shape: ModelConfig = open_checkpoint(LLAMA).config
    with pytest.raises(ConfigError, match="another tokenizer: 'unheard of' is"):
        open_drafter(config, shape, 64, fast_byte_tokenizer())
    other = fast_byte_tokenizer()
    assert open_drafter(config, shape, 64, None) is not None
