"""Imports point one way: pallas_kernels <- models <- jaxserve, and inside jaxserve from the engine down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import PACKAGES, imports, module_name, parse, source_files, within

# part -> what of this repository it may import, besides itself
ALLOWED = {
    "pallas_kernels": (),
    "jaxserve.models": ("pallas_kernels",),
    "jaxserve.errors": (),
    "jaxserve.config": ("jaxserve.errors", "jaxserve.sampling_params"),
    "jaxserve.vllm_arguments": (),
    "jaxserve.sampling_params": ("jaxserve.errors", "jaxserve.vllm_arguments"),
    "jaxserve.outputs": (),
    "jaxserve.progress": ("jaxserve.errors",),
    "jaxserve.scheduler": ("jaxserve.errors", "jaxserve.sampling_params"),
    "jaxserve.sampling": ("pallas_kernels", "jaxserve.errors", "jaxserve.config", "jaxserve.sampling_params"),
    "jaxserve.speculation": (),
    "jaxserve.text": ("jaxserve.errors",),
    "jaxserve.weights": ("jaxserve.errors", "jaxserve.config", "jaxserve.sampling_params", "jaxserve.models"),
    "jaxserve.runner": (
        "pallas_kernels",
        "jaxserve.models",
        "jaxserve.errors",
        "jaxserve.config",
        "jaxserve.sampling",
        "jaxserve.speculation",
        "jaxserve.scheduler.plan",
    ),
    "jaxserve.engine": (
        "pallas_kernels",
        "jaxserve.models",
        "jaxserve.errors",
        "jaxserve.config",
        "jaxserve.outputs",
        "jaxserve.sampling_params",
        "jaxserve.scheduler",
        "jaxserve.speculation",
        "jaxserve.runner",
        "jaxserve.text",
        "jaxserve.weights",
    ),
}
# may import anything of jaxserve
FRONTS = ("jaxserve", "jaxserve.__main__", "jaxserve.llm", "jaxserve.cli", "jaxserve.cli_flags", "jaxserve.cli_file")
# part -> the only other distributions that it may import
OUTSIDE = {
    "pallas_kernels": {"jax", "jaxlib", "numpy"},
    "jaxserve.models": {"jax", "flax", "numpy"},
    "jaxserve.scheduler": {"numpy"},
    "jaxserve.sampling": {"jax", "numpy"},
    "jaxserve.speculation": {"jax", "numpy"},
    "jaxserve.runner": {"jax", "flax", "numpy", "tqdm"},
}
FILES = source_files(*PACKAGES)


def part_of(path: Path) -> str:
    """The longest name in ALLOWED that holds the file; a front's own name otherwise."""
    name = module_name(path)
    parts = [part for part in ALLOWED if within(name, part)]
    return max(parts, key=len) if parts else name


def ours(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


def test_the_walk_sees_the_tree():
    assert len(FILES) > 80
    assert "jaxserve.models.registry.Model" in set(imports(Path("jaxserve/runner/step.py")))
    assert "jaxserve.models.rope.rope_tables" in set(imports(Path("models/llama.py")))  # relative ones are resolved


def test_every_file_belongs_to_a_part():
    assert [str(path) for path in FILES if part_of(path) not in (*ALLOWED, *FRONTS)] == []


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    files = [path for path in FILES if part_of(path) == part]
    assert files
    wrong = [
        f"{path} imports {name}"
        for path in files
        for name in imports(path)
        if ours(name) and not any(within(name, target) for target in (part, *ALLOWED[part]))
    ]
    assert wrong == []


@pytest.mark.parametrize("part", OUTSIDE)
def test_other_distributions(part):
    wrong = [
        f"{path} imports {name}"
        for path in FILES
        if part_of(path) == part
        for name in {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - OUTSIDE[part]
        if not ours(name)
    ]
    assert wrong == []


def test_models_import_each_other_relatively():
    """Installed, the folder is jaxserve/models: an absolute import of ``models`` would find a user's own package."""
    for path in source_files("jaxserve", "models", "pallas_kernels", "scripts", "tests"):
        assert [name for name in imports(path) if within(name, "models")] == [], path
    for path in source_files("models"):
        nodes = [node for node in ast.walk(parse(path)) if isinstance(node, ast.ImportFrom) and not node.level]
        assert [node.module for node in nodes if within(str(node.module), "jaxserve")] == [], path


IMPORT_ONLY = """
import sys
import jaxserve
heavy = {"jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy", "orbax"} & set(sys.modules)
sys.exit(f"import jaxserve imported {sorted(heavy)}" if heavy else 0)
"""
NO_BACKEND = """
import sys
from jax._src import xla_bridge
import jaxserve.engine.build, jaxserve.cli, jaxserve.engine.async_engine
sys.exit("importing the engine started a backend" if xla_bridge.backends_are_initialized() else 0)
"""


@pytest.mark.parametrize("code", [IMPORT_ONLY, NO_BACKEND], ids=["imports nothing heavy", "starts no backend"])
def test_importing_jaxserve(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
