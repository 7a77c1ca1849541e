"""Real engines of tiny random models, built once and shared: a runner is expensive, a scheduler and a core are not.

So most tests take ``Tiny.llm(**settings of the scheduler)``: another scheduler and core over the runner of one engine,
which also means that every test finds the device as dirty as the last one left it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.engine.build import build_engine
from jaxserve.engine.core import EngineCore, StepRunner
from jaxserve.outputs import RequestOutput
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.scheduler import Scheduler

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FAMILIES = ("llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma3")
SMALL = {
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 80,
    "block_size": 4,
    "kv_cache_memory_bytes": 1 << 20,
    "strict_compile": True,
    "dtype": "float32",
}
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


class Watched:
    """A StepRunner that shows its plans."""

    def __init__(self, runner: StepRunner, watch: Callable[[StepPlan], None]) -> None:
        self.fetch, self.takes_another = runner.fetch, runner.takes_another
        self._dispatch, self._watch = runner.dispatch, watch

    def dispatch(self, plans: Sequence[StepPlan]) -> Sequence[Any]:
        for plan in plans:
            self._watch(plan)
        return self._dispatch(plans)


class Tiny:
    """One engine of a tiny model, and LLMs on variations of it, one at a time: they share the pool."""

    def __init__(self, name: str, tokenizer: str | None, **settings: Any) -> None:
        if name == "dummy":
            where = {"model": str(Path(__file__).with_name("tiny_dummy.toml")), "load_format": "dummy"}
        elif name.endswith(".gguf"):
            where = {"model": name}
        else:
            where = {"model": str(GOLDEN / "tiny" / name)}
        self.config = EngineConfig(**{**where, "tokenizer": tokenizer, **SMALL, **settings})
        self.engine = build_engine(self.config, progress=False)
        self.vocab_size = self.engine.model_config.vocab_size

    @contextlib.contextmanager
    def llm(self, watch: Callable[[StepPlan], None] | None = None, **scheduler: Any) -> Iterator[LLM]:
        """The engine with other settings of its scheduler (``SchedulerConfig``), checked after every step.

        ``watch`` sees every plan before it is dispatched.
        """
        core = self.engine.core
        config = dataclasses.replace(core.scheduler.config, **scheduler)
        runner = core.runner if watch is None else Watched(core.runner, watch)
        engine = dataclasses.replace(
            self.engine,
            core=EngineCore(Scheduler(config), runner, strict_compile=True, check_invariants=True),
            config=dataclasses.replace(self.engine.config, scheduling_policy=config.policy),
        )
        with LLM.from_engine(engine) as llm:
            yield llm
            llm.engine.core.check_health()

    def close(self) -> None:
        self.engine.core.shutdown()


def generate(llm: LLM, prompts: Sequence[Any], params: Any = GREEDY, **kwargs: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False, **kwargs)


def ids(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """Token ids of every choice, requests one after the other."""
    return [choice.token_ids for output in outputs for choice in output.outputs]


def preemptions(llm: LLM) -> int:
    return llm.engine.core.stats()["num_preemptions"]
