"""Which block holds the KV of which prefix.

A prefix is a chain of full blocks. A block's key is (node of the block before it, its tokens), and the first block's
parent is the root, which carries the salt. Node numbers are never reused, and the dictionary compares tokens whenever
hashes are equal, so a hash collision can't produce a false hit.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence

from jaxserve.scheduler.block_pool import BlockPool


class PrefixCache:
    """Maps chains of full blocks to block ids. Holds no references: an idle block may be evicted at any time."""

    __slots__ = ("_entries", "_keys", "_next_node", "pool")

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks, block_size, self._forget)
        self._entries: dict[tuple[Hashable, bytes], tuple[int, int]] = {}  # key -> (block, node)
        self._keys: list[tuple[Hashable, bytes] | None] = [None] * num_blocks
        self._next_node = 0

    def __len__(self) -> int:
        return len(self._entries)

    def match(
        self,
        root: Hashable,
        token_ids: Sequence[int],  # [tokens_len]
    ) -> tuple[list[int], Hashable]:
        """The longest cached chain of ``token_ids``, short of the last token, whose logits are still needed.

        Returns:
            Its blocks, and the node that the next block's key starts from. Takes no reference and touches no order.
        """
        block_size = self.pool.block_size
        num_blocks = (len(token_ids) - 1) // block_size
        blocks: list[int] = []
        parent = root
        if num_blocks <= 0 or not self._entries:
            return blocks, parent
        data = array("i", token_ids).tobytes()
        size = 4 * block_size
        find = self._entries.get
        for start in range(0, num_blocks * size, size):
            entry = find((parent, data[start : start + size]))
            if entry is None:
                break
            block, parent = entry
            blocks.append(block)
        return blocks, parent

    def publish(
        self,
        block: int,
        parent: Hashable,
        token_ids: Sequence[int],  # [block_size]
    ) -> Hashable:
        """Makes a full, computed block known; returns its node, the parent of the block after it.

        Where another block already holds the same prefix, that one stays and this one remains private.
        """
        key = (parent, array("i", token_ids).tobytes())
        entry = self._entries.get(key)
        if entry is not None:
            return entry[1]
        node = self._next_node
        self._next_node += 1
        self._entries[key] = (block, node)
        self._keys[block] = key
        self.pool.published[block] = True
        return node

    def entries(self) -> dict[int, tuple[Hashable, bytes]]:
        """A copy: block -> key, for checks."""
        return {block: key for block, key in enumerate(self._keys) if key is not None}

    def is_consistent(self) -> bool:
        """Whether entries, keys and the pool's published marks tell the same story."""
        known = self.entries()
        return (
            len(known) == len(self._entries)
            and all(self._entries.get(key, (-1, -1))[0] == block for block, key in known.items())
            and all(mark == (block in known) for block, mark in enumerate(self.pool.published))
        )

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        self._keys[block] = None
        if key is not None:
            del self._entries[key]
