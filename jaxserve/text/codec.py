"""The few things that the engine asks of a tokenizer, behind one small class. Imports no jax."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from jaxserve.errors import InvalidRequestError


def check_unicode(what: str, text: str) -> None:
    """Refuses half a surrogate pair, which Python's strings may hold and no encoding of text can.

    Raises:
        InvalidRequestError: says which, and where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{what} holds {text[error.start]!r} at index {error.start}, half of a surrogate pair; allowed: "
            "Unicode text"
        ) from error


class Codec:
    """Text to ids and back, safe from several threads.

    ``tokenizer`` is a transformers fast tokenizer, or anything with its ``encode``, ``decode`` and special-token
    attributes; or None (``skip_tokenizer_init``), and then nothing can be encoded or decoded.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._lock = threading.Lock()  # a fast tokenizer raises "Already borrowed" where two threads encode at once
        self._token_texts: dict[int, str] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if self.tokenizer is None:
            raise InvalidRequestError("the engine has no tokenizer (skip_tokenizer_init); pass token ids, not text")
        check_unicode("the text", text)
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of the ids, with no clean-up of spaces: clean-up would depend on tokens that don't exist yet."""
        if self._backend is not None:
            return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str | None:
        """The text of one token alone (U+FFFD where it is part of a character); None without a tokenizer."""
        if self.tokenizer is None:
            return None
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode((token_id,))
        return text

    @property
    def leading_token_ids(self) -> list[int]:
        """What ``encode`` puts before every text: usually BOS or nothing."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        first = self.encode("")[:1]
        return first if bos is not None and first == [bos] else []
