"""What steps cost, without a clock."""

from itertools import pairwise
from pathlib import Path

import pytest

from jaxserve.engine.step_cost import fixed_step_cost, step_cost
from jaxserve.models.registry import build
from jaxserve.scheduler.filling import tokens_to_run
from jaxserve.weights.config_file import read_model_toml

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
GPU_SIZES = (512, 1024, 2048, 4096, 8192)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_steps_cost_more_the_more_they_hold(platform):
    costs = [step_cost(platform, n) for n in range(1, 4096)]
    assert costs[0] == 1.0
    assert all(a < b for a, b in pairwise(costs))
    assert step_cost(platform, 8192) == pytest.approx(2 * step_cost(platform, 4096))


def test_a_large_step_is_its_tokens_and_what_none_would_cost():
    for platform, shortest, longest in (("cpu", 20, 60), ("tpu", 200, 300)):  # bound by arithmetic, by reading weights
        assert shortest < fixed_step_cost(platform, 2e8) < longest


@pytest.mark.parametrize(
    ("shape", "alone", "beside_256"),
    [("smollm2-135m", 4300, 2146), ("qwen3-0.6b", 4096, 2048), ("llama-3.1-8b", 4096, 2048)],
)
def test_the_smaller_the_layers_the_less_is_a_step_cut(shape, alone, beside_256):
    config = read_model_toml(CONFIGS / f"{shape}.toml")
    model = build(config, dtype="bfloat16", padded_vocab=config.vocab_size)
    cost = fixed_step_cost("gpu", model.layer_size)
    assert tokens_to_run(4300, 1, GPU_SIZES, cost) == alone
    assert tokens_to_run(2146, 256, GPU_SIZES, cost) == beside_256
