"""Decoding speed of a small real model on this machine, against transformers where a Python with torch is at hand.

A rate is (N-1) * batch tokens over the time for N outputs less the time for 1, greedy: decoding alone.
Both sides run in turns, so that whatever else the machine does meets both; the best of the runs counts. The last
stdout line is one JSON document.

    python scripts/bench_offline.py
    python scripts/bench_offline.py --hf-python path/to/torch-env/bin/python

That environment needs transformers, torch, gguf and accelerate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smollm2 import installed_weights

PROMPT = "Explain in a few sentences why the sky is blue and why sunsets are red."


def rate(generate: Callable[[int, int], None], batch: int, num_tokens: int) -> float:
    """Decoded tokens per second; ``generate(batch, n)`` makes n tokens for each of ``batch`` prompts."""
    start = time.perf_counter()
    generate(batch, 1)
    first = time.perf_counter()
    generate(batch, num_tokens)
    return batch * (num_tokens - 1) / ((time.perf_counter() - first) - (first - start))


class Transformers:
    """The other side: this file, run with ``--serve-hf`` by a Python that has torch; a line in, a line out."""

    def __init__(self, python: str, model: Path):
        self.process = subprocess.Popen(
            [python, __file__, "--serve-hf", "--model", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self.read()

    def rate(self, batch: int, num_tokens: int) -> float:
        assert self.process.stdin is not None
        print(json.dumps([batch, num_tokens]), file=self.process.stdin, flush=True)
        return self.read()["rate"]

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the transformers process ended; its message is above")
        return json.loads(line)


def serve_transformers(model: Path) -> None:
    """Loads the model with transformers in float32 and measures what stdin asks for."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    network = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    def generate(batch: int, num_tokens: int) -> None:
        inputs = ids.repeat(batch, 1)
        with torch.inference_mode():
            network.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                pad_token_id=0,
            )

    generate(1, 4)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**versions, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"rate": rate(generate, *json.loads(line))}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="a .gguf file; the demo weights if not given")
    parser.add_argument("--hf-python", help="a Python with torch, transformers, gguf and accelerate")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--serve-hf", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.model or installed_weights()
    if args.serve_hf:
        serve_transformers(model)
        return

    from jaxserve import LLM, SamplingParams

    llm = LLM(str(model), max_model_len=1024, max_num_seqs=max(args.batches))

    def generate(batch: int, num_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        llm.generate([PROMPT] * batch, params, use_tqdm=False)

    other = Transformers(args.hf_python, model) if args.hf_python else None
    rates: dict[str, dict[int, list[float]]] = {"jaxserve": {}, **({"transformers": {}} if other else {})}
    for batch in args.batches:
        generate(batch, 4)
        for _ in range(args.runs):
            rates["jaxserve"].setdefault(batch, []).append(rate(generate, batch, args.tokens))
            if other:
                rates["transformers"].setdefault(batch, []).append(other.rate(batch, args.tokens))
    for name, by_batch in rates.items():
        for batch, runs in by_batch.items():
            print(f"{name:13s} batch {batch}: best {max(runs):7.1f} tokens/s, median {statistics.median(runs):7.1f}")
    best = {name: {batch: max(runs) for batch, runs in by_batch.items()} for name, by_batch in rates.items()}
    document = {
        "device": llm.engine.info["device"],
        "attention": llm.engine.info["attention"],
        "start-up seconds": llm.engine.info["start-up seconds"],
        "tokens/s": rates,
        "best": best,
        "other": other.about if other else None,
    }
    if other:
        document["against transformers"] = {b: best["jaxserve"][b] / best["transformers"][b] for b in args.batches}
    llm.close()
    if other:
        other.process.kill()
    print(json.dumps(document))


if __name__ == "__main__":
    main()
