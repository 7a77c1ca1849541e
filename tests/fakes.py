"""Stand-ins for the expensive parts: a tokenizer with a byte a token, and an engine core without a model or jax.

``FakeCore`` keeps ``EngineCore``'s contract (its own thread, events to a sink, idempotent ``finish``), so the tests of
the fronts run on it in milliseconds.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxserve.config import EngineConfig, Limits
from jaxserve.engine.events import ChoiceEvent, ShutDown, dead_error
from jaxserve.scheduler.plan import Logprobs
from jaxserve.scheduler.request import Choice

BOS, EOS, START, END = 256, 257, 258, 259
SPECIAL = {BOS: "<bos>", EOS: "<eos>", START: "<start>", END: "<end>"}
VOCAB_SIZE = 261  # one id (260) that the tokenizer doesn't know: models pad their vocabulary


class ByteTokenizer:
    """UTF-8 bytes are ids 0..255; four special tokens follow. ``add_bos`` puts BOS before every text."""

    bos_token_id, eos_token_id, bos_token, eos_token = BOS, EOS, "<bos>", "<eos>"
    chat_template = "fixed"

    def __init__(self, *, add_bos: bool = False):
        self.add_bos = add_bos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ([BOS] if self.add_bos and add_special_tokens else []) + list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        data = b""
        for token_id in token_ids:
            if token_id < 256:
                data += bytes([token_id])
            elif not skip_special_tokens:
                data += SPECIAL.get(token_id, "").encode()
        return data.decode(errors="replace")

    def apply_chat_template(
        self, conversation: Sequence[dict], *, add_generation_prompt: bool = False, **_: Any
    ) -> str:
        text = "".join(f"{message['role']}: {message['content']}\n" for message in conversation)
        return text + ("assistant: " if add_generation_prompt else "")


def fast_byte_tokenizer(*, chat_template: str | None = None, add_bos: bool = False) -> Any:
    """The same ids in a real transformers fast tokenizer (byte-level BPE without merges)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    printable = {b: c for c, b in _byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab={printable[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL.values()])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = chat_template
    return fast


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: a printable character for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


class Clock:
    """Takes the place of ``time`` in a module: it moves when a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def letters(choice: Choice) -> list[int]:
    """The default model: endless lower-case letters, a function of prompt, seed and index alone."""
    key = repr((tuple(choice.prompt_token_ids), choice.seed, choice.index)).encode()
    length = choice.params.max_tokens or 16
    data = b"".join(hashlib.sha256(key + bytes([i % 256, i // 256])).digest() for i in range(length // 32 + 1))
    return [97 + byte % 26 for byte in data]


def few_letters(choice: Choice) -> list[int]:
    """Eight of them. A core that ``pauses`` has then said what it has to say, and a longer answer waits."""
    return letters(choice)[:8]


@dataclass
class _Running:
    choice: Choice
    sink: Callable[[ChoiceEvent], None]
    reply: list[int]
    emitted: list[int] = field(default_factory=list)


class FakeCore:
    """Emits ``reply(choice)`` for every choice, ``tokens_per_step`` a step, until EOS, a stop id or max_tokens.

    With ``pauses`` a choice whose reply is used up emits nothing more, and waits to be finished from outside: a test of
    who ends it needs no race. ``halts_after`` so many steps the core clears its gate.

    Attributes:
        gate: cleared, no step is run.
        ended: choice_id -> (finish_reason, stop_reason, tokens emitted), for every choice that ended.
    """

    def __init__(
        self,
        reply: Callable[[Choice], Sequence[int]] = letters,
        *,
        tokens_per_step: int = 1,
        step_seconds: float = 0.0,
        pauses: bool = False,
        halts_after: int | None = None,
    ):
        self.reply = reply
        self.pauses = pauses
        self.tokens_per_step = tokens_per_step
        self.step_seconds = step_seconds
        self.halts_after = halts_after
        self.gate = threading.Event()
        self.gate.set()
        self.ended: dict[int, tuple[str, int | str | None, int]] = {}
        self.submitted: list[Choice] = []
        self.heartbeat = 0.0
        self.choice_ids = itertools.count()
        self._running: dict[int, _Running] = {}
        self._finishing: list[tuple[int, str, int | str | None]] = []
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="fake-core", daemon=True)
            self._thread.start()

    def shutdown(self) -> None:
        self.fail(ShutDown())
        self.gate.set()  # and nothing clears it any more
        if self._thread is not None:
            self._thread.join()

    def submit(self, choices: Sequence[Choice], sink: Callable[[ChoiceEvent], None], *, streaming: bool = True) -> None:
        """Every step has its event, whether ``streaming`` or not."""
        self.check_health()
        with self._changed:
            self.submitted += choices
            self._running |= {c.choice_id: _Running(c, sink, list(self.reply(c))) for c in choices}
            self._changed.notify()

    def finish(self, choice_id: int, reason: str, stop_reason: int | str | None = None) -> None:
        with self._changed:
            self._finishing.append((choice_id, reason, stop_reason))
            self._changed.notify()

    def fail(self, error: BaseException, *, silently: bool = False) -> None:
        """The engine dies; ``silently``: no event is sent, as if the thread had vanished."""
        with self._changed:
            self._stopping = True
            if self._error is None:
                self._error = error
            if silently:
                self._running.clear()
            self._changed.notify()

    def check_health(self) -> None:
        if self._error is not None:
            raise dead_error(self._error)

    def stats(self) -> dict[str, Any]:
        return {"num_running": self.num_running}

    @property
    def num_running(self) -> int:
        with self._changed:  # who runs no more is in ``ended``
            return len(self._running)

    def _loop(self) -> None:
        num_steps = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._finishing or self._running, timeout=10)
                if self._stopping:
                    self._die()
                    return
                self._apply_finishes()
            self.gate.wait()
            time.sleep(self.step_seconds)
            with self._changed:
                if not self._stopping:
                    self._apply_finishes()
                    num_steps += 1
                    if num_steps == self.halts_after:  # before anybody hears of this step, who may set the gate
                        self.gate.clear()
                    for running in list(self._running.values()):
                        self._step(running)
            self.heartbeat = time.monotonic()

    def _die(self) -> None:
        for running in self._running.values():
            running.sink(_event(running.choice, (), "error", None, error=self._error))
        self._running.clear()

    def _apply_finishes(self) -> None:
        for choice_id, reason, stop_reason in self._finishing:
            if (running := self._running.pop(choice_id, None)) is not None:
                self.ended[choice_id] = (reason, stop_reason, len(running.emitted))
                running.sink(_event(running.choice, (), reason, stop_reason))
        self._finishing.clear()

    def _step(self, running: _Running) -> None:
        choice, params = running.choice, running.choice.params
        eos = () if params.ignore_eos else choice.eos_token_ids
        tokens: list[int] = []
        reason, stop_reason = None, None
        while len(tokens) < self.tokens_per_step and reason is None:
            rest = running.reply[len(running.emitted) :]
            if not rest and self.pauses:
                break
            token = rest[0] if rest else choice.eos_token_ids[0]
            tokens.append(token)
            running.emitted.append(token)
            if len(running.emitted) >= params.min_tokens and token in eos:
                reason = "stop"
            elif len(running.emitted) >= params.min_tokens and token in params.stop_token_ids:
                reason, stop_reason = "stop", token
            elif len(running.emitted) >= (params.max_tokens or 16):
                reason = "length"
        if reason is not None:
            del self._running[choice.choice_id]
            self.ended[choice.choice_id] = (reason, stop_reason, len(running.emitted))
        if tokens:
            running.sink(_event(choice, tuple(tokens), reason, stop_reason))


def _event(
    choice: Choice,
    tokens: tuple[int, ...],
    reason: str | None,
    stop_reason: int | str | None,
    *,
    error: BaseException | None = None,
) -> ChoiceEvent:
    params = choice.params
    logprobs = fake_logprobs(tokens, 20) if params.logprobs is not None and tokens else None
    prompt_logprobs = None
    if params.prompt_logprobs is not None and choice.index == 0 and choice.status == 0:
        choice.status = 1  # type: ignore[assignment]
        prompt_logprobs = (1, fake_logprobs(tuple(choice.prompt_token_ids[1:]), 20))
    return ChoiceEvent(
        choice_id=choice.choice_id,
        index=choice.index,
        token_ids=tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=reason,
        stop_reason=stop_reason,
        num_cached_tokens=0,
        error=error,
        time=time.monotonic(),
    )


def fake_logprobs(tokens: Sequence[int], k: int) -> Logprobs:
    """Ids 0..k-1 are the most likely everywhere; the chosen token t has logprob -t / 100 and rank t + 1."""
    tops = np.tile(np.arange(k, dtype=np.int32), (len(tokens), 1))
    chosen = np.asarray(tokens, np.int32)
    return Logprobs(-chosen.astype(np.float32) / 100, chosen + 1, tops, -tops.astype(np.float32) / 100)


def fake_engine(
    core: FakeCore | None = None,
    *,
    tokenizer: Any = None,
    max_model_len: int = 64,
    eos_token_ids: tuple[int, ...] = (EOS,),
    sampling_defaults: dict[str, Any] | None = None,
    limits: Limits | None = None,
    **settings: Any,
) -> Any:
    """What ``build_engine`` returns, around a FakeCore."""
    limits = limits or Limits()
    return SimpleNamespace(
        core=core or FakeCore(),
        model_config=SimpleNamespace(vocab_size=VOCAB_SIZE),
        tokenizer=tokenizer or ByteTokenizer(),
        eos_token_ids=eos_token_ids,
        sampling_defaults=sampling_defaults or {},
        max_model_len=max_model_len,
        limits=limits,
        seeds=random.Random(settings.get("seed", 0)),
        info={"attention": "fake", "device": "none", "memory": {"blocks": 3}},
        config=EngineConfig(model="fake", max_model_len=max_model_len, limits=limits, **settings),
    )
