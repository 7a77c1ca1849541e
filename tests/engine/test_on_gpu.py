"""Honest speed: what runs fast on a Hopper GPU says what the model says. ``pytest -m gpu tests/engine/test_on_gpu.py``.

Each check is a function of a model, an implementation and a dtype. Those marked ``gpu`` are of the real SmolLM2 and of
a slice of Qwen3-0.6B's shape; the same functions run by default on tiny models through plain XLA.

Logit errors are printed and recorded: ``-s``, or ``--junitxml``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scoring import Case, Scorer, rms, score
from speculation_cases import SMALL as FEW_EXECUTABLES
from speculation_cases import prompts
from tiny_engines import GOLDEN, SMALL, generate, ids

from jaxserve import LLM, SamplingParams
from jaxserve.models.linear import einsum
from jaxserve.models.registry import build
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.config_file import read_model_toml
from jaxserve.weights.load import load_params

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"
GetScorer = Callable[[str, str], Scorer]
ON_CARD = pytest.param("card", marks=[pytest.mark.gpu, pytest.mark.real_model])
REAL = pytest.param("real", marks=[pytest.mark.slow, pytest.mark.real_model])


@dataclass(frozen=True)
class Subject:
    """A checkpoint, the answers that are known for it, and how an engine of it is built."""

    model: str
    cases: list[Case]
    settings: dict[str, Any]
    kernel: str  # implementation that runs in bfloat16
    block_size: int
    clear: float  # lead of a float32 answer that bfloat16 must not turn round

    def scorer(self, dtype: str, implementation: str) -> Scorer:
        checkpoint = open_checkpoint(self.model)
        model = build(checkpoint.config, dtype=dtype, padded_vocab=checkpoint.config.vocab_size)
        longest = max(len(case.forced) for case in self.cases)
        return Scorer(
            checkpoint.config, load_params(checkpoint, model, progress=False),
            dtype=dtype, implementation=implementation, block_size=self.block_size, max_len=longest,
        )  # fmt: skip

    def work(self) -> tuple[list[list[int]], list[SamplingParams]]:
        """Prompts and settings that yield the answers."""
        params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False)
        return [case.prompt for case in self.cases], [
            params.with_changes(max_tokens=len(case.answer)) for case in self.cases
        ]


def needs_a_gpu() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA Hopper GPU")


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> Subject:
    """tiny: a random model and the dense oracle. real, card: SmolLM2 and transformers' goldens, here or on a GPU."""
    if request.param == "tiny":
        oracle = request.getfixturevalue("reference")("llama")
        settings = {**SMALL, **FEW_EXECUTABLES}
        texts = [text[:20] for text in prompts()[:5]]
        return Subject(
            str(GOLDEN / "tiny" / "llama"), [oracle_case(oracle, t) for t in texts], settings, "xla", 4, 0.02
        )
    if request.param == "card":
        needs_a_gpu()
    path = request.getfixturevalue("smollm2_path")
    goldens = json.loads((GOLDEN / "smollm2.json").read_text()).values()
    cases = [Case(g["input_ids"], g["greedy"], np.array(g["step_logit_max"]), np.array(g["margin"])) for g in goldens]
    assert sum(len(case.answer) for case in cases) == 172
    kernel = "pallas_gpu" if request.param == "card" else "xla"
    settings = {  # few executables: compiling is what takes the time
        "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 32, "kv_cache_memory_bytes": 256 << 20,
    }  # fmt: skip
    return Subject(path, cases, settings, kernel, 64, 0.25)


@pytest.fixture(scope="module")
def scorer(subject: Subject) -> GetScorer:
    """``scorer(dtype, implementation)``, made the first time it is asked for."""
    return functools.cache(subject.scorer)


def oracle_case(oracle: Any, prompt: list[int], length: int = 24) -> Case:
    answer, _ = oracle.follow(prompt, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
    logits = oracle.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :]
    second, first = np.sort(logits, axis=1)[:, -2:].T
    return Case(prompt, answer, first, first - second)


# -- float32 through plain XLA


def check_answers(subject: Subject, speculative_config: dict[str, Any] | None) -> dict[str, Any]:
    """Every id of every answer; returns the scheduler's counts."""
    with LLM(
        subject.model, skip_tokenizer_init=True, dtype="float32", attention_implementation="xla",
        speculative_config=speculative_config, **{k: v for k, v in subject.settings.items() if k != "dtype"},
    ) as llm:  # fmt: skip
        texts, params = subject.work()
        assert ids(generate(llm, texts, params)) == [case.answer for case in subject.cases]
        (last,) = generate(llm, texts[-1:], params[-1:])  # alone, on another path: few rows go several steps a call
        assert last.outputs[0].token_ids == subject.cases[-1].answer
        return llm.engine.core.stats()


