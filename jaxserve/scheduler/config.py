"""The scheduler's settings, all resolved to numbers. Host only: imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from jaxserve.errors import ConfigError
from jaxserve.sampling_params import RepetitionDetection
from jaxserve.scheduler.adaptive import AdaptiveDrafts


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits and policies of one scheduler.

    Attributes:
        max_num_seqs: choices that run at once; slots are ``0 .. max_num_seqs-1``.
        max_model_len: longest prompt + output, in tokens.
        max_num_batched_tokens: tokens in one step, at least ``max_num_seqs`` so that every choice can decode in each
            step.
        step_sizes: tokens that the device pads large steps to, ascending; empty where it doesn't.
        fixed_step_cost: what such a step costs whatever its size (weights are read, kernels launched), in tokens.
        max_sample_rows: bound on the sum of ``1 + num_drafts`` over a step's sampling rows, at least ``max_num_seqs``;
            None is ``max_num_seqs * (1 + max_drafts)``, which never binds.
        max_prefill_chunk_len: most prompt tokens of one choice in one step; None is no bound of its own.
        block_size: tokens per KV block.
        num_blocks: blocks in the pool; ids are ``0 .. num_blocks-1``.
        max_drafts: K, the longest draft; 0 switches speculation off.
        drafting: "device": drafts are looked up on the device and plans carry upper bounds. "host": drafts come through
            ``Scheduler.set_drafts``; a choice that may draft isn't planned while it has tokens in flight.
        adaptive_drafts: the rule that shortens drafts that don't pay; None drafts K always.
        enable_prefix_caching: False shares blocks between the n choices of one request only.
        policy: "fcfs", or "priority": lower ``priority`` first, then arrival.
        run_ahead: plans that may be uncommitted while another one is built.
        admission_headroom_len: tokens per running choice whose blocks an admission must leave free.
        admission_retry_steps: steps after which a refused choice is looked up again though too few blocks came free.
        max_seconds: wall-clock limit of every choice, in seconds; None is none.
        repetition: what to do about a verbatim loop where the request doesn't say: "off", "warn" (count it), "stop".
        repetition_detection: the loop's definition where the request doesn't give one.
        vocab_size: token ids, of host drafts and of results, must lie below it.

    Raises:
        ConfigError: a setting is out of range; the message names it and the range.
    """

    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    step_sizes: tuple[int, ...] = ()
    fixed_step_cost: int = 0
    max_sample_rows: int | None = None
    max_prefill_chunk_len: int | None = None
    max_drafts: int = 0
    drafting: Literal["device", "host"] = "device"
    adaptive_drafts: AdaptiveDrafts | None = AdaptiveDrafts()
    enable_prefix_caching: bool = True
    policy: Literal["fcfs", "priority"] = "fcfs"
    run_ahead: int = 1
    admission_headroom_len: int = 16
    admission_retry_steps: int = 16
    max_seconds: float | None = None
    repetition: Literal["off", "warn", "stop"] = "warn"
    repetition_detection: RepetitionDetection = RepetitionDetection()
    vocab_size: int = 2**31 - 1

    def __post_init__(self) -> None:
        for name, low in (
            ("max_num_seqs", 1),
            ("max_model_len", 2),
            ("max_num_batched_tokens", self.max_num_seqs),
            ("block_size", 1),
            ("num_blocks", 1),
            ("max_sample_rows", self.max_num_seqs),
            ("max_prefill_chunk_len", 1),
            ("fixed_step_cost", 0),
            ("max_drafts", 0),
            ("run_ahead", 0),
            ("admission_headroom_len", 0),
            ("admission_retry_steps", 1),
            ("vocab_size", 1),
        ):
            value = getattr(self, name)
            if value is None and name in ("max_sample_rows", "max_prefill_chunk_len"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name} is {value!r}; allowed: an integer of at least {low}")
        for name, allowed in (
            ("drafting", ("device", "host")),
            ("policy", ("fcfs", "priority")),
            ("repetition", ("off", "warn", "stop")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        sizes = (0, *self.step_sizes)
        if any(b <= a for a, b in pairwise(sizes)):
            raise ConfigError(f"step_sizes is {self.step_sizes!r}; allowed: ascending numbers above 0")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigError(f"max_seconds is {self.max_seconds!r}; allowed: None, or a number above 0")
        if self.max_sample_rows is None:
            object.__setattr__(self, "max_sample_rows", self.max_num_seqs * (1 + self.max_drafts))
