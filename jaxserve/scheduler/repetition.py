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
    last (c-1)*p tokens recur p tokens earlier. Their ending is searched as bytes, and they are compared in full only
    where it recurs: most outputs cost one scan of ``max_pattern_size`` tokens.
    """
    count, smallest = rule.min_count, rule.min_pattern_size
    longest = min(rule.max_pattern_size, length // count)
    # apart, because of the shortest patterns so few tokens must recur that they recur everywhere
    few = (_TELLING_LEN - 1) // (count - 1)
    if smallest <= few:
        if found := _shortest(token_ids, length, smallest, min(longest, few), count):
            return found
        smallest = few + 1
    return _shortest(token_ids, length, smallest, longest, count)


def _shortest(token_ids: array[int], length: int, smallest: int, longest: int, count: int) -> int:
    """``repeated_pattern_len`` of patterns of ``smallest..longest`` tokens."""
    if longest < smallest:
        return 0
    tail_len = smallest * (count - 1)  # what recurs of every pattern is at least as long
    needle_len = tail_len if tail_len < _NEEDLE_LEN else _NEEDLE_LEN
    width = token_ids.itemsize
    # from the needle at the distance of the longest pattern to that at the distance of the shortest, and to itself
    recent = token_ids[length - longest - needle_len : length].tobytes()
    needle = recent[-width * needle_len :]
    end = len(recent) - width * smallest
    while (at := recent.rfind(needle, 0, end)) >= 0:
        end = at + len(needle) - 1
        if at % width:  # bytes of two tokens
            continue
        size = longest - at // width
        if (
            token_ids[length - tail_len : length] == token_ids[length - tail_len - size : length - size]
            and token_ids[length - size : length] == token_ids[length - 2 * size : length - size]
            and token_ids[length - size * (count - 1) : length] == token_ids[length - size * count : length - size]
        ):
            return size
    return 0
