"""Blocks of KV storage: who holds them, which are free, and which idle ones still hold a cached prefix.

``reserve`` gives all or refuses and changes nothing. There is no ``min()`` on block counts here: whoever asks has
already cut its tokens, so what it asks for is what it needs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence


class BlockPool:
    """Reference-counted blocks ``0 .. num_blocks-1``. Every operation is O(1) per block.

    A block is free (no content), idle (no holder, but its content is in the prefix cache; least recently used first),
    or held by ``refs[block]`` tables. ``forget(block)`` is called when an idle block is taken and its content given
    up.
    """

    __slots__ = ("_forget", "_free", "_idle", "block_size", "num_blocks", "num_evictions", "published", "refs")

    def __init__(self, num_blocks: int, block_size: int, forget: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evictions = 0
        self.refs = [0] * num_blocks
        self.published = [False] * num_blocks  # the prefix cache knows the block
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low ids first
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._forget = forget

    @property
    def num_available(self) -> int:
        """Blocks that a reservation can take, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that cover ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def reserve(self, table: list[int], up_to: int, hits: Sequence[int] = (), headroom: int = 0) -> bool:
        """Makes ``table`` cover ``up_to`` tokens: ``hits`` are appended first, then fresh blocks.

        Args:
            table: the holder's blocks; appended in place. Empty where ``hits`` are given.
            up_to: tokens to cover.
            hits: cached blocks to share. An idle one stops being available, so it's charged.
            headroom: blocks that must be left afterwards.

        Returns:
            True, and the table covers ``up_to``; or False, and nothing at all has changed.
        """
        refs = self.refs
        fresh = -(-up_to // self.block_size) - len(table) - len(hits)
        if fresh <= 0 and not hits:
            return True
        available = len(self._free) + len(self._idle)
        for block in hits:
            if not refs[block]:
                available -= 1
        if fresh + headroom > available:
            return False
        for block in hits:
            if not refs[block]:
                del self._idle[block]
            refs[block] += 1
            table.append(block)
        for _ in range(fresh):
            block = self._take()
            refs[block] = 1
            table.append(block)
        return True

    def release(self, table: list[int]) -> None:
        """Drops the holder's references and empties its table.

        The tail goes first: a cached chain is evicted from its end, never from under its children.
        """
        refs = self.refs
        for block in reversed(table):
            refs[block] -= 1
            if not refs[block]:
                if self.published[block]:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        table.clear()

    def evict_idle(self) -> int:
        """Gives up the content of every idle block; returns how many there were."""
        count = len(self._idle)
        while self._idle:
            self._free.append(self._evict())
        return count

    def free_and_idle(self) -> tuple[list[int], list[int]]:
        """Copies of the free stack and of the idle list, for checks."""
        return list(self._free), list(self._idle)

    def _take(self) -> int:
        return self._free.pop() if self._free else self._evict()

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self.published[block] = False
        self.num_evictions += 1
        self._forget(block)
        return block
