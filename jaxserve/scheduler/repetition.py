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
_WIDTH = array("i").itemsize


class LoopFinder:
    """Looks for the loops of one rule.

    A tail of c copies of a pattern of p tokens is a tail of c*p tokens in which each equals the one p before it, so its
    last (c-1)*p tokens recur p tokens earlier. The ending that all patterns have in common is searched as bytes, and
    only where it recurs is more looked at: most outputs cost one scan of ``max_pattern_size`` tokens.
    """

    __slots__ = ("_count", "_ranges")

    def __init__(self, rule: RepetitionDetection) -> None:
        self._count = count = rule.min_count
        # apart, because of the shortest patterns so few tokens must recur that they recur everywhere
        few = (_TELLING_LEN - 1) // (count - 1)
        parts = (
            (rule.min_pattern_size, min(rule.max_pattern_size, few)),
            (
                max(rule.min_pattern_size, few + 1),
                rule.max_pattern_size,
            ),
        )
        # (shortest and longest pattern, length of the ending that all of them have in common)
        self._ranges = tuple((low, high, min(low * (count - 1), _NEEDLE_LEN)) for low, high in parts if low <= high)

    def pattern_len(self, token_ids: array[int], length: int) -> int:
        """The shortest pattern in the rule's range that ``token_ids[:length]`` ends in as often as it says, or 0."""
        most = length // self._count
        for shortest, longest, ending_len in self._ranges:
            if longest > most:
                longest = most
            if longest < shortest:
                return 0
            # from the ending at the distance of the longest pattern to that at the distance of the shortest, and itself
            recent = token_ids[length - longest - ending_len : length].tobytes()
            recurs = recent.rfind(recent[-_WIDTH * ending_len :], 0, -_WIDTH * shortest) >= 0
            if recurs and (found := self._search(token_ids, length, shortest, longest)):
                return found
        return 0

    def _search(self, token_ids: array[int], length: int, shortest: int, longest: int) -> int:
        """The same where something recurs, in time that grows with the tokens only, however they were chosen.

        The newest token comes first here, and sizes are bytes. Where no more than e tokens recur at the distance p,
        fewer than it takes, no pattern of p+1 .. e tokens is a loop: its copies would reach past the first token that
        differs, and that would equal the one p before it since both are copies inside those e. And the longer the
        patterns that are left, the more of the text must recur: few distances are looked at.
        """
        count = self._count
        text = token_ids[length - count * longest : length][::-1].tobytes()
        # Python searches in linear time where there is more than three times as much to search in as to search for.
        padded = text + b"\xff" * (3 * len(text) + 2500)
        size, longest = _WIDTH * shortest, _WIDTH * longest
        while size <= longest:
            size = padded.find(text[: (count - 1) * size], size)
            if not 0 <= size <= longest:
                return 0
            if size % _WIDTH:  # bytes of two tokens
                size += _WIDTH - size % _WIDTH
                continue
            enough = (count - 1) * size
            equal = _common_len(text[:enough], text[size : size + enough])
            if equal == enough:
                return size // _WIDTH
            size = max(size, equal - equal % _WIDTH) + _WIDTH
        return 0


def _common_len(one: bytes, other: bytes) -> int:
    """How many bytes two strings of one length have in common at their start."""
    if one == other:
        return len(one)
    differing = int.from_bytes(one, "big") ^ int.from_bytes(other, "big")
    return len(one) - (differing.bit_length() + 7) // 8
