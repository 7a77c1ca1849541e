"""``Runner``: runs plans on the device. ``dispatch`` returns before the step has run; ``fetch`` waits for its result.

Shape letters: R rows of the plan, K draft length, C logprob candidates, M rows of a logprob table.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxserve.models.registry import Model
from jaxserve.runner.attend import POOL, WHOLE, PagedAttention
from jaxserve.runner.buckets import burst_width, pick_forward
from jaxserve.runner.compile import compile_all
from jaxserve.runner.compiler import ADMISSION_ROWS, Compiler
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.draft import DraftModel
from jaxserve.runner.executable_cache import ExecutableCache
from jaxserve.runner.executables import BurstKey, Executables, without_large_bursts
from jaxserve.runner.packet import admission_fields, pack_admissions, pack_plan, packet_len
from jaxserve.runner.state import init_scratch, init_slots
from jaxserve.sampling.host import host_row, row_spec
from jaxserve.sampling.tier import Tier, tier_for
from jaxserve.scheduler.plan import Logprobs, StepPlan, StepResult
from pallas_kernels.lowering_processes import LoweringProcesses

# XLA:GPU records a graph no earlier than the second run of an executable; elsewhere one run loads everything.
_WARMUP_RUNS = {"gpu": 3}


@dataclass(frozen=True, slots=True)
class PromptWindow:
    """Scores of some prompt tokens of one row, on their way."""

    row: int
    first: int  # position of the first scored token
    num_tokens: int
    words: jax.Array  # int32[W, 2 + 2C]


@dataclass(frozen=True, slots=True)
class Dispatched:
    """A step on its way."""

    plan: StepPlan
    words: jax.Array  # int32[R, ...], see step.sample; of a burst int32[N, R, ...]
    place: tuple[int, ...]  # of the step in ``words``: (n,) in a burst, else ()
    num_drafts: int
    with_logprobs: bool
    prompt_windows: tuple[PromptWindow, ...]


class Runner:
    """Owns everything on the device. One thread calls it.

    Args:
        model: abstract.
        params: its parameters, on the mesh.
        attention: how layers attend; names the mesh.
        config: shapes.
        drafter: a model that drafts, on the same mesh.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        attention: PagedAttention,
        config: RunnerConfig,
        drafter: DraftModel | None = None,
    ) -> None:
        self.config = config
        self._spec = row_spec(config.vocab_size, config.limits)
        self._fields = admission_fields(config, self._spec)
        self._tiers = np.zeros(config.max_num_seqs, np.int32)  # of the choice in each slot
        self._model, self._attention = model, attention
        self._trunk: tuple[Any, ...] = (model.trunk_params(params),)  # of the target, then of the draft model
        if drafter is not None:
            self._trunk += (drafter.model.trunk_params(drafter.params),)
        self._drafter = drafter
        self._head = model.head_params(params)
        self._heads = (self._head,) if drafter is None else (self._head, drafter.params)
        self._params = params
        self.executables: Executables | None = None

    def start(
        self,
        *,
        cache_dir: str | None = None,
        progress: bool | None = False,
        temp_limit: int | None = None,
        lowered: Mapping[str, jax.stages.Lowered] | None = None,
        lowering: LoweringProcesses | None = None,
    ) -> Executables:
        """Allocates the state, compiles the closed set or reads it from ``cache_dir``, and runs all of it.

        ``progress`` shows a bar; None: on a terminal. Bursts that need more than ``temp_limit`` bytes of temporaries
        are left out. ``lowered``: what a trial has traced (``compile.Trial``). ``lowering``: who lowers kernels; None:
        this process.
        """
        compiler = self.compiler()
        cache = None if cache_dir is None else ExecutableCache.of(cache_dir, compiler)
        executables = compile_all(compiler, cache, lowering or LoweringProcesses(0), progress=progress, lowered=lowered)
        executables = without_large_bursts(executables, temp_limit)
        before = time.perf_counter()
        kv, self._slots, self._scratch, draft_kv = (
            jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))()
            for make, shapes in zip(
                self._makers(), (compiler.kv, compiler.slots, compiler.scratch, compiler.draft_kv), strict=True
            )
        )
        self._kv: tuple[Any, ...] = (kv,) if self._drafter is None else (kv, draft_kv)  # as _trunk
        self.executables = executables
        self._warm_up(executables)
        executables.seconds["first runs"] = time.perf_counter() - before
        return executables

    def compiler(self) -> Compiler:
        """What ``start`` compiles with; nothing is allocated."""
        kv, slots, scratch, draft_kv = (jax.eval_shape(make) for make in self._makers())
        return Compiler(
            model=self._model,
            attention=self._attention,
            config=self.config,
            fields=self._fields,
            params=self._params,
            kv=self._place(kv, POOL),
            slots=self._place(slots, WHOLE),
            scratch=self._place(scratch, WHOLE),
            drafter=self._drafter,
            draft_kv=self._place(draft_kv, POOL),
        )

    def takes_another(self, plans: Sequence[StepPlan]) -> bool:
        """Whether one more plan, if it is of their kind, can go to the device in the same call as these."""
        key = self._burst_key(plans)
        return key is not None and len(plans) < key.num_steps

    def dispatch(self, plans: Sequence[StepPlan]) -> list[Dispatched]:
        """Sends consecutive steps to the device, as one burst if there is one for them; doesn't wait.

        Raises:
            ValueError: a plan has a token_mask; the runner uploads none.
        """
        for plan in plans:
            if plan.token_mask is not None:
                raise ValueError("the plan has a token_mask; the runner uploads none")
        if len(plans) > 1 and (key := self._burst_key(plans)) is not None and len(plans) == key.num_steps:
            return self._dispatch_burst(plans, key)
        return [self._dispatch_one(plan) for plan in plans]

    def _burst_key(self, plans: Sequence[StepPlan]) -> BurstKey | None:
        """The executable for a burst of these; None where one of them isn't a step that a burst can make.

        A burst's steps sample at every row, admit nobody and score no prompts. Where nothing drafts, rows have one
        token: attention is fast for that only. Where a model drafts, it drafts in all of them.
        """
        burst = self._started().burst
        if not burst:
            return None
        num_tokens = num_rows = 0
        tier, is_narrow = Tier.GREEDY, True
        for plan in plans:
            if plan.admissions or not plan.samples.all():
                return None
            tier = Tier(tier | self._tier(plan.slots))
            if next(_prompt_scores(plan), None) is not None:
                return None
            if self._drafter is not None and not plan.num_drafts.any():
                return None
            num_tokens, num_rows = max(num_tokens, plan.num_tokens), max(num_rows, len(plan.slots))
            is_narrow = is_narrow and bool((plan.widths == 1).all())
        fitting = (key for key in burst if key.serves(tier, num_tokens, num_rows))
        return next((key for key in fitting if is_narrow or self._width(key) is None), None)

    def _width(self, key: BurstKey) -> int | None:
        return burst_width(key.num_tokens, key.num_rows, self.config.max_drafts)

    def _dispatch_burst(self, plans: Sequence[StepPlan], key: BurstKey) -> list[Dispatched]:
        words = self._run_burst(key, np.stack([pack_plan(plan, self.config) for plan in plans]))
        scored = key.tier.covers(Tier.SCORED)
        return [Dispatched(plan, words, (n,), self.config.max_drafts, scored, ()) for n, plan in enumerate(plans)]

    def _run_burst(self, key: BurstKey, packets: np.ndarray) -> jax.Array:  # int32[N, packet_len]
        self._kv, self._slots, words = self._started().burst[key](
            self._trunk, self._heads, self._kv, self._slots, packets
        )
        words.copy_to_host_async()
        return words  # int32[N, R, ...]

    def _dispatch_one(self, plan: StepPlan) -> Dispatched:
        """An upload and three or more launches."""
        executables = self._started()
        self._admit(plan)
        self._slots = executables.stage(self._slots, pack_plan(plan, self.config))
        drafts = self.config.max_drafts if plan.num_drafts.any() else 0
        if drafts and self._drafter is not None:
            self._propose(plan, self._drafter)
        num_rows = len(plan.slots)
        forward = executables.forward[pick_forward(self.config.token_buckets, plan.num_tokens, num_rows)]
        self._kv, self._scratch = forward(self._trunk, self._kv, self._slots, self._scratch)
        windows = tuple(self._prompt_windows(plan))
        tier = self._tier(plan.slots)
        key = next(key for key in executables.sample if key.serves(tier, drafts, num_rows))
        self._slots, words = executables.sample[key](self._head, self._slots, self._scratch)
        words.copy_to_host_async()
        return Dispatched(plan, words, (), key.num_drafts, key.tier.covers(Tier.SCORED), windows)

    def fetch(self, step: Dispatched) -> StepResult:
        """Waits for a step and returns its result."""
        words = np.asarray(step.words)[step.place][: len(step.plan.slots)]  # [R, ...]
        K = step.num_drafts
        logprobs = None
        if step.with_logprobs and any(choice.params.logprobs is not None for choice in step.plan.choices):
            table = words[:, 2 + K + 1 :]
            logprobs = _logprobs(table.reshape(len(table), K + 1, -1))
        return StepResult(
            step_id=step.plan.step_id,
            token_ids=words[:, 2 : 2 + K + 1],
            num_emitted=words[:, 0],
            num_drafted=words[:, 1],
            logprobs=logprobs,
            prompt_logprobs=_join_windows(step.prompt_windows),
        )

    def _started(self) -> Executables:
        if self.executables is None:
            raise RuntimeError("the runner wasn't started")
        return self.executables

    def _tier(self, slots: np.ndarray) -> Tier:  # int32[R]
        """What the choices in these slots need together."""
        return Tier(int(np.bitwise_or.reduce(self._tiers[slots])))

    def _propose(self, plan: StepPlan, drafter: DraftModel) -> None:
        """Fills the staged drafts. Rows past the last that drafts are left out: prefill chunks come last."""
        executables = self._started()
        num_rows = int(np.flatnonzero(plan.num_drafts)[-1]) + 1
        tier = self._tier(plan.slots[:num_rows])
        key = next(key for key in executables.propose if key.serves(tier, self.config.max_drafts, num_rows))
        self._run_proposer(executables.propose[key], drafter)

    def _run_proposer(self, propose: Any, drafter: DraftModel) -> None:
        target_kv, draft_kv = self._kv
        draft_kv, self._slots = propose(drafter.params, draft_kv, self._slots)
        self._kv = (target_kv, draft_kv)

    def _admit(self, plan: StepPlan) -> None:
        executables = self._started()
        admissions = plan.admissions
        for admission in admissions:
            self._tiers[admission.slot] = tier_for(admission.choice.params)
        for chunk in itertools.batched(admissions, ADMISSION_ROWS):
            rows = [
                host_row(
                    admission.choice.params,
                    seed=admission.choice.seed,
                    choice_index=admission.choice.index,
                    eos_token_ids=admission.choice.eos_token_ids,
                    prompt_len=admission.choice.prompt_len,
                    bad_words_ids=admission.choice.bad_words_ids,
                    vocab_size=self.config.vocab_size,
                    limits=self.config.limits,
                )
                for admission in chunk
            ]
            words = pack_admissions(chunk, rows, self._fields, self.config, ADMISSION_ROWS)
            self._slots = executables.admit(self._slots, words)

    def _prompt_windows(self, plan: StepPlan) -> Iterable[PromptWindow]:
        executables = self._started()
        size = executables.prompt_score_tokens
        for row, start, num_scores in _prompt_scores(plan):
            for offset in range(0, num_scores, size):
                window = np.array([row, offset, start + offset], np.int32)
                words = executables.prompt_scores(self._head, self._slots, self._scratch, window)
                words.copy_to_host_async()
                yield PromptWindow(row, start + offset + 1, min(size, num_scores - offset), words)

    def _warm_up(self, executables: Executables) -> None:
        """Runs every executable on an empty plan: padding rows write nowhere."""
        packet = np.zeros(packet_len(self.config), np.int32)
        packet[: self.config.max_num_seqs] = self.config.max_num_seqs
        packet[-3 * self.config.max_table_updates :: 3] = self.config.max_num_seqs
        nobody = pack_admissions([], [], self._fields, self.config, ADMISSION_ROWS)
        platform = self._attention.mesh.devices.flat[0].platform
        for _ in range(_WARMUP_RUNS.get(platform, 1)):
            self._slots = executables.admit(self._slots, nobody)
            self._slots = executables.stage(self._slots, packet)
            for forward in executables.forward.values():
                self._kv, self._scratch = forward(self._trunk, self._kv, self._slots, self._scratch)
            for key in executables.burst:
                self._run_burst(key, np.stack([packet] * key.num_steps))
            executables.prompt_scores(self._head, self._slots, self._scratch, np.zeros(3, np.int32))
            if self._drafter is not None:
                for propose in executables.propose.values():
                    self._run_proposer(propose, self._drafter)
            for sample in executables.sample.values():
                self._slots, words = sample(self._head, self._slots, self._scratch)
                words.copy_to_host_async()
        jax.block_until_ready((self._kv, self._slots, self._scratch))

    def _makers(self) -> tuple[Any, ...]:
        drafter = self._drafter
        return (
            lambda: self._attention.empty_pools(self.config.num_blocks),
            lambda: init_slots(self.config),
            lambda: init_scratch(self.config, self._model.config.model_dim, jnp.dtype(self._model.dtype)),
            lambda: () if drafter is None else drafter.attention.empty_pools(self.config.num_blocks),
        )

    def _place(self, tree: Any, spec: Any) -> Any:
        sharding = NamedSharding(self._attention.mesh, spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _prompt_scores(plan: StepPlan) -> Iterator[tuple[int, int, int]]:
    """(row, first position, number) of prompt tokens whose followers the newest plan scores."""
    for row, choice in enumerate(plan.choices):
        if choice.needs_prompt_logprobs:
            width = int(plan.widths[row])
            start = choice.computed_len + choice.in_flight_len - width  # exact in prefill: nothing is drafted there
            num_scores = min(start + width, choice.prompt_len - 1) - start
            if num_scores > 0:
                yield row, start, num_scores


def _logprobs(words: np.ndarray) -> Logprobs:  # int32[..., 2 + 2C]
    num = (words.shape[-1] - 2) // 2
    return Logprobs(
        token_logprob=np.ascontiguousarray(words[..., 0]).view(np.float32),
        token_rank=words[..., 1],
        top_ids=words[..., 2 : 2 + num],
        top_logprobs=np.ascontiguousarray(words[..., 2 + num :]).view(np.float32),
    )


def _join_windows(windows: tuple[PromptWindow, ...]) -> dict[int, tuple[int, Logprobs]]:
    """Windows of one row lie one after the other."""
    joined: dict[int, tuple[int, Logprobs]] = {}
    for row, group in itertools.groupby(windows, key=lambda window: window.row):
        parts = list(group)
        table = np.concatenate([np.asarray(part.words)[: part.num_tokens] for part in parts])
        joined[row] = (parts[0].first, _logprobs(table))
    return joined
