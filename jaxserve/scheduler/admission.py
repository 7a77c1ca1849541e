"""Which choices may enter at all, and what a choice looks like when it enters.

A choice that passes ``check`` fits the pool on its own at its longest, so the oldest running choice always can go on
once the others are preempted: that is the ground of the progress guarantee.
"""

from __future__ import annotations

from jaxserve.errors import InvalidRequestError
from jaxserve.scheduler.adaptive import DraftLen
from jaxserve.scheduler.config import SchedulerConfig
from jaxserve.scheduler.repetition import LOOK_EVERY, LoopFinder
from jaxserve.scheduler.request import Choice
from jaxserve.scheduler.width import limit_len

NEVER = 2**62


def max_output_len(choice: Choice, config: SchedulerConfig) -> int:
    """``max_tokens``, or what the context leaves."""
    if choice.params.max_tokens is None:
        return config.max_model_len - choice.prompt_len
    return choice.params.max_tokens


def check(choice: Choice, config: SchedulerConfig) -> None:
    """Refuses a choice that could never run to its end. Changes nothing.

    Raises:
        InvalidRequestError: names the field, its value and the allowed range.
    """
    prompt_len, max_model_len = choice.prompt_len, config.max_model_len
    if not 1 <= prompt_len <= max_model_len - 1:
        raise InvalidRequestError(
            f"prompt has {prompt_len} tokens; allowed: 1..{max_model_len - 1} (max_model_len - 1)"
        )
    max_tokens = max_output_len(choice, config)
    if not 1 <= max_tokens <= max_model_len - prompt_len:
        raise InvalidRequestError(
            f"max_tokens is {max_tokens}; allowed with a prompt of {prompt_len} tokens: "
            f"1..{max_model_len - prompt_len} (max_model_len {max_model_len} - prompt)"
        )
    if not 0 <= choice.params.min_tokens <= max_tokens:
        raise InvalidRequestError(f"min_tokens is {choice.params.min_tokens}; allowed: 0..max_tokens ({max_tokens})")
    wanted = choice.params.num_speculative_tokens
    if wanted is not None and not 0 <= wanted <= config.max_drafts:
        raise InvalidRequestError(
            f"num_speculative_tokens is {wanted}; allowed: 0..{config.max_drafts} (the engine's), or None"
        )
    longest = limit_len(prompt_len, max_tokens, max_model_len)
    blocks = -(-longest // config.block_size)
    if blocks > config.num_blocks:
        raise InvalidRequestError(
            f"prompt of {prompt_len} tokens with max_tokens {max_tokens} needs {blocks} KV blocks of "
            f"{config.block_size} tokens; the pool has {config.num_blocks}: prompt + max_tokens can be at most "
            f"{config.num_blocks * config.block_size + 1}"
        )


def prepare(choice: Choice, config: SchedulerConfig, arrival: int) -> None:
    """Fills what the scheduler derives from a checked choice's settings."""
    params = choice.params
    choice.arrival = arrival
    choice.order = (choice.priority if config.policy == "priority" else 0, arrival)
    choice.max_output_len = max_output_len(choice, config)
    choice.limit_len = limit_len(choice.prompt_len, choice.max_output_len, config.max_model_len)
    eos = () if params.ignore_eos else choice.eos_token_ids
    choice.stop_ids = frozenset((*eos, *(params.stop_token_ids or ())))
    limits = [seconds for seconds in (params.max_seconds, config.max_seconds) if seconds is not None]
    choice.deadline = choice.arrival_time + min(limits) if limits else None
    max_drafts = config.max_drafts if params.num_speculative_tokens is None else params.num_speculative_tokens
    if config.drafting == "host":
        choice.host_synchronous = choice.host_synchronous or max_drafts > 0
    elif choice.host_synchronous:
        max_drafts = 0  # the device can't look up drafts for masks that it doesn't have
    choice.draft_len = DraftLen(max_drafts, config.adaptive_drafts)
    if params.repetition_detection is not None:
        choice.loop_finder, choice.repetition_stops = LoopFinder(params.repetition_detection), True
    elif config.repetition != "off":
        choice.loop_finder, choice.repetition_stops = (
            LoopFinder(config.repetition_detection),
            config.repetition == "stop",
        )
    choice.repetition_at = LOOK_EVERY if choice.loop_finder is not None else NEVER