@pytest.mark.parametrize("subject", ["tiny", REAL, ON_CARD], indirect=True)
def test_float32_gives_the_known_answers(subject: Subject) -> None:
    assert check_answers(subject, None)["num_drafted_tokens"] == 0


@pytest.mark.timeout(900)  # for the real model's: 30 layers of a drafter, four times over, compiled on two cores
@pytest.mark.parametrize("subject", ["tiny", REAL, ON_CARD], indirect=True)
@pytest.mark.parametrize("method", ["ngram", "int8"])
def test_drafts_change_no_answer(subject: Subject, method: str) -> None:
    """K = 4. The known answers are those without drafts."""
    config: dict[str, Any] = {"num_speculative_tokens": 4, "adaptive": False, "method": "ngram"}
    if method == "int8":
        config |= {"method": "draft_model", "quantization": "int8"}
    stats = check_answers(subject, config)
    assert 0 < stats["num_accepted_tokens"] < stats["num_drafted_tokens"]
    if method == "int8":
        assert stats["num_accepted_tokens"] > 0.8 * stats["num_drafted_tokens"]


def check_float32_logits(logits: Sequence[np.ndarray], cases: Sequence[Case]) -> float:
    """The answers are the best tokens, with the logits and leads that are known; returns the largest error."""
    worst = 0.0
    for rows, case in zip(logits, cases, strict=True):
        assert rows.argmax(axis=1).tolist() == case.answer
        second, first = np.sort(rows, axis=1)[:, -2:].T
        worst = max(worst, np.abs(first - case.best).max(), np.abs(first - second - case.margins).max())
    assert worst < 2e-3, f"a logit is off by {worst}"  # with TF32's 10 bits of mantissa it is 0.02 and more
    return worst


@pytest.mark.parametrize("subject", ["tiny", REAL, ON_CARD], indirect=True)
def test_float32_is_float32(subject: Subject, scorer: GetScorer, record_property: Any) -> None:
    """By the program: every product is asked for at the highest precision. By the numbers: logits, a bare product."""
    exact = scorer("float32", "xla")
    products = re.findall(r"stablehlo\.dot_general.*", exact.lowered())
    assert len(products) > 2 * 5
    assert all("precision = [HIGHEST, HIGHEST]" in product for product in products)
    error = check_float32_logits(score(exact, subject.cases, 16), subject.cases)
    record_property("largest_logit_error", float(error))
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(shape, np.float32) for shape in ((64, 512), (512, 96)))
    error = np.abs(jax.jit(lambda x, y: einsum("te,ef->tf", x, y))(x, y) - x.astype(np.float64) @ y.astype(np.float64))
    assert error.max() < 1e-4  # of sums of 512 products of unit size; TF32: 1e-2


# -- bfloat16 through the kernel


def clear_disagreements(logits: Sequence[np.ndarray], cases: Sequence[Case], clear: float) -> list[tuple[int, int]]:
    """(case, position) of every token that another one beats although its lead in float32 is clear."""
    return [
        (number, at)
        for number, (rows, case) in enumerate(zip(logits, cases, strict=True))
        for at in np.flatnonzero((rows.argmax(axis=1) != case.answer) & (case.margins > clear)).tolist()
    ]


@pytest.mark.parametrize("subject", ["tiny", REAL, ON_CARD], indirect=True)
def test_bfloat16_agrees_where_the_lead_is_clear(subject: Subject, scorer: GetScorer, record_property: Any) -> None:
    """Teacher-forced; prompts in chunks, answers a token at a time, rows of both kinds in one step."""
    subject_scorer = scorer("bfloat16", subject.kernel)
    assert ("post_attention" in subject_scorer.lowered()) == (subject.kernel == "pallas_gpu")
    ours = score(subject_scorer, subject.cases, 16)
    exact = score(scorer("float32", "xla"), subject.cases, 16)
    agree = sum(int((r.argmax(axis=1) == case.answer).sum()) for r, case in zip(ours, subject.cases, strict=True))
    total = sum(len(case.answer) for case in subject.cases)
    errors = np.concatenate([np.abs(one - other).ravel() for one, other in zip(ours, exact, strict=True)])
    figures = {"agree": f"{agree}/{total}", "largest_logit_error": errors.max(), "mean_logit_error": errors.mean()}
    for name, value in figures.items():
        record_property(name, str(value))
    print(figures)
    assert sum(int((case.margins > subject.clear).sum()) for case in subject.cases) > total // 2
    assert clear_disagreements(ours, subject.cases, subject.clear) == []


