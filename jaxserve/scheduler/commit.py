"""What a step's results change."""

from __future__ import annotations

import numpy as np

from jaxserve.scheduler.invariants import SchedulerInvariantError
from jaxserve.scheduler.plan import Logprobs, StepPlan, StepResult
from jaxserve.scheduler.request import Choice, FinishReason
from jaxserve.scheduler.state import SchedulerState
from jaxserve.scheduler.stopping import append_tokens


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


class Committer:
    """Applies results to a scheduler's state."""

    def __init__(self, state: SchedulerState) -> None:
        self.state = state
        self.config = state.config

    def apply(self, plan: StepPlan, result: StepResult) -> list[Commit]:
        """Applies the result of the oldest outstanding plan; rows of choices that have left it meanwhile are dropped.

        Returns:
            One entry for each choice that got tokens, an end, or prompt logprobs.

        Raises:
            SchedulerInvariantError: the result isn't the oldest plan's, or claims what the plan didn't allow.
        """
        state, stats = self.state, self.state.stats
        if not state.outstanding or state.outstanding[0] is not plan or result.step_id != plan.step_id:
            raise SchedulerInvariantError(f"result of step {result.step_id} isn't that of the oldest outstanding plan")
        state.outstanding.popleft()
        self._check_ids(result)
        self._check_counts(plan, result)
        emitted_lens = np.where(plan.samples, result.num_emitted, 0)
        rows = zip(
            plan.choices,
            plan.epochs.tolist(),
            plan.widths.tolist(),
            (plan.widths - plan.num_drafts - plan.samples + emitted_lens).tolist(),
            plan.num_drafts.tolist(),
            result.num_drafted.tolist(),
            emitted_lens.tolist(),
            result.token_ids.tolist(),
            strict=True,
        )
        prompt_logprobs = result.prompt_logprobs
        commits: list[Commit] = []
        num_drafted = num_accepted = num_emitted = 0
        for row, (choice, epoch, width, computed, drafts_len, drafted, emitted, token_ids) in enumerate(rows):
            if choice.epoch != epoch:
                stats.num_dropped_rows += 1
                continue
            choice.in_flight_len -= width
            choice.computed_len += computed
            if not emitted:  # a prompt's chunk, not the last one
                state.publish(choice)
                state.wake_siblings(choice)
                if row in prompt_logprobs:
                    commits.append(Commit(choice, row, [], None, None, _new_logprobs(choice, row, result)))
                continue
            if drafts_len:
                num_drafted += drafted
                num_accepted += emitted - 1
                choice.draft_len.record(drafts_len, emitted - 1, plan.verify_costs)
            del token_ids[emitted:]  # padding
            commit = Commit(choice, row, token_ids)
            output = choice.output_token_ids
            if len(output) + emitted < choice.quiet_len and choice.stop_ids.isdisjoint(token_ids):
                output.fromlist(token_ids)  # almost every row comes by here
            else:
                commit.finish_reason, commit.stop_reason = append_tokens(choice, token_ids, stats)
                if choice.publish_at <= choice.computed_len:
                    state.publish(choice)
            num_emitted += len(token_ids)
            if choice.siblings is not None:
                state.wake_siblings(choice)
            if prompt_logprobs and row in prompt_logprobs:
                commit.prompt_logprobs = _new_logprobs(choice, row, result)
            commits.append(commit)
            if commit.finish_reason is not None:
                state.finish(choice, commit.finish_reason, commit.stop_reason)
        stats.num_drafted_tokens += num_drafted
        stats.num_accepted_tokens += num_accepted
        stats.num_emitted_tokens += num_emitted
        return commits

    def _check_ids(self, result: StepResult) -> None:
        """A device that answers with ids that don't exist is broken, and what it said before may be wrong as well."""
        token_ids = result.token_ids
        wrong = token_ids.astype(np.uint32) >= self.config.vocab_size  # as are negative ones
        wrong &= np.arange(token_ids.shape[1]) < result.num_emitted[:, None]
        if wrong.any():
            what = f"step {result.step_id} emitted token id {token_ids[wrong][0]}"
            raise SchedulerInvariantError(f"{what}; the vocabulary has {self.config.vocab_size}")

    def _check_counts(self, plan: StepPlan, result: StepResult) -> None:
        """At least one token in each row that samples, after drafts that were planned; of rows that aren't dropped."""
        emitted, drafted = result.num_emitted, result.num_drafted
        wrong = plan.samples & ((emitted < 1) | (emitted > 1 + drafted) | (drafted > plan.num_drafts))
        for row in np.flatnonzero(wrong).tolist():
            if plan.choices[row].epoch == plan.epochs[row]:
                raise SchedulerInvariantError(
                    f"step {plan.step_id} row {row}: {emitted[row]} tokens from {drafted[row]} drafts of at most "
                    f"{plan.num_drafts[row]}"
                )


def _new_logprobs(choice: Choice, row: int, result: StepResult) -> tuple[int, Logprobs] | None:
    """A row's prompt logprobs, less what was handed out before a preemption."""
    first, logprobs = result.prompt_logprobs[row]
    end = first + len(logprobs.token_logprob)
    start = max(first, choice.prompt_logprobs_len)
    if start >= end:
        return None
    choice.prompt_logprobs_len = end
    if start == first:
        return first, logprobs
    skip = start - first
    return start, Logprobs(
        logprobs.token_logprob[skip:], logprobs.token_rank[skip:], logprobs.top_ids[skip:], logprobs.top_logprobs[skip:]
    )
