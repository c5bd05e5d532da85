"""What an engine is asked for and what it answers, wherever it draws."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import Fp8Error
from ..pipelines.adapters import Lora
from ..pipelines.call_rules import CallRules
from .metrics import Metrics

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from ..pipelines.pixels import Sound


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
        sound: None of models that make none.
    """

    index: int
    seed: int
    frames: NDArray[np.uint8]
    sound: Sound | None
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

    @property
    def shown(self) -> bool:
        """Whether there was a preview."""
        return self._previews > 0

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
        max_batch: how many pictures it draws together.
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
    max_batch: int


class AnyEngine(Protocol):
    """Whoever draws for the HTTP side: the engine of this machine, or those of others."""

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
