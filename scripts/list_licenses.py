"""Prints the tables of docs/dependencies.md: what jaxserve installs, and under which licence, from installed metadata.

    python scripts/list_licenses.py

Run it in an environment made by `make test`.
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, distribution

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = "jaxserve-llm"
SPDX = {
    "Apache Software License": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "MIT License": "MIT",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD License": "BSD",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "ISC License (ISCL)": "ISC",
    "Python Software Foundation License": "PSF-2.0",
}


def required(dist: Distribution, extras: frozenset[str]) -> dict[str, frozenset[str]]:
    """Name -> extras of what ``dist`` needs here, with the given extras of its own."""
    environments = [{**default_environment(), "extra": extra} for extra in ("", *extras)]
    found: dict[str, frozenset[str]] = {}
    for text in dist.requires or ():
        need = Requirement(text)
        if need.marker is None or any(need.marker.evaluate(environment) for environment in environments):
            name = canonicalize_name(need.name)
            found[name] = found.get(name, frozenset()) | need.extras
    return found


def closure(extras: frozenset[str]) -> dict[str, Distribution]:
    """Everything that installing jaxserve with ``extras`` brings, by name."""
    seen: dict[tuple[str, frozenset[str]], Distribution] = {}
    waiting = list(required(distribution(OURS), extras).items())
    while waiting:
        key = waiting.pop()
        if key not in seen:
            seen[key] = distribution(key[0])
            waiting += required(seen[key], key[1]).items()
    return {name: dist for (name, _), dist in seen.items()}


def licence(dist: Distribution) -> str:
    """The licence that the metadata states: an SPDX expression where there is one."""
    data = dist.metadata
    field = data.get("License-Expression") or data.get("License") or ""
    if not field or "\n" in field or len(field) > 60:
        classifiers = [c for c in data.get_all("Classifier") or () if c.startswith("License :: OSI Approved ::")]
        field = ", ".join(c.rpartition(" :: ")[2] for c in classifiers) or "not stated"
    return ", ".join(SPDX.get(part, part) for part in re.split(r", (?!Version)", field))


def table(dists: dict[str, Distribution]) -> str:
    rows = [f"| {name} | {dist.version} | {licence(dist)} |" for name, dist in sorted(dists.items())]
    return "\n".join(["| package | version read | licence |", "|---|---|---|", *rows])


def main() -> None:
    direct = required(distribution(OURS), frozenset())
    dev = required(distribution(OURS), frozenset({"dev"})).keys() - direct.keys()
    everything = closure(frozenset())
    print(f"## Asked for by jaxserve\n\n{table({name: everything[name] for name in direct})}\n")
    indirect = {name: dist for name, dist in everything.items() if name not in direct}
    print(f"## Brought along by these\n\n{table(indirect)}\n")
    print(f"## For development: the extra `dev`\n\n{table({name: distribution(name) for name in dev})}")


if __name__ == "__main__":
    main()
