"""A world to try schedulers in: a hash model, a device with a fake KV cache, and an oracle that generates one by one.

The device stores (position, fingerprint of the whole prefix) in each slot of each block, and compares every position
that a query attends to with the choice's true prefix. A block with two owners, a stale table, a wrong row or a shared
block that was overwritten can't go unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.sampling_params import RepetitionDetection, SamplingParams
from jaxserve.scheduler import Choice, Commit, Scheduler, SchedulerConfig, StepPlan, StepResult

VOCAB_SIZE = 7
EOS = 6
POISON = -1
# (most drafts that the row may verify) -> (drafts found, of which are right)
Pick = Callable[[int], tuple[int, int]]


def extend(fingerprint: int, token_id: int) -> int:
    """The fingerprint of a prefix with one more token."""
    return (fingerprint * 1_000_003 + token_id + 17) % (2**61 - 1)


def root_fingerprint(salt: str | None) -> int:
    return 1 if salt is None else 2 + sum(map(ord, salt))


@dataclass(frozen=True)
class HashModel:
    """The next token is a function of prefix, seed and choice.

    ``eos_every``: about one token in so many ends the answer; ``loop``: the tokens repeat with this period instead.
    """

    eos_every: int = 12
    loop: int = 0

    def next_token(self, fingerprint: int, seed: int, index: int, output_index: int) -> int:
        if self.loop:
            return output_index % self.loop
        mixed = (fingerprint * 6_364_136_223_846_793_005 + seed * 1_442_695 + index * 97 + output_index) % (2**61 - 1)
        mixed ^= mixed >> 29
        if self.eos_every and mixed % self.eos_every == 0:
            return EOS
        return (mixed // 64) % EOS


def loops_by_definition(output: list[int], rule: RepetitionDetection) -> bool:
    """Whether the output ends in ``min_count`` copies of a pattern: every size, tried one by one."""
    for size in range(rule.min_pattern_size, rule.max_pattern_size + 1):
        pattern = output[-size:]
        if len(output) >= size * rule.min_count and output[-size * rule.min_count :] == pattern * rule.min_count:
            return True
    return False


def oracle(model: HashModel, choice: Choice, config: SchedulerConfig) -> tuple[list[int], str]:
    """The whole answer and its finish reason, generated token by token without batch, cache or drafts."""
    params = choice.params
    fingerprint = root_fingerprint(choice.cache_salt)
    for token_id in choice.prompt_token_ids:
        fingerprint = extend(fingerprint, token_id)
    stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else set(choice.eos_token_ids))
    longest = params.max_tokens or config.max_model_len - len(choice.prompt_token_ids)
    rule = params.repetition_detection or (config.repetition_detection if config.repetition == "stop" else None)
    output: list[int] = []
    while True:
        token_id = model.next_token(fingerprint, choice.seed, choice.index, len(output))
        fingerprint = extend(fingerprint, token_id)
        output.append(token_id)
        if token_id in stops and len(output) > params.min_tokens:
            return output, "stop"
        if len(output) == longest:
            return output, "length"
        looked_at = len(output) % 16 == 0 and len(output) >= params.min_tokens
        if rule is not None and looked_at and loops_by_definition(output, rule):
            return output, "repetition"


class DeviceSlot:
    """The device's fields of one slot. Poisoned until an admission."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.computed_len = 10**6
        self.table: list[int] = []
        self.salt: str | None = None


