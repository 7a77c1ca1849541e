"""What drafts cost on this machine: the constants of the adaptive rule, without a clock."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from jaxserve.config import EngineConfig, SpeculativeConfig
from jaxserve.engine.step_cost import step_cost
from jaxserve.runner.draft import DraftModel
from jaxserve.scheduler.adaptive import AdaptiveDrafts

logger = logging.getLogger("jaxserve")

# Of a step with one launch a layer, against one of XLA's products: Qwen3-0.6B's shape on one H200, 1 and 8 requests.
_FUSED = 0.82
# Of one more sampled position a row. On CPU nothing for greedy requests, 0.08 to 0.16 where noise is drawn.
_POSITION_COST = {"cpu": 0.05, "gpu": 0.03, "tpu": 0.03}
# float32 bytes for each packed one
_WIDENED = {"int8": 4, "fp8": 4, "fp8_weight_only": 4, "int4": 8}


def adaptive_rule(
    config: EngineConfig, platform: str, step_sizes: Mapping[int, bool], drafter: DraftModel | None
) -> AdaptiveDrafts | None:
    """The rule's constants; None where drafts don't adapt.

    ``step_sizes``: tokens of each forward bucket, and whether layers run in one launch each there.
    """
    if config.speculative_config is None or not config.speculative_config.adaptive:
        return None
    cost = _POSITION_COST[platform]
    if drafter is not None:
        cost += _pass_cost(config.speculative_config, platform, drafter.share)
    costs = {size: step_cost(platform, size) * (_FUSED if fused else 1) for size, fused in step_sizes.items()}
    return AdaptiveDrafts(token_cost=cost, step_costs=tuple(sorted(costs.items())))


def without_hopeless_drafts(config: EngineConfig, platform: str) -> EngineConfig:
    """The config less a draft model that the rule couldn't let draft even if all its drafts were right; warns of it.

    A copy of the target is one on a CPU, where a pass of it takes as long as one of the target: k passes and the verify
    step bring 1 + k tokens in the time of more than 1 + k steps. It would be kept up in every step for nothing.
    """
    drafts = config.speculative_config
    if drafts is None or not drafts.adaptive or not _copies_at_full_cost(drafts, platform):
        return config
    logger.warning(
        "no speculation: on a CPU a pass of a quantised copy takes as long as one of the model, so its drafts "
        "can't pay however many are right; adaptive=False in speculative_config drafts all the same"
    )
    return dataclasses.replace(config, speculative_config=None)


def _pass_cost(drafts: SpeculativeConfig, platform: str, share: float) -> float:
    """Of a pass of the draft model, whose bytes are that share of the target's."""
    if _copies_at_full_cost(drafts, platform):
        return 1.0
    # Where weights are read, not computed with, bytes are time. A CPU widens packed weights first.
    return share * (_WIDENED[drafts.quantization] if platform == "cpu" and drafts.quantization else 1)


def _copies_at_full_cost(drafts: SpeculativeConfig, platform: str) -> bool:
    return platform == "cpu" and drafts.method == "draft_model" and drafts.model is None
