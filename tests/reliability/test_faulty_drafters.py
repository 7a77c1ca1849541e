"""Drafters on the host that propose garbage, or far too much, under load: nobody else notices."""

import pytest
from callers import Callers, crowded_core
from core_world import FakeRunner, next_token

from jaxserve import SamplingParams


def follow(tokens, count):
    """The next tokens of the fake device's model."""
    found = []
    for _ in range(count):
        found.append(next_token(tokens + found))
    return found


def test_drafts_that_a_drafter_checks_itself_cost_nobody_anything():
    """set_drafts refuses garbage and keeps nothing; a caller that expects that goes on."""
    refused = []

    def hook(what, step_id):
        for choice in core.scheduler.state.decoding if what == "fetch" else ():
            for token_ids in ([97], [-1], [0] * 3 + [2**40]):
                with pytest.raises(ValueError, match="draft token id"):
                    core.scheduler.set_drafts(choice, token_ids)
                refused.append(choice)
                assert choice.draft_token_ids is None

    core = crowded_core(FakeRunner(hook), drafting="host", max_drafts=4, vocab_size=97)
    callers = Callers(core)
    with callers.llm:
        callers.start(SamplingParams(max_tokens=3, ignore_eos=True))
        callers.join(40)
        assert not any(isinstance(outcome, BaseException) for outcome in callers.outcomes())
    assert len(refused) > 100


@pytest.mark.parametrize("num_right", [0, 2, 9])
def test_a_drafter_that_proposes_a_thousand_tokens_for_everybody(num_right):
    """The width rule leaves of them what a step verifies, however many are right; everybody gets the same answer."""
    core = crowded_core(FakeRunner(), drafting="host", max_drafts=4, vocab_size=97, run_ahead=0)
    correct, widths = core.scheduler.schedule, []

    def schedule():
        for choice in core.scheduler.state.decoding:
            true = follow([*choice.prompt_token_ids, *choice.output_token_ids], num_right)
            core.scheduler.set_drafts(choice, true + [0] * (1000 - num_right))
        plan = correct()
        if plan is not None:
            widths.append(int(plan.num_drafts.max()))
        return plan

    core.scheduler.schedule = schedule
    callers = Callers(core)
    with callers.llm:
        callers.start(SamplingParams(max_tokens=9, ignore_eos=True))
        callers.join(40)
    assert len(callers.outcomes()) == 3 + 10 + 70
    assert [output.outputs[0].token_ids for outputs in callers.outcomes("generate") for output in outputs] == [
        follow([1, 2, 3], 9)
    ] * 120
    assert all(output.outputs[0].token_ids == follow([7, 8, 9], 9) for output in callers.outcomes("asyncio"))
    assert max(widths) == 4
    assert (core.scheduler.stats.num_accepted_tokens > 0) == (num_right > 0)
