"""Where an output ends: stop ids, length, verbatim loops, looked at token by token."""

from __future__ import annotations

from jaxserve.scheduler.repetition import LOOK_EVERY
from jaxserve.scheduler.request import Choice, FinishReason
from jaxserve.scheduler.stats import SchedulerStats


def append_tokens(
    choice: Choice, token_ids: list[int], stats: SchedulerStats
) -> tuple[FinishReason | None, int | str | None]:
    """Cuts ``token_ids`` in place to the shortest prefix that ends the choice, if any does, and appends what is left.

    The answer is a function of the whole output, not of how it was cut into steps. Of two reasons at the same token,
    stop beats length and length beats repetition. Stop ids and loops count only after ``min_tokens`` tokens.

    Returns:
        The finish reason and the stop reason.
    """
    output = choice.output_token_ids
    before = len(output)
    reason: FinishReason | None = None
    stop_reason: int | str | None = None
    if before + len(token_ids) >= choice.max_output_len:
        del token_ids[choice.max_output_len - before :]
        reason = "length"
    if not choice.stop_ids.isdisjoint(token_ids):  # seldom: most that come by here are only due for a look
        for at in range(max(0, choice.min_output_len - before), len(token_ids)):
            token_id = token_ids[at]
            if token_id in choice.stop_ids:
                del token_ids[at + 1 :]
                ends_answer = token_id in choice.eos_token_ids and not choice.params.ignore_eos
                reason, stop_reason = "stop", None if ends_answer else token_id
                break
    output.fromlist(token_ids)
    while len(output) >= choice.repetition_at:
        look_at = choice.repetition_at
        choice.repetition_at = look_at + LOOK_EVERY
        finder = choice.loop_finder
        if look_at < choice.min_output_len or finder is None or not finder.pattern_len(output, look_at):
            continue
        if not choice.repetition_stops:
            stats.num_repetition_warnings += 1
            choice.repetition_at = choice.max_output_len + 1
        elif look_at < len(output) or reason is None:
            del output[look_at:]
            del token_ids[look_at - before :]
            return "repetition", "repetition_detected"
    choice.find_quiet_len()
    return reason, stop_reason