class FakeDevice:
    """Executes plans in order, as data dependence makes a real device do."""

    def __init__(self, config: SchedulerConfig, model: HashModel) -> None:
        self.config = config
        self.model = model
        self.table_len = -(-config.max_model_len // config.block_size)
        self.slots = [DeviceSlot() for _ in range(config.max_num_seqs)]
        self.kv: list[list[tuple[int, int] | None]] = [[None] * config.block_size for _ in range(config.num_blocks)]

    def execute(self, plan: StepPlan, pick: Pick) -> StepResult:
        config = self.config
        self._check_plan(plan)
        for admission in plan.admissions:
            slot = self.slots[admission.slot]
            slot.tokens = admission.token_ids.tolist()
            slot.computed_len = admission.computed_len
            slot.table = admission.block_ids.tolist() + [POISON] * (self.table_len - len(admission.block_ids))
            slot.salt = admission.choice.cache_salt
        for slot_index, index, block in plan.table_updates.tolist():
            assert self.slots[slot_index].table[index] == POISON, "a table entry is overwritten"
            self.slots[slot_index].table[index] = block
        num_rows = len(plan.choices)
        token_ids = np.full((num_rows, config.max_drafts + 1), POISON, np.int32)
        num_emitted = np.zeros(num_rows, np.int32)
        num_drafted = np.zeros(num_rows, np.int32)
        for row in range(num_rows):
            emitted, drafted = self._run_row(plan, row, pick)
            token_ids[row, : len(emitted)] = emitted
            num_emitted[row], num_drafted[row] = len(emitted), drafted
        return StepResult(plan.step_id, token_ids, num_emitted, num_drafted)

    def _check_plan(self, plan: StepPlan) -> None:
        config = self.config
        slots = plan.slots.tolist()
        assert len(set(slots)) == len(slots) > 0, "a slot has two rows"
        assert plan.num_tokens <= config.max_num_batched_tokens, "more tokens than the step's budget"
        assert int((1 + plan.num_drafts)[plan.samples].sum()) <= (config.max_sample_rows or 0), "too many sampling rows"
        assert int(plan.widths.min()) >= 1 and int(plan.num_drafts.min()) >= 0, "an empty or negative row"
        assert not plan.num_drafts[~plan.samples].any(), "drafts without sampling"
        admitted = [admission.slot for admission in plan.admissions]
        assert len(set(admitted)) == len(admitted) and set(admitted) <= set(slots), "an admission without a row"
        assert (plan.draft_ids is None) == (config.drafting == "device")

    def _run_row(self, plan: StepPlan, row: int, pick: Pick) -> tuple[list[int], int]:
        config, choice = self.config, plan.choices[row]
        slot = self.slots[int(plan.slots[row])]
        max_drafts, samples = int(plan.num_drafts[row]), bool(plan.samples[row])
        known = int(plan.widths[row]) - max_drafts  # tokens whose ids the device has
        start = slot.computed_len
        assert start + known <= len(slot.tokens), "a row computes tokens that nobody has"
        assert samples == (start + known == len(slot.tokens)), "a row samples in the wrong place"
        assert max_drafts == 0 or known == 1, "drafts in a prefill chunk"
        right = self._continuation(slot, choice, max_drafts + 1) if samples else []
        drafts: list[int] = []
        if plan.draft_ids is not None:
            drafts = plan.draft_ids[row, :max_drafts].tolist()
            assert all(0 <= draft < VOCAB_SIZE for draft in drafts), "a draft id outside the vocabulary"
        elif max_drafts:
            drafted, accepted = pick(max_drafts)
            drafts = right[:drafted]
            if accepted < drafted:
                drafts[accepted] = (drafts[accepted] + 1) % VOCAB_SIZE
        inputs = slot.tokens[start:] + drafts if samples else slot.tokens[start : start + known]
        self._write(slot, start, inputs)
        self._check_reads(slot, start, inputs)
        if not samples:
            slot.computed_len += known
            return [], 0
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == right[accepted]:
            accepted += 1
        emitted = right[: accepted + 1]
        slot.computed_len += known + accepted
        slot.tokens += emitted
        assert len(slot.tokens) <= config.max_model_len, "the token history overflows"
        return emitted, len(drafts)

    def _continuation(self, slot: DeviceSlot, choice: Choice, count: int) -> list[int]:
        fingerprint = root_fingerprint(slot.salt)
        for token_id in slot.tokens:
            fingerprint = extend(fingerprint, token_id)
        output: list[int] = []
        first = len(slot.tokens) - choice.prompt_len
        for output_index in range(first, first + count):
            token_id = self.model.next_token(fingerprint, choice.seed, choice.index, output_index)
            fingerprint = extend(fingerprint, token_id)
            output.append(token_id)
        return output

    def _write(self, slot: DeviceSlot, start: int, inputs: list[int]) -> None:
        config = self.config
        fingerprint = root_fingerprint(slot.salt)
        for token_id in slot.tokens[:start]:
            fingerprint = extend(fingerprint, token_id)
        for position, token_id in enumerate(inputs, start):
            fingerprint = extend(fingerprint, token_id)
            assert position <= config.max_model_len - 2, "no room for the sampled token"
            block = slot.table[position // config.block_size]
            assert block != POISON, "a write outside the granted blocks"
            self.kv[block][position % config.block_size] = (position, fingerprint)

    def _check_reads(self, slot: DeviceSlot, start: int, inputs: list[int]) -> None:
        block_size = self.config.block_size
        fingerprint = root_fingerprint(slot.salt)
        for position, token_id in enumerate(slot.tokens[:start] + inputs):
            fingerprint = extend(fingerprint, token_id)
            entry = self.kv[slot.table[position // block_size]][position % block_size]
            assert entry == (position, fingerprint), f"position {position} reads {entry}"


class World:
    """A scheduler, a device and their outstanding steps; every move is checked."""

    def __init__(
        self,
        config: SchedulerConfig,
        model: HashModel | None = None,
        make_scheduler: Callable[[SchedulerConfig], Scheduler] = Scheduler,
    ) -> None:
        self.config = config
        self.model = model or HashModel()
        self.scheduler = make_scheduler(config)
        self.device = FakeDevice(config, self.model)
        self.steps: list[tuple[StepPlan, StepResult]] = []
        self.choices: list[Choice] = []
        self.answers: list[tuple[list[int], str]] = []  # what the oracle says
        self.streams: list[list[int]] = []  # what the commits said
        self.num_schedules = 0

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        seed: int = 0,
        salt: str | None = None,
        host_synchronous: bool = False,
    ) -> list[Choice]:
        params = params or SamplingParams(max_tokens=None)
        added = []
        first = len(self.choices)
        for index in range(params.n):
            choice = Choice(
                choice_id=first + index,
                group_id=first,
                index=index,
                prompt_token_ids=list(prompt),
                params=params,
                seed=seed,
                eos_token_ids=(EOS,),
                cache_salt=salt,
                arrival_time=0.0,
                host_synchronous=host_synchronous,
            )
            self.scheduler.add(choice)
            self.choices.append(choice)
            self.answers.append(oracle(self.model, choice, self.config))
            self.streams.append([])
            added.append(choice)
        self.check()
        return added

    def dispatch(self, pick: Pick) -> bool:
        """Plans a step and runs it on the device, whose result stays outstanding."""
        if self.config.drafting == "host":
            self._propose(pick)
        plan = self.scheduler.schedule()
        if plan is not None:
            self.num_schedules += 1
            self.steps.append((plan, self.device.execute(plan, pick)))
        self.check()
        return plan is not None

    def _propose(self, pick: Pick) -> None:
        for choice in list(self.scheduler.state.decoding):
            if choice.draft_len.most and not choice.in_flight_len and choice.computed_len >= choice.prefill_len:
                drafted, accepted = pick(choice.draft_len.most)
                right = self.device._continuation(self.device.slots[choice.slot], choice, drafted)
                if accepted < drafted:
                    right[accepted] = (right[accepted] + 1) % VOCAB_SIZE
                assert self.scheduler.set_drafts(choice, right)

    def commit(self) -> list[Commit]:
        """Returns the oldest outstanding result to the scheduler."""
        plan, result = self.steps.pop(0)
        alive = {choice.choice_id for choice in self.choices if not choice.finished}
        commits = self.scheduler.commit(plan, result)
        for commit in commits:
            assert commit.choice.choice_id in alive, "a commit for a choice that has ended"
            self.streams[commit.choice.choice_id] += commit.new_token_ids
            assert commit.finish_reason == commit.choice.finish_reason
        self.check()
        return commits

    def abort(self, choice: Choice) -> None:
        was_alive = not choice.finished
        assert self.scheduler.finish(choice, "abort") == was_alive
        assert not self.scheduler.finish(choice, "error")
        self.check()

    def preempt(self, choice: Choice) -> None:
        """Preempts a running choice, as a lack of blocks would."""
        self.scheduler.state.preempt(choice)
        self.check()

    def evict(self) -> None:
        self.scheduler.clear_prefix_cache()
        self.check()

    def expire(self, now: float) -> None:
        for commit in self.scheduler.expire(now):
            assert commit.finish_reason == commit.choice.finish_reason == "timeout"
            assert commit.choice.deadline is not None and commit.choice.deadline <= now
        self.check()

    def drain(self, pick: Pick) -> None:
        """Runs until nothing is left, within a bound on steps, and looks whether everything came back."""
        left = sum(len(answer) for answer, _ in self.answers) + sum(choice.prompt_len for choice in self.choices)
        bound = 8 * (left + 8) * (1 + self.config.run_ahead)
        while self.scheduler.has_work or self.steps:
            bound -= 1
            assert bound > 0, "no end in sight"
            if not self.dispatch(pick) and self.steps:
                self.commit()
        assert self.scheduler.pool.num_available == self.config.num_blocks, "blocks leaked"
        assert len(self.scheduler.state.free_slots) == self.config.max_num_seqs, "slots leaked"
        assert not self.scheduler.state.siblings and not len(self.scheduler.state.waiting)
        for choice in self.choices:
            assert choice.finished

    def check(self) -> None:
        self.scheduler.check_invariants()
        for choice, (answer, reason), stream in zip(self.choices, self.answers, self.streams, strict=True):
            output = choice.output_token_ids.tolist()
            assert output == stream, "commits and outputs differ"
            assert output == answer[: len(output)], f"{choice}: {output} isn't a prefix of {answer}"
            if choice.finish_reason in ("stop", "length", "repetition"):
                assert output == answer, f"{choice} ended early"
                assert choice.finish_reason == reason, f"{choice}: {choice.finish_reason} instead of {reason}"
            wanted = choice.draft_len
            if not choice.finished and wanted.most and not wanted.now and not wanted.rest_len:
                assert self._is_drafting(choice), f"{choice} waits for the result of a probe that nobody runs"

    def _is_drafting(self, choice: Choice) -> bool:
        """Whether drafts of it are in flight whose result will be applied."""
        return any(
            planned is choice and epoch == choice.epoch and drafts_len
            for plan, _ in self.steps
            for planned, epoch, drafts_len in zip(plan.choices, plan.epochs, plan.num_drafts, strict=True)
        )


def make_config(**changes: Any) -> SchedulerConfig:
    """A small scheduler without surprises: no adaptation, no run-ahead, plenty of blocks."""
    settings: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_model_len": 32,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "num_blocks": 64,
        "adaptive_drafts": None,
        "run_ahead": 0,
    }
    return SchedulerConfig(**{**settings, **changes})


def make_world(model: HashModel | None = None, **changes: Any) -> World:
    """A world of that, whose answers don't end by themselves."""
    return World(make_config(**changes), model or HashModel(eos_every=0))


def everything(most: int) -> tuple[int, int]:
    """All drafts are found, and right."""
    return most, most


def nothing(most: int) -> tuple[int, int]:
    """All drafts are found, and wrong."""
    return most, 0
