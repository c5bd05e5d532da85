"""What owns the pipeline: it draws what requests will need before it is ready, and then batches."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import NothingConvertedError
from ..pipelines.call_rules import CallError
from ..pipelines.denoisers import PipelineError
from ..pipelines.pixels import has_finite_sound, sounds_of, to_bytes, to_image
from ..pipelines.previews import PreviewError, Previews
from ..pipelines.session import Session
from ..pipelines.step_clock import StepClock
from .orders import (
    Abilities,
    DrawingError,
    EngineError,
    Failed,
    NotFiniteError,
    Order,
    OutOfMemoryError,
    Picture,
    Preview,
    Progress,
    Video,
)

log = logging.getLogger("fp8_compile.serve")

NEEDED = ("prompt", "height", "width", "num_inference_steps", "generator", "output_type", "callback_on_step_end")
"""Arguments that a pipeline must take to be served."""

# Of at least `min_m` tokens each, so that what is decided for texts of few rows is decided for all.
WARMUP_PROMPTS = (
    "a large red circle on the left of a white background, and beside it a smaller one",
    "two small blue squares on a yellow background under three green crosses, one of which is much larger",
)

OnProgress = Callable[[int, int, str], None]
"""Called during the warm-up with how much of it is done, how much there is, and what comes next."""


Show = Callable[[int, Preview | Progress], None]


class PainterLostError(EngineError):
    """The process of a painter is gone, with what it was drawing."""


@dataclass
class Drawn:
    """What came of a batch.

    Attributes:
        events: for each order, a `Picture` or `Video` or, where it is not finite, `Failed`. Empty where nobody waits
            for any.
        failure: why there are none; the next batch can be drawn.
        steps: that were done.
        phases: seconds of "encode", "denoise" and "decode", of a batch that was drawn to its end.
        compile_seconds: which were none, had the warm-up seen it all.
        memory: bytes of a GPU, "allocated" and "reserved" by torch.
    """

    events: list[Picture | Video | Failed] = field(default_factory=list)
    failure: Exception | None = None
    steps: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    compile_seconds: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)


class AnyPainter(Protocol):
    """Who draws for an `Engine`, which calls all but `kill` from one thread."""

    @property
    def lost(self) -> bool:
        """Whether it must be started, or started again."""

    def start(self, on_progress: OnProgress) -> Abilities:
        """Load and warm up. Where it was lost, anew.

        Raises:
            PainterLostError: it was lost meanwhile.
            Exception: what it could not start for.
        """

    def draw(self, orders: Sequence[Order], show: Show, wanted: Callable[[int], bool]) -> Drawn:
        """Draw orders of one seed each together.

        Args:
            show: called with an unfinished picture or the progress of a video, and of which order it is.
            wanted: whether anybody waits for this order. A drawing that nobody waits for is stopped after its step.

        Raises:
            PainterLostError: it was lost meanwhile.
        """

    def close(self) -> None:
        """It is not needed any more."""

    def kill(self) -> None:
        """Nobody waits for it any more. May be called in any thread, at any time."""


class _Abandoned(Exception):
    """Nobody waits for any picture of a batch."""


class Painter:
    """Draws with a pipeline of this process.

    Args:
        load: makes the session, compiled.
        warmup: sizes ``(width, height)`` to draw before it is ready; the first is the most usual. None: the pipeline's.
        max_batch: how many pictures may be drawn together, where they can be.
    """

    session: Session
    lost = False
    _previews: Previews

    def __init__(self, load: Callable[[], Session], warmup: Sequence[tuple[int, int]], max_batch: int) -> None:
        self._load = load
        self._warmup = warmup
        self._max_batch = max_batch
        self._no_previews: str | None = None
        self._needs_image = False
        self._encoded = 0.0

    def close(self) -> None:
        """See `AnyPainter`."""

    def kill(self) -> None:
        """A thread cannot be: it ends with the process."""

    # --- before it is ready ---

    def start(self, on_progress: OnProgress) -> Abilities:
        """See `AnyPainter`.

        Raises:
            PipelineError: the pipeline cannot be served.
        """
        # A batch, padded texts and adapters each make graphs of their own; a model left out of FP8 would be worse.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.session = session = self._load()
        name = type(session.pipe).__name__
        missing = [argument for argument in NEEDED if not session.takes(argument)]
        if missing:
            raise PipelineError(f"{name} takes no {', '.join(missing)}, so it cannot be served")
        encoders: dict[nn.Module, None] = {}
        for each in self._sessions:
            each.pipe.set_progress_bar_config(disable=True)
            modules = [part for part in vars(each.pipe).values() if isinstance(part, nn.Module)]
            encoders |= dict.fromkeys(module for module in modules if module not in each.denoisers.values())
        for encoder in encoders:
            encoder.register_forward_hook(self._note_encoded)
        self._previews = Previews(session.pipe)
        self._no_previews = self._previews.refusal()
        if session.rules.makes_videos:
            # Of equal sides, the rotary embedding of a square video would make a graph for squares alone.
            torch.fx.experimental._config.use_duck_shape = False
            self._no_previews, self._max_batch = "it makes videos", 1
        missed = session.needs_a_picture(WARMUP_PROMPTS[0], **session.arguments(num_inference_steps=2))
        self._needs_image = missed is not None
        if self._needs_image:
            log.info("the pipeline needs a picture: %s", missed)
            self._max_batch = 1
        self._warm_up(on_progress)
        adapters = session.adapters
        tokenizers = [v for n, v in vars(session.pipe).items() if n.startswith("tokenizer") and callable(v)]
        return Abilities(
            rules=session.rules,
            multiple=session.pixel_multiple,
            frame_multiple=session.frame_multiple,
            cache=session.cache,
            weights=tuple(each.weights for each in self._sessions),
            tokenizer=max(tokenizers, key=lambda tokenizer: tokenizer.model_max_length, default=None),
            adapters=() if adapters is None else adapters.names,
            adapters_at_once=0 if adapters is None else adapters.at_once,
            no_previews=self._no_previews,
            needs_image=self._needs_image,
            max_batch=self._max_batch,
        )

    @property
    def _sessions(self) -> list[Session]:
        """The session, and its twin, if there is one."""
        return [self.session] if self.session.twin is None else [self.session, self.session.twin]

    def _warm_up(self, on_progress: OnProgress) -> None:
        """Draw with each graph that requests will need."""
        sizes: list[tuple[int, int] | None] = [*self._warmup] or [None]
        first, second = WARMUP_PROMPTS
        todo: list[tuple[tuple[int, int] | None, tuple[str, ...]]] = [(size, (first,)) for size in sizes]
        if self._max_batch > 1:  # with texts of equal length, and with texts that are padded
            todo += [(size, prompts) for size in sizes for prompts in ((first, first), (first, second))]
        for done, (size, prompts) in enumerate(todo):
            if done == 1 and (reason := self._no_batches()):
                log.warning("pictures are drawn one by one: %s", reason)
                self._max_batch = 1
            if len(prompts) > self._max_batch:
                continue
            what = "" if size is None else f"{size[0]}x{size[1]}"
            on_progress(done, len(todo), f"{what} batch of {len(prompts)}".strip())
            given = {} if size is None else {"width": size[0], "height": size[1]}
            # A cache makes a graph for each state that it comes to.
            steps = {} if self.session.cache is not None else {"num_inference_steps": 2}
            arguments = self.session.arguments(**given, **steps)
            if self.session.rules.makes_videos:
                arguments["num_frames"] = 2 * (self.session.frame_multiple or 4) + 1
            if self._needs_image:
                from PIL import Image

                arguments["image"] = Image.new("RGB", size or (1024, 1024))
                if self.session.takes("mask_image"):
                    arguments["mask_image"] = Image.new("L", size or (1024, 1024), 255)
            try:
                self._draw_for_nobody(prompts, arguments)
            except PreviewError as error:
                self._no_previews = str(error)
                self._draw_for_nobody(prompts, arguments)
        on_progress(len(todo), len(todo), "done")

    def _draw_for_nobody(self, prompts: Sequence[str], arguments: Mapping[str, Any]) -> None:
        previews = int(self._no_previews is None)
        for unquantized in (False, True)[: len(self._sessions)]:
            orders = [Order(prompt, (0,), arguments, previews, unquantized=unquantized) for prompt in prompts]
            self._call(orders, lambda _, shown: None, lambda _: True, Drawn())

    def _no_batches(self) -> str | None:
        """Why a picture would depend on which others are drawn with it; None if it does not."""
        for name, module in self.session.denoisers.items():
            if getattr(module, "is_cache_enabled", False):
                return f"the {name} has a step cache"
        try:
            reports = self.session.reports()
        except NothingConvertedError:
            return None
        if any(row.mixes_samples for report in reports.values() for row in report.layers):
            return "activations have one scale for the whole batch"
        if any(row.decision == "fp8" for report in reports.values() for row in report.attentions):
            return "attention in FP8 takes no mask, and texts of different lengths would bring one"
        return None

    def _note_encoded(self, *_: Any) -> None:
        """A text encoder has run; the last one before the first step ends the phase "encode"."""
        self._encoded = time.monotonic()

    # --- a batch ---

    def draw(self, orders: Sequence[Order], show: Show, wanted: Callable[[int], bool]) -> Drawn:
        """See `AnyPainter`."""
        drawn = Drawn()
        with StepClock(self.session.device) as clock, contextlib.suppress(_Abandoned):
            try:
                drawn.events = self._call(orders, show, wanted, drawn)
            except _Abandoned:
                raise
            except Exception as error:
                drawn.failure = _as_failure(error)
                if not isinstance(error, CallError):
                    log.exception("drawing %d pictures failed", len(orders))
        if isinstance(drawn.failure, OutOfMemoryError):
            # Outside of the handler, which holds all that the failed call had in memory.
            gc.collect()
            torch.cuda.empty_cache()
        drawn.compile_seconds = clock.compile_seconds
        if torch.device(self.session.device).type == "cuda":
            allocated = torch.cuda.memory_allocated(self.session.device)
            drawn.memory = {"allocated": allocated, "reserved": torch.cuda.memory_reserved(self.session.device)}
        return drawn

    def _call(
        self, orders: Sequence[Order], show: Show, wanted: Callable[[int], bool], drawn: Drawn
    ) -> list[Picture | Video | Failed]:
        """See `draw`. Notes in ``drawn`` what it has done."""
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
            show(0, Progress(0, steps))

        def step(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            nonlocal last, encoded, latents
            last, latents = time.monotonic(), kwargs["latents"]
            encoded = max(start, self._encoded) if encoded is None else encoded
            drawn.steps += 1
            if makes_videos:
                show(0, Progress(index + 1, pipe.num_timesteps))
            if not any(wanted(position) for position in range(len(orders))):
                raise _Abandoned
            for position, order in enumerate(orders):
                shown = preview_steps(order.previews, pipe.num_timesteps)
                if index + 1 in shown and wanted(position):
                    of_order = {**order.arguments, "prompt": order.prompt}
                    decoded = self._previews.decode(latents[position : position + 1], **of_order)
                    if bool(torch.isfinite(decoded).all()):  # else the picture will fail, too
                        show(position, Preview(shown.index(index + 1), to_image(decoded[0])))
            return kwargs

        if session.adapters is not None:
            session.adapters.use(orders[0].lora)
        prompts = [order.prompt for order in orders]
        arguments |= {"prompt": prompts, "callback_on_step_end": step, "output_type": "pt"}
        made = session.call([order.seeds[0] for order in orders], **arguments)
        pixels: Tensor = made.frames if makes_videos else made.images
        images = pixels.float().cpu()  # waits for the device
        end = time.monotonic()
        encoded = encoded or start
        drawn.phases = {"encode": encoded - start, "denoise": last - encoded, "decode": end - last}
        finite = [bool(torch.isfinite(each).all()) for each in latents]
        heard, sounds = has_finite_sound(made), sounds_of(made, session.pipe) if makes_videos else []
        events: list[Picture | Video | Failed] = []
        for position, (order, image) in enumerate(zip(orders, images, strict=True)):
            if heard and finite[position] and bool(torch.isfinite(image).all()):
                tokens, seed = session.tokens(latents), order.seeds[0]
                if makes_videos:
                    events.append(Video(0, seed, to_bytes(image), sounds[position], tokens, end - start))
                else:
                    events.append(Picture(0, seed, to_image(image), tokens, end - start))
            else:
                events.append(Failed(NotFiniteError("the model made NaN or Inf; no picture was made of it")))
        return events


def preview_steps(previews: int, steps: int) -> list[int]:
    """After which of ``steps`` steps, counted from 1, to show a preview: evenly spread, and never after the last.

    Fewer than ``previews`` where there are too few steps.
    """
    return sorted({round(steps * (i + 1) / (previews + 1)) for i in range(previews)} - {0, steps})


def _as_failure(error: Exception) -> Exception:
    """What a client may know of ``error``: what it can mend, or only its kind."""
    if isinstance(error, CallError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemoryError("the device is out of memory; ask for a smaller picture")
    return DrawingError(f"drawing failed with {type(error).__name__}; the server's log tells more")
