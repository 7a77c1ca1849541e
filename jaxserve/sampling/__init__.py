"""Logits to tokens. Works under jit, with the vocabulary sharded or not, and needs no sort over it.

A step uses it like this (shape letters in ``state``)::

    state = reset_rows(state, slots, rows, tokens, tokens_len)            # admissions; rows: stacked host_row(...)
    rows = make_rows(state, slots, tokens, tokens_len, drafts)            # M = R * (K+1) positions
    token_ids, logprobs = sample(logits, rows, state, tier=..., ...)
    num_emitted = speculation.verify.accept(token_ids.reshape(R, K + 1), drafts, num_drafts, samples)
    state = commit_tokens(state, slots, token_ids.reshape(R, K + 1), num_emitted)   # where the tier is SCORED or more

Modules: ``tier`` (what is compiled in), ``host`` (a request as numpy arrays), ``state``, ``rows``, ``sampler``,
``processors``, ``truncate``, ``noise``, ``logprobs`` (also of prompts), ``bitmask``.
"""
