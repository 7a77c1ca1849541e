"""The adaptive rule's constants, as an engine gets them from its platform, its step sizes and its drafter."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
from speculation_cases import SMALL
from tiny_engines import Tiny

from jaxserve import SamplingParams
from jaxserve.config import EngineConfig, SpeculativeConfig
from jaxserve.engine.draft_costs import adaptive_rule, without_hopeless_drafts
from jaxserve.engine.step_cost import step_cost
from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.runner.buckets import row_buckets, token_buckets
from jaxserve.scheduler.adaptive import Wish, choose_draft_len, verify_costs

NGRAM = SpeculativeConfig(method="ngram")
TWIN = SpeculativeConfig(method="draft_model", quantization="int8")
SMALLER = SpeculativeConfig(method="draft_model", model="smaller")
CONFIG = EngineConfig(model="m", speculative_config=NGRAM)


def rule_for(platform, max_num_seqs, config=CONFIG, drafter=None):
    buckets = token_buckets(max(512, 2 * max_num_seqs), row_buckets(max_num_seqs, platform), platform)
    return adaptive_rule(config, platform, {tokens: False for tokens, _ in buckets}, drafter)


def drafts_of_a_runaway(platform, num_running, max_num_seqs):
    rule, wishes = rule_for(platform, max_num_seqs), {Wish(1.0, 4): 1}
    return choose_draft_len(wishes, num_running, verify_costs(wishes, num_running, 4, rule), 4)


def test_a_runaway_is_drafted_for_as_long_as_that_costs_the_others_little():
    alone, beside_three, beside_seven = (drafts_of_a_runaway("cpu", n, 8) for n in (1, 4, 8))
    assert (alone, beside_three, beside_seven) == (4, 4, 0), "eight tokens are a step of eight, twelve one of 64"
    assert [drafts_of_a_runaway("gpu", n, 256) for n in (1, 4, 256)] == [4, 4, 0]


def test_leaving_the_sizes_whose_layers_are_fused_costs_more():
    """Eight requests that draft make a step of 64 of one of 8: how many right drafts that takes."""
    needed = []
    for fused in (False, True):
        rule = adaptive_rule(CONFIG, "gpu", {8: fused, 64: False}, None)
        assert dict(rule.step_costs)[64] == step_cost("gpu", 64)
        needed.append(
            next(
                p for p in range(101)
                if choose_draft_len({Wish(p / 100, 4): 8}, 8, verify_costs({Wish(p / 100, 4): 8}, 8, 4, rule), 4)
            )
        )  # fmt: skip
    assert 0 < needed[0] < needed[1] < 50


@pytest.mark.parametrize("max_num_seqs", [1, 3, 8, 17, 256])
def test_every_engine_on_a_gpu_has_a_rule(max_num_seqs):
    """Whatever its sizes: 12 tokens, whose layers aren't fused, cost more than 24."""
    rows = row_buckets(max_num_seqs, "gpu")
    for max_num_batched_tokens in (max_num_seqs, 96, 160, 1536, 6144, 8192, 12288):
        sizes = [tokens for tokens, _ in token_buckets(max(max_num_batched_tokens, max_num_seqs), rows, "gpu")]
        rule = adaptive_rule(CONFIG, "gpu", {tokens: tokens in (8, 16, 24, 32) for tokens in sizes}, None)
        assert [tokens for tokens, _ in rule.step_costs] == sorted(sizes)


def test_what_a_draft_costs():
    assert adaptive_rule(EngineConfig(model="m"), "gpu", {8: True}, None) is None
    assert (
        adaptive_rule(
            dataclasses.replace(CONFIG, speculative_config=SpeculativeConfig(adaptive=False)), "cpu", {1: False}, None
        )
        is None
    )
    assert rule_for("gpu", 256).token_cost == 0.03
    for drafts, platform, cost in (
        (TWIN, "gpu", 0.03 + 0.25),
        (SMALLER, "cpu", 0.05 + 0.25),
        (
            dataclasses.replace(SMALLER, quantization="int8"),
            "cpu",
            0.05 + 1.0,
        ),  # as float32 it has four times the bytes
        (dataclasses.replace(SMALLER, quantization="int8"), "gpu", 0.03 + 0.25),
    ):
        config = dataclasses.replace(CONFIG, speculative_config=drafts)
        assert rule_for(platform, 8, config, SimpleNamespace(share=0.25)).token_cost == pytest.approx(cost)


def test_a_copy_that_cannot_pay_is_left_out_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "jaxserve"):
        hopeless = dataclasses.replace(CONFIG, speculative_config=TWIN)
        assert without_hopeless_drafts(hopeless, "cpu").speculative_config is None
        assert "can't pay" in caplog.text and "adaptive=False" in caplog.text
        caplog.clear()
        for drafts, platform in (
            (None, "cpu"),
            (NGRAM, "cpu"),
            (SMALLER, "cpu"),
            (dataclasses.replace(TWIN, adaptive=False), "cpu"),
            (TWIN, "gpu"),
        ):
            config = dataclasses.replace(CONFIG, speculative_config=drafts)
            assert without_hopeless_drafts(config, platform) is config
    assert not caplog.records


def test_a_copy_in_the_models_own_format_is_refused_all_the_same(byte_tokenizer_path):
    with pytest.raises(ConfigError, match="'int8', and so is the model's"):
        Tiny("llama", byte_tokenizer_path, **SMALL, quantization="int8", speculative_config=TWIN)


def test_the_engine_is_one_without_speculation_then(tiny):
    """Nothing of the copy is loaded or computed, and a request that asks for drafts hears of it."""
    without = tiny("llama", **SMALL, speculative_config=TWIN)
    engine = without.engine
    compiler = engine.core.runner.compiler()
    assert compiler.drafter is None and compiler.config.max_drafts == 0
    assert engine.core.scheduler.config.max_drafts == 0 and engine.config.speculative_config is None
    with without.llm() as llm, pytest.raises(InvalidRequestError, match="num_speculative_tokens is 1"):
        llm.generate([[1, 2]], SamplingParams(num_speculative_tokens=1), use_tqdm=False)
