"""Requests, KV blocks, prefix cache, and the plan of each step. Host only: imports no jax."""

from jaxserve.scheduler.adaptive import AdaptiveDrafts
from jaxserve.scheduler.commit import Commit
from jaxserve.scheduler.config import SchedulerConfig
from jaxserve.scheduler.invariants import SchedulerInvariantError
from jaxserve.scheduler.plan import Admission, Logprobs, StepPlan, StepResult
from jaxserve.scheduler.request import Choice, Status
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.stats import SchedulerStats

__all__ = [
    "AdaptiveDrafts",
    "Admission",
    "Choice",
    "Commit",
    "Logprobs",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerInvariantError",
    "SchedulerStats",
    "Status",
    "StepPlan",
    "StepResult",
]
