"""Converts a checkpoint (Hugging Face directory, GGUF file or cached hub id) to an Orbax directory.

    python scripts/convert_checkpoint.py MODEL DIRECTORY [--dtype bfloat16]

The directory holds the fused parameters, the model's config and the tokenizer's files, and is itself a model:
``LLM(DIRECTORY)``, ``jaxserve generate --model DIRECTORY``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxserve.errors import JaxserveError
from jaxserve.weights import open_checkpoint
from jaxserve.weights.convert import convert


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory, .gguf file, or hub id in the local cache")
    parser.add_argument("directory", type=Path, help="where to write; made here, or empty")
    parser.add_argument("--tokenizer", help="where the tokenizer is, if not in the checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the stored parameters; default: exact")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    try:
        checkpoint = open_checkpoint(options.model)
        convert(
            checkpoint,
            options.directory,
            tokenizer=options.tokenizer,
            dtype=options.dtype,
            progress=not options.quiet,
        )
    except JaxserveError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{options.directory}: {checkpoint.config.architecture}, {checkpoint.config.num_layers} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
