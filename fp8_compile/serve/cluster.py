"""Engines on many machines through Ray Serve, behind one ingress that speaks HTTP.

Ray queues, places, scales, checks and restarts. What it does not do is to replay what a worker held that died: the
ingress does that, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from ..errors import Fp8Error
from ..pipelines.call_rules import CallError
from ..pipelines.session import Session
from .app import ServerSettings, create_app
from .engine import Engine
from .guard import Guard
from .metrics import Metrics
from .orders import (
    Abilities,
    DrawingError,
    EngineError,
    Event,
    Failed,
    Order,
    Picture,
    Preview,
    Progress,
    QueueFullError,
    Ticket,
    UnavailableError,
    Video,
)
from .pictures import PictureStore
from .protocol import MAX_PICTURES

log = logging.getLogger("fp8_compile.serve")

NAME = "fp8-diffusion"
"""Of the application in Ray Serve."""

HEAD = "node:__internal_head__"
"""What Ray calls a resource that its head node alone has, 1 of it."""

LOST = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, ReplicaUnavailableError, UnavailableError)
"""What arrives in place of an event where a worker has died, or its engine has."""

RETRY_AFTER = 5
"""Seconds; Ray does not tell how long its queue takes."""


class ClusterError(Fp8Error):
    """The cluster cannot serve this."""


@dataclass(frozen=True)
class Spread:
    """How many workers there are, and what each takes.

    Attributes:
        replicas: workers, at least.
        max_replicas: workers, at most; Ray starts more where more is asked for than ``max_batch`` pictures each.
        max_batch: see `Engine`.
        max_queue: requests that wait for a worker.
        device: of each worker. None: a GPU each where the cluster has any, else none.
        grace: seconds to finish what was accepted, where a worker or the ingress shall end.
    """

    replicas: int
    max_replicas: int
    max_batch: int
    max_queue: int
    device: str | None
    grace: float


class Worker:
    """A deployment: an engine, which is ready once this is made. See `Engine` for the arguments."""

    def __init__(self, load: Callable[[], Session], warmup: Sequence[tuple[int, int]], max_batch: int) -> None:
        # Its own queue refuses nothing that Ray lets through.
        self._engine = Engine(load, warmup, max_batch, max_waiting=MAX_PICTURES * _requests_at_once(max_batch))
        self._engine.start().result()

    def abilities(self) -> Abilities:
        """See `Engine.abilities`."""
        return self._engine.abilities

    def check_health(self) -> None:
        """Called by Ray, which replaces a worker where this raises."""
        if not self._engine.ready:
            raise UnavailableError("the engine has stopped")

    async def draw(self, order: Order) -> AsyncIterator[Event | None]:
        """None once the engine has ``order``, then its events. Whoever stops listening stops the drawing."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = self._engine.submit(order, put)
        try:
            yield None
            left = len(order.seeds)
            while left:
                event = await events.get()
                left = 0 if isinstance(event, Failed) else left - isinstance(event, Picture | Video)
                yield event
        finally:
            ticket.cancel()


class _RemoteTicket(Ticket):
    """An order that a worker draws."""

    drawing: asyncio.Task[None]

    def cancel(self) -> None:
        super().cancel()
        self.drawing.cancel()


class RemoteEngine:
    """The workers, as one engine. Made in the event loop of the ingress.

    Args:
        workers: of the deployment `Worker`.
    """

    def __init__(self, workers: DeploymentHandle[Any]) -> None:
        self.metrics = Metrics()
        self._workers = workers
        self._abilities: Abilities | None = None
        self._asking = asyncio.create_task(self._ask_for_abilities())

    @property
    def alive(self) -> bool:
        """Whether it can become ready: always, since Ray starts workers again."""
        return True

    @property
    def ready(self) -> bool:
        """Whether there was a worker. Where there is none any more, requests wait for the next one."""
        return self._abilities is not None

    async def wait_until_ready(self) -> None:
        """Return once there was a worker."""
        await self._asking

    @property
    def abilities(self) -> Abilities:
        """What the workers can be asked for, once it is ready."""
        assert self._abilities is not None
        return self._abilities

    async def accept(self, order: Order, on_event: Callable[[Event], None]) -> Ticket:
        """Return once a worker has ``order``. ``on_event`` is called in this event loop.

        Raises:
            QueueFullError: as many requests wait as may.
            UnavailableError: workers cannot be started, or two have died over it.
            DrawingError: a worker failed before it began.
        """
        ticket = _RemoteTicket(order, on_event)
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ticket.drawing = asyncio.create_task(self._draw(ticket, begun))
        try:
            await begun
        except BaseException:  # also where the client has left
            ticket.cancel()
            raise
        return ticket

    async def _draw(self, ticket: Ticket, begun: asyncio.Future[None]) -> None:
        try:
            await self._draw_or_raise(ticket, begun)
        except Exception as error:
            self.metrics.failures.inc()
            failure = _as_failure(error)
            if begun.done():
                ticket.emit(Failed(failure))
            else:
                begun.set_exception(failure)

    async def _draw_or_raise(self, ticket: Ticket, begun: asyncio.Future[None]) -> None:
        """Draw, and where a worker is lost, once more with another what was not drawn yet."""
        left = dict(enumerate(ticket.order.seeds))
        shown = False
        for _ in range(2):
            places = list(left)
            order = dataclasses.replace(ticket.order, seeds=tuple(left.values()))
            events: Any = self._workers.options(stream=True).draw.remote(order)
            try:
                async for event in events:
                    if event is None:
                        if not begun.done():
                            begun.set_result(None)
                    elif isinstance(event, Picture | Video):
                        place = places[event.index]
                        del left[place]
                        self.metrics.pictures.inc()
                        ticket.emit(dataclasses.replace(event, index=place))
                    elif isinstance(event, Preview | Progress):
                        shown = shown or isinstance(event, Preview)
                        ticket.emit(event)
                    else:
                        raise event.error
                return
            except LOST as error:
                log.warning("a worker was lost with %d pictures: %s", len(left), type(error).__name__)
                if not left:
                    return
                if shown:  # to a client that has seen a part of a picture the rest would be another's
                    break
            except asyncio.CancelledError:
                events.cancel()
                raise
        raise UnavailableError("the worker that drew this was lost; ask again")

    async def _ask_for_abilities(self) -> None:
        while self._abilities is None:
            try:
                self._abilities = await self._workers.abilities.remote()
            except Exception:  # whatever it is: it is not ready without
                log.exception("no worker has said yet what it can be asked for")
                await asyncio.sleep(5)


