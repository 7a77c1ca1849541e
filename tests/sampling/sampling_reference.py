"""The sampler's rules once more, in plain Python and numpy: one position at a time, with sorting, from token lists."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import numpy as np

from jaxserve.config import Limits
from jaxserve.sampling.host import host_row
from jaxserve.sampling.state import SamplingState, init_state, reset_rows
from jaxserve.sampling_params import SamplingParams

LIMITS = Limits(max_stop_token_ids=4, max_logit_bias=3, max_bad_words=3, max_bad_word_len=3, max_logprobs=5)

_reset = jax.jit(reset_rows)


@dataclass
class Case:
    """One choice: its settings and its tokens so far."""

    params: SamplingParams
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    bad_words: list[list[int]] = field(default_factory=list)
    eos: tuple[int, ...] = (2,)
    seed: int = 7
    index: int = 0

    def row(self, vocab_size: int, limits: Limits = LIMITS) -> dict[str, np.ndarray]:
        return host_row(
            self.params,
            seed=self.seed,
            choice_index=self.index,
            eos_token_ids=self.eos,
            prompt_len=len(self.prompt),
            bad_words_ids=self.bad_words,
            vocab_size=vocab_size,
            limits=limits,
        )


def history(cases: list[Case], max_len: int, rubbish: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token history [R, max_len] (rubbish past the end) and lengths [R]."""
    tokens = np.full((len(cases), max_len), rubbish, np.int32)
    lengths = np.array([len(c.prompt) + len(c.output) for c in cases], np.int32)
    for row, case in zip(tokens, cases, strict=True):
        row[: len(case.prompt) + len(case.output)] = case.prompt + case.output
    return tokens, lengths


def state_of(
    cases: list[Case], vocab_size: int, max_len: int = 16, state: SamplingState | None = None
) -> SamplingState:
    """A state whose slot i belongs to cases[i]."""
    tokens, lengths = history(cases, max_len)
    rows = [case.row(vocab_size) for case in cases]
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    state = init_state(len(cases), vocab_size, LIMITS) if state is None else state
    return _reset(state, np.arange(len(cases), dtype=np.int32), stacked, tokens, lengths)


def processed(logits: np.ndarray, case: Case, output: list[int]) -> np.ndarray:
    """What the draw at output position len(output) sees, before temperature."""
    params = case.params
    out = logits.astype(np.float64).copy()
    if params.allowed_token_ids is not None:
        for token in range(len(out)):
            if token not in params.allowed_token_ids:
                out[token] = -np.inf
    allowed = out.copy()
    for word in case.bad_words:
        prefix = list(word[:-1])
        if len(output) >= len(prefix) and output[len(output) - len(prefix) :] == prefix:
            out[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        for token in set(case.eos) | set(params.stop_token_ids or ()):
            out[token] = -np.inf
    if np.all(out == -np.inf):
        out = allowed
    for token, value in (params.logit_bias or {}).items():
        out[token] += value
    for token in set(case.prompt) | set(output):
        if out[token] > 0:
            out[token] /= params.repetition_penalty
        else:
            out[token] *= params.repetition_penalty
    for token in set(output):
        out[token] -= params.frequency_penalty * output.count(token)
        out[token] -= params.presence_penalty
    return out


def noise_bits(seed: int, choice_index: int, output_index: int, width: int) -> np.ndarray:
    """uint32[width] by jax.random: of ids 512 apart, the lower has the high word of an element, the other the low."""
    word = seed & 0xFFFFFFFFFFFFFFFF
    with jax.enable_x64(True), jax.threefry_partitionable(True):
        key = jax.random.wrap_key_data(np.array([word >> 32, word & 0xFFFFFFFF], np.uint32), impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, choice_index), output_index)
        words = np.asarray(jax.random.bits(key, (-(-width // 1024) * 512,), np.uint64)).reshape(-1, 1, 512)
    return np.concatenate([words >> 32, words & 0xFFFFFFFF], axis=1).reshape(-1)[:width].astype(np.uint32)


def gumbel_of(bits: np.ndarray) -> np.ndarray:
    """float64: standard Gumbel noise of 32 random bits."""
    return -np.log(-np.log1p(-(bits.astype(np.float64) + 0.5) * 2.0**-32))


def kept_ids(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Truncation by sorting; ids that tie with the last kept one are kept too."""
    with np.errstate(invalid="ignore"):
        scaled = (logits.astype(np.float64) - logits.max()) / temperature
    kept = [v for v in range(len(logits)) if np.exp(scaled[v]) >= min_p]
    if top_k > 0:
        ranked = sorted((logits[v] for v in kept), reverse=True)
        if top_k <= len(ranked):
            kept = [v for v in kept if logits[v] >= ranked[top_k - 1]]
    if top_p < 1.0:
        order = sorted(kept, key=lambda v: -logits[v])
        mass = np.exp(scaled[order])
        reached = np.cumsum(mass) >= top_p * mass.sum()
        last = logits[order[int(np.argmax(reached))]] if reached.any() else -np.inf
        kept = [v for v in kept if logits[v] >= last]
    return set(kept)


def target(logits: np.ndarray, case: Case, output: list[int]) -> np.ndarray:
    """The exact distribution of the next token, float64[V]."""
    params = case.params
    out = processed(logits, case, output)
    probs = np.zeros(len(out))
    if params.temperature == 0:
        probs[int(np.argmax(out))] = 1.0
        return probs
    kept = sorted(kept_ids(out, params.temperature, params.top_k, params.top_p, params.min_p))
    weights = np.exp((out[kept] - out.max()) / params.temperature)
    probs[kept] = weights / weights.sum()
    return probs
