"""The repository's Python files and what they import, for the tests that hold its layout."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jaxserve", "models", "pallas_kernels")


def source_files(*folders: str) -> list[Path]:
    """All .py files under the folders, relative to ROOT. Links are not followed: jaxserve/models is models."""
    walks = (walk for folder in folders for walk in os.walk(ROOT / folder, followlinks=False))
    return sorted((Path(at) / name).relative_to(ROOT) for at, _, names in walks for name in names if name[-3:] == ".py")


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def module_name(path: Path) -> str:
    """What a file is imported as: models/rope.py is jaxserve.models.rope."""
    parts = path.with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("jaxserve", *parts) if parts[0] == "models" else parts)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of everything that a file imports, at any depth; ``from a import b`` gives ``a.b``."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")
