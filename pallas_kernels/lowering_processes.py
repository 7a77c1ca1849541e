"""Ops are lowered by several processes at a time: lowering is Python, of which a process runs one thread at a time.

A process reads pickled ops from stdin and writes to stdout what they are lowered to, until stdin ends. It runs nothing
on a device, and sees none. It is no fork of the caller, whose threads and device wouldn't survive that, and it doesn't
import the caller's main module, as those of ``multiprocessing`` do: many a script that makes an engine isn't prepared.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import jax

from pallas_kernels.lower_once import LoweredOp, Op, lowers_apart

logger = logging.getLogger("jaxserve")


class LoweringProcesses:
    """At most ``num`` processes, which start when the first op comes. Threads may ask at the same time.

    A process that ends before its time takes nothing with it: its op is lowered by the caller, with a warning. So an op
    that can't be lowered fails where it would have failed.
    """

    def __init__(self, num: int) -> None:
        self._num = num
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._functions: dict[Op, Future[Callable[..., Any]]] = {}
        self._closed = False

    @property
    def num_callers(self) -> int:
        """Threads that should trace at a time: nothing is gained by several where ops aren't lowered apart."""
        return max(1, self._num) if lowers_apart() else 1

    def lowerer(self, op: Op) -> Callable[..., Any]:
        """The op's function, see ``lower_once.lowered_by``; equal ops are lowered once."""
        with self._lock:
            known = op in self._functions
            future = self._functions.setdefault(op, Future())
        if not known:
            try:
                future.set_result(self._lower(op).function())
            except BaseException as error:
                future.set_exception(error)
                raise
        return future.result()

    def _lower(self, op: Op) -> LoweredOp:
        if self._closed:
            raise RuntimeError("the processes that lower kernels were ended")
        with self._lock:
            while len(self._processes) < self._num:
                try:
                    process = _start()
                except OSError as error:
                    logger.warning("%d of %d processes lower kernels: %s", len(self._processes), self._num, error)
                    self._num = len(self._processes)
                else:
                    self._processes.append(process)
                    self._idle.put(process)
        if not self._processes:
            return op.lower()
        process = self._idle.get()
        try:
            return _ask(process, op)
        except (EOFError, OSError) as error:
            if self._closed:
                raise RuntimeError("the processes that lower kernels were ended") from error
            logger.warning("a process that lowers kernels has ended (%s): %s is lowered here", error, op.run.__name__)
            return op.lower()
        finally:
            self._idle.put(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                # What it hadn't read is lost, and that is all there is to say.
                with contextlib.suppress(BrokenPipeError):
                    if pipe is not None:
                        pipe.close()


def _start() -> subprocess.Popen[bytes]:
    """Another interpreter that imports what this one would."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _ask(process: subprocess.Popen[bytes], op: Op) -> LoweredOp:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a process that lowers kernels was started without pipes")
    pickle.dump(op, process.stdin)
    process.stdin.flush()
    lowered: LoweredOp = pickle.load(process.stdout)
    return lowered


def serve() -> None:
    """Lowers what comes until stdin ends."""
    jax.config.update("jax_platforms", "cpu")  # the device is the caller's
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who closes stdin
    gc.disable()  # what is traced is kept until the end of a short life
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints, prints there
    while True:
        try:
            op = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(op.lower(), replies)
        replies.flush()
