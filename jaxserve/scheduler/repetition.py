"""Finds verbatim loops: an output that ends in ``min_count`` copies of one pattern (vLLM's ``repetition_detection``).

Every output is looked at when its length is a multiple of ``LOOK_EVERY``, at exactly that length, so that the answer
doesn't depend on how the output was cut into steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.sampling_params import RepetitionDetection

LOOK_EVERY = 16  # tokens of one choice


def repeated_pattern_len(
    token_ids: Sequence[int],  # [output_len]
    rule: RepetitionDetection,
) -> int:
    """The shortest pattern in the rule's range that the tail repeats ``min_count`` times in a row; 0 if there is none.

    A tail of c copies of a pattern of p tokens is a tail of c*p tokens in which each equals the one p before it. Only
    distances at which the last token recurs can be such a p, so most outputs cost one scan of ``max_pattern_size``
    tokens.
    """
    length = len(token_ids)
    count = rule.min_count
    longest = min(rule.max_pattern_size, length // count)
    shortest = rule.min_pattern_size
    if longest < shortest:
        return 0
    last = token_ids[-1]
    recent = list(token_ids[length - 1 - longest : length - 1])
    recent.reverse()  # recent[p - 1] is p tokens before the last
    at = shortest - 1
    while True:
        try:
            at = recent.index(last, at)
        except ValueError:
            return 0
        size = at + 1
        if (
            token_ids[length - size :] == token_ids[length - 2 * size : length - size]
            and token_ids[length - size * (count - 1) :] == token_ids[length - size * count : length - size]
        ):
            return size
        at += 1
