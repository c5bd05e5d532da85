"""One thread owns the pipeline, and draws what is asked: in turn, in batches, and only for who still waits.

engine = Engine(load, warmup=[(1024, 1024)])
engine.start().result()
engine.submit(Order("a red circle", seeds=(0,), arguments={"num_inference_steps": 8}), on_event=print)
"""

from __future__ import annotations

import contextvars
import gc
import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..errors import Fp8Error, NothingConvertedError
from ..pipelines.adapters import Lora
from ..pipelines.call_rules import CallError, CallRules
from ..pipelines.denoisers import PipelineError
from ..pipelines.previews import PreviewError, Previews
from ..pipelines.session import Session
from ..pipelines.step_clock import StepClock
from .metrics import Metrics
from .waiting import WaitingItems

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

log = logging.getLogger("fp8_compile.serve")

NEEDED = ("prompt", "height", "width", "num_inference_steps", "generator", "output_type", "callback_on_step_end")
"""Arguments that a pipeline must take to be served."""

# Of at least `min_m` tokens each, so that what is decided for texts of few rows is decided for all.
WARMUP_PROMPTS = (
    "a large red circle on the left of a white background, and beside it a smaller one",
    "two small blue squares on a yellow background under three green crosses, one of which is much larger",
)


class EngineError(Fp8Error):
    """The engine cannot draw what is asked."""


class QueueFullError(EngineError):
    """No room for these pictures.

    Attributes:
        retry_after: seconds after which there should be some.
    """

    def __init__(self, problem: str, retry_after: int) -> None:
        super().__init__(f"{problem}; try again in {retry_after} s")
        self.retry_after = retry_after


class UnavailableError(EngineError):
    """The engine is not ready yet, or shuts down."""


class DrawingError(EngineError):
    """A picture could not be drawn; the next one can."""


class OutOfMemoryError(DrawingError):
    """The device has no memory for a picture of this size."""


class NotFiniteError(DrawingError):
    """The model made NaN or Inf, which would have been a black picture."""


