"""A queue and a thread that has it drawn: in turn, in batches, and only for who still waits.

engine = Engine(load, warmup=[(1024, 1024)])
engine.start().result()
engine.submit(Order("a red circle", seeds=(0,), arguments={"num_inference_steps": 8}), on_event=print)
"""

from __future__ import annotations

import atexit
import contextvars
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from ..pipelines.session import Session
from .metrics import Metrics
from .orders import (
    Abilities,
    EngineError,
    Event,
    Failed,
    Order,
    Preview,
    Progress,
    QueueFullError,
    Ticket,
    UnavailableError,
)
from .painter import AnyPainter, Drawn, OnProgress, Painter, PainterLostError
from .painter_process import PainterProcess
from .waiting import WaitingItems

log = logging.getLogger("fp8_compile.serve")

RESTART_PAUSES = (0.0, 1.0, 4.0, 16.0)
"""Seconds before a lost worker is started again; when all have been spent, it is not any more."""

STEADY_SECONDS = 600.0
"""After so long, or after a batch, a worker has not been started in vain: the first pause is the next."""

LOST = "the worker that drew this was lost; ask again"
ENDED = "the server shuts down, and the time to finish is over"


@dataclass(frozen=True, eq=False)
class _Row:
    """One picture of a ticket: a row of a batch."""

    ticket: Ticket
    index: int
    since: float

    @property
    def order(self) -> Order:
        """Of this picture alone."""
        return dataclasses.replace(self.ticket.order, seeds=(self.ticket.order.seeds[self.index],))

    @property
    def client(self) -> str:
        return self.ticket.order.client

    @property
    def batch_key(self) -> Hashable | None:
        return self.ticket.order.batch_key

    @property
    def abandoned(self) -> bool:
        return self.ticket.done


