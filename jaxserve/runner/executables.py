"""The closed set of executables: which ones there are, and which one a step takes. Nothing is compiled later."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.runner.buckets import burst_len
from jaxserve.runner.config import RunnerConfig
from jaxserve.sampling.tier import Tier

logger = logging.getLogger("jaxserve")


@dataclass(frozen=True)
class SampleKey:
    """A sampling executable, or a draft model's."""

    tier: Tier
    num_drafts: int
    num_rows: int

    @property
    def cost(self) -> tuple[int, int]:
        """Orders keys, so that the first that serves is the cheapest that serves."""
        return self.num_rows * (1 + self.num_drafts), self.tier

    def serves(self, tier: Tier, num_drafts: int, num_rows: int) -> bool:
        return self.tier.covers(tier) and self.num_drafts >= num_drafts and self.num_rows >= num_rows


@dataclass(frozen=True)
class BurstKey:
    """An executable that makes several steps of one size."""

    tier: Tier
    num_tokens: int
    num_rows: int
    num_steps: int

    def serves(self, tier: Tier, num_tokens: int, num_rows: int) -> bool:
        return self.tier.covers(tier) and self.num_tokens >= num_tokens and self.num_rows >= num_rows


def sample_keys(config: RunnerConfig) -> tuple[SampleKey, ...]:
    """The sampling executables, cheapest first. The rarer ones come in few sizes; a step takes the next that serves.

    Where there are many sizes (on accelerators) a greedy step of fewer rows takes PLAIN: noise is cheap there. All
    sizes of the other tiers are sizes of PLAIN, so that plain rows never pay for processors.
    """
    rows, K = config.row_buckets, config.max_drafts
    ends, last = tuple(dict.fromkeys((rows[0], rows[-1]))), rows[-1:]
    if len(rows) <= 3:
        rare = last if K else ends
        sizes = {Tier.GREEDY: rows, Tier.PLAIN: rows, Tier.TRUNCATED: rare, Tier.SCORED: rare, Tier.FULL: rare}
    else:
        rare = rows[::-2][::-1]  # every other size, the last among them
        sizes = {Tier.GREEDY: last, Tier.PLAIN: (rows[0], *rare) if K and rows[0] not in rare else rare}
        sizes |= {Tier.TRUNCATED: rare, Tier.SCORED: last if K else rare, Tier.FULL: rare}
    keys = [SampleKey(tier, K, size) for tier, some in sizes.items() for size in some]
    if K:  # a step without drafts takes the verifier where rows are few: the LM head costs the same there
        keys += [SampleKey(Tier.PLAIN, 0, size) for size in rows[-2:]]
    return tuple(sorted(keys, key=lambda key: key.cost))


def burst_keys(config: RunnerConfig) -> tuple[BurstKey, ...]:
    """The bursts' executables, cheapest first. PLAIN serves greedy rows too; TRUNCATED and SCORED come in one size."""
    buckets = config.burst_buckets  # none where burst_len is 1
    found = []
    for number, (tokens, rows) in enumerate(buckets):
        rare = (Tier.TRUNCATED, Tier.SCORED) if number == min(1, len(buckets) - 1) else ()
        tiers = (Tier.PLAIN, *rare)
        found += [BurstKey(tier, tokens, rows, burst_len(rows, config.burst_len)) for tier in tiers]
    return tuple(found)


def propose_keys(config: RunnerConfig) -> tuple[SampleKey, ...]:
    """A draft model's executables, cheapest first; tier FULL stands in for TRUNCATED and SCORED."""
    rows, K = config.row_buckets, config.max_drafts
    keys = [SampleKey(tier, K, size) for tier in (Tier.GREEDY, Tier.PLAIN) for size in rows]
    return tuple(sorted([*keys, SampleKey(Tier.FULL, K, rows[-1])], key=lambda key: key.cost))


@dataclass(frozen=True)
class Executables:
    """Compiled functions; see step.py and draft.py for what each does."""

    stage: Any
    admit: Any
    prompt_scores: Any
    forward: dict[tuple[int, int], Any]
    sample: dict[SampleKey, Any]
    burst: dict[BurstKey, Any]
    propose: dict[SampleKey, Any]  # empty without a draft model
    prompt_score_tokens: int  # that one call of prompt_scores takes
    num_from_cache: int  # how many weren't compiled but read
    seconds: dict[str, float]  # of start-up, by phase

    @property
    def num_executables(self) -> int:
        """Without the draft model's."""
        return 3 + len(self.forward) + len(self.sample) + len(self.burst)


def temp_bytes(compiled: Any) -> int:
    """Temporary memory of one executable on one device, in bytes; 0 where the backend doesn't say."""
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else int(analysis.temp_size_in_bytes)


def without_large_bursts(executables: Executables, limit: int | None) -> Executables:
    """Without the bursts whose temporaries exceed ``limit`` bytes, with a warning: single steps do the same."""
    if limit is None:
        return executables
    kept = {}
    for key, compiled in executables.burst.items():
        if (size := temp_bytes(compiled)) <= limit:
            kept[key] = compiled
        else:
            what = (
                "%d steps of %d requests in one call aren't used: their temporaries take %d bytes, there is room for %d"
            )
            logger.warning(what, key.num_steps, key.num_rows, size, limit)
    return replace(executables, burst=kept)