def _as_failure(error: Exception) -> Exception:
    """What a client may know of ``error``, of a worker or of Ray."""
    if isinstance(error, BackPressureError):
        return QueueFullError("as many requests wait as may", math.ceil(error.retry_after_s or RETRY_AFTER))
    if isinstance(error, DeploymentUnavailableError):
        return UnavailableError("the workers could not be started")
    if isinstance(error, (EngineError, CallError)):
        return error
    log.error("a worker failed", exc_info=error)
    return DrawingError(f"drawing failed with {type(error).__name__}; the server's log tells more")


def _requests_at_once(max_batch: int) -> int:
    """Of a worker: a batch that is drawn, and the next one."""
    return 2 * max_batch


class Ingress:
    """A deployment: the HTTP side, which needs no device."""

    async def __init__(self, workers: DeploymentHandle[Any], settings: ServerSettings) -> None:  # type: ignore[misc]
        self._engine = RemoteEngine(workers)
        self._settings = settings
        self._folder = tempfile.TemporaryDirectory(prefix="fp8-serve-")
        await self._engine.wait_until_ready()  # else an update would replace one that accepts by one that does not yet

    def __serve_build_asgi_app__(self) -> Guard:
        """Called by Ray Serve."""
        return create_app(self._engine, self._settings, PictureStore(Path(self._folder.name)))


def application(
    load: Callable[[], Session], warmup: Sequence[tuple[int, int]], settings: ServerSettings, spread: Spread
) -> Application:
    """What Ray Serve runs in the cluster that this process is connected to; see `Engine` for the first two."""
    scaled: dict[str, Any] = {"num_replicas": spread.replicas}
    if spread.max_replicas > spread.replicas:
        autoscaling = AutoscalingConfig(
            min_replicas=spread.replicas,
            max_replicas=spread.max_replicas,
            target_ongoing_requests=spread.max_batch,
        )
        scaled = {"autoscaling_config": autoscaling}
    workers: Any = serve.deployment(
        Worker,
        name="Worker",
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus_of_worker(spread.device)},
        max_ongoing_requests=_requests_at_once(spread.max_batch),
        max_queued_requests=spread.max_queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER),
        graceful_shutdown_timeout_s=spread.grace,
        **scaled,
    )
    # One, since it keeps the pictures that have an address; on the head node, without which there is no cluster. What
    # waits, waits for the workers, not here, where the refusal would be Ray's own.
    ingress: Any = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001}},
        max_ongoing_requests=100_000,
        max_surge_percent=100,  # an update starts the new one first: it needs no device that the old one has
        graceful_shutdown_timeout_s=spread.grace + 10,
    )
    made: Application = ingress.bind(workers.bind(load, warmup, spread.max_batch), settings)
    return made


def gpus_of_worker(device: str | None) -> int:
    """How many GPUs a worker takes that draws on ``device``; see `Spread`."""
    return int(gpus_of_cluster() > 0 if device is None else device.startswith("cuda"))


def gpus_of_cluster() -> int:
    """How many there are."""
    return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]


def join() -> None:
    """Join the cluster that ``RAY_ADDRESS`` names or that runs on this machine, or start one of this machine alone.

    Raises:
        ClusterError: it cannot be reached.
    """
    try:
        ray.init()
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"the Ray cluster cannot be reached: {error}") from error


def join_to_serve() -> None:
    """`join`, to serve there.

    Raises:
        ClusterError: it cannot be reached, or it serves something already.
    """
    join()
    running = serve.status()
    if running.proxies or running.applications:
        raise ClusterError(
            "Ray Serve runs in this cluster already: stop it (serve shutdown), or add this application to its config "
            "(serve deploy)"
        )


def run(made: Application, host: str, port: int, on_ready: Callable[[], None]) -> None:
    """Serve ``made`` in the cluster that this process is connected to, until SIGINT or SIGTERM.

    Args:
        on_ready: called once every worker can draw.

    Raises:
        ClusterError: the workers cannot be started.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
            try:
                serve.run(made, name=NAME)
            except RuntimeError as error:
                raise ClusterError(f"{error} The log above has the reason.") from error
            on_ready()
            signal.pause()
    finally:
        serve.delete(NAME)  # finishes what was accepted; the shutdown alone would not
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
