"""Counters of one scheduler, since its start."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from jaxserve.scheduler.request import FINISH_REASONS


@dataclass(slots=True)
class SchedulerStats:
    """Sums over the scheduler's life. Padding is never counted."""

    num_steps: int = 0
    num_planned_tokens: int = 0  # upper bounds, where drafts are looked up on the device
    num_emitted_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0  # drafts that agreed with what was sampled, also behind a token that ends the answer
    num_admissions: int = 0
    num_preemptions: int = 0
    num_dropped_rows: int = 0  # results of an older epoch
    num_prefix_queries: int = 0  # tokens looked up in the prefix cache
    num_prefix_hits: int = 0  # tokens found there
    num_repetition_warnings: int = 0
    # by finish reason; all keys exist from the start, so that another thread may copy it at any time
    num_finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        return asdict(self)
