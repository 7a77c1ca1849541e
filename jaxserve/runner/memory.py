"""How many KV blocks fit. Sizes are in bytes, on one device."""

from __future__ import annotations

import os
from dataclasses import dataclass

from jaxserve.errors import ConfigError, KVCacheTooSmallError

CPU_KV_BYTES = 1 << 30
EXPLICIT = ("num_gpu_blocks_override", "kv_cache_memory_bytes")
SHARE = "gpu_memory_utilization"
MAX_BLOCKS = 2**31 - 1  # ids are int32, and the one behind the last block stands for none
GRAPH_RESERVE_BYTES = 512 << 20  # recorded graphs, library workspaces and results in flight


@dataclass(frozen=True)
class MemoryPlan:
    """Where a device's memory goes.

    Attributes:
        limit: what the allocator may hand out; None where the device doesn't say (CPU).
        params: weights and whatever else was there before the engine's state.
        state: slots and scratch.
        temp: largest temporary of any executable.
        reserve: kept free.
        block: one KV block over all layers.
        num_blocks: blocks of the pool.
        source: what decided ``num_blocks``.
    """

    limit: int | None
    params: int
    state: int
    temp: int
    reserve: int
    block: int
    num_blocks: int
    source: str

    @property
    def most_temp(self) -> int | None:
        """Temporaries of one executable that there is room for. A library's choice, measured anew in each compilation,
        may take some more than in the trial: a part of the reserve is for that. None: nobody measured."""
        return self.temp + self.reserve // 4 if self.temp else None

    def describe(self) -> dict[str, str]:
        """Readable sizes, for ``info``."""
        sizes = {"weights": self.params, "state": self.state, "temporaries": self.temp, "reserve": self.reserve}
        shown = {name: readable(size) for name, size in sizes.items()}
        if self.limit is not None:
            shown = {"limit": readable(self.limit), **shown}
        blocks = f"{readable(self.num_blocks * self.block)}, {self.num_blocks} blocks, from {self.source}"
        return {**shown, "kv cache": blocks}


def readable(size: int) -> str:
    """A size in bytes with a unit that suits it."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def plan_blocks(
    *,
    limit: int | None,
    params: int,
    state: int,
    temp: int,
    block: int,
    override: int | None,
    kv_bytes: int | None,
) -> MemoryPlan:
    """The number of blocks: an explicit number, else what an explicit size holds, else what is left of the limit.

    What is left is rounded down, by less than 1%: it differs a little from start to start, and another number of blocks
    is another set of executables, none of which would be in the cache.
    """
    reserve = 0 if limit is None else GRAPH_RESERVE_BYTES
    if override is not None:
        num_blocks, source = override, "num_gpu_blocks_override"
    elif kv_bytes is not None:
        num_blocks, source = kv_bytes // block, "kv_cache_memory_bytes"
    elif limit is None:
        num_blocks, source = CPU_KV_BYTES // block, f"the default of {readable(CPU_KV_BYTES)}"
    else:
        left = (limit - params - state - temp - reserve) // block
        spare_bits = max(0, left.bit_length() - 8)
        num_blocks, source = left >> spare_bits << spare_bits, "the memory that is left"
    return MemoryPlan(limit, params, state, temp, reserve, block, num_blocks, source)


def check_fits(plan: MemoryPlan, *, max_model_len: int, block_size: int) -> None:
    """One request of ``max_model_len`` tokens must fit, and what was asked for must fit in the memory.

    Raises:
        KVCacheTooSmallError: says the largest ``max_model_len`` that would fit, and what would make room.
        ConfigError: an explicit size takes more than there is.
    """
    most = min(MAX_BLOCKS, max(0, _room(plan)) // plan.block)
    if plan.source in EXPLICIT and plan.num_blocks > most:
        raise ConfigError(
            f"{plan.source} gives {plan.num_blocks} KV blocks, {readable(plan.num_blocks * plan.block)}; allowed: at "
            f"most {most} blocks, {readable(most * plan.block)}"
        )
    needed = -(-max_model_len // block_size)
    if plan.num_blocks >= needed:
        return
    fits = max(plan.num_blocks, 0) * block_size
    setting = plan.source if plan.source in EXPLICIT else "kv_cache_memory_bytes" if plan.limit is None else SHARE
    advice = f"raise {setting}"
    if fits >= 2:  # the shortest context: a prompt's token and one of output
        advice = f"the largest max_model_len that fits is {fits}; lower max_model_len, or {advice}"
    raise KVCacheTooSmallError(
        f"max_model_len {max_model_len} needs {needed} KV blocks of {block_size} tokens "
        f"({readable(needed * plan.block)}), but {plan.source} gives {max(plan.num_blocks, 0)}; {advice}"
    )


def _room(plan: MemoryPlan) -> int:
    """Bytes that blocks can't pass. A CPU, which states no limit, has the host's memory."""
    if plan.limit is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return plan.limit - plan.params - plan.state - plan.temp
