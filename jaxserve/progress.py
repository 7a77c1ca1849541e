"""The bar that counts the prompts of a call that are done, as ``use_tqdm`` of ``generate`` and ``chat`` asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from jaxserve.errors import InvalidRequestError

UseTqdm = bool | Callable[..., Any]


class Bar(Protocol):
    """What is needed of a bar; tqdm's have it."""

    def update(self, n: int, /) -> Any:
        """``n`` more prompts are done."""
        ...

    def close(self) -> Any: ...


def check_use_tqdm(use_tqdm: UseTqdm) -> None:
    """Refuses what neither says whether to show a bar nor makes one.

    Raises:
        InvalidRequestError: it is neither a bool nor callable.
    """
    if not isinstance(use_tqdm, bool) and not callable(use_tqdm):
        raise InvalidRequestError(
            f"use_tqdm is {use_tqdm!r}; allowed: True, False, or a callable that makes a bar as tqdm does"
        )


def make_bar(use_tqdm: UseTqdm, num_prompts: int) -> Bar:
    """A bar of ``num_prompts``, which False doesn't show. A callable is called once, with ``total`` and ``desc``.

    Raises:
        InvalidRequestError: the callable returned something that has no ``update`` or no ``close``.
    """
    desc = "Processed prompts"
    if isinstance(use_tqdm, bool):
        from tqdm.auto import tqdm

        return tqdm(total=num_prompts, desc=desc, unit="prompt", disable=not use_tqdm)
    # Nothing else is passed: a wrapper of tqdm that sets an argument itself must not get it twice.
    bar = use_tqdm(total=num_prompts, desc=desc)
    if not all(callable(getattr(bar, name, None)) for name in ("update", "close")):
        raise InvalidRequestError(f"use_tqdm made {bar!r}; allowed: a bar with update() and close(), as tqdm makes it")
    return bar
