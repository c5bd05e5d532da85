"""The options of commands that draw for many, and the pipeline that they ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import KEEP
from .arguments import (
    QUANTIZING,
    Cache,
    CompileSettings,
    IgnoredLayers,
    NoQuantization,
    TextEncoderQuantization,
    check_no_quantization,
    parse_patterns,
)
from .messages import fail, require, tell

if TYPE_CHECKING:
    from ..pipelines.session import Session


@dataclass(frozen=True)
class EngineSettings(CompileSettings):
    """Options of the engine: what it loads, draws first, and may be asked for."""

    warmup: Annotated[
        list[str] | None,
        typer.Option(help="A size to draw before it is ready; repeat it. Default: --sizes, or the pipeline's own."),
    ] = None
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of a picture of medium quality. Default: the pipeline's.")
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A LoRA file that requests may name; repeat it."),
    ] = None
    max_loras: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Adapters that one picture may use; each costs time, used or not. Default: 2, or 1 with one --lora.",
        ),
    ] = None
    cache: Cache = None
    text_encoder_quantization: TextEncoderQuantization = None
    max_pixels: Annotated[int, typer.Option(min=256, help="Of a picture, without --sizes.")] = 4 * 1024 * 1024
    max_frames: Annotated[int, typer.Option(min=2, help="Of a video.")] = 257
    max_steps: Annotated[int, typer.Option(min=1, help="That a request may ask for.")] = 100
    # With guidance, twice as many rows: below those that count as tokens (`fp8_compile.passes.graphs`).
    max_batch: Annotated[int, typer.Option(min=1, max=15, help="Pictures drawn together; 1: each alone.")] = 4
    compile_cache: Annotated[
        Path | None, typer.Option(help="Compiled code to start with: the folder of fp8-diffusion compile --output.")
    ] = None
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Hold the unquantized transformer beside it, which requests may ask for."),
    ] = False
    no_quantization: NoQuantization = False
    ignored_layers: IgnoredLayers = None

    def loader(self, context: typer.Context, model: str) -> Loader:
        """Check the options.

        Raises:
            OptionError: one is not valid.
            PatternError: an entry of ``ignored_layers`` is malformed.
        """
        if self.no_quantization:
            check_no_quantization(context, QUANTIZING)
            if self.compare:
                fail("--compare and --no-quantization exclude each other; leave one out")
        if self.activation_scheme == "static":
            fail("--activation-scheme static: this command takes no scales; serve weights that were saved with theirs")
        check_additions(self.cache, self.text_encoder_quantization)
        options = options_at_load(self, self.ignored_layers, model)
        adapters = _loras(self.lora)
        if self.max_loras is not None and self.max_loras > len(adapters):
            fail(f"--max-loras {self.max_loras}: there are {len(adapters)} adapters (--lora)")
        return Loader(self, model, options, adapters)


@dataclass(frozen=True)
class Loader:
    """Loads and compiles ``model``, and says which layers stay as they are. It can be sent to another process.

    Attributes:
        options: of the backend.
        adapters: LoRA files by name.
    """

    settings: EngineSettings
    model: str
    options: dict[str, Any]
    adapters: dict[str, Path]

    def __call__(self) -> Session:
        from ..pipelines.session import Session
        from .progress import hush_libraries

        hush_libraries()
        settings, quantized = self.settings, not self.settings.no_quantization
        session = Session.load(
            self.model,
            settings.dtype,
            settings.device,
            quantized=quantized,
            at_load={**self.options, "strict": True} if quantized else None,
            cache=settings.cache,
            text_encoders=settings.text_encoder_quantization,
        )
        tell_additions(session)
        if session.rules.makes_videos:
            require("imageio", "imageio_ffmpeg", extra="serve,video")
        if settings.compile_cache is not None:
            tell_loaded(settings.compile_cache, session.device)
        twin = session.unquantized_twin() if settings.compare else None
        session = self._adapted(session)
        if twin is not None:
            tell_twin(session, twin)
            twin = self._adapted(twin)
            twin.compile_unquantized(settings.inner_backend, settings.compile_mode, dynamic=True)
            session = dataclasses.replace(session, twin=twin)
        if quantized:
            tell_kept(session)
            session.compile(self.options, dynamic=True)
        else:
            session.compile_unquantized(settings.inner_backend, settings.compile_mode, dynamic=True)
        return session

    def _adapted(self, session: Session) -> Session:
        if not self.adapters:
            return session
        from ..pipelines.adapters import Adapters

        adapters = Adapters(session.pipe, self.adapters, self.settings.max_loras or 2)
        return dataclasses.replace(session, adapters=adapters)


def options_at_load(settings: CompileSettings, ignored_layers: Sequence[str] | None, model: str) -> dict[str, Any]:
    """Those of the backend, for weights that are converted while loading.

    Raises:
        OptionError: one is not valid.
        PatternError: an entry of ``ignored_layers`` is malformed.
    """
    patterns, chosen = parse_patterns(ignored_layers)
    chosen = chosen or settings.layers is not None
    return settings.options(patterns if chosen else default_patterns(model))


def default_patterns(model: str) -> list[str]:
    """What is kept where nothing is said; none of a pipeline of the package, which was measured without."""
    from ..embedded import embedded_name
    from ..options import RECOMMENDED

    return [] if embedded_name(model) is not None else [RECOMMENDED]


def tell_kept(session: Session) -> None:
    """Say which layers stay as they are by pattern."""
    from ..weights.records import record_of

    for module in session.denoisers.values():
        record = record_of(module)
        asked = {} if record is None else record.options
        by_plan = [pattern for pattern, how in asked.get("layers", {}).items() if how == KEEP]
        patterns = [*asked.get("ignored_layers", ()), *by_plan]
        kept = ", ".join(patterns)
        rest = f"keeps {kept}; --ignored-layers none converts everything" if patterns else "keeps nothing"
        tell(f"{type(module).__name__}: {rest}")


def check_additions(cache: str | None, text_encoders: str | None) -> None:
    """Refuse, before anything is loaded, what no pipeline can have.

    Raises:
        OptionError: there is no such cache, or no such method.
    """
    from ..checks import parse_options
    from ..pipelines.caches import check_cache

    if cache is not None:
        check_cache(cache)
    if text_encoders is not None:
        parse_options({"method": text_encoders})


def tell_additions(session: Session) -> None:
    """Say which step cache is on, and what became of the text encoders."""
    if session.cache is not None:
        tell(f"step cache {session.cache}: steps that change little are not computed in full")
    for encoder in session.text_encoders:
        before, after = encoder.bytes_before / 1e6, encoder.bytes_after / 1e6
        if encoder.reason is not None:
            tell(f"{encoder.name} ({encoder.kind}): stays as it is, {before:.1f} MB; {encoder.reason}")
        else:
            tell(
                f"{encoder.name} ({encoder.kind}): {encoder.weights} weights quantized, {before:.1f} MB -> "
                f"{after:.1f} MB, which saves {before - after:.1f} MB"
            )


def tell_twin(session: Session, twin: Session) -> None:
    """Say what the twin needs beside the session."""
    size, more = (sum(p.nbytes for m in each.denoisers.values() for p in m.parameters()) for each in (session, twin))
    tell(
        f"--compare: the transformer in {twin.weights}, {more / 1e6:.1f} MB, beside the one in {session.weights}, "
        f"{size / 1e6:.1f} MB"
    )


def tell_loaded(cache: Path, device: str) -> None:
    """Let compiled code be found that ``cache`` has, and say whether it can be.

    Raises:
        SavedCacheError: it is no folder of compiled code.
    """
    from ..inductor import saved_cache

    other = saved_cache.load(cache, device)
    used = "compiled code is taken from it" if other is None else f"{other}. It is not used; all is compiled anew"
    tell(f"--compile-cache {cache}: {used}")


def parse_sizes(option: str, given: Sequence[str] | None) -> list[tuple[int, int]]:
    """The sizes that ``option`` names, ``(width, height)``."""
    from ..serve.pictures import parse_size

    sizes = []
    for text in (part for item in given or [] for part in item.split(",")):
        size = parse_size(text.strip())
        if size is None:
            fail(f"{option} {text!r}: expected width and height, such as 1024x1024")
        sizes.append(size)
    return sizes


def _loras(given: Sequence[str] | None) -> dict[str, Path]:
    """By name, the files of ``--lora``."""
    files: dict[str, Path] = {}
    for text in given or []:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            fail(f"--lora {text!r}: expected NAME=PATH")
        if name in files:
            fail(f"--lora {text!r}: there are two adapters {name!r}")
        if not Path(path).is_file():
            fail(f"--lora {text!r}: there is no file {path!r}")
        files[name] = Path(path)
    return files
