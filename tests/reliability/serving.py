"""LLMs on one real engine, with a scheduler of the test's own and a runner that the test can watch."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from dense_reference import Reference
from tiny_engines import Tiny

from jaxserve import LLM, SamplingParams
from jaxserve.config import Limits, SpeculativeConfig
from jaxserve.engine.core import EngineCore
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.request import Choice
from jaxserve.scheduler.scheduler import Scheduler

K = 4
BLOCK = 4
CONTEXT = 64
GAP = 1e-3  # promise 2: a lead above it is safe from rounding
OUTPUT_LEN = 28
SMALL = {
    "max_model_len": CONTEXT,
    "block_size": BLOCK,
    "max_num_batched_tokens": 40,
    "speculative_config": SpeculativeConfig(num_speculative_tokens=K, prompt_lookup_min=1, prompt_lookup_max=3),
    "repetition": "off",
    "repetition_detection": {"max_pattern_size": 7},
    "limits": Limits(max_stop_token_ids=8, max_logit_bias=4, max_bad_words=4, max_bad_word_len=3, max_logprobs=3),
}
GREEDY = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt and the first ``OUTPUT_LEN`` tokens of its greedy answer, which lead everywhere by more than GAP."""

    prompt: list[int]
    answer: list[int]


def make_cases(count: int = 10) -> list[Case]:
    """Prompts of 1 to 34 tokens, some of them shared prefixes, many of them repetitive."""
    oracle, rng, cases = Reference("llama"), np.random.default_rng(7), []
    lengths = [1, 3, 4, 5, 8, 9, 16, 17, 23, 34]
    while len(cases) < count:
        length = lengths[len(cases)]
        pattern = rng.integers(97, 123, int(rng.integers(1, 7))).tolist()
        prompt = (pattern * length)[:length]
        if len(cases) % 3 == 2:  # shares all but its last token with another prompt
            prompt = (cases[-1].prompt * length)[: length - 1] + prompt[:1]
        answer, lead = oracle.follow(prompt, GREEDY)
        if lead > GAP:
            cases.append(Case(prompt, answer))
    return cases


class Runner:
    """The engine's runner with hooks, which run on the core's thread.

    Attributes:
        before: called with every plan before it's dispatched.
        dispatched: called with every plan after that.
        fetched: gets every plan and result; what it returns is committed.
        draft: (choice, most) -> token ids, instead of the drafts that the device looks up. Needs ``run_ahead=0``.
    """

    def __init__(self, runner: Any) -> None:
        self.real = runner
        self.before: Callable[[StepPlan], None] = lambda plan: None
        self.dispatched: Callable[[StepPlan], None] = lambda plan: None
        self.fetched: Callable[[StepPlan, StepResult], StepResult] = lambda plan, result: result
        self.draft: Callable[[Choice, int], list[int]] | None = None

    def takes_another(self, plans: Sequence[StepPlan]) -> bool:
        return False

    def dispatch(self, plans: Sequence[StepPlan]) -> list[Any]:
        (plan,) = plans
        self.before(plan)
        executables = self.real.executables
        if self.draft is not None:
            self.real.executables = dataclasses.replace(
                executables, stage=lambda slots, packet: self._with_drafts(executables.stage(slots, packet), plan)
            )
        (step,) = self.real.dispatch(plans)
        self.real.executables = executables
        self.dispatched(plan)
        return [step]

    def fetch(self, step: Any) -> StepResult:
        return self.fetched(step.plan, self.real.fetch(step))

    def _with_drafts(self, slots: Any, plan: StepPlan) -> Any:
        """The staged plan with the test's drafts."""
        import jax

        staged = slots.plan
        widths, num_drafts, drafts = (np.array(a) for a in (staged.widths, staged.num_drafts, staged.drafts))
        for row, choice in enumerate(plan.choices):
            if most := int(plan.num_drafts[row]):
                token_ids = self.draft(choice, most)[:most]
                widths[row], num_drafts[row] = 1 + len(token_ids), len(token_ids)
                drafts[row, : len(token_ids)] = token_ids
        changed = {"widths": widths, "num_drafts": num_drafts, "drafts": drafts}
        placed = {name: jax.device_put(value, getattr(staged, name).sharding) for name, value in changed.items()}
        return dataclasses.replace(slots, plan=dataclasses.replace(staged, **placed))

    @property
    def slots(self) -> Any:
        """The device's slots, as numpy: waits for all steps dispatched."""
        import jax

        return jax.tree.map(np.asarray, self.real._slots)

    def replace_slots(self, **fields: Any) -> None:
        """Overwrites fields of the device's slots; nothing may be in flight."""
        import jax

        old = self.real._slots
        new = {name: jax.device_put(value, getattr(old, name).sharding) for name, value in fields.items()}
        self.real._slots = dataclasses.replace(old, **new)


@contextlib.contextmanager
def serve(engine: Tiny, *, strict: bool = True, check: bool = True, **scheduler: Any) -> Iterator[LLM]:
    """An LLM with other settings of its scheduler, whose drafts never pause; ``llm.engine.core.runner`` is a Runner.

    ``check``: look at the scheduler's invariants after every step. The engine may be dead when it's left.
    """
    core = engine.engine.core
    config = dataclasses.replace(core.scheduler.config, **{"adaptive_drafts": None, **scheduler})
    mine = EngineCore(Scheduler(config), Runner(core.runner), strict_compile=strict, check_invariants=check)
    changed = dataclasses.replace(engine.engine.config, scheduling_policy=config.policy)
    served = dataclasses.replace(engine.engine, core=mine, config=changed, max_model_len=config.max_model_len)
    with LLM.from_engine(served) as llm:
        yield llm


def generate(llm: LLM, prompts: Sequence[Any], params: Any = GREEDY, **kwargs: Any) -> list[Any]:
    return llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False, **kwargs)


def ids(llm: LLM, cases: Sequence[Case], params: Any = GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in generate(llm, [case.prompt for case in cases], params)]


def idle(llm: LLM) -> dict[str, Any]:
    """Waits until nothing runs, and looks whether every block and slot came back. The statistics."""
    deadline = time.monotonic() + 30

    def is_idle(scheduler: Scheduler) -> bool:
        if scheduler.has_work or scheduler.num_in_flight:
            return False
        scheduler.check_invariants()
        assert scheduler.pool.num_available == scheduler.config.num_blocks, "blocks leaked"
        assert len(scheduler.state.free_slots) == scheduler.config.max_num_seqs, "slots leaked"
        return True

    while not llm.engine.core.call(is_idle):
        assert time.monotonic() < deadline, llm.engine.core.stats()
        time.sleep(0.001)
    return llm.engine.core.stats()


def knows(cases: Sequence[Case], right: Callable[[int], int] = lambda most: most) -> Callable[[Choice, int], list[int]]:
    """A drafter that knows the answers: of ``most`` drafts the first ``right(most)`` are true, the next is not."""
    answers = {tuple(case.prompt): case.answer for case in cases}

    def draft(choice: Choice, most: int) -> list[int]:
        at = len(choice.output_token_ids)
        token_ids = answers[tuple(choice.prompt_token_ids)][at : at + most]
        if (wrong := right(most)) < len(token_ids):
            token_ids = [*token_ids[:wrong], (token_ids[wrong] + 1) % 128, *token_ids[wrong + 1 :]]
        return token_ids

    return draft


def running(llm: LLM, plan: StepPlan) -> list[Choice]:
    """The choices of a plan that are still in the state that it was made for."""
    return [choice for choice, epoch in zip(plan.choices, plan.epochs, strict=True) if choice.epoch == epoch]
