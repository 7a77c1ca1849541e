"""Every legal step has a bucket, the smallest one, and the closed set is small."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.runner.buckets import (
    burst_buckets,
    burst_len,
    burst_width,
    forward_width,
    pick_forward,
    pick_rows,
    row_buckets,
    token_buckets,
)
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.executables import burst_keys, sample_keys
from jaxserve.sampling.tier import Tier

PLATFORMS = ["cpu", "gpu", "tpu"]
DEFAULTS = {"cpu": (8, 512), "gpu": (256, 8192), "tpu": (256, 8192)}


def config_for(platform, max_num_seqs, max_num_batched_tokens, max_drafts=0):
    rows = row_buckets(max_num_seqs, platform)
    return RunnerConfig(
        max_num_seqs=max_num_seqs,
        max_model_len=64,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=16,
        num_blocks=8,
        vocab_size=97,
        max_drafts=max_drafts,
        burst_len=4,
        burst_buckets=burst_buckets(rows, max_drafts),
        token_buckets=token_buckets(max_num_batched_tokens, rows, platform),
        row_buckets=rows,
    )


@st.composite
def limits(draw):
    seqs = draw(st.integers(1, 300))
    return seqs, draw(st.integers(seqs, 9000))


@given(limits(), st.sampled_from(PLATFORMS), st.data())
@settings(deadline=None)
def test_every_legal_step_fits_the_smallest_bucket_that_holds_it(limits, platform, data):
    seqs, batched = limits
    config = config_for(platform, seqs, batched)
    num_rows = data.draw(st.integers(1, seqs))
    num_tokens = data.draw(st.integers(num_rows, batched))
    tokens, rows = pick_forward(config.token_buckets, num_tokens, num_rows)
    assert tokens >= num_tokens and rows >= num_rows
    assert (tokens, rows) in config.token_buckets
    holding = [b for b in config.token_buckets if b[0] >= num_tokens and b[1] >= num_rows]
    assert (tokens, rows) == min(holding)
    assert pick_rows(config.row_buckets, num_rows) == min(r for r in config.row_buckets if r >= num_rows)


@given(limits(), st.sampled_from(PLATFORMS))
@settings(deadline=None)
def test_buckets_are_ascending_and_end_at_the_limits(limits, platform):
    seqs, batched = limits
    config = config_for(platform, seqs, batched)
    assert list(config.row_buckets) == sorted(set(config.row_buckets))
    assert list(config.token_buckets) == sorted(set(config.token_buckets))
    assert config.row_buckets[-1] == seqs
    assert config.token_buckets[-1] == (batched, seqs)
    assert all(rows <= tokens for tokens, rows in config.token_buckets)


@pytest.mark.parametrize("drafts", [0, 1, 4])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_at_most_24_executables_by_default(platform, drafts):
    """Forward and sampling, as the design counts them, and bursts, which are both."""
    config = config_for(platform, *DEFAULTS[platform], drafts)
    bursts = burst_keys(config)
    assert len(config.token_buckets) + len(sample_keys(config)) + len(bursts) <= 24


def test_bursts_with_drafts_have_few_rows_and_room_for_the_drafts():
    assert burst_buckets((8, 32, 64, 128), 0) == ((8, 8), (32, 32), (64, 64), (128, 128))
    assert burst_buckets((8, 32, 64, 128), 2) == ((8, 8), (32, 8))
    assert burst_buckets((8, 32, 64, 128), 4) == ((8, 8), (64, 8))
    assert burst_buckets((8, 32, 64, 128), 19) == ((8, 8), (128, 8))
    assert burst_buckets((8,), 0) == burst_buckets((8,), 4) == ((8, 8),)


def test_only_bursts_without_drafts_have_one_token_a_row():
    assert [burst_width(8, 8, 0), burst_width(8, 8, 4), burst_width(64, 8, 4)] == [1, None, None]
    # A step of as many tokens as rows may have a prompt, for whose row there is no other kernel.
    assert [forward_width(64, 8, 0), forward_width(64, 8, 4), forward_width(8, 8, 0)] == [1, None, None]


def test_large_bursts_are_short():
    """Somebody who arrives waits for them."""
    assert [burst_len(rows, 4) for rows in (8, 64, 65, 256)] == [4, 4, 2, 2]
    assert [burst_len(rows, 1) for rows in (8, 256)] == [1, 1]


def test_the_cheapest_burst_that_serves_comes_first():
    keys = burst_keys(config_for("gpu", 256, 8192))
    found = [(key.tier, key.num_rows) for key in keys if key.serves(Tier.TRUNCATED, 1, 1)]
    assert found == [(Tier.TRUNCATED, 64)]
    for rows in (1, 8, 9, 64, 65, 256):
        first = next(key for key in keys if key.serves(Tier.GREEDY, rows, rows))
        assert first.tier == Tier.PLAIN and first.num_rows == pick_rows((8, 64, 128, 256), rows)


def test_a_step_beyond_the_limits_is_an_error():
    config = config_for("gpu", 16, 64)
    for tokens, rows in ((65, 1), (17, 17)):
        with pytest.raises(ValueError, match="no bucket"):
            pick_forward(config.token_buckets, tokens, rows)
    with pytest.raises(ValueError, match="no bucket"):
        pick_rows(config.row_buckets, 17)


@given(limits(), st.sampled_from(PLATFORMS), st.sampled_from([0, 1, 4]), st.data())
@settings(deadline=None)
def test_every_step_has_a_sampler_and_the_cheapest_that_serves_comes_first(limits, platform, max_drafts, data):
    config = config_for(platform, *limits, max_drafts)
    keys = sample_keys(config)
    assert len(keys) == len(set(keys))
    tier = data.draw(st.sampled_from(list(Tier)))
    drafts = data.draw(st.sampled_from([0, max_drafts]))
    rows = data.draw(st.integers(1, config.max_num_seqs))
    serving = [key for key in keys if key.serves(tier, drafts, rows)]
    first = next(key for key in keys if key.serves(tier, drafts, rows))
    assert first.tier >= tier and first.num_drafts in (drafts, max_drafts) and first.num_rows >= rows
    assert first.num_rows * (1 + first.num_drafts) == min(key.num_rows * (1 + key.num_drafts) for key in serving)
    fewest = [key for key in serving if key.cost[0] == first.cost[0]]
    assert first.tier == min(key.tier for key in fewest)
    if Tier.PLAIN.covers(tier):
        assert Tier.PLAIN.covers(first.tier), "plain rows must not pay for processors that they don't use"
