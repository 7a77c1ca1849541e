"""What a step's tokens mean for a choice: which are kept, and whether it ends."""

from __future__ import annotations

from jaxserve.scheduler.plan import Logprobs
from jaxserve.scheduler.repetition import LOOK_EVERY, repeated_pattern_len
from jaxserve.scheduler.request import Choice, FinishReason
from jaxserve.scheduler.stats import SchedulerStats


class Commit:
    """What one step brought to one choice.

    Attributes:
        choice: with the tokens already appended.
        row: the choice's row in the plan; -1 where no step was involved (a timeout). The tokens' logprobs are
            ``result.logprobs`` at ``[row, :len(new_token_ids)]``.
        new_token_ids: emitted tokens, after stopping.
        finish_reason: set with the choice's last commit.
        stop_reason: the stop token id, or what else ended it.
        prompt_logprobs: (first position, Logprobs) of prompt tokens that weren't handed out before.
    """

    __slots__ = ("choice", "finish_reason", "new_token_ids", "prompt_logprobs", "row", "stop_reason")

    def __init__(
        self,
        choice: Choice,
        row: int,
        new_token_ids: list[int],
        finish_reason: FinishReason | None = None,
        stop_reason: int | str | None = None,
        prompt_logprobs: tuple[int, Logprobs] | None = None,
    ) -> None:
        self.choice = choice
        self.row = row
        self.new_token_ids = new_token_ids
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        self.prompt_logprobs = prompt_logprobs

    def __repr__(self) -> str:
        return f"Commit({self.choice.choice_id}, {self.new_token_ids}, {self.finish_reason}, {self.stop_reason})"


def append_tokens(
    choice: Choice, token_ids: list[int], stats: SchedulerStats
) -> tuple[list[int], FinishReason | None, int | str | None]:
    """Appends the shortest prefix of ``token_ids`` that ends the choice, or all of them.

    The answer is a function of the whole output, not of how it was cut into steps. Of two reasons at the same token,
    stop beats length and length beats repetition. Stop ids and loops count only after ``min_tokens`` tokens.

    Returns:
        The tokens appended, the finish reason and the stop reason.
    """
    output = choice.output_token_ids
    before = len(output)
    keep = len(token_ids)
    reason: FinishReason | None = None
    stop_reason: int | str | None = None
    if before + keep >= choice.max_output_len:
        keep, reason = choice.max_output_len - before, "length"
    stop_ids = choice.stop_ids
    if stop_ids and not stop_ids.isdisjoint(token_ids):
        for i in range(max(0, choice.min_output_len - before), keep):
            token_id = token_ids[i]
            if token_id in stop_ids:
                keep, reason = i + 1, "stop"
                ends_answer = token_id in choice.eos_token_ids and not choice.params.ignore_eos
                stop_reason = None if ends_answer else token_id
                break
    output.extend(token_ids if keep == len(token_ids) else token_ids[:keep])
    while len(output) >= choice.repetition_at:
        look_at = choice.repetition_at
        choice.repetition_at = look_at + LOOK_EVERY
        if look_at < choice.min_output_len or not _loops(choice, look_at):
            continue
        if not choice.repetition_stops:
            stats.num_repetition_warnings += 1
            choice.repetition_at = choice.max_output_len + 1
        elif look_at < len(output) or reason is None:
            del output[look_at:]
            keep, reason, stop_reason = look_at - before, "repetition", "repetition_detected"
            break
    return token_ids[:keep], reason, stop_reason


def _loops(choice: Choice, length: int) -> bool:
    rule = choice.repetition
    if rule is None:
        return False
    start = max(0, length - rule.max_pattern_size * rule.min_count)
    return repeated_pattern_len(choice.output_token_ids[start:length], rule) > 0
