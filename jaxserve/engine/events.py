"""What the engine's core tells its fronts. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxserve.errors import EngineDeadError

if TYPE_CHECKING:
    from jaxserve.scheduler.plan import Logprobs


@dataclass(frozen=True, slots=True)
class ChoiceEvent:
    """News of one choice: the tokens that one step emitted for it, its end, or both.

    The last event of a choice has ``finish_reason``; its ``token_ids`` may be empty (abort, timeout, error).

    Attributes:
        choice_id: ``Choice.choice_id``.
        index: which of the request's choices it is.
        token_ids: new tokens, in order; a stop token is included.
        logprobs: rows are ``token_ids``; None where they weren't asked for.
        prompt_logprobs: (position of the first row's token in the prompt, rows); chunks arrive in order.
        finish_reason: None while the choice runs.
        stop_reason: the stop token id or stop string; None for EOS.
        num_cached_tokens: prompt tokens that the prefix cache held at first admission.
        error: why the choice failed; the engine is dead then (see ``dead_error``).
        time: ``time.monotonic()`` when the step's result was committed.
        num_drafted: draft tokens that the step verified for the choice.
        num_accepted: those of them that were accepted.
    """

    choice_id: int
    index: int
    token_ids: tuple[int, ...]
    logprobs: Logprobs | None
    prompt_logprobs: tuple[int, Logprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None
    num_cached_tokens: int
    error: BaseException | None
    time: float
    num_drafted: int = 0
    num_accepted: int = 0


class ShutDown(EngineDeadError):
    """Why an engine is dead that nothing was wrong with."""

    def __init__(self) -> None:
        super().__init__("the engine was shut down; build another LLM or AsyncEngine to go on")


def dead_error(cause: BaseException) -> EngineDeadError:
    """What a caller of a dead engine gets: an exception of its own, which says whether the engine failed."""
    shut_down = isinstance(cause, ShutDown)
    error = EngineDeadError(str(cause) if shut_down else f"the engine failed: {cause}")
    error.__cause__ = None if shut_down else cause  # set to None, it also hides what the caller was just handling
    return error
