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
from jaxserve.runner import draft, step
from jaxserve.runner.attend import POOL, WHOLE, PagedAttention
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.draft import DraftModel
from jaxserve.runner.packet import Fields, packet_len
from jaxserve.runner.state import Scratch, SlotState
from jaxserve.sampling.tier import Tier
from pallas_kernels.ragged_paged_attention.types import KVPool

ADMISSION_ROWS = 8  # admissions in one upload
PROMPT_SCORE_TOKENS = 256  # prompt tokens that one call scores


@dataclass(frozen=True)
class SampleKey:
    """A sampling executable, or a draft model's."""

    tier: Tier
    num_drafts: int
    num_rows: int

    @property
    def cost(self) -> tuple[int, int]:
        """Orders keys, so that the first that serves is the cheapest that serves."""
        return self.num_rows * (1 + self.num_drafts), self.tier

    def serves(self, tier: Tier, num_drafts: int, num_rows: int) -> bool:
        return self.tier >= tier and self.num_drafts >= num_drafts and self.num_rows >= num_rows


def sample_keys(config: RunnerConfig) -> tuple[SampleKey, ...]:
    """The sampling executables, cheapest first. The rarer ones come in few sizes; a step takes the next that serves.

    A greedy step takes PLAIN where there is no GREEDY of its size: noise costs less than more rows of the LM head.
    """
    rows, K = config.row_buckets, config.max_drafts
    few = (rows[0], rows[-1]) if len(rows) > 1 and not K else (rows[-1],)
    keys = [SampleKey(Tier.GREEDY, K, size) for size in rows[::2]] + [SampleKey(Tier.PLAIN, K, size) for size in rows]
    keys += [SampleKey(tier, K, size) for tier in (Tier.TRUNCATED, Tier.FULL) for size in few]
    if K:  # a step without drafts takes the verifier where rows are few: the LM head costs the same there
        keys += [SampleKey(Tier.PLAIN, 0, size) for size in rows[-2:]]
    return tuple(sorted(keys, key=lambda key: key.cost))


def propose_keys(config: RunnerConfig) -> tuple[SampleKey, ...]:
    """A draft model's executables, cheapest first; tier FULL stands in for TRUNCATED."""
    rows, K = config.row_buckets, config.max_drafts
    keys = [SampleKey(tier, K, size) for tier in (Tier.GREEDY, Tier.PLAIN) for size in rows]
    return tuple(sorted([*keys, SampleKey(Tier.FULL, K, rows[-1])], key=lambda key: key.cost))


@dataclass(frozen=True)
class Executables:
    """Compiled functions; see step.py and draft.py for what each does."""

    stage: Any
    admit: Any
    prompt_scores: Any
    forward: dict[tuple[int, int], Any]
    sample: dict[SampleKey, Any]
    burst: dict[tuple[int, int], Any]
    propose: dict[SampleKey, Any]  # empty without a draft model
    prompt_score_tokens: int  # that one call of prompt_scores takes
    seconds: dict[str, float]  # of start-up, by phase

    @property
    def num_executables(self) -> int:
        """Without the draft model's."""
        return 3 + len(self.forward) + len(self.sample) + len(self.burst)

    def temp_bytes(self) -> int:
        """Largest temporary allocation of any executable on one device, in bytes."""
        everything = [self.stage, self.admit, self.prompt_scores]
        for group in (self.forward, self.sample, self.burst, self.propose):
            everything += group.values()
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
    drafter: DraftModel | None = None
    draft_kv: tuple[KVPool, ...] = ()

    def lower_forward(self, num_tokens: int, num_rows: int) -> Any:
        models, params, kv = self._trunks()
        run = functools.partial(
            step.forward,
            models=models,
            config=self.config,
            num_tokens=num_tokens,
            num_rows=num_rows,
        )
        out = (self._pools(kv), self._whole(self.scratch))
        jitted = self._jit(_named(run, f"forward_{num_tokens}x{num_rows}"), donate=(1, 3), out=out)
        return jitted.lower(params, kv, self.slots, self.scratch)

    def lower_burst(self, num_tokens: int, num_rows: int) -> Any:
        """Tier PLAIN serves greedy rows too."""
        models, params, kv = self._trunks()
        config = self.config
        run = functools.partial(
            step.burst,
            models=models,
            config=config,
            tier=Tier.PLAIN,
            num_tokens=num_tokens,
            num_rows=num_rows,
        )
        out = (self._pools(kv), self._whole(self.slots), self._whole(self.scratch), self._sharding(WHOLE))
        jitted = self._jit(_named(run, f"burst_{num_tokens}x{num_rows}"), donate=(2, 3, 4), out=out)
        heads = (self.model.head_params(self.params),) + (() if self.drafter is None else (self.drafter.params,))
        packets = self._words(config.burst_len, packet_len(config))
        return jitted.lower(params, heads, kv, self.slots, self.scratch, packets)

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

    def lower_propose(self, drafter: DraftModel, key: SampleKey) -> Any:
        run = functools.partial(
            draft.propose,
            model=drafter.model,
            attention=drafter.attention,
            config=self.config,
            tier=key.tier,
            num_rows=key.num_rows,
        )
        out = (self._pools(self.draft_kv), self._whole(self.slots))
        name = f"propose_{key.tier.name.lower()}_{key.num_rows}x{key.num_drafts}"
        return self._jit(_named(run, name), donate=(1, 2), out=out).lower(drafter.params, self.draft_kv, self.slots)

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
        for tokens, rows in self.config.burst_buckets:
            jobs["burst", tokens, rows] = functools.partial(self.lower_burst, tokens, rows)
        proposals: tuple[SampleKey, ...] = ()
        if self.drafter is not None:
            proposals = propose_keys(self.config)
            for key in reversed(proposals):
                jobs["propose", key] = functools.partial(self.lower_propose, self.drafter, key)
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
            burst={key: done["burst", *key] for key in self.config.burst_buckets},
            propose={key: done["propose", key] for key in proposals},
            prompt_score_tokens=self._prompt_score_tokens(),
            seconds={"trace": lowering, "compile": time.perf_counter() - started - lowering},
        )

    def _trunks(self) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Models with their attention, parameters, pools: of the target, then of the draft model."""
        models, params, kv = [(self.model, self.attention)], [self.model.trunk_params(self.params)], [self.kv]
        if (drafter := self.drafter) is not None:
            models.append((drafter.model, drafter.attention))
            params.append(drafter.model.trunk_params(drafter.params))
            kv.append(self.draft_kv)
        return tuple(models), tuple(params), tuple(kv)

    def _jit(self, function: Any, *, donate: tuple[int, ...], out: Any) -> Any:
        # An argument that is only overwritten must not be dropped: its buffer is what the output goes to, so that
        # addresses, and with them the recorded graphs, stay as they are.
        return jax.jit(function, donate_argnums=donate, out_shardings=out, keep_unused=True)

    def _prompt_score_tokens(self) -> int:
        return min(PROMPT_SCORE_TOKENS, self.config.max_num_batched_tokens)

    def _sharding(self, spec: Any) -> NamedSharding:
        return NamedSharding(self.attention.mesh, spec)

    def _pools(self, kv: Any) -> Any:
        return jax.tree.map(lambda _: self._sharding(POOL), kv)

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
