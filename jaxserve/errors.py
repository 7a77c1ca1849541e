"""Every error that jaxserve raises on purpose.

::

    JaxserveError
    ├── ConfigError (ValueError)              an engine setting is wrong, or doesn't fit the machine
    │   └── KVCacheTooSmallError              the KV pool can't hold one request of max_model_len
    ├── CheckpointError (ValueError)          a checkpoint is missing, damaged, or not what its config says
    │   ├── UnsupportedModelError             architecture, rope scaling or quantisation that jaxserve doesn't know
    │   └── TokenizerError                    the tokenizer is missing, damaged or of an unknown kind
    ├── InvalidRequestError (ValueError)      a prompt or a sampling parameter is out of range
    ├── CompileAfterWarmupError (RuntimeError) an executable was born while serving, in strict mode
    └── EngineDeadError (RuntimeError)        the engine failed (``__cause__``) or was shut down

The message says what was wrong (name and value) and what would be right.
"""

import contextlib
from collections.abc import Iterator


class JaxserveError(Exception):
    """Base of all errors below."""


class ConfigError(JaxserveError, ValueError):
    """An engine setting is wrong, or doesn't fit the machine."""


class KVCacheTooSmallError(ConfigError):
    """The KV pool can't hold one request of ``max_model_len`` tokens."""


class CheckpointError(JaxserveError, ValueError):
    """A checkpoint is missing, damaged, or not what its config says."""


class UnsupportedModelError(CheckpointError):
    """An architecture, rope scaling or quantisation that jaxserve doesn't know."""


class TokenizerError(CheckpointError):
    """The tokenizer is missing, damaged or of an unknown kind."""


class InvalidRequestError(JaxserveError, ValueError):
    """A prompt or a sampling parameter is out of range."""


class CompileAfterWarmupError(JaxserveError, RuntimeError):
    """An executable was born while serving, in strict mode."""


class EngineDeadError(JaxserveError, RuntimeError):
    """The engine serves no more. It failed, and ``__cause__`` says of what; or it was shut down, which has no cause."""


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """What is refused within is a setting of ``name``: the message, which begins with that setting, says so."""
    try:
        yield
    except (ConfigError, InvalidRequestError) as error:
        raise type(error)(f"{name}.{error}") from error
