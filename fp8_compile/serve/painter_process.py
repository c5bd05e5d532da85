"""A painter in a process of its own, so that what kills it does not end the server.

The two talk through a pipe: `_Draw` and `_Drop` to the process; `_Progress`, `Abilities` or an exception, and then what
there is to show, with its position, and `Drawn` from it. It ends with the process that started it, however that one
ends.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import select
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ..errors import Fp8Error
from ..pipelines.session import Session
from .orders import Abilities, EngineError, Order
from .painter import Drawn, OnProgress, Painter, PainterLostError, Show

log = logging.getLogger("fp8_compile.serve")

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

LOOK_SECONDS = 0.05
"""How long a client that has left is drawn for beyond the step of the moment."""


@dataclass(frozen=True)
class _Draw:
    number: int
    orders: Sequence[Order]


@dataclass(frozen=True)
class _Drop:
    """Nobody waits for the order of this position in `_Draw` of this number."""

    number: int
    position: int


@dataclass(frozen=True)
class _Progress:
    done: int
    total: int
    what: str


class PainterProcess:
    """See `AnyPainter`.

    Args:
        load: see `Painter`; can be pickled, as all arguments.
        on_lost: called in a thread when the process has died.
    """

    def __init__(
        self,
        load: Callable[[], Session],
        warmup: Sequence[tuple[int, int]],
        max_batch: int,
        on_lost: Callable[[], None],
    ) -> None:
        self._arguments = (load, warmup, max_batch)
        self._on_lost = on_lost
        self._number = 0
        self._gone = threading.Event()
        self._started = False
        self._killed = False
        self._lock = threading.Lock()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection

    @property
    def lost(self) -> bool:
        """See `AnyPainter`."""
        return not self._started or self._gone.is_set()

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        return None if self._process is None else self._process.pid

    def start(self, on_progress: OnProgress) -> Abilities:
        """See `AnyPainter`."""
        self._started = False
        self.close()
        # Neither fork nor a fork server: CUDA and threads survive none of them.
        context = multiprocessing.get_context("spawn")
        self._pipe, its_end = context.Pipe()
        self._gone = threading.Event()
        process = context.Process(target=_run, args=(its_end, *self._arguments), name="fp8-worker")
        with self._lock:
            if self._killed:
                raise PainterLostError("it shall not be started any more")
            process.start()
            self._process = process
        its_end.close()
        threading.Thread(target=self._watch, args=(process, self._gone), daemon=True).start()
        while isinstance(message := self._receive(), _Progress):
            on_progress(message.done, message.total, message.what)
        if isinstance(message, Exception):
            raise message
        assert isinstance(message, Abilities)
        self._started = True
        return message

    def draw(self, orders: Sequence[Order], show: Show, wanted: Callable[[int], bool]) -> Drawn:
        """See `AnyPainter`."""
        self._number += 1
        left = set(range(len(orders)))
        self._send(_Draw(self._number, orders))
        while not isinstance(message := self._receive(lambda: self._drop(left, wanted)), Drawn):
            show(*message)
        return message

    def _drop(self, left: set[int], wanted: Callable[[int], bool]) -> None:
        """Say which orders nobody waits for any more, and take them out of ``left``."""
        for position in [position for position in left if not wanted(position)]:
            left.remove(position)
            self._send(_Drop(self._number, position))

    def close(self) -> None:
        """See `AnyPainter`."""
        if self._process is None:
            return
        self._pipe.close()  # which it takes for the end, if it lives
        self._process.join(5)
        self._process.kill()
        self._process.join()
        self._process = None

    def kill(self) -> None:
        """See `AnyPainter`. It cannot be started any more."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def _watch(self, process: multiprocessing.process.BaseProcess, gone: threading.Event) -> None:
        wait([process.sentinel])  # `join` is for one thread
        gone.set()
        self._on_lost()

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._lost_error() from error

    def _receive(self, meanwhile: Callable[[], None] = lambda: None) -> Any:
        try:
            while not self._pipe.poll(LOOK_SECONDS):
                if self._gone.is_set() and not self._pipe.poll():
                    raise self._lost_error()
                meanwhile()
            return self._pipe.recv()
        except (OSError, EOFError) as error:
            raise self._lost_error() from error

    def _lost_error(self) -> PainterLostError:
        assert self._process is not None
        self._process.kill()  # it is gone, or about to be: its pipe is closed
        self._gone.wait()
        self._process.join()
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with status {code}"
        return PainterLostError(f"the worker's process {how}")


def _run(pipe: Connection, load: Callable[[], Session], warmup: Sequence[tuple[int, int]], max_batch: int) -> None:
    """What the process does: load and warm up, then draw until the pipe is closed."""
    # Signals of the terminal and of a supervisor are for the server, which finishes what it has accepted.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    painter = Painter(load, warmup, max_batch)
    try:
        pipe.send(painter.start(lambda *what: pipe.send(_Progress(*what))))
    except Exception as error:
        pipe.send(_sendable(error))
        return
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        if isinstance(message, _Draw):
            pipe.send(_draw(painter, pipe, message))


def _draw(painter: Painter, pipe: Connection, asked: _Draw) -> Drawn:
    dropped: set[int] = set()

    look = select.poll()  # `Connection.poll` makes one each time, of which a drawing has many
    look.register(pipe, select.POLLIN)

    def wanted(position: int) -> bool:
        while look.poll(0):
            message = pipe.recv()  # nothing else comes while it draws
            dropped.update({message.position} if message.number == asked.number else ())
        return position not in dropped

    return painter.draw(asked.orders, lambda *shown: pipe.send(shown), wanted)


def _end_with_the_server() -> None:
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    os._exit(1)


def _sendable(error: Exception) -> Exception:
    """``error``, or what can be pickled of it."""
    if isinstance(error, torch._dynamo.exc.BackendCompilerFailed) and isinstance(error.inner_exception, Fp8Error):
        error = error.inner_exception
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # each class fails in its own way
        expected = False
    else:
        expected = isinstance(error, Fp8Error)
    if expected:
        return error
    log.error("the worker could not start", exc_info=error)
    return EngineError(f"the worker could not start: {type(error).__name__}: {error}")
