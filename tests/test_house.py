"""House rules that a machine can hold: file sizes, settings, and how users' mistakes are reported."""

import ast
import re
from pathlib import Path

import pytest
from source_tree import PACKAGES, ROOT, parse, source_files

PRODUCT = source_files(*PACKAGES)
EVERYTHING = [*PRODUCT, *source_files("scripts", "tests")]
KERNEL_FILES = {path for path in PRODUCT if path.parts[0] == "pallas_kernels"}
# What is done with XLA's own variables, whatever they are called in the source.
ENVIRONMENT_ALLOWED = {
    # It must be set before XLA's backend exists, unless the user has set it by its older name.
    Path("jaxserve/engine/memory_share.py"): [
        "os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', *)",
        "os.environ.setdefault('XLA_CLIENT_MEM_FRACTION', *)",
    ],
    # The compiler's flags tell executables apart.
    Path("jaxserve/runner/executable_cache.py"): [
        "os.environ.get('XLA_FLAGS', *)",
        "os.environ.get('LIBTPU_INIT_ARGS', *)",
    ],
}


def num_lines(path: Path) -> int:
    return len((ROOT / path).read_text().splitlines())


def test_no_file_is_too_long():
    too_long = {str(p): num_lines(p) for p in EVERYTHING if num_lines(p) > (600 if p in KERNEL_FILES else 450)}
    assert too_long == {}


def test_nine_files_in_ten_are_under_300_lines():
    over = sorted(str(path) for path in EVERYTHING if num_lines(path) >= 300)
    assert len(over) <= len(EVERYTHING) / 10, over


def names_used(path: Path) -> set[str]:
    """Dotted names such as os.environ, and names imported from modules."""
    used = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
    return used


def test_no_settings_in_environment_variables():
    readers = {path for path in PRODUCT if names_used(path) & {"os.environ", "os.getenv", "os.putenv"}}
    assert readers <= set(ENVIRONMENT_ALLOWED)


@pytest.mark.parametrize("path", ENVIRONMENT_ALLOWED, ids=str)
def test_the_only_variables_are_xlas_own(path):
    calls = [n for n in ast.walk(parse(path)) if isinstance(n, ast.Call) and "os.environ" in ast.unparse(n.func)]
    found = [f"{ast.unparse(n.func)}({ast.literal_eval(n.args[0])!r}, *)" for n in calls]
    assert found == ENVIRONMENT_ALLOWED[path]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_assert_checks_what_a_caller_gave(package):
    """python -O drops asserts: in the product they may only tell mypy that an optional is there."""
    found = [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path in source_files(package)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Assert) and not is_narrowing(node.test)
    ]
    assert found == []


def is_narrowing(test: ast.expr) -> bool:
    """``x is not None``."""
    return isinstance(test, ast.Compare) and ast.unparse(test).endswith("is not None")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_exception_is_swallowed_unseen(package):
    """``except:`` catches Ctrl-C; an empty handler of Exception hides every bug."""
    found = [
        f"{path}:{node.lineno}"
        for path in source_files(package)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler)
        and (
            node.type is None
            or (ast.unparse(node.type) in ("Exception", "BaseException") and isinstance(node.body[-1], ast.Pass))
        )
    ]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_unfinished_code(package):
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError")
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in source_files(package)
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if mark.search(line)
    ]
    assert found == []
