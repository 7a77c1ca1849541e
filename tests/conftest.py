"""Shared set-up of all tests, before anything imports jax: eight virtual CPU devices, and a cache of compiled code.

Most engines of the tests differ in what their scheduler does and not in what they compile, so nearly all of their
executables come from the cache; a second run of the tests compiles next to nothing.
"""

import os
import signal
from pathlib import Path

_FLAG = "--xla_force_host_platform_device_count"

if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell started the tests in the background; some send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
