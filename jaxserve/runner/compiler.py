"""What each executable is compiled of: a function, abstract arguments, what it donates, where its results lie."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxserve.models.quantized import Fp8Weight, packed_kinds
from jaxserve.models.registry import Model
from jaxserve.runner import draft, step
from jaxserve.runner.attend import POOL, WHOLE, PagedAttention
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.draft import DraftModel
from jaxserve.runner.executables import BurstKey, SampleKey
from jaxserve.runner.packet import Fields, packet_len
from jaxserve.runner.state import Scratch, SlotState
from pallas_kernels.gumbel_argmax import api as gumbel_argmax
from pallas_kernels.ragged_paged_attention.types import KVPool
from pallas_kernels.truncation_threshold import api as truncation_threshold

ADMISSION_ROWS = 8  # admissions in one upload
PROMPT_SCORE_TOKENS = 256  # prompt tokens that one call scores
_NO_GRAPHS = {"xla_gpu_graph_min_graph_size": 1 << 30}  # kernels of a graph, at least
# Weights of a layer times tokens, for which an H100 takes as long as a slow host for launching a layer's twelve kernels
# one by one: 1024 tokens of Qwen3-0.6B are 16e9, and take 3 ms where the launches take up to 6.
_MOST_WORK_OF_A_GRAPH = 24e9
# While a Triton product of 64 rows is loaded that has run, each launch on an H100 takes 0.36 us more: 0.12 ms a step.
# cuBLAS is slower for 8 rows, 6% slower for 64, and faster from 128 rows on: see docs/performance.md.
# Products in fp8 are its own whatever their rows: XLA tunes its Triton products for minutes.
_CUBLAS = {"xla_gpu_enable_triton_gemm": False}
_FEWEST_CUBLAS_ROWS = 64


@dataclass(frozen=True)
class Task:
    """One executable to be. Profiles and compile logs show its name.

    Attributes:
        name: says everything in which the tasks of one ``Compiler`` differ.
        args: shapes with shardings, or arrays.
        donate: which of them.
        out: shardings of the results.
        options: of XLA's compiler, where they differ from its own.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    donate: tuple[int, ...]
    out: Any
    options: Mapping[str, Any] | None = None

    def lower(self) -> jax.stages.Lowered:
        """Traces."""

        def call(*args: Any) -> Any:
            return self.function(*args)

        call.__name__ = call.__qualname__ = self.name
        # Not with keep_unused: JAX 0.11 then never frees what was traced, nor what is compiled from it.
        return jax.jit(call, donate_argnums=self.donate, out_shardings=self.out).lower(*self.args)


