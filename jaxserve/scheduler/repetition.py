"""Finds verbatim loops: an output that ends in ``min_count`` copies of one pattern (vLLM's ``repetition_detection``).

Every output is looked at when its length is a multiple of ``LOOK_EVERY``, at exactly that length, so that the answer
doesn't depend on how the output was cut into steps.
"""

from __future__ import annotations

from array import array

from jaxserve.sampling_params import RepetitionDetection

LOOK_EVERY = 16  # tokens of one choice
_NEEDLE_LEN = 16  # tokens; a search for more would cost more than the comparisons that it saves
_TELLING_LEN = 5  # tokens; fewer recur too often


def repeated_pattern_len(
    token_ids: array[int],  # [output_len]
    rule: RepetitionDetection,
    length: int,
) -> int:
    """The shortest pattern in the rule's range that ``token_ids[:length]`` ends in ``min_count`` times; 0 if none.

    A tail of c copies of a pattern of p tokens is a tail of c*p tokens in which each equals the one p before it, so its
    last (c-1)*p tokens recur p tokens earlier. They are searched as bytes, and compared in full only where they recur:
    most outputs cost one scan of ``max_pattern_size`` tokens.
    """
    count = rule.min_count
    longest = min(rule.max_pattern_size, length // count)
    # apart, because of the shortest patterns so few tokens must recur that they recur everywhere
    few = min(longest, (_TELLING_LEN - 1) // (count - 1))
    return _shortest(token_ids, length, rule.min_pattern_size, few, count) or _shortest(
        token_ids, length, max(rule.min_pattern_size, few + 1), longest, count
    )


def _shortest(token_ids: array[int], length: int, smallest: int, longest: int, count: int) -> int:
    """``repeated_pattern_len`` of patterns of ``smallest..longest`` tokens."""
    if longest < smallest:
        return 0
    tail = token_ids[length - smallest * (count - 1) : length]  # what recurs of every pattern is at least as long
    ending = tail[-_NEEDLE_LEN:]
    needle = ending.tobytes()
    # from the needle at the distance of the longest pattern to that at the distance of the shortest
    recent = token_ids[length - longest - len(ending) : length - smallest].tobytes()
    end = len(recent)
    while (at := recent.rfind(needle, 0, end)) >= 0:
        end = at + len(needle) - 1
        if at % token_ids.itemsize:  # bytes of two tokens
            continue
        size = longest - at // token_ids.itemsize
        if (
            tail == token_ids[length - len(tail) - size : length - size]
            and token_ids[length - size : length] == token_ids[length - 2 * size : length - size]
            and token_ids[length - size * (count - 1) : length] == token_ids[length - size * count : length - size]
        ):
            return size
    return 0
