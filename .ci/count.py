"""count.py DIRECTORY FAILED_STAGES: the last line of .ci/run, from pytest's JUnit files.

A stage that failed without a failed test (lint, types, a crash) counts as one failure.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree

total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
for path in sorted(Path(sys.argv[1]).glob("*.xml")):
    for suite in ElementTree.parse(path).iter("testsuite"):
        for name in total:
            total[name] += int(suite.get(name, 0))
bad = total["failures"] + total["errors"]
failed = max(bad, int(sys.argv[2]))
print(f"{total['tests'] - bad - total['skipped']} passed, {failed} failed, {total['skipped']} skipped")
