"""Seconds from the start of a process to its first token: with an empty compilation cache, then with a filled one.

Each start is a process of its own, timed from outside: the interpreter, imports, weights (dummy), compiling, warming
up and one greedy token of a short prompt are all in it. The last stdout line is one JSON document.

    python scripts/bench_startup.py --model configs/models/qwen3-0.6b.toml
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START = """
import json, sys
from jaxserve import LLM, SamplingParams

llm = LLM(**json.loads(sys.argv[1]))
llm.generate([[1, 2, 3, 4]], SamplingParams(temperature=0, max_tokens=1, detokenize=False), use_tqdm=False)
told = {name: value for name, value in llm.engine.info.items() if "executables" in name or "seconds" in name}
print("FIRST", json.dumps(told), flush=True)
llm.close()
"""


def start(settings: dict[str, Any]) -> dict[str, Any]:
    """One start: seconds to the first token, and what the engine says of it."""
    began = time.perf_counter()
    command = [sys.executable, "-c", START, json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        if process.stdout is None:
            raise RuntimeError("the process has no output")
        for line in process.stdout:
            if line.startswith("FIRST "):
                seconds = time.perf_counter() - began
                info = json.loads(line.removeprefix("FIRST "))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[:2])
    print(f"{seconds:7.2f} s to the first token; {info}", flush=True)
    return {"seconds": round(seconds, 2), **info}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/models/qwen3-0.6b.toml")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--warm-starts", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "model": args.model,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": args.max_model_len,
            "max_num_seqs": args.max_num_seqs,
            "compilation_cache_dir": directory,
        }
        cold = start(settings)
        warm = [start(settings) for _ in range(args.warm_starts)]
    print(json.dumps({"cold": cold, "warm": warm, "settings": vars(args)}))


if __name__ == "__main__":
    main()