@dataclass(frozen=True)
class Order:
    """Pictures of one request.

    Attributes:
        seeds: one for each picture.
        arguments: of `Session.call`, checked by `Session.arguments`, without the prompt.
        previews: how many unfinished pictures to show.
        lora: adapters of the session.
        client: whose turn it takes in the queue.
        unquantized: draw with the session's twin.
    """

    prompt: str
    seeds: tuple[int, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    previews: int = 0
    lora: Lora = ()
    client: str = ""
    unquantized: bool = False

    @property
    def batch_key(self) -> Hashable | None:
        """What pictures have in common that are drawn together. The texts may differ, not whether there are any.

        None where pictures are given, which pipelines do not take for several texts alike.
        """
        if "image" in self.arguments:
            return None
        texts = ("negative_prompt",)
        common = sorted((name, name if name in texts else value) for name, value in self.arguments.items())
        return (self.lora, self.unquantized, *common)


@dataclass(frozen=True)
class Preview:
    """An unfinished picture; ``index`` counts from 0."""

    index: int
    image: Image


@dataclass(frozen=True)
class Picture:
    """A finished picture, number ``index`` of its order.

    Attributes:
        tokens: how many the transformer saw of it.
        seconds: that its batch took.
    """

    index: int
    seed: int
    image: Image
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Video:
    """A finished video; as `Picture`.

    Attributes:
        frames: ``(frames, height, width, 3)``, uint8.
    """

    index: int
    seed: int
    frames: NDArray[np.uint8]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Of a video, ``done`` of ``steps`` steps are done; none when it has been begun."""

    done: int
    steps: int


@dataclass(frozen=True)
class Failed:
    """The end of an order that was not fulfilled."""

    error: Exception


Event = Preview | Picture | Video | Progress | Failed


class Ticket:
    """An order in the engine. Its events are a `Picture` or `Video` for each seed, or once a `Failed`, the last."""

    def __init__(self, order: Order, on_event: Callable[[Event], None]) -> None:
        self.order = order
        self._on_event = on_event
        self._left = len(order.seeds)
        self._previews = 0
        self._lock = threading.Lock()

    @property
    def done(self) -> bool:
        """No event will follow."""
        return self._left == 0

    def cancel(self) -> None:
        """Nobody waits for the rest: it is not drawn, a drawing is stopped after its step, and no event follows."""
        with self._lock:
            self._left = 0

    def emit(self, event: Event) -> None:
        """Hand ``event`` out, unless the ticket is done, or a drawing that is repeated shows a preview again."""
        with self._lock:
            if self._left == 0:
                return
            if isinstance(event, Preview):
                if event.index < self._previews:
                    return
                self._previews = event.index + 1
            elif isinstance(event, Picture | Video):
                self._left -= 1
            elif isinstance(event, Failed):
                self._left = 0
            self._on_event(event)


@dataclass(frozen=True)
class Abilities:
    """What an engine can be asked for. It holds no weights, so that it can be sent to a machine that has none.

    Attributes:
        multiple: of pixels, that width and height must be.
        frame_multiple: of frames, see `Session.frame_multiple`.
        cache: of steps, see `Session`.
        weights: what those of the session are, and those of its twin, if there is one.
        tokenizer: that counts the tokens of a text; of several, the one that reads most. None: there is none.
        adapters: names of the LoRA adapters.
        adapters_at_once: how many of them a picture may use.
        no_previews: why there can be no unfinished pictures; None: there can.
        needs_image: it cannot draw from a text alone.
    """

    rules: CallRules
    multiple: int
    frame_multiple: int | None
    cache: str | None
    weights: tuple[str, ...]
    tokenizer: Any
    adapters: tuple[str, ...]
    adapters_at_once: int
    no_previews: str | None
    needs_image: bool


class AnyEngine(Protocol):
    """Whoever draws for the HTTP side: an `Engine` in its own process, or those of other machines."""

    metrics: Metrics

    @property
    def alive(self) -> bool:
        """Whether it can become ready, or is."""

    @property
    def ready(self) -> bool:
        """Whether it takes orders."""

    @property
    def abilities(self) -> Abilities:
        """What it can be asked for, once it is ready."""

    async def accept(self, order: Order, on_event: Callable[[Event], None]) -> Ticket:
        """Return once ``order`` has its place. ``on_event`` must return at once, and may be called in any thread.

        Raises:
            EngineError: it will not be drawn.
        """


@dataclass(frozen=True, eq=False)
class _Row:
    """One picture of a ticket: a row of a batch."""

    ticket: Ticket
    index: int
    since: float

    @property
    def seed(self) -> int:
        return self.ticket.order.seeds[self.index]

    @property
    def client(self) -> str:
        return self.ticket.order.client

    @property
    def batch_key(self) -> Hashable | None:
        return self.ticket.order.batch_key

    @property
    def abandoned(self) -> bool:
        return self.ticket.done


class _Abandoned(Exception):
    """Nobody waits for any picture of a batch."""


class Engine:
    """Draws for many at once with one pipeline.

    Args:
        load: makes the session, compiled, in the engine's thread.
        warmup: sizes ``(width, height)`` to draw before it is ready; the first is the most usual. None: the pipeline's.
        max_batch: how many pictures may be drawn together.
        max_waiting: how many pictures may wait beside those.
        on_progress: called during the warm-up with how much of it is done, how much there is, and what comes next.
    """

    def __init__(
        self,
        load: Callable[[], Session],
        warmup: Sequence[tuple[int, int]] = (),
        max_batch: int = 4,
        max_waiting: int = 64,
        on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    ) -> None:
        self.metrics = Metrics()
        self.session: Session
        self.no_previews: str | None = None
        self.needs_image = False
        self.max_batch = max_batch
        self._load = load
        self._warmup = warmup
        self._max_waiting = max_waiting
        self._on_progress = on_progress
        self._waiting: WaitingItems[_Row] = WaitingItems(max_waiting, self.metrics.waiting.set)
        self._ready: Future[None] = Future()
        self._closing = False
        self._tickets: set[Ticket] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._previews: Previews
        self._weights: tuple[str, ...]
        self._encoded = 0.0
        self._seconds_per_picture = 1.0

    def start(self) -> Future[None]:
        """Load and warm up in a thread. The future is done when pictures can be drawn, or holds why they cannot."""
        # torch's settings are kept by context: the thread shall have those of the caller.
        context = contextvars.copy_context()
        # A daemon: a process that must end shall not wait for a step that hangs.
        self._thread = threading.Thread(target=context.run, args=(self._work,), name="fp8-worker", daemon=True)
        self._thread.start()
        return self._ready

    @property
    def ready(self) -> bool:
        """Whether it takes orders."""
        return self._ready.done() and self._ready.exception() is None and self.alive and not self._closing

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, order: Order, on_event: Callable[[Event], None]) -> Ticket:
        """Queue ``order``. ``on_event`` is called in the engine's thread, and must return at once.

        Raises:
            QueueFullError: too many pictures wait.
            UnavailableError: it is not ready, or shuts down.
        """
        ticket = Ticket(order, on_event)
        now = time.monotonic()
        with self._lock:
            if not self.ready:
                raise UnavailableError("the server shuts down" if self._closing else "the server is not ready yet")
            rows = [_Row(ticket, index, now) for index in range(len(order.seeds))]
            if not self._waiting.put(rows):
                seconds = len(self._waiting) * self._seconds_per_picture
                problem = f"{len(rows)} pictures more than the {self._max_waiting} that may wait"
                raise QueueFullError(problem, max(1, round(seconds)))
            self._tickets = {each for each in self._tickets if not each.done} | {ticket}
        return ticket

    async def accept(self, order: Order, on_event: Callable[[Event], None]) -> Ticket:
        """`submit`, as `AnyEngine` has it."""
        return self.submit(order, on_event)

    @property
    def _sessions(self) -> list[Session]:
        """The session, and its twin, if there is one."""
        return [self.session] if self.session.twin is None else [self.session, self.session.twin]

    @property
    def abilities(self) -> Abilities:
        """What can be asked for, once it is ready."""
        pipe = self.session.pipe
        adapters = self.session.adapters
        tokenizers = [value for name, value in vars(pipe).items() if name.startswith("tokenizer") and callable(value)]
        return Abilities(
            rules=self.session.rules,
            multiple=self.session.pixel_multiple,
            frame_multiple=self.session.frame_multiple,
            cache=self.session.cache,
            weights=self._weights,
            tokenizer=max(tokenizers, key=lambda tokenizer: tokenizer.model_max_length, default=None),
            adapters=() if adapters is None else adapters.names,
            adapters_at_once=0 if adapters is None else adapters.at_once,
            no_previews=self.no_previews,
            needs_image=self.needs_image,
        )

    def close(self, grace: float) -> None:
        """Take no more orders, finish those there are within ``grace`` seconds, and fail the rest."""
        self.refuse()
        if self._thread is not None and self._ready.done():  # nobody waits for the end of a warm-up
            self._thread.join(grace)
        self._fail_all(UnavailableError("the server shuts down, and the time to finish is over"))

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

    def _work(self) -> None:
        # A batch, padded texts and adapters each make graphs of their own; a model left out of FP8 would be worse.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        try:
            self.session = self._load()
            self._prepare()
        except BaseException as error:  # whoever waits for it is told
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            while rows := self._waiting.take(self.max_batch):
                self._draw(rows)
        finally:
            self.refuse()
            self._fail_all(UnavailableError("the server's worker has stopped"))

    # --- before it is ready ---

    def _prepare(self) -> None:
        """Check the pipeline, and draw with each graph that requests will need."""
        session = self.session
        name = type(session.pipe).__name__
        missing = [argument for argument in NEEDED if not session.takes(argument)]
        if missing:
            raise PipelineError(f"{name} takes no {', '.join(missing)}, so it cannot be served")
        self._weights = tuple(each.weights for each in self._sessions)
        encoders: dict[nn.Module, None] = {}
        for each in self._sessions:
            each.pipe.set_progress_bar_config(disable=True)
            modules = [part for part in vars(each.pipe).values() if isinstance(part, nn.Module)]
            encoders |= dict.fromkeys(module for module in modules if module not in each.denoisers.values())
        for encoder in encoders:
            encoder.register_forward_hook(self._note_encoded)
        self._previews = Previews(session.pipe)
        self.no_previews = self._previews.refusal()
        if session.rules.makes_videos:
            # Of equal sides, the rotary embedding of a square video would make a graph for squares alone.
            torch.fx.experimental._config.use_duck_shape = False
            self.no_previews, self.max_batch = "it makes videos", 1
        sizes: list[tuple[int, int] | None] = [*self._warmup] or [None]
        first, second = WARMUP_PROMPTS
        self.needs_image = session.takes("image") and not self._draws_from_text()
        if self.needs_image:
            self.max_batch = 1
        todo: list[tuple[tuple[int, int] | None, tuple[str, ...]]] = [(size, (first,)) for size in sizes]
        if self.max_batch > 1:  # with texts of equal length, and with texts that are padded
            todo += [(size, prompts) for size in sizes for prompts in ((first, first), (first, second))]
        for done, (size, prompts) in enumerate(todo):
            if done == 1 and (reason := self._no_batches()):
                log.warning("pictures are drawn one by one: %s", reason)
                self.max_batch = 1
            if len(prompts) > self.max_batch:
                continue
            what = "" if size is None else f"{size[0]}x{size[1]}"
            self._on_progress(done, len(todo), f"{what} batch of {len(prompts)}".strip())
            given = {} if size is None else {"width": size[0], "height": size[1]}
            # A cache makes a graph for each state that it comes to.
            steps = {} if session.cache is not None else {"num_inference_steps": 2}
            arguments = session.arguments(**given, **steps)
            if session.rules.makes_videos:
                arguments["num_frames"] = 2 * (session.frame_multiple or 4) + 1
            if self.needs_image:
                from PIL import Image

                arguments["image"] = Image.new("RGB", size or (1024, 1024))
                if session.takes("mask_image"):
                    arguments["mask_image"] = Image.new("L", size or (1024, 1024), 255)
            try:
                self._draw_for_nobody(prompts, arguments)
            except PreviewError as error:
                self.no_previews = str(error)
                self._draw_for_nobody(prompts, arguments)
        self._on_progress(len(todo), len(todo), "done")

    def _draws_from_text(self) -> bool:
        """Whether a pipeline that takes a picture also draws without."""
        try:
            self.session.check_call(prompt=WARMUP_PROMPTS[0], **self.session.arguments(num_inference_steps=2))
        except Exception as error:  # each pipeline fails in its own way without a picture
            log.info("the pipeline needs a picture: %s", error)
            return False
        return True

    def _draw_for_nobody(self, prompts: Sequence[str], arguments: Mapping[str, Any]) -> None:
        previews = int(self.no_previews is None)
        for unquantized in (False, True)[: len(self._sessions)]:
            orders = [Order(prompt, (0,), arguments, previews, unquantized=unquantized) for prompt in prompts]
            self._call([_Row(Ticket(order, lambda _: None), 0, time.monotonic()) for order in orders])

    def _no_batches(self) -> str | None:
        """Why a picture would depend on which others are drawn with it; None if it does not."""
        for name, module in self.session.denoisers.items():
            if getattr(module, "is_cache_enabled", False):
                return f"the {name} has a step cache"
        try:
            reports = self.session.reports()
        except NothingConvertedError:
            return None
        schemes = {row.scheme for report in reports.values() for row in report.layers}
        return "activations have one scale for the whole batch" if any("tensor" in s for s in schemes) else None

    def _note_encoded(self, *_: Any) -> None:
        """A text encoder has run; the last one before the first step ends the phase "encode"."""
        self._encoded = time.monotonic()

    # --- a batch ---

    def _draw(self, rows: Sequence[_Row]) -> None:
        """Draw ``rows`` together; if that fails, each alone, so that only those fail that must."""
        rows = [row for row in rows if not row.abandoned]
        if not rows:
            return
        failure: Exception | None = None
        start = time.monotonic()
        try:
            with StepClock(self.session.device) as clock:
                made = self._call(rows)
        except _Abandoned:
            return
        except Exception as error:
            failure = _as_failure(error)
            if not isinstance(failure, CallError):
                log.exception("drawing %d pictures failed", len(rows))
        if failure is not None:
            # Outside of the handler, which holds all that the failed call had in memory.
            if isinstance(failure, OutOfMemoryError):
                gc.collect()
                torch.cuda.empty_cache()
            if len(rows) > 1:
                for row in rows:
                    self._draw([row])
                return
            self.metrics.failures.inc()
            rows[0].ticket.emit(Failed(failure))
            return
        if clock.compile_seconds:
            self.metrics.compile_seconds.inc(clock.compile_seconds)
            log.warning("compiled for %.1f s after the warm-up", clock.compile_seconds)
        seconds = (time.monotonic() - start) / len(rows)
        self._seconds_per_picture += 0.2 * (seconds - self._seconds_per_picture)
        self.metrics.batch_size.observe(len(rows))
        for row, event in zip(rows, made, strict=True):
            self.metrics.phases.labels("queue").observe(start - row.since)
            (self.metrics.failures if isinstance(event, Failed) else self.metrics.pictures).inc()
            row.ticket.emit(event)

    def _call(self, rows: Sequence[_Row]) -> list[Event]:
        """A `Picture` for each row, or `Failed` where it is not finite; their previews are handed out meanwhile."""
        orders = [row.ticket.order for row in rows]
        session = self._sessions[orders[0].unquantized]
        arguments = dict(orders[0].arguments)
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [order.arguments["negative_prompt"] for order in orders]
        start = last = time.monotonic()
        encoded: float | None = None
        latents = torch.empty(0)
        makes_videos = session.rules.makes_videos
        if makes_videos:
            steps = arguments.get("num_inference_steps", session.rules.defaults["num_inference_steps"])
            rows[0].ticket.emit(Progress(0, steps))

        def step(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            nonlocal last, encoded, latents
            last, latents = time.monotonic(), kwargs["latents"]
            encoded = max(start, self._encoded) if encoded is None else encoded
            self.metrics.steps.inc()
            if makes_videos:
                rows[0].ticket.emit(Progress(index + 1, pipe.num_timesteps))
            if all(row.abandoned for row in rows):
                raise _Abandoned
            for position, row in enumerate(rows):
                shown = preview_steps(row.ticket.order.previews, pipe.num_timesteps)
                if index + 1 in shown and not row.abandoned:
                    of_row = {**row.ticket.order.arguments, "prompt": row.ticket.order.prompt}
                    decoded = self._previews.decode(latents[position : position + 1], **of_row)
                    if bool(torch.isfinite(decoded).all()):  # else the picture will fail, too
                        row.ticket.emit(Preview(shown.index(index + 1), _image(decoded[0])))
            return kwargs

        if session.adapters is not None:
            session.adapters.use(orders[0].lora)
        prompts = [order.prompt for order in orders]
        arguments |= {"prompt": prompts, "callback_on_step_end": step, "output_type": "pt"}
        made = session.call([row.seed for row in rows], **arguments)
        pixels: Tensor = made.frames if makes_videos else made.images
        images = pixels.float().cpu()  # waits for the device
        for phase, seconds in (
            ("encode", (encoded or start) - start),
            ("denoise", last - (encoded or start)),
            ("decode", time.monotonic() - last),
        ):
            self.metrics.phases.labels(phase).observe(seconds)
        finite = [bool(torch.isfinite(each).all()) for each in latents]
        events: list[Event] = []
        for position, (row, image) in enumerate(zip(rows, images, strict=True)):
            if finite[position] and bool(torch.isfinite(image).all()):
                tokens, seconds = session.tokens(latents), time.monotonic() - start
                if makes_videos:
                    events.append(Video(row.index, row.seed, _bytes(image), tokens, seconds))
                else:
                    events.append(Picture(row.index, row.seed, _image(image), tokens, seconds))
            else:
                events.append(Failed(NotFiniteError("the model made NaN or Inf; no picture was made of it")))
        return events


def preview_steps(previews: int, steps: int) -> list[int]:
    """After which of ``steps`` steps, counted from 1, to show a preview: evenly spread, and never after the last.

    Fewer than ``previews`` where there are too few steps.
    """
    return sorted({round(steps * (i + 1) / (previews + 1)) for i in range(previews)} - {0, steps})


def _image(pixels: Tensor) -> Image:
    """A picture of ``(3, height, width)`` in [0, 1], rounded as diffusers does."""
    from PIL import Image

    return Image.fromarray(_bytes(pixels))


def _bytes(pixels: Tensor) -> NDArray[np.uint8]:
    """Of ``(..., 3, height, width)`` in [0, 1], the colors last."""
    colors_last = (pixels.float().cpu().movedim(-3, -1) * 255).round().byte()
    return cast("NDArray[np.uint8]", colors_last.numpy())


def _as_failure(error: Exception) -> Exception:
    """What a client may know of ``error``: what it can mend, or only its kind."""
    if isinstance(error, CallError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemoryError("the device is out of memory; ask for a smaller picture")
    return DrawingError(f"drawing failed with {type(error).__name__}; the server's log tells more")
