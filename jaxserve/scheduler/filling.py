"""How many of its tokens a mixed step should have, where the device pads it to a bucket.

A step of 2146 tokens costs as much as one of 4096. Leaving 98 of them for the next step, which has its decode rows
anyway, costs 2048 and a small bucket. The larger the gap between two buckets, the more may be left.
"""

from __future__ import annotations

WORTHWHILE = 0.8  # of a step's cost; above it, a prompt's last tokens don't wait for one more step


def tokens_to_run(num_tokens: int, num_rows: int, step_sizes: tuple[int, ...], fixed_cost: int) -> int:
    """All of a step's tokens, or as many as fill a smaller bucket, if two steps are well below the cost of one.

    Args:
        num_tokens: that are planned.
        num_rows: of this step; the next one is reckoned to have as many, beside what is left of this one.
        step_sizes: tokens of the buckets, ascending.
        fixed_cost: what a step costs whatever its size, in tokens.
    """
    filled = max((size for size in step_sizes if size < num_tokens), default=None)
    if filled is None:
        return num_tokens

    def cost(tokens: int) -> int:  # what no bucket holds isn't padded
        return fixed_cost + min((size for size in step_sizes if size >= tokens), default=tokens)

    two = cost(filled) + cost(num_tokens - filled + num_rows)
    return filled if two <= WORTHWHILE * cost(num_tokens) else num_tokens