class Engine:
    """Draws for many at once with one pipeline.

    Args:
        load: makes the session, compiled.
        warmup: sizes ``(width, height)`` to draw before it is ready; the first is the most usual. None: the pipeline's.
        max_batch: how many pictures may be drawn together.
        max_waiting: how many pictures may wait beside those.
        on_progress: called during the warm-up with how much of it is done, how much there is, and what comes next.
        own_process: draw in a process of its own. Where that dies, it is started again, and what it was drawing is
            drawn once more. ``load`` can be pickled then.
    """

    def __init__(
        self,
        load: Callable[[], Session],
        warmup: Sequence[tuple[int, int]] = (),
        max_batch: int = 4,
        max_waiting: int = 64,
        on_progress: OnProgress = lambda done, total, what: None,
        own_process: bool = False,
    ) -> None:
        self.metrics = Metrics()
        self._painter: AnyPainter
        if own_process:
            self._painter = PainterProcess(load, warmup, max_batch, on_lost=lambda: self._waiting.wake())
            atexit.register(self.close, 0)  # else multiprocessing would wait for its end
        else:
            self._painter = Painter(load, warmup, max_batch)
        self._max_waiting = max_waiting
        self._on_progress = on_progress
        self._waiting: WaitingItems[_Row] = WaitingItems(max_waiting, self.metrics.waiting.set)
        self._ready: Future[None] = Future()
        self._abilities: Abilities
        self._closing = False
        self._ended = threading.Event()
        self._tickets: set[Ticket] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._restarts = 0
        self._steady_from = 0.0
        self._seconds_per_picture = 1.0

    def start(self) -> Future[None]:
        """Load and warm up. The future is done when pictures can be drawn, or holds why they cannot."""
        # torch's settings are kept by context: the thread shall have those of the caller.
        context = contextvars.copy_context()
        # A daemon: a process that must end shall not wait for a step that hangs.
        self._thread = threading.Thread(target=context.run, args=(self._work,), name="fp8-engine", daemon=True)
        self._thread.start()
        return self._ready

    @property
    def ready(self) -> bool:
        """Whether it takes orders."""
        started = self._ready.done() and self._ready.exception() is None
        return started and self.alive and not self._closing and not self._painter.lost

    @property
    def alive(self) -> bool:
        """Whether it can become ready, or is."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def abilities(self) -> Abilities:
        """What can be asked for, once it is ready."""
        return self._abilities

    @property
    def max_batch(self) -> int:
        """How many pictures are drawn together, once it is ready."""
        return self._abilities.max_batch

    @property
    def session(self) -> Session:
        """What it draws with, once it is ready; of an engine without a process of its own."""
        assert isinstance(self._painter, Painter)
        return self._painter.session

    def submit(self, order: Order, on_event: Callable[[Event], None]) -> Ticket:
        """Queue ``order``. ``on_event`` is called in the engine's thread, and must return at once.

        Raises:
            QueueFullError: too many pictures wait.
            UnavailableError: it is not ready, or shuts down.
        """
        return self.submit_all([(order, on_event)])[0]

    def submit_all(self, asked: Sequence[tuple[Order, Callable[[Event], None]]]) -> list[Ticket]:
        """`submit` several orders of one client, of which all or none find room, and which may so share a batch."""
        tickets = [Ticket(order, on_event) for order, on_event in asked]
        now = time.monotonic()
        with self._lock:
            if not self.ready:
                raise UnavailableError("the server shuts down" if self._closing else "the server is not ready")
            rows = [_Row(ticket, index, now) for ticket in tickets for index in range(len(ticket.order.seeds))]
            if not self._waiting.put(rows):
                seconds = len(self._waiting) * self._seconds_per_picture
                problem = f"{len(rows)} pictures more than the {self._max_waiting} that may wait"
                raise QueueFullError(problem, max(1, round(seconds)))
            self._tickets = {each for each in self._tickets if not each.done} | {*tickets}
        return tickets

    async def accept(self, order: Order, on_event: Callable[[Event], None]) -> Ticket:
        """`submit`, as `AnyEngine` has it."""
        return self.submit(order, on_event)

    def close(self, grace: float) -> None:
        """Take no more orders, finish those there are within ``grace`` seconds, and fail the rest."""
        self.refuse()
        if self._thread is not None and self._ready.done():  # nobody waits for the end of a warm-up
            self._thread.join(grace)
        self._ended.set()
        self._fail_all(UnavailableError(ENDED))
        self._painter.kill()

    def refuse(self) -> None:
        """Take no more orders; those there are go on."""
        with self._lock:
            self._closing = True
        self._waiting.close()

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            tickets, self._tickets = self._tickets, set()
        for ticket in tickets:
            ticket.emit(Failed(error))

    # --- in its thread ---

    def _work(self) -> None:
        try:
            self._abilities = self._painter.start(self._on_progress)
        except BaseException as error:  # whoever waits for it is told
            self._painter.close()
            self._ready.set_exception(error)
            return
        self._steady_from = time.monotonic() + STEADY_SECONDS
        self._ready.set_result(None)
        try:
            while True:
                rows = self._waiting.take(self.max_batch, lambda: self._painter.lost)
                if not rows and self._closing and not self._waiting:
                    return
                if self._painter.lost:
                    self._restart()
                self._draw(rows)
        except EngineError as error:  # of `_restart`
            if not self._ended.is_set():
                log.error("%s", error)
        finally:
            self.refuse()
            self._fail_all(UnavailableError("the server's worker has stopped"))
            self._painter.close()

    def _restart(self) -> None:
        """Start the painter again.

        Raises:
            EngineError: it has been in vain too often, or shall not be any more.
        """
        if time.monotonic() > self._steady_from:
            self._restarts = 0
        while not self._ended.is_set():
            if self._restarts == len(RESTART_PAUSES):
                raise EngineError(f"the worker was started again {self._restarts} times in vain; it is given up")
            pause = RESTART_PAUSES[self._restarts]
            self._restarts += 1
            log.warning("the worker is lost; it is started again in %g s", pause)
            self._ended.wait(pause)
            try:
                self._abilities = self._painter.start(lambda done, total, what: None)
            except Exception as error:  # whatever it is, the next attempt may do better
                log.error("the worker could not be started again: %s", error)
                continue
            self.metrics.restarts.inc()
            self._steady_from = time.monotonic() + STEADY_SECONDS
            return
        raise EngineError(ENDED)

    def _draw(self, rows: Sequence[_Row], again: bool = False) -> None:
        """Draw ``rows`` together; if that fails, each alone, so that only those fail that must.

        Args:
            again: a painter was lost over them before.
        """
        rows = [row for row in rows if not row.abandoned]
        if not rows:
            return
        start = time.monotonic()

        def show(position: int, event: Preview | Progress) -> None:
            rows[position].ticket.emit(event)

        try:
            drawn = self._painter.draw([row.order for row in rows], show, lambda position: not rows[position].abandoned)
        except PainterLostError as error:
            log.warning("%s, which was drawing %d pictures", error, len(rows))
            for row in rows:
                if again or row.ticket.shown:  # to a client that has seen a part the rest would be another's
                    self._fail(row, UnavailableError(LOST))
            self._restart()
            for row in rows:
                self._draw([row], again=True)
            return
        self._count(drawn)
        if drawn.failure is not None:
            if len(rows) == 1:
                self._fail(rows[0], drawn.failure)
            for row in rows if len(rows) > 1 else ():
                self._draw([row], again)
            return
        if not drawn.events:
            return
        self._restarts = 0
        seconds = (time.monotonic() - start) / len(rows)
        self._seconds_per_picture += 0.2 * (seconds - self._seconds_per_picture)
        for row, event in zip(rows, drawn.events, strict=True):
            self.metrics.phases.labels("queue").observe(start - row.since)
            if isinstance(event, Failed):
                self._fail(row, event.error)
            else:
                self.metrics.pictures.inc()
                row.ticket.emit(dataclasses.replace(event, index=row.index))

    def _count(self, drawn: Drawn) -> None:
        self.metrics.steps.inc(drawn.steps)
        for phase, seconds in drawn.phases.items():
            self.metrics.phases.labels(phase).observe(seconds)
        for kind, size in drawn.memory.items():
            self.metrics.memory.labels(kind).set(size)
        if drawn.events:
            self.metrics.batch_size.observe(len(drawn.events))
        if drawn.compile_seconds:
            self.metrics.compile_seconds.inc(drawn.compile_seconds)
            log.warning("compiled for %.1f s after the warm-up", drawn.compile_seconds)

    def _fail(self, row: _Row, error: Exception) -> None:
        self.metrics.failures.inc()
        row.ticket.emit(Failed(error))
