"""What a caller may ask of one generation. Imports no jax.

The names and defaults are vLLM's. Every field is honoured, or refused here (or at admission, where the answer depends
on the model) with an error that names field, value and allowed range.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import Any

from jaxserve.errors import InvalidRequestError, inside
from jaxserve.vllm_arguments import SAMPLING_NEUTRAL, accept_neutral

MAX_SEED = 2**63 - 1
PRIORITIES = -(2**31), 2**31 - 1  # lowest and highest value
# The settings that a checkpoint may have defaults for, in its generation_config.
CHECKPOINT_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_BOOLEANS = ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens")


@dataclass(frozen=True, kw_only=True)
class RepetitionDetection:
    """Stop a choice whose output ends in a pattern repeated verbatim (vLLM's ``repetition_detection``).

    ``min_pattern_size``..``max_pattern_size`` are in tokens; ``min_count`` is the number of repetitions in a row.
    """

    max_pattern_size: int = 64
    min_pattern_size: int = 1
    min_count: int = 8


class LogitBias(Mapping[int, float]):
    """A read-only mapping from token ids to biases: equal to a dict with the same entries, hashable and picklable."""

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[int, float]):
        self._entries = dict(entries)

    def __getitem__(self, token_id: int) -> float:
        return self._entries[token_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        return repr(self._entries)


def _explain_assignment[T](cls: type[T]) -> type[T]:
    """Decorates a frozen dataclass: assigning to a field says how to get a changed copy. vLLM's can be assigned to."""

    def refuse(self: T, name: str, *_: Any) -> None:
        raise FrozenInstanceError(
            f"{cls.__name__} is immutable; instead of changing {name!r}, make a changed copy: "
            f"params = params.with_changes({name}=...)"
        )

    setattr(cls, "__setattr__", refuse)  # noqa: B010
    setattr(cls, "__delattr__", refuse)  # noqa: B010
    return cls


@_explain_assignment
@accept_neutral(SAMPLING_NEUTRAL, InvalidRequestError)
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of one request. Immutable and hashable; ``with_changes`` makes a changed copy.

    vLLM's other arguments are accepted where they ask for nothing (``vllm_arguments.py``), else refused.

    Raises:
        InvalidRequestError: a field is out of range; the message names field, value and range.
    """

    n: int = 1
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # None or -1: drawn once at admission
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: the engine's default_max_tokens
    min_tokens: int = 0
    max_seconds: float | None = None  # wall clock from submission
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    priority: int = 0  # lower runs first, as in vLLM; used by scheduling_policy="priority"
    num_speculative_tokens: int | None = None  # None: the engine's; 0 switches speculation off for this request
    repetition_detection: RepetitionDetection | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "stop", (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop, "a string, "))
        for name in ("stop_token_ids", "bad_words"):
            put(self, name, _tuple(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            put(self, "allowed_token_ids", _tuple("allowed_token_ids", self.allowed_token_ids))
        if self.logit_bias is not None:
            put(self, "logit_bias", _bias(self.logit_bias))
        if isinstance(self.repetition_detection, Mapping):
            put(self, "repetition_detection", _repetition(self.repetition_detection))
        self._check_numbers()
        self._check_lists()
        for name in _BOOLEANS:
            if not isinstance(value := getattr(self, name), bool):
                raise InvalidRequestError(f"{name} is {value!r}; allowed: True, False")

    def _check_numbers(self) -> None:
        _integer(self, "n", 1, 1024)
        _number(self, "temperature", 0.0, 1e6)
        _number(self, "top_p", 0.0, 1.0, low_open=True)
        _integer(self, "top_k", -1, 2**31 - 1)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _number(self, "min_p", 0.0, 1.0)
        _number(self, "presence_penalty", -2.0, 2.0)
        _number(self, "frequency_penalty", -2.0, 2.0)
        _number(self, "repetition_penalty", 0.0, 1e6, low_open=True)
        _integer(self, "seed", -(2**63), MAX_SEED, optional=True)
        if self.seed == -1:  # vLLM's other word for None
            object.__setattr__(self, "seed", None)
        _integer(self, "max_tokens", 1, 2**31 - 1, optional=True)
        _integer(self, "min_tokens", 0, 2**31 - 1)
        _number(self, "max_seconds", 0.0, 1e9, low_open=True, optional=True)
        for name in ("logprobs", "prompt_logprobs"):
            _integer(self, name, 0, 2**31 - 1, optional=True, span="0..max_logprobs (of the engine's limits)")
        _integer(self, "priority", *PRIORITIES)
        _integer(self, "num_speculative_tokens", 0, 1024, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens is {self.min_tokens}; allowed: 0..max_tokens ({self.max_tokens})")
        if (r := self.repetition_detection) is not None:
            if not isinstance(r, RepetitionDetection):
                raise InvalidRequestError(
                    f"repetition_detection is {r!r}; allowed: a RepetitionDetection, a dict of its fields, or None"
                )
            with inside("repetition_detection"):
                _integer(r, "min_pattern_size", 1, 2**31 - 1)
                _integer(r, "max_pattern_size", r.min_pattern_size, 2**31 - 1)
                _integer(r, "min_count", 2, 2**31 - 1)

    def _check_lists(self) -> None:
        for name in ("stop", "bad_words"):
            for item in getattr(self, name):
                if not isinstance(item, str) or not item:
                    raise InvalidRequestError(f"{name} holds {item!r}; allowed: strings that aren't empty")
        if self.stop and not self.detokenize:
            raise InvalidRequestError(
                f"stop is {list(self.stop)!r} with detokenize=False; stop strings need detokenize=True"
            )
        for name in ("stop_token_ids", "allowed_token_ids"):
            for item in getattr(self, name) or ():
                if not is_integer(item) or item < 0:
                    raise InvalidRequestError(f"{name} holds {item!r}; allowed: token ids, 0..vocab_size-1")
            if (ids := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(map(int, ids)))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError("allowed_token_ids is empty; allowed: None, or at least one token id")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SamplingParams:
        """Builds from a mapping; an unknown key is refused by name."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise InvalidRequestError(f"unknown sampling parameter {unknown[0]!r}; known: {', '.join(sorted(known))}")
        return cls(**settings)

    def with_changes(self, **changes: Any) -> SamplingParams:
        """A validated copy with some fields changed."""
        return replace(self, **changes)

    def clone(self) -> SamplingParams:
        """An equal copy, as in vLLM."""
        return replace(self)


def is_integer(value: Any) -> bool:
    """Whether a caller's value is an integer of Python's or numpy's. Booleans aren't."""
    return type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def checked_integer(name: str, value: Any, low: int, high: int, also: str = "", span: str = "") -> int:
    """A caller's value as Python's int.

    Raises:
        InvalidRequestError: it isn't an integer in ``low..high``; ``also`` says what else would do, ``span`` what to
            call the range, where admission has a narrower one.
    """
    if not is_integer(value) or not low <= value <= high:
        raise InvalidRequestError(f"{name} is {value!r}; allowed: an integer in {span or f'{low}..{high}'}{also}")
    return int(value)


def _tuple(name: str, value: Any, also: str = "") -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidRequestError(f"{name} is {value!r}; allowed: {also}a list, or None")
    return tuple(value)


def _repetition(settings: Mapping[str, Any]) -> RepetitionDetection:
    known = [f.name for f in fields(RepetitionDetection)]
    if unknown := sorted(set(settings) - set(known)):
        raise InvalidRequestError(f"repetition_detection holds {unknown[0]!r}; allowed: {', '.join(known)}")
    return RepetitionDetection(**settings)


def _bias(bias: Mapping[int, float]) -> LogitBias:
    if not isinstance(bias, Mapping):
        raise InvalidRequestError(f"logit_bias is {bias!r}; allowed: a mapping from token ids to biases, or None")
    clean: dict[int, float] = {}
    for key, value in bias.items():
        digits = isinstance(key, str) and re.fullmatch("[0-9]{1,10}", key)  # OpenAI clients send the ids as strings
        if not digits and not is_integer(key):
            raise InvalidRequestError(f"logit_bias has key {key!r}; allowed: token ids")
        if int(key) < 0 or not _is_number(value) or not -100 <= value <= 100:
            raise InvalidRequestError(f"logit_bias has {key!r}: {value!r}; allowed: token ids, biases in -100..100")
        clean[int(key)] = float(value)
    return LogitBias(clean)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _number(owner: Any, name: str, low: float, high: float, *, low_open: bool = False, optional: bool = False) -> None:
    value = getattr(owner, name)
    if value is None and optional:
        return
    if not _is_number(value) or not low <= value <= high or (low_open and value == low):  # NaN is in no range
        span = f"{'(' if low_open else '['}{low:g}, {high:g}]"
        raise InvalidRequestError(f"{name} is {value!r}; allowed: a number in {span}{' or None' if optional else ''}")
    if type(value) not in (int, float):  # numpy's
        object.__setattr__(owner, name, float(value))


def _integer(owner: Any, name: str, low: int, high: int, *, optional: bool = False, span: str = "") -> None:
    value = getattr(owner, name)
    if value is not None or not optional:
        object.__setattr__(owner, name, checked_integer(name, value, low, high, " or None" if optional else "", span))
