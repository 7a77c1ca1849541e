"""What steps cost on this kind of machine, without a clock."""

from __future__ import annotations

from itertools import pairwise

# By platform: what steps of so many tokens take, in units of a step of one. CPU: SmolLM2-135M in float32 on two cores,
# one row in the first two steps and eight in the others, one sampled position each. GPU: the matrix products of
# Llama-3.1-8B and Qwen3-0.6B in bfloat16 on one H100, between the two; from 512 tokens on they're bound by arithmetic.
# TPUs haven't been timed; they read and compute in a similar proportion.
_STEP_COSTS = {
    "cpu": ((1, 1.0), (8, 1.9), (64, 3.4), (512, 17.0)),
    "gpu": ((1, 1.0), (512, 2.3), (1024, 4.3)),
    "tpu": ((1, 1.0), (512, 2.3), (1024, 4.3)),
}
# Weights times tokens that an H100 multiplies in 20 us: a layer of Qwen3-0.6B takes so much longer than reading it.
_LAUNCHES = 5e9


def step_cost(platform: str, num_tokens: int) -> float:
    """Of a step that computes ``num_tokens``, padding included: linear between what was measured, and past its end."""
    points = _STEP_COSTS[platform]
    for (few, low), (many, high) in pairwise(points):
        if num_tokens <= many:
            return low + (high - low) * (num_tokens - few) / (many - few)
    return points[-1][1] * num_tokens / points[-1][0]


def fixed_step_cost(platform: str, layer_size: float) -> int:
    """What a step costs whatever its size, in tokens of a large one: reading the weights, and on a GPU the launches.

    Args:
        layer_size: weights of a layer.
    """
    most = _STEP_COSTS[platform][-1][0]
    reading = step_cost(platform, 1) * most / step_cost(platform, most)
    return round(reading + (_LAUNCHES / layer_size if platform == "gpu" else 0.0))
