"""Imports transformers late and without its advice to install PyTorch: jaxserve uses its tokenizers only."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType


def import_transformers() -> ModuleType:
    """The ``transformers`` module; the first call takes a second or two."""
    logger = logging.getLogger("transformers")
    logger.addFilter(_no_torch_advice)
    try:
        return importlib.import_module("transformers")
    finally:
        logger.removeFilter(_no_torch_advice)


def _no_torch_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()
