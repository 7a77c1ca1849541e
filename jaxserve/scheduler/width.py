"""The one width rule: how many tokens a choice may compute in a step, for every path.

A choice's ``computed_len`` may never pass ``limit_len``, which says two things at once: no position at or past
``max_model_len - 1`` is computed (so that the sampled token still has its place), and no more than ``max_tokens``
tokens are emitted. The second holds because a choice that has computed C tokens, prefill done, has emitted at most
``C - prompt_len + 1``. What is in flight counts in full, as an upper bound. Limits act on tokens, here; blocks are
counted afterwards, from the width that this rule gave, and are never clamped.
"""

from __future__ import annotations


def limit_len(prompt_len: int, max_tokens: int, max_model_len: int) -> int:
    """The most tokens of a choice that may ever be computed; its pool demand is the blocks that cover them."""
    return min(max_model_len, prompt_len + max_tokens) - 1


def step_width(planned_len: int, limit: int, wanted: int) -> int:
    """Tokens that a choice may compute in this step: 0 means that it isn't in the step.

    Args:
        planned_len: ``computed_len + in_flight_len``.
        limit: the choice's ``limit_len``.
        wanted: a prefill chunk, or 1 + drafts; at least 0.
    """
    room = limit - planned_len
    if room >= wanted:
        return wanted
    return room if room > 0 else 0


def draft_cap(
    *,
    num_decodes: int,
    num_drafting: int,
    prefill_pending: bool,
    max_drafts: int,
    max_tokens: int,
    max_sample_rows: int,
    max_num_seqs: int,
) -> int:
    """The most drafts a row may have so that all decode rows fit the step, and drafts don't starve prefill.

    Where prefill waits, drafts take at most half of the tokens that plain decoding leaves, and every slot keeps one
    sampling row; otherwise they may take all. ``num_drafting`` of the ``num_decodes`` rows share them evenly.
    """
    tokens = max_tokens - num_decodes
    rows = max_sample_rows - num_decodes
    if prefill_pending:
        tokens //= 2
        rows = max_sample_rows - max_num_seqs
    return min(max_drafts, tokens // num_drafting, rows // num_drafting)
