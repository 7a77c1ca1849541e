"""What a tiny model must say: dense attention over the whole prefix for every token, on weights read by other code.

Nothing here knows of caches, chunks, batches or slots.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dense_attention import dense_attend
from hf_tree import model_config, param_tree
from safetensors.numpy import load_file
from sampling_reference import Case, gumbel_of, kept_ids, noise_bits, processed
from tiny_engines import GOLDEN

from jaxserve import SamplingParams
from jaxserve.models.registry import Model, Params, build

LENGTH = 96  # one compiled shape: what follows a token can't change it


class Reference:
    """One tiny model.

    ``change(model, params) -> params`` replaces its weights; ``round_kv`` is that of ``dense_attend``.
    """

    def __init__(
        self,
        name: str,
        change: Callable[[Model, Params], Params] | None = None,
        round_kv: Callable[[jax.Array], jax.Array] | None = None,
    ) -> None:
        path = GOLDEN / "tiny" / name
        config = model_config(json.loads((path / "config.json").read_text()))
        model = build(config, dtype="float32", padded_vocab=config.vocab_size)
        params = param_tree(load_file(path / "model.safetensors"), config, config.vocab_size)
        if change is not None:
            params = change(model, params)
        golden = np.load(path / "golden.npz")
        self.vocab_size = config.vocab_size
        self.prompt: list[int] = golden["prompt"].tolist()
        self.hf_logits: np.ndarray = golden["logits"]  # float32[T, V], of transformers

        @jax.jit
        def run(params, token_ids):
            positions = jnp.arange(LENGTH, dtype=jnp.int32)
            pools = (None,) * config.num_layers
            hidden, _ = model.hidden(params, token_ids, positions, pools, dense_attend(config, round_kv))
            return model.logits(params, hidden)

        self._run = functools.partial(run, params)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float32[len(tokens), V]"""
        padded = np.pad(np.asarray(tokens, np.int32), (0, LENGTH - len(tokens)))
        return np.asarray(self._run(padded))[: len(tokens)]

    def logprobs(self, tokens: list[int]) -> np.ndarray:
        """float64[len(tokens), V], of the raw distribution."""
        logits = self.logits(tokens).astype(np.float64)
        top = logits.max(axis=1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))

    def follow(self, prompt: list[int], params: SamplingParams, **case: Any) -> tuple[list[int], float]:
        """The output for ``params``, one token at a time, and the smallest lead that a token had over the second.

        ``case``: further arguments of ``leads``.
        """
        output, leads = self.leads(prompt, params, **case)
        return output, min(leads, default=np.inf)

    def leads(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        eos: tuple[int, ...] = (2,),
        index: int = 0,
        bad_words: list[list[int]] | None = None,
    ) -> tuple[list[int], list[float]]:
        """The output for ``params``, and each token's lead over the second.

        Ends like the engine: at a stop id or EOS (once ``min_tokens`` allow it), or at ``max_tokens``.
        """
        case = Case(params, prompt, [], bad_words or [], eos, params.seed or 0, index)
        stops = {*(() if params.ignore_eos else eos), *(params.stop_token_ids or ())}
        output: list[int] = []
        leads: list[float] = []
        while len(output) < (params.max_tokens or 0):
            scores = processed(self.logits(prompt + output)[-1], case, output)
            if params.temperature > 0:
                keep = sorted(kept_ids(scores, params.temperature, params.top_k, params.top_p, params.min_p))
                noise = gumbel_of(noise_bits(case.seed, index, len(output), self.vocab_size))
                kept = np.full(self.vocab_size, -np.inf)
                kept[keep] = scores[keep] + params.temperature * noise[keep]
                scores = kept
            second, first = np.sort(scores)[-2:]
            leads.append(float(first - second))
            output.append(int(scores.argmax()))
            if output[-1] in stops and len(output) >= params.min_tokens:
                break
        return output, leads
