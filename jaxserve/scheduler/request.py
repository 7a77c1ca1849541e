"""A choice: one generation of a request, as the scheduler sees it."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.adaptive import DraftLen
from jaxserve.scheduler.repetition import LoopFinder

if TYPE_CHECKING:
    from jaxserve.scheduler.siblings import Siblings

FinishReason = Literal["stop", "length", "repetition", "timeout", "abort", "error"]
FINISH_REASONS: tuple[str, ...] = ("stop", "length", "repetition", "timeout", "abort", "error")


class Status(IntEnum):
    WAITING = 0
    RUNNING = 1
    FINISHED = 2


class Choice:
    """One generation: prompt, settings, what was emitted, and where its KV lies.

    The caller fills the constructor's arguments; everything else belongs to the scheduler and is read-only elsewhere.

    Attributes:
        choice_id: unique in the engine's life.
        group_id: ``choice_id`` of the request's first choice; its ``params.n`` choices share it.
        index: 0 .. n-1.
        prompt_token_ids: int[prompt_len], at least one.
        output_token_ids: emitted tokens that the host knows; an array, which keeps 4 bytes a token and no objects.
        params: settings; ``max_tokens=None`` means what the context leaves.
        seed: of the noise; drawn by the caller where the request has none.
        eos_token_ids: ids that end the answer unless ``params.ignore_eos``.
        bad_words_ids: ``params.bad_words`` as token ids, for the sampler; the scheduler doesn't look at them.
        cache_salt: prefix blocks are shared only between equal salts.
        priority: lower runs first (policy "priority").
        arrival_time: ``max_seconds`` counts from it, on the clock of ``Scheduler.expire``; None is
            ``time.monotonic()``.
        host_synchronous: not planned while it has tokens in flight (host-computed masks), and never drafted on the
            device.
        epoch: bumped by preemption and finish; a result of an older epoch is dropped.
        computed_len: tokens whose KV was written by returned steps.
        in_flight_len: upper bound on what dispatched, unreturned steps may add to ``computed_len``.
        block_ids: the choice's block table.
        num_cached_tokens: prompt tokens found in the prefix cache at the first admission.
        prefill_len: tokens to compute before the first new token, set at admission.
        limit_len: most that ``computed_len`` may become (see ``width.py``).
    """

    __slots__ = (
        "arrival",
        "arrival_time",
        "bad_words_ids",
        "block_ids",
        "cache_parent",
        "cache_root",
        "cache_salt",
        "capacity_len",
        "choice_id",
        "computed_len",
        "deadline",
        "draft_len",
        "draft_token_ids",
        "eos_token_ids",
        "epoch",
        "finish_reason",
        "group_id",
        "host_synchronous",
        "in_flight_len",
        "index",
        "limit_len",
        "loop_finder",
        "max_output_len",
        "min_output_len",
        "num_cached_tokens",
        "num_preemptions",
        "num_published",
        "order",
        "output_token_ids",
        "params",
        "prefill_len",
        "priority",
        "prompt_len",
        "prompt_logprobs_len",
        "prompt_token_ids",
        "publish_at",
        "quiet_len",
        "refusal",
        "repetition_at",
        "repetition_stops",
        "seed",
        "siblings",
        "slot",
        "status",
        "stop_ids",
        "stop_reason",
    )

    def __init__(
        self,
        *,
        choice_id: int,
        group_id: int | None = None,
        prompt_token_ids: Sequence[int],  # [prompt_len]
        params: SamplingParams,
        index: int = 0,
        seed: int = 0,
        eos_token_ids: Sequence[int] = (),
        bad_words_ids: Sequence[Sequence[int]] = (),
        cache_salt: str | None = None,
        priority: int | None = None,
        arrival_time: float | None = None,
        host_synchronous: bool = False,
    ) -> None:
        self.choice_id = choice_id
        self.group_id = choice_id if group_id is None else group_id
        self.index = index
        self.prompt_token_ids = prompt_token_ids
        self.prompt_len = len(prompt_token_ids)
        self.output_token_ids = array("i")
        self.params = params
        self.seed = seed
        self.eos_token_ids = tuple(eos_token_ids)
        self.bad_words_ids = bad_words_ids
        self.cache_salt = cache_salt
        self.priority = params.priority if priority is None else priority
        self.arrival_time = time.monotonic() if arrival_time is None else arrival_time
        self.host_synchronous = host_synchronous
        # where it stands
        self.status = Status.WAITING
        self.slot = -1
        self.epoch = 0
        self.arrival = 0  # sequence number, given by Scheduler.add
        self.order: tuple[int, int] = (0, 0)  # (priority, arrival), the key of every queue
        self.siblings: Siblings | None = None
        self.deadline: float | None = None
        self.refusal: tuple[int, int] | None = None  # see admission.py
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.prompt_logprobs_len = 0  # prompt tokens whose logprobs were handed out
        # lengths
        self.computed_len = 0
        self.in_flight_len = 0
        self.prefill_len = self.prompt_len
        self.limit_len = 0
        self.max_output_len = 0
        self.min_output_len = params.min_tokens
        # blocks
        self.block_ids: list[int] = []
        self.capacity_len = 0  # len(block_ids) * block_size
        self.cache_root: object = None  # None: no lookup and no publishing
        self.cache_parent: object = None  # cache node of the last published block
        self.num_published = 0  # blocks walked by publishing
        self.publish_at = 0  # computed_len from which the next block can be published
        # stopping
        self.stop_ids: frozenset[int] = frozenset()
        self.loop_finder: LoopFinder | None = None
        self.repetition_stops = False
        self.repetition_at = 0  # output length of the next look
        self.quiet_len = 0  # an output shorter than this, without a stop id, goes on and has nothing to publish
        # speculation
        self.draft_len = DraftLen(0, None)
        self.draft_token_ids: list[int] | None = None  # host drafts, from set_drafts to the next schedule

    @property
    def tokens_len(self) -> int:
        """Prompt + emitted tokens that the host knows."""
        return self.prompt_len + len(self.output_token_ids)

    def find_quiet_len(self) -> None:
        """Sets ``quiet_len`` from what it is made of: a decoding choice has computed all its tokens but the newest."""
        self.quiet_len = min(self.max_output_len, self.repetition_at, self.publish_at - self.prompt_len + 1)

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def needs_prompt_logprobs(self) -> bool:
        """The n choices share a prompt: its logprobs are computed for the first one only."""
        return self.index == 0 and self.params.prompt_logprobs is not None

    def tokens(self, start: int, end: int) -> Sequence[int]:
        """Tokens ``start .. end-1`` of prompt + output."""
        prompt_len = self.prompt_len
        if end <= prompt_len:
            return self.prompt_token_ids[start:end]
        if start >= prompt_len:
            return self.output_token_ids[start - prompt_len : end - prompt_len]
        return [*self.prompt_token_ids[start:], *self.output_token_ids[: end - prompt_len]]

    def __repr__(self) -> str:
        return (
            f"Choice({self.choice_id}, {self.status.name}, slot={self.slot}, epoch={self.epoch}, "
            f"prompt={self.prompt_len}, output={len(self.output_token_ids)}, computed={self.computed_len}, "
            f"in_flight={self.in_flight_len})"
        )
