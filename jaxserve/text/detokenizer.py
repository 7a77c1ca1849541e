"""Token ids to text, one token at a time, at constant cost a token.

Text can't be decoded token by token: a character's bytes may be spread over tokens, and some decoders treat the start
of a text differently. So a window of tokens is decoded whenever one is added, and what is new in it is handed out::

    ids      ... [ context ][ pending ]
                 ^start     ^read     ^len(ids)
    window       decode(ids[start:]) ; its first ``sent`` characters have been handed out

``pending`` is empty unless the window's text ends in U+FFFD, which may be the beginning of a character. The last tokens
of the prompt are the first context, so that "▁Paris" after a prompt is " Paris", and not "Paris".
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence

from jaxserve.text.codec import Codec

CONTEXT_LEN = 6  # prompt tokens in the first window
MAX_PENDING = 8  # tokens; a character is at most four bytes, so more of them aren't one character
MAX_WINDOW = 32  # tokens
REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one choice while it grows. ``push`` hands out new text, ``flush`` what was held back."""

    def __init__(self, codec: Codec, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True):
        self._codec = codec
        self._skip = skip_special_tokens
        self._ids = list(prompt_token_ids[-CONTEXT_LEN:])
        self._start = 0
        self._read = len(self._ids)
        self._prompt_text: str | None = self._decode(0)  # None once the first text was handed out
        self._sent = 0

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that is certain now (often the token's, sometimes nothing)."""
        self._ids.append(token_id)
        window = self._decode(self._start)
        if not window.endswith(REPLACEMENT):
            return self._hand_out(window, len(window))
        if len(self._ids) - self._read <= MAX_PENDING:
            return ""
        return self._hand_out(window, len(window) - 1)

    def flush(self) -> str:
        """The rest, once no token will follow: an unfinished character becomes U+FFFD."""
        if len(self._ids) == self._read:
            return ""
        window = self._decode(self._start)
        return self._hand_out(window, len(window))

    def _decode(self, start: int) -> str:
        return self._codec.decode(self._ids[start:], skip_special_tokens=self._skip)

    def _hand_out(self, window: str, until: int) -> str:
        if self._prompt_text is not None:
            self._sent = len(os.path.commonprefix([self._prompt_text, window]))
            self._prompt_text = None
        text = window[self._sent : until]
        if until == len(window):
            before, self._read = self._read, len(self._ids)
            if text or self._read - self._start > MAX_WINDOW:  # a context without text (special tokens) isn't one
                self._start = max(self._start, before)
            self._sent = len(self._decode(self._start))
        elif len(self._ids) - self._start > MAX_WINDOW:
            self._start = len(self._ids) - MAX_PENDING
            self._sent = max(0, len(self._decode(self._start)) - 1)
        else:
            self._sent = until
        return text


def decode_output(
    codec: Codec, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], *, skip_special_tokens: bool = True
) -> str:
    """The text of a whole output at once: the same as a Detokenizer's pieces put together."""
    context = list(prompt_token_ids[-CONTEXT_LEN:])
    before = codec.decode(context, skip_special_tokens=skip_special_tokens)
    text = codec.decode(context + list(output_token_ids), skip_special_tokens=skip_special_tokens)
    return text[len(os.path.commonprefix([before, text])) :]
