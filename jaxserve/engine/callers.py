"""Who waits for which choice, and what they are told: a step's results become events here. Imports no jax."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jaxserve.engine.events import ChoiceEvent
from jaxserve.errors import InvalidRequestError
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.commit import Commit
from jaxserve.scheduler.plan import Logprobs, StepResult
from jaxserve.scheduler.request import Choice

logger = logging.getLogger("jaxserve")

Sink = Callable[[ChoiceEvent], None]


@dataclass(slots=True)
class _Quiet:
    """What the caller of a choice knows of it, and what it doesn't know yet."""

    num_told: int = 0  # tokens
    num_drafted: int = 0  # since then
    num_accepted: int = 0


class Callers:
    """The sinks of all choices that run or wait. Any thread may use it; sinks are called without its lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sinks: dict[int, Sink] = {}
        self._quiet: dict[int, _Quiet] = {}  # of choices that are told of twice only

    def __len__(self) -> int:
        """Choices whose end wasn't told yet."""
        return len(self._sinks)

    def add(self, choices: Sequence[Choice], sink: Sink, *, streaming: bool) -> None:
        """See ``EngineCore.submit``.

        Raises:
            InvalidRequestError: an id is in use; none was added.
        """
        sinks = {choice.choice_id: sink for choice in choices}
        with self._lock:
            if len(sinks) < len(choices) or not sinks.keys().isdisjoint(self._sinks):
                raise InvalidRequestError("a choice_id is in use; allowed: each of EngineCore.choice_ids once")
            self._sinks |= sinks
            if not streaming:
                self._quiet |= {c.choice_id: _Quiet() for c in choices if not _needs_every_step(c.params)}

    def forget(self, choice_id: int) -> Sink | None:
        """Nobody hears of the choice any more; returns who would have."""
        with self._lock:
            self._quiet.pop(choice_id, None)
            return self._sinks.pop(choice_id, None)

    def tell(self, commit: Commit, result: StepResult | None, when: float) -> None:
        """Tells a choice's caller what a step brought, or how it ended without one (``result`` is None)."""
        choice, row = commit.choice, commit.row
        token_ids: Sequence[int] = commit.new_token_ids
        logprobs = None
        num_drafted = num_accepted = 0
        if result is not None and row >= 0:
            if result.logprobs is not None and choice.params.logprobs is not None and token_ids:
                logprobs = _rows(result.logprobs, row, len(token_ids))
            if num_drafted := int(result.num_drafted[row]):
                num_accepted = max(int(result.num_emitted[row]) - 1, 0)
        quiet = self._quiet.get(choice.choice_id)
        if quiet is not None:
            quiet.num_drafted += num_drafted
            quiet.num_accepted += num_accepted
            if commit.finish_reason is None and quiet.num_told:
                return
            token_ids = choice.output_token_ids[quiet.num_told :]
            num_drafted, num_accepted = quiet.num_drafted, quiet.num_accepted
            quiet.num_told, quiet.num_drafted, quiet.num_accepted = len(choice.output_token_ids), 0, 0
        event = ChoiceEvent(
            choice_id=choice.choice_id,
            index=choice.index,
            token_ids=tuple(token_ids),
            logprobs=logprobs,
            prompt_logprobs=commit.prompt_logprobs,
            finish_reason=commit.finish_reason,
            stop_reason=commit.stop_reason,
            num_cached_tokens=choice.num_cached_tokens,
            error=None,
            time=when,
            num_drafted=num_drafted,
            num_accepted=num_accepted,
        )
        if event.finish_reason is None:
            sink = self._sinks.get(choice.choice_id)
        else:
            sink = self.forget(choice.choice_id)
        if sink is not None:
            sink(event)

    def tell_all(self, error: BaseException) -> None:
        """Every choice ends with ``error``. Each caller hears of it, whatever another one's sink raises."""
        with self._lock:
            sinks, self._sinks = self._sinks, {}
            self._quiet.clear()
        for event, sink in _endings(sinks, error):
            try:
                sink(event)
            except Exception:  # one caller's trouble must not keep the news from the others
                logger.exception("choice %d can't be told that the engine is dead", event.choice_id)


def _endings(sinks: dict[int, Sink], error: BaseException) -> Iterable[tuple[ChoiceEvent, Sink]]:
    now = time.monotonic()
    for choice_id, sink in sinks.items():
        event = ChoiceEvent(
            choice_id=choice_id,
            index=0,
            token_ids=(),
            logprobs=None,
            prompt_logprobs=None,
            finish_reason="error",
            stop_reason=None,
            num_cached_tokens=0,
            error=error,
            time=now,
        )
        yield event, sink


def _needs_every_step(params: SamplingParams) -> bool:
    """Whether a caller that waits for the end has something to do at each step all the same."""
    return bool(params.stop) or params.logprobs is not None or params.prompt_logprobs is not None


def _rows(table: Logprobs, row: int, num_tokens: int) -> Logprobs:
    """The first ``num_tokens`` positions of one row."""
    return Logprobs(
        token_logprob=table.token_logprob[row, :num_tokens],
        token_rank=table.token_rank[row, :num_tokens],
        top_ids=table.top_ids[row, :num_tokens],
        top_logprobs=table.top_logprobs[row, :num_tokens],
    )