@dataclass(frozen=True)
class Compiler:
    """Makes tasks for one model on one mesh.

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

    def forward(self, num_tokens: int, num_rows: int) -> Task:
        models, params, kv = self._trunks()
        run = functools.partial(
            step.forward,
            models=models,
            config=self.config,
            num_tokens=num_tokens,
            num_rows=num_rows,
        )
        out = (self._pools(kv), self._whole(self.scratch))
        args = (params, kv, self.slots, self.scratch)
        is_graph = num_tokens <= num_rows or self._launch_bound(num_tokens)
        options = self._layer_options(num_tokens, params, is_graph=is_graph)
        return Task(f"forward_{num_tokens}x{num_rows}", run, args, (1, 3), out, options)

    def burst(self, key: BurstKey) -> Task:
        models, params, kv = self._trunks()
        run = functools.partial(
            step.burst,
            models=models,
            config=self.config,
            tier=key.tier,
            implementations=tuple(self.sampler_implementation(model) for model, _ in models),
            num_tokens=key.num_tokens,
            num_rows=key.num_rows,
        )
        heads: tuple[Any, ...] = (self.model.head_params(self.params),)
        if self.drafter is not None:
            heads += (self.drafter.params,)
        packets = self._words(key.num_steps, packet_len(self.config))
        args = (params, heads, kv, self.slots, packets)
        out = (self._pools(kv), self._whole(self.slots), self._sharding(WHOLE))
        name = f"burst_{key.tier.name.lower()}_{key.num_tokens}x{key.num_rows}"
        return Task(name, run, args, (2, 3), out, self._layer_options(key.num_tokens, (params, heads)))

    def sample(self, key: SampleKey) -> Task:
        run = functools.partial(
            step.sample,
            model=self.model,
            config=self.config,
            tier=key.tier,
            implementation=self.sampler_implementation(self.model),
            num_rows=key.num_rows,
            num_drafts=key.num_drafts,
        )
        name = f"sample_{key.tier.name.lower()}_{key.num_rows}x{key.num_drafts + 1}"
        out = (self._whole(self.slots), self._sharding(WHOLE))
        args = (self.model.head_params(self.params), self.slots, self.scratch)
        return Task(name, run, args, (1,), out, self._no_graphs)

    def propose(self, drafter: DraftModel, key: SampleKey) -> Task:
        run = functools.partial(
            draft.propose,
            model=drafter.model,
            attention=drafter.attention,
            config=self.config,
            tier=key.tier,
            implementation=self.sampler_implementation(drafter.model),
            num_rows=key.num_rows,
        )
        name = f"propose_{key.tier.name.lower()}_{key.num_rows}x{key.num_drafts}"
        out = (self._pools(self.draft_kv), self._whole(self.slots))
        options = self._layer_options(key.num_rows, drafter.params)
        return Task(name, run, (drafter.params, self.draft_kv, self.slots), (1, 2), out, options)

    def stage(self) -> Task:
        run = functools.partial(step.stage, config=self.config)
        args = (self.slots, self._words(packet_len(self.config)))
        return Task("stage", run, args, (0,), self._whole(self.slots), self._no_graphs)

    def admit(self) -> Task:
        run = functools.partial(step.admit, fields=self.fields)
        words = self._words(ADMISSION_ROWS, self.fields.num_words)
        return Task("admit", run, (self.slots, words), (0,), self._whole(self.slots), self._no_graphs)

    def prompt_scores(self) -> Task:
        run = functools.partial(
            step.prompt_scores,
            model=self.model,
            config=self.config,
            num_tokens=self.prompt_score_tokens,
        )
        args = (self.model.head_params(self.params), self.slots, self.scratch, self._words(3))
        return Task("prompt_scores", run, args, (), self._sharding(WHOLE), self._no_graphs)

    def sampler_implementation(self, model: Model) -> str:
        """Of the sampler's kernels, see ``sampler.sample``.

        They read whole rows of logits, so they take one device. They run where attention's kernels do: what asks for
        plain XLA there gets it here.
        """
        one_device = self.attention.mesh.devices.size == 1
        if self.attention.implementation != "pallas_gpu" or not one_device:
            return "xla"
        refused = gumbel_argmax.supports(self.config.vocab_size, model.padded_vocab) or truncation_threshold.supports(
            model.padded_vocab
        )
        return "xla" if refused else "pallas_gpu"

    @property
    def prompt_score_tokens(self) -> int:
        return min(PROMPT_SCORE_TOKENS, self.config.max_num_batched_tokens)

    @property
    def _no_graphs(self) -> Mapping[str, Any] | None:
        """Options of what XLA:GPU shall launch kernel by kernel.

        What takes a packet from the host or gives the host a result has another address for it in each step: its graph
        would be recorded anew each time, which takes longer than to launch its few kernels.
        """
        return _NO_GRAPHS if self._platform == "gpu" else None

    def _launch_bound(self, num_tokens: int) -> bool:
        """Whether a step's kernels take the device less time than launching them one by one takes the host.

        Then they are a graph. Otherwise the first of them had better run while the host launches the others: a graph is
        launched when all of it has been recorded. A draft model's layers, in the same step, are no larger.
        """
        return self.model.layer_size / self.attention.mesh.size * num_tokens <= _MOST_WORK_OF_A_GRAPH

    def _layer_options(self, num_tokens: int, params: Any, *, is_graph: bool = True) -> Mapping[str, Any] | None:
        """Options for XLA:GPU of what runs layers with ``params``: whether as a graph, and with whose products."""
        if self._platform != "gpu":
            return None
        kinds = packed_kinds(params)
        # Not cuBLAS where a product unpacks its weight: XLA would widen that to a copy first.
        by_cublas = kinds == {Fp8Weight} or (not kinds and is_graph and num_tokens >= _FEWEST_CUBLAS_ROWS)
        return {**({} if is_graph else _NO_GRAPHS), **(_CUBLAS if by_cublas else {})} or None

    @property
    def _platform(self) -> str:
        return self.attention.mesh.devices.flat[0].platform

    def _trunks(self) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Models with their attention, parameters, pools: of the target, then of the draft model."""
        models, params, kv = [(self.model, self.attention)], [self.model.trunk_params(self.params)], [self.kv]
        if (drafter := self.drafter) is not None:
            models.append((drafter.model, drafter.attention))
            params.append(drafter.model.trunk_params(drafter.params))
            kv.append(self.draft_kv)
        return tuple(models), tuple(params), tuple(kv)

    def _sharding(self, spec: Any) -> NamedSharding:
        return NamedSharding(self.attention.mesh, spec)

    def _pools(self, kv: Any) -> Any:
        return jax.tree.map(lambda _: self._sharding(POOL), kv)

    def _whole(self, tree: Any) -> Any:
        return jax.tree.map(lambda _: self._sharding(WHOLE), tree)

    def _words(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=self._sharding(WHOLE))