@pytest.mark.parametrize("subject", ["tiny"], indirect=True)
def test_what_is_wrong_is_seen(subject: Subject, scorer: GetScorer) -> None:
    """Rounded logits fail as float32, and noise of the size of the leads turns clear answers round."""
    logits = score(scorer("bfloat16", "xla"), subject.cases, 16)
    with pytest.raises(AssertionError):
        check_float32_logits(logits, subject.cases)
    rng = np.random.default_rng(0)
    noisy = [rows + rng.normal(scale=5 * subject.clear, size=rows.shape) for rows in logits]
    assert clear_disagreements(noisy, subject.cases, subject.clear)


# -- the kernel against XLA on random weights


def check_as_near_as_xla(exact: list[np.ndarray], xla: list[np.ndarray], ours: list[np.ndarray]) -> dict[str, float]:
    """In bfloat16 the kernel errs no more than XLA does, of what float32 says with the same weights.

    Both round activations to 8 bits of mantissa in the same places, so their errors are alike in size and independent
    in sign; a kernel also rounds the softmax weights. A quarter more in the mean, and twice XLA's worst token for any
    token, is the room for that and for chance.
    """
    errors = {
        name: np.concatenate([rms(one - other) for one, other in zip(logits, exact, strict=True)])
        for name, logits in (("xla", xla), ("ours", ours))
    }
    figures = {
        f"{name}_{how}": float(f(e)) for name, e in errors.items() for how, f in (("mean", np.mean), ("max", np.max))
    }
    print(figures)
    assert figures["ours_mean"] < 1.25 * figures["xla_mean"], figures
    assert figures["ours_max"] < 2 * figures["xla_max"], figures
    return figures


class RandomModel:
    """Random weights that bfloat16 holds exactly, and sequences of random tokens."""

    def __init__(self, toml: Path, num_layers: int, block_size: int, lens: Sequence[tuple[int, int]]) -> None:
        checkpoint = open_checkpoint(str(toml), "dummy")
        config = read_model_toml(toml)
        self.config = dataclasses.replace(config, layers=config.layers[:num_layers])
        model = build(self.config, dtype="bfloat16", padded_vocab=config.vocab_size)
        checkpoint = dataclasses.replace(checkpoint, config=self.config)
        self.params = load_params(checkpoint, model, progress=False, seed=0)
        self.block_size = block_size
        rng = np.random.default_rng(0)
        self.sequences = [rng.integers(0, config.vocab_size, a + b).tolist() for a, b in lens]
        self.prompt_lens = [a for a, _ in lens]

    def logits(self, dtype: str, implementation: str, chunk_len: int, params: Any = None) -> list[np.ndarray]:
        scorer = Scorer(
            self.config, self.params if params is None else params, dtype=dtype, implementation=implementation,
            block_size=self.block_size, max_len=max(map(len, self.sequences)),
        )  # fmt: skip
        return scorer.logits(self.sequences, self.prompt_lens, chunk_len)


@pytest.mark.gpu
def test_the_kernel_errs_no_more_than_xla(record_property: Any) -> None:
    """Four layers of Qwen3-0.6B's shape: chunks of 64, contexts over several blocks, then a token at a time."""
    needs_a_gpu()
    model = RandomModel(CONFIGS / "qwen3-0.6b.toml", 4, 64, [(150, 8), (40, 30), (130, 1), (64, 12)])
    exact, xla = model.logits("float32", "xla", 64), model.logits("bfloat16", "xla", 64)
    for name, value in check_as_near_as_xla(exact, xla, model.logits("bfloat16", "pallas_gpu", 64)).items():
        record_property(name, str(value))


def test_so_it_is_judged() -> None:
    """Other chunks pass; a layer's weights a twentieth too large don't."""
    model = RandomModel(Path(__file__).with_name("tiny_dummy.toml"), 1, 4, [(30, 8), (9, 20), (25, 1)])
    exact, xla = model.logits("float32", "xla", 8), model.logits("bfloat16", "xla", 8)
    for one, other in itertools.pairwise([exact, model.logits("float32", "xla", 5)]):
        np.testing.assert_allclose(np.concatenate(one), np.concatenate(other), atol=1e-5)
    check_as_near_as_xla(exact, xla, model.logits("bfloat16", "xla", 5))
    layers = [jax.tree.map(lambda leaf: (leaf * 1.05).astype(jnp.bfloat16), model.params["layers"][0])]
    wrong = {**model.params, "layers": layers}
    with pytest.raises(AssertionError):
        check_as_near_as_xla(exact, xla, model.logits("bfloat16", "xla", 8, wrong))
