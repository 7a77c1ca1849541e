"""The runner's static options, all resolved to numbers: part of every executable's identity."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.config import Limits


@dataclass(frozen=True, kw_only=True)
class NgramConfig:
    """Drafts looked up in the choice's own tokens: suffixes of ``max_len`` down to ``min_len`` tokens."""

    min_len: int = 2
    max_len: int = 3


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """Shapes of the static device arrays, and what is compiled.

    Attributes:
        max_num_seqs: slots S.
        max_model_len: length of a slot's token history.
        max_num_batched_tokens: tokens of the largest step.
        block_size: tokens per KV block.
        num_blocks: blocks of every layer's pool.
        vocab_size: true vocabulary; the model pads it.
        max_drafts: K.
        ngram: how drafts are looked up on the device; None: they come from a draft model, or with the plan.
        unroll_drafts: a draft model's passes are compiled one after the other, not as a loop.
        limits: caps of variable-size request fields.
        token_buckets: (tokens, rows) of every forward executable, ascending.
        row_buckets: rows of the sampling executables, ascending; the last is ``max_num_seqs``.
        burst_len: most plans that one call of a burst's executable runs; 1: there are none.
        burst_buckets: (tokens, rows) of bursts, ascending.
    """

    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    vocab_size: int
    max_drafts: int = 0
    ngram: NgramConfig | None = None
    unroll_drafts: bool = False
    limits: Limits = Limits()
    token_buckets: tuple[tuple[int, int], ...]
    row_buckets: tuple[int, ...]
    burst_len: int = 1
    burst_buckets: tuple[tuple[int, int], ...] = ()

    @property
    def table_width(self) -> int:
        """Columns of the block table: ``ceil(max_model_len / block_size)``."""
        return -(-self.max_model_len // self.block_size)

    @property
    def max_table_updates(self) -> int:
        """Block-table entries that one step may change: every row may start one block more than it fills."""
        return self.max_num_batched_tokens // self.block_size + 2 * self.max_num_seqs
