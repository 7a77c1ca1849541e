"""Finds verbatim loops: an output that ends in ``min_count`` copies of one pattern (vLLM's ``repetition_detection``).

Every output is looked at when its length is a multiple of ``LOOK_EVERY``, at exactly that length, so that the answer
doesn't depend on how the output was cut into steps.
"""

from __future__ import annotations

from array import array

from jaxserve.sampling_params import RepetitionDetection

LOOK_EVERY = 16  # tokens of one choice


def repeated_pattern_len(
    token_ids: array[int],  # [output_len]
    rule: RepetitionDetection,
    length: int,
) -> int:
    """The shortest pattern in the rule's range that ``token_ids[:length]`` ends in ``min_count`` times; 0 if none.

    A tail of c copies of a pattern of p tokens is a tail of c*p tokens in which each equals the one p before it. Only
    distances at which the last token recurs can be such a p, so most outputs cost one scan of ``max_pattern_size``
    tokens.
    """
    count = rule.min_count
    longest = min(rule.max_pattern_size, length // count)
    if longest < rule.min_pattern_size:
        return 0
    last = token_ids[length - 1]
    recent = token_ids[length - 1 - longest : length - 1].tolist()
    recent.reverse()  # recent[p - 1] is p tokens before the last
    size = rule.min_pattern_size - 1
    for _ in range(recent.count(last)):
        try:
            size = recent.index(last, size) + 1
        except ValueError:  # the other occurrences are nearer than min_pattern_size
            return 0
        if (
            token_ids[length - size : length] == token_ids[length - 2 * size : length - size]
            and token_ids[length - size * (count - 1) : length] == token_ids[length - size * count : length - size]
        ):
            return size
    return 0
