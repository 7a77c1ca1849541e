"""Whole logits of sequences, teacher-forced over a paged pool in chunks, by any implementation in any dtype.

What an engine computes between the token ids and the sampler, without scheduler, buckets or sampler: rows of several
sequences in one call, first prompts in chunks, then a token at a time.

Shape letters: R rows, T packed tokens, P block-table columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.models.config import ModelConfig
from jaxserve.models.fused import GPU
from jaxserve.models.registry import build
from jaxserve.runner.attend import PagedAttention, attention_specs
from pallas_kernels.ragged_paged_attention.types import RaggedBatch


@dataclass(frozen=True)
class Case:
    """A prompt with the greedy answer that is known for it."""

    prompt: list[int]
    answer: list[int]
    best: np.ndarray  # float[len(answer)], logit of each token of the answer
    margins: np.ndarray  # float[len(answer)], its lead over the second

    @property
    def forced(self) -> list[int]:
        """The tokens that are fed; the last of the answer needs none after it."""
        return [*self.prompt, *self.answer[:-1]]


class Scorer:
    """One model in one dtype, attending in one way."""

    NUM_ROWS = 8

    def __init__(
        self,
        config: ModelConfig,
        params: Any,  # of any float dtype
        *,
        dtype: str,
        implementation: str,
        block_size: int,
        max_len: int,
    ) -> None:
        gpu = GPU.of(jax.devices()[0]) if implementation == "pallas_gpu" else "not asked for"
        model = build(config, dtype=dtype, padded_vocab=config.vocab_size, gpu=gpu)
        specs = attention_specs(config, block_size=block_size, dtype=dtype, kv_dtype=dtype, shards=1)
        mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
        self._attention = attention = PagedAttention(specs, implementation, mesh)
        self._block_size = block_size
        self._table = np.arange(self.NUM_ROWS * -(-max_len // block_size), dtype=np.int32).reshape(self.NUM_ROWS, -1)
        self.params = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, model.params)

        def run(params: Any, pools: Any, tokens: jax.Array, positions: jax.Array, batch: RaggedBatch) -> Any:
            hidden, pools = model.hidden(params, tokens, positions, pools, attention.bind(batch))
            return model.logits(params, hidden), pools

        self._run = jax.jit(run, donate_argnums=1)

    def logits(
        self, sequences: Sequence[Sequence[int]], prompt_lens: Sequence[int], chunk_len: int
    ) -> list[np.ndarray]:  # float32[len(sequence), V] each
        """Prompts in chunks of ``chunk_len``, beside rows that are done with theirs and get a token at a time."""
        pools = jax.jit(lambda: self._attention.empty_pools(self._table.size))()
        done = [0] * len(sequences)
        rows: list[list[np.ndarray]] = [[] for _ in sequences]
        while any(start < len(sequence) for start, sequence in zip(done, sequences, strict=True)):
            widths = [
                min(chunk_len, prompt_len - start) if start < prompt_len else min(1, len(sequence) - start)
                for start, prompt_len, sequence in zip(done, prompt_lens, sequences, strict=True)
            ]
            arguments = self.arguments(sequences, done, widths, chunk_len * len(sequences))
            on_device, pools = self._run(self.params, pools, *arguments)
            packed = np.asarray(on_device)
            for row, (end, width) in enumerate(zip(np.cumsum(widths), widths, strict=True)):
                rows[row].append(packed[end - width : end])
                done[row] += width
        return [np.concatenate(parts) for parts in rows]

    def lowered(self) -> str:
        """The program of a step of one token, before any compiler has seen it."""
        pools = jax.eval_shape(lambda: self._attention.empty_pools(self._table.size))
        return self._run.lower(self.params, pools, *self.arguments([[0]], [0], [1], self.NUM_ROWS)).as_text()

    def arguments(
        self, sequences: Sequence[Sequence[int]], done: Sequence[int], widths: Sequence[int], most: int
    ) -> tuple[jax.Array, jax.Array, RaggedBatch]:
        """Token ids, positions and batch of a step; T is the number of rows where it fits, else ``most``."""
        R, B, used = self.NUM_ROWS, self._block_size, sum(widths)
        T = R if used <= R else max(most, R)
        tokens, positions = np.zeros(T, np.int32), np.zeros(T, np.int32)
        block, context = np.full(T, self._table.size, np.int32), np.zeros(R, np.int32)
        ends = np.zeros(R + 1, np.int32)
        for row in range(R):
            width, start = (widths[row], done[row]) if row < len(widths) else (0, 0)
            ends[row + 1] = ends[row] + width
            at = slice(ends[row], ends[row + 1])
            positions[at] = np.arange(start, start + width)
            block[at] = self._table[row, positions[at] // B]
            if width:
                tokens[at] = sequences[row][start : start + width]
                context[row] = start + width
        parts = (self._table, context, ends, block, positions % B)
        return jnp.asarray(tokens), jnp.asarray(positions), RaggedBatch(*(jnp.asarray(part) for part in parts))


def score(scorer: Scorer, cases: Sequence[Case], chunk_len: int) -> list[np.ndarray]:  # float32[len(answer), V] each
    """The logits from which each token of the answers is chosen."""
    prompt_lens = [len(case.prompt) for case in cases]
    logits = scorer.logits([case.forced for case in cases], prompt_lens, chunk_len)
    return [rows[prompt_len - 1 :] for rows, prompt_len in zip(logits, prompt_lens, strict=True)]


def rms(x: np.ndarray) -> np.ndarray:  # float[T, V] -> float[T]
    return np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=1))
