"""Tiny Hugging Face directories, and editing their JSON."""

import json
from pathlib import Path

TINY = Path(__file__).resolve().parents[1] / "golden" / "tiny"


def edit_json(path, changes):
    """Sets keys; a value of None removes the key."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    settings |= changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
