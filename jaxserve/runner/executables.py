"""The closed set of executables: what is compiled, in parallel, before the first request; nothing is compiled later."""

from __future__ import annotations

import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from jaxserve.models.registry import Model
from jaxserve.runner import step
from jaxserve.runner.attend import POOL, WHOLE, PagedAttention
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.packet import Fields, packet_len
from jaxserve.runner.state import Scratch, SlotState
from jaxserve.sampling.tier import Tier
from pallas_kernels.ragged_paged_attention.types import KVPool

ADMISSION_ROWS = 8  # admissions in one upload
PROMPT_SCORE_TOKENS = 256  # prompt tokens that one call scores


@dataclass(frozen=True, order=True)
class SampleKey:
    """A sampling executable. Ordered by cost, so that the smallest that fits is the cheapest that fits."""

    tier: Tier
    num_drafts: int
    num_rows: int

    def serves(self, tier: Tier, num_drafts: int, num_rows: int) -> bool:
        return self.tier >= tier and self.num_drafts >= num_drafts and self.num_rows >= num_rows


def sample_keys(config: RunnerConfig) -> tuple[SampleKey, ...]:
    """The sampling executables. The rarer tiers come in few sizes; a step takes the next one that serves it."""
    rows, K = config.row_buckets, config.max_drafts
    few = (rows[0], rows[-1]) if len(rows) > 1 and not K else (rows[-1],)
    keys = [SampleKey(tier, drafts, size) for tier in (Tier.GREEDY, Tier.PLAIN) for drafts in {0, K} for size in rows]
    keys += [SampleKey(tier, K, size) for tier in (Tier.TRUNCATED, Tier.FULL) for size in few]
    return tuple(sorted(keys))


@dataclass(frozen=True)
class Executables:
    """Compiled functions; see step.py for what each does."""

    stage: Any
    admit: Any
    prompt_scores: Any
    forward: dict[tuple[int, int], Any]
    sample: dict[SampleKey, Any]
    prompt_score_tokens: int  # that one call of prompt_scores takes
    seconds: dict[str, float]  # of start-up, by phase

    @property
    def num_executables(self) -> int:
        return 3 + len(self.forward) + len(self.sample)

    def temp_bytes(self) -> int:
        """Largest temporary allocation of any executable on one device, in bytes."""
        everything = [self.stage, self.admit, self.prompt_scores, *self.forward.values(), *self.sample.values()]
        return max(temp_bytes(compiled) for compiled in everything)


def temp_bytes(compiled: Any) -> int:
    """Temporary memory of one executable on one device, in bytes; 0 where the backend doesn't say."""
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else int(analysis.temp_size_in_bytes)


@dataclass(frozen=True)
class Compiler:
    """Lowers the step's functions for abstract arguments.

    Attributes:
        params: the model's parameters, arrays or shapes with shardings.
        fields: layout of an admission.
    """

    model: Model
    attention: PagedAttention
    config: RunnerConfig
    fields: Fields
    params: Any
    kv: tuple[KVPool, ...]  # shapes with shardings
    slots: SlotState
    scratch: Scratch

    def lower_forward(self, num_tokens: int, num_rows: int) -> Any:
        run = functools.partial(
            step.forward,
            model=self.model,
            attention=self.attention,
            config=self.config,
            num_tokens=num_tokens,
            num_rows=num_rows,
        )
        out = (jax.tree.map(lambda _: self._sharding(POOL), self.kv), self._whole(self.scratch))
        jitted = self._jit(_named(run, f"forward_{num_tokens}x{num_rows}"), donate=(1, 3), out=out)
        return jitted.lower(self.model.trunk_params(self.params), self.kv, self.slots, self.scratch)

    def lower_sample(self, key: SampleKey) -> Any:
        run = functools.partial(
            step.sample,
            model=self.model,
            config=self.config,
            tier=key.tier,
            num_rows=key.num_rows,
            num_drafts=key.num_drafts,
        )
        name = f"sample_{key.tier.name.lower()}_{key.num_rows}x{key.num_drafts + 1}"
        out = (self._whole(self.slots), self._sharding(WHOLE))
        jitted = self._jit(_named(run, name), donate=(1,), out=out)
        return jitted.lower(self.model.head_params(self.params), self.slots, self.scratch)

    def lower_stage(self) -> Any:
        run = functools.partial(step.stage, config=self.config)
        jitted = self._jit(_named(run, "stage"), donate=(0,), out=self._whole(self.slots))
        return jitted.lower(self.slots, self._words(packet_len(self.config)))

    def lower_admit(self) -> Any:
        run = functools.partial(step.admit, fields=self.fields)
        jitted = self._jit(_named(run, "admit"), donate=(0,), out=self._whole(self.slots))
        return jitted.lower(self.slots, self._words(ADMISSION_ROWS, self.fields.num_words))

    def lower_prompt_scores(self) -> Any:
        run = functools.partial(
            step.prompt_scores,
            model=self.model,
            config=self.config,
            num_tokens=self._prompt_score_tokens(),
        )
        jitted = self._jit(_named(run, "prompt_scores"), donate=(), out=self._sharding(WHOLE))
        return jitted.lower(self.model.head_params(self.params), self.slots, self.scratch, self._words(3))

    def compile_all(self, *, progress: bool) -> Executables:
        """Traces on this thread, compiles on as many threads as there are cores."""
        started = time.perf_counter()
        jobs: dict[Any, Any] = {"stage": self.lower_stage, "admit": self.lower_admit}
        jobs["prompt_scores"] = self.lower_prompt_scores
        # The largest first: they take longest, and the others fill the gaps behind them.
        for tokens, rows in reversed(self.config.token_buckets):
            jobs[tokens, rows] = functools.partial(self.lower_forward, tokens, rows)
        for key in reversed(sample_keys(self.config)):
            jobs[key] = functools.partial(self.lower_sample, key)
        done: dict[Any, Any] = {}
        lowering = 0.0
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            tqdm(total=len(jobs), desc="Compiling", unit="exe", disable=not progress) as bar,
        ):
            futures = {}
            for name, lower in jobs.items():
                before = time.perf_counter()
                lowered = lower()
                lowering += time.perf_counter() - before
                futures[pool.submit(lowered.compile)] = name
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                bar.update()
        return Executables(
            stage=done["stage"],
            admit=done["admit"],
            prompt_scores=done["prompt_scores"],
            forward={key: done[key] for key in self.config.token_buckets},
            sample={key: done[key] for key in sample_keys(self.config)},
            prompt_score_tokens=self._prompt_score_tokens(),
            seconds={"trace": lowering, "compile": time.perf_counter() - started - lowering},
        )

    def _jit(self, function: Any, *, donate: tuple[int, ...], out: Any) -> Any:
        # An argument that is only overwritten must not be dropped: its buffer is what the output goes to, so that
        # addresses, and with them the recorded graphs, stay as they are.
        return jax.jit(function, donate_argnums=donate, out_shardings=out, keep_unused=True)

    def _prompt_score_tokens(self) -> int:
        return min(PROMPT_SCORE_TOKENS, self.config.max_num_batched_tokens)

    def _sharding(self, spec: Any) -> NamedSharding:
        return NamedSharding(self.attention.mesh, spec)

    def _whole(self, tree: Any) -> Any:
        return jax.tree.map(lambda _: self._sharding(WHOLE), tree)

    def _words(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=self._sharding(WHOLE))


def _named(function: functools.partial, name: str) -> Any:
    """A function with a name of its own: profiles and compile logs show it."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__name__ = call.__qualname__ = name
    return call
