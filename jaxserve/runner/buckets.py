"""The padded sizes that select an executable. Pure functions of the limits, so that warm-up and serving agree."""

from __future__ import annotations

from bisect import bisect_left

DECODE_GROWTH = {"cpu": 2, "gpu": 2, "tpu": 2}
SMALLEST_DECODE = {"cpu": 1, "gpu": 8, "tpu": 8}  # one row is slower than eight on Hopper; on CPU eight cost 3.5 rows


def row_buckets(max_num_seqs: int, platform: str, most: int = 5) -> tuple[int, ...]:
    """Row counts from the platform's smallest decode bucket to ``max_num_seqs``, at most ``most`` of them.

    The sizes double; where that gives too many, those just above the smallest go first: a padded row costs least there.
    """
    sizes = [max_num_seqs]
    smallest = SMALLEST_DECODE[platform]
    size = smallest
    while size < max_num_seqs:
        sizes.append(size)
        size *= DECODE_GROWTH[platform]
    sizes.sort()
    while len(sizes) > most:
        del sizes[1]
    return tuple(sizes)


def token_buckets(
    max_num_batched_tokens: int, rows: tuple[int, ...], *, growth: int = 4
) -> tuple[tuple[int, int], ...]:
    """(tokens, rows) pairs: decode buckets with a token a row, then mixed ones that hold any number of rows."""
    buckets = [(size, size) for size in rows]
    most_rows = rows[-1]
    mixed = []
    size = max_num_batched_tokens
    while size > most_rows:
        mixed.append((size, most_rows))
        size //= growth
    return tuple(buckets + mixed[::-1])


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
