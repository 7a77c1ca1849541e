"""Ops are lowered by several processes at a time: lowering is Python, of which a process runs one thread at a time.

A process reads pickled ops from stdin and writes what they are lowered to into a pipe, until stdin ends. It runs
nothing on a device, and sees none. It is no fork of the caller, whose threads and device wouldn't survive that, and it
doesn't import the caller's main module, as those of ``multiprocessing`` do: many a script that makes an engine isn't
prepared for that.

JAX 0.11 numbers the kernels that a process lowers, and the numbers are in their text. So an op's text isn't the same
from run to run, and JAX's persistent cache doesn't know it again; the kernels are the same.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

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
        self._processes: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
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
        self._start_all()
        if not self._processes:
            return op.lower()
        process = self._idle.get()
        try:
            return process.lower(op)
        except _EndedError as error:
            self._raise_if_closed()
            logger.warning("%s: %s is lowered here", error, op.run.__name__)
            return op.lower()
        finally:
            self._idle.put(process)

    def _start_all(self) -> None:
        with self._lock:
            self._raise_if_closed()
            while len(self._processes) < self._num:
                try:
                    process = _start()
                except OSError as error:
                    logger.warning("%d of %d processes lower kernels: %s", len(self._processes), self._num, error)
                    self._num = len(self._processes)
                else:
                    self._processes.append(process)
                    self._idle.put(process)

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("the processes that lower kernels were ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
        for process in self._processes:
            process.end()


class _EndedError(Exception):
    """A process has ended; the message says why."""


@dataclass(frozen=True)
class _Process:
    popen: subprocess.Popen[bytes]
    requests: IO[bytes]
    replies: IO[bytes]

    def lower(self, op: Op) -> LoweredOp:
        """Waits for it. Only one thread may.

        Raises:
            _EndedError: the process has ended, or what it says can't be read.
        """
        request = pickle.dumps(op)
        try:
            self.requests.write(request)
            self.requests.flush()
            lowered: LoweredOp = pickle.load(self.replies)
        # Of a closed pipe a ValueError; of half a reply, whatever is missing.
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            self.popen.kill()
            raise _EndedError(f"a process that lowers kernels has ended ({error or type(error).__name__})") from error
        return lowered

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.requests, self.replies):
            # What it hadn't read is lost, and that is all there is to say.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _start() -> _Process:
    """Another interpreter that imports what this one would.

    Raises:
        OSError: there can't be another.
    """
    if not sys.executable:
        raise OSError("Python doesn't know its own executable")
    ours = str(Path(__file__).parents[1])
    paths = [os.path.abspath(path) for path in sys.path if isinstance(path, str)] + [ours]
    reading, writing = os.pipe()
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # Ctrl-C is for the caller, who ends it
        f"import sys; sys.path[:] = {paths!r}\n"
        f"from {__name__} import serve; serve({writing})"
    )
    # Replies have a pipe of their own: anything may print.
    try:
        popen = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(writing,),
        )
    except OSError:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    if popen.stdin is None:
        raise RuntimeError("a process was started without the pipe that it was to have")
    return _Process(popen, popen.stdin, os.fdopen(reading, "rb"))


def serve(replies: int) -> None:
    """Lowers what comes until stdin ends; ``replies`` is the file descriptor that results go to."""
    jax.config.update("jax_platforms", "cpu")  # the device is the caller's
    gc.disable()  # what is traced is kept until the end of a short life
    with os.fdopen(replies, "wb") as results:
        while True:
            try:
                op = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            pickle.dump(op.lower(), results)
            results.flush()
