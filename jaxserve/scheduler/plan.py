"""What the scheduler hands to the runner each step, and what comes back. Host data only: numpy, no jax.

R is the number of rows in the step, U the number of block-table updates, K the longest draft of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxserve.scheduler.request import Choice


@dataclass(frozen=True, slots=True)
class Admission:
    """A slot that takes a new or resumed choice. The runner resets every device field of the slot from this."""

    slot: int
    choice: Choice
    token_ids: np.ndarray  # int32[tokens_len], prompt + what was emitted before a preemption
    computed_len: int  # tokens whose KV the prefix cache already holds
    block_ids: np.ndarray  # int32[number of blocks held]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, immutable. Rows are ordered decode first, then prefill chunks.

    ``width[r]`` is the most tokens that row r computes (1 + num_drafts for a verify row); the device may draft fewer.
    ``samples[r]`` says that the row's newest position yields a token (a decode, a verify, or the last prefill chunk).
    ``draft_ids`` is None where drafts are looked up on the device.
    """

    step_id: int
    choices: tuple[Choice, ...]  # R
    slots: np.ndarray  # int32[R]
    widths: np.ndarray  # int32[R]
    num_drafts: np.ndarray  # int32[R], the most drafts that row may verify; widths = 1 + num_drafts there
    samples: np.ndarray  # bool[R]
    epochs: np.ndarray  # int64[R]
    admissions: tuple[Admission, ...] = ()
    table_updates: np.ndarray = field(
        default_factory=lambda: np.zeros((0, 3), np.int32)
    )  # int32[U, 3]: slot, index, block
    draft_ids: np.ndarray | None = None  # int32[R, K]
    token_mask: np.ndarray | None = None  # uint32[R, ceil(V / 32)], bit set = allowed
    verify_costs: tuple[float, ...] = ()  # [K+1], what the adaptive rule reckoned with; of no use to the runner

    @property
    def num_tokens(self) -> int:
        return int(self.widths.sum())


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of the raw distribution (before any processor) for some tokens. M tokens, C candidates."""

    token_logprob: np.ndarray  # float32[M], of the chosen token
    token_rank: np.ndarray  # int32[M], 1 = most likely
    top_ids: np.ndarray  # int32[M, C], most likely first
    top_logprobs: np.ndarray  # float32[M, C]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step produced, on the host. ``token_ids[r, :num_emitted[r]]`` are real, the rest is padding.

    ``logprobs`` (or None) has leading shape [R, K+1]; ``prompt_logprobs`` maps row -> (first position, Logprobs):
    entry i is prompt token ``first position + i`` (so the first position is at least 1).
    """

    step_id: int
    token_ids: np.ndarray  # int32[R, K+1]
    num_emitted: np.ndarray  # int32[R], 0 for rows that didn't sample
    num_drafted: np.ndarray  # int32[R]
    logprobs: Logprobs | None = None
    prompt_logprobs: dict[int, tuple[int, Logprobs]] = field(default_factory=dict)
