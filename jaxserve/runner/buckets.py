"""The padded sizes that select an executable. Pure functions of the limits, so that warm-up and serving agree."""

from __future__ import annotations

from bisect import bisect_left

# By platform: the smallest decode bucket, how many row buckets at most, and the step between mixed buckets. One row is
# slower than eight on Hopper; on CPU eight rows cost 3.5 of one, and a compilation is slow.
_SIZES = {"cpu": (1, 2, 8), "gpu": (8, 4, 2), "tpu": (8, 4, 4)}
# On one H100 a step of more rows takes the device about as long as the host: two in one call hide that, and a request
# that arrives waits for fewer.
_LONG_BURST_ROWS = 64


def num_slots(max_num_seqs: int, platform: str) -> int:
    """Slots for so many choices: whole smallest buckets, so that a step of few rows has the size that is fastest."""
    smallest = _SIZES[platform][0]
    return -(-max_num_seqs // smallest) * smallest


def row_buckets(max_num_seqs: int, platform: str) -> tuple[int, ...]:
    """Row counts from the platform's smallest decode bucket to ``max_num_seqs``.

    The sizes double; where that gives too many, those just above the smallest go first: a padded row costs least there.
    """
    size, most, _ = _SIZES[platform]
    sizes = [max_num_seqs]
    while size < max_num_seqs:
        sizes.append(size)
        size *= 2
    sizes.sort()
    while len(sizes) > most:
        del sizes[1]
    return tuple(sizes)


def token_buckets(max_num_batched_tokens: int, rows: tuple[int, ...], platform: str) -> tuple[tuple[int, int], ...]:
    """(tokens, rows) pairs: decode buckets with a token a row, then mixed ones that hold any number of rows."""
    growth = _SIZES[platform][2]
    mixed = []
    size = max_num_batched_tokens
    while size > rows[-1]:
        mixed.append((size, rows[-1]))
        size //= growth
    return tuple([(size, size) for size in rows] + mixed[::-1])


def burst_buckets(rows: tuple[int, ...], max_drafts: int) -> tuple[tuple[int, int], ...]:
    """(tokens, rows) pairs for several steps in one call.

    Without drafts: the decode buckets. With drafts: the fewest rows, without and with drafts in each.
    """
    if not max_drafts:
        return tuple((size, size) for size in rows)
    fewest = rows[0]
    wide = next((size for size in rows if size >= fewest * (1 + max_drafts)), rows[-1])
    return tuple(dict.fromkeys([(fewest, fewest), (wide, fewest)]))


def burst_width(num_tokens: int, num_rows: int, max_drafts: int) -> int | None:
    """How many tokens a row of such a burst has at most; None where it may be any number."""
    return 1 if num_tokens == num_rows and not max_drafts else None


def forward_width(num_tokens: int, num_rows: int, max_drafts: int) -> int | None:
    """How many tokens a row has at most that is no prompt's, where prompts' rows run apart; None: maybe any number."""
    return 1 if num_tokens > num_rows and not max_drafts else None


def burst_len(num_rows: int, longest: int) -> int:
    """Steps of a burst of so many rows, where ``longest`` are allowed."""
    return longest if num_rows <= _LONG_BURST_ROWS else min(longest, 2)


def pick_forward(buckets: tuple[tuple[int, int], ...], num_tokens: int, num_rows: int) -> tuple[int, int]:
    """The smallest bucket that holds the step."""
    for tokens, rows in buckets:
        if num_tokens <= tokens and num_rows <= rows:
            return tokens, rows
    raise ValueError(f"no bucket of {buckets} holds {num_tokens} tokens of {num_rows} rows")


def pick_rows(buckets: tuple[int, ...], num_rows: int) -> int:
    """The smallest row bucket that holds ``num_rows``."""
    at = bisect_left(buckets, num_rows)
    if at == len(buckets):
        raise ValueError(f"no bucket of {buckets} holds {num_rows} rows")
    return buckets[at]
