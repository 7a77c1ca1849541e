"""The one width rule, against its definition tried token by token."""

from itertools import product

from jaxserve.scheduler.width import draft_cap, limit_len, step_width


def test_width_never_passes_context_or_max_tokens():
    for max_model_len, prompt_len, max_tokens in product(range(2, 12), range(1, 11), range(1, 12)):
        if prompt_len > max_model_len - 1 or max_tokens > max_model_len - prompt_len:
            continue
        limit = limit_len(prompt_len, max_tokens, max_model_len)
        for planned, wanted in product(range(prompt_len, limit + 2), range(7)):
            width = step_width(planned, limit, wanted)
            emitted = planned - prompt_len + 1
            allowed = [
                w
                for w in range(wanted + 1)
                if w == 0 or (planned + w <= max_model_len - 1 and emitted + w <= max_tokens)
            ]
            assert width == max(allowed)


def test_exactly_max_tokens_fit():
    assert limit_len(prompt_len=10, max_tokens=6, max_model_len=16) == 15
    assert limit_len(prompt_len=10, max_tokens=5, max_model_len=16) == 14


def test_draft_cap_keeps_budgets_and_leaves_room_for_prefill():
    for decodes, tokens, spare_rows, pending in product(range(1, 9), range(8, 40, 3), range(0, 12, 3), (False, True)):
        cap = draft_cap(
            num_decodes=decodes,
            num_drafting=decodes,
            prefill_pending=pending,
            max_drafts=4,
            max_tokens=tokens,
            max_sample_rows=8 + spare_rows,
            max_num_seqs=8,
        )
        assert 0 <= cap <= 4
        assert decodes * (1 + cap) <= min(tokens, 8 + spare_rows)
        if pending and decodes < 8:
            assert decodes * (1 + cap) < tokens
            assert decodes * (1 + cap) + (8 - decodes) <= 8 + spare_rows
