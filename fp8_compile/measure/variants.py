"""One pipeline, compiled in several ways that take turns."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backend import fp8_diffusion
from ..checks import parse_options
from ..errors import NothingConvertedWarning, OptionError, UnmatchedPatternWarning
from ..options import Fp8Options
from ..pipelines.denoisers import PipelineError, denoisers_of, has_fp8_weights, mark_steps, repeated_blocks
from ..pipelines.step_clock import StepClock
from ..report import Report, report
from ..schemes import scheme_for
from .quality import Sample, generate

BF16 = None
"""In the place of patterns: the region is compiled by the inner backend alone, unquantized."""


def check_measurable(pipeline: Any) -> None:
    """Refuse a pipeline that makes no pictures, or that does not say when a step ends.

    Raises:
        PipelineError: it takes no ``callback_on_step_end``, or it makes videos.
    """
    name, accepted = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    if "callback_on_step_end" not in accepted and not anything:
        raise PipelineError(f"{name} takes no callback_on_step_end, by which steps are measured: {', '.join(accepted)}")
    if "num_frames" in accepted:
        raise PipelineError(f"{name} takes num_frames, so it makes videos; measured are pipelines that make images")


@dataclass(frozen=True, eq=False)
class Region:
    """A module that is compiled as one graph.

    Attributes:
        denoiser: the name in the pipeline of the model that it belongs to.
        path: of the module in that model; empty for the model itself.
    """

    denoiser: str
    path: str
    module: nn.Module


Patterns = tuple[str, ...] | None
"""The ``ignored_layers`` of a region, or `BF16`."""


class NotedBackend:
    """``fp8_diffusion``, which adds each graph that it compiles to ``graphs``: all variants share a model's report."""

    reset = staticmethod(fp8_diffusion.reset)  # type: ignore[attr-defined]  # for torch.compiler.reset

    def __init__(self) -> None:
        self.graphs: set[str] = set()

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **arguments: Any) -> Callable[..., Any]:
        self.graphs.add(str(torch._guards.CompileContext.current_compile_id()))
        return fp8_diffusion(gm, example_inputs, **arguments)


class Variants:
    """A pipeline whose denoisers run as one of several compiled variants, switched without compiling again.

    All variants live in one process and share the weights and their FP8 constants, so that they can be timed in turn.
    Graphs are compiled for the exact sizes of their inputs (``dynamic=False``). Otherwise the first variant would get
    static graphs and the later ones dynamic graphs, and their times could not be compared. `close` puts back what the
    pipeline was compiled with before.

    A mode or Inductor's settings may ask for CUDA graphs. Where blocks are compiled with them, hooks mark every call of
    a denoiser as a step, until `close`; see `mark_steps`.

    Args:
        pipeline: a diffusers pipeline, on its device.
        options: see `Fp8Options`; of every quantized variant; ``ignored_layers`` belongs to `use`.
        whole: compile each denoiser as one graph. Default: its repeated blocks, where it names any.

    Raises:
        PipelineError: the pipeline has nothing to compile, makes videos, takes no callback, has FP8 weights already, or
            ``torch.compile(module)`` was put in the place of one of its modules.
        OptionError: an option is invalid, or ``ignored_layers`` or ``strict`` is among them.
    """

    def __init__(self, pipeline: Any, options: Fp8Options | Mapping[str, Any], whole: bool = False) -> None:
        self.pipeline = pipeline
        self.denoisers = denoisers_of(pipeline)
        check_measurable(pipeline)
        for name, model in self.denoisers.items():
            if has_fp8_weights(model):
                raise PipelineError(f"{name} has FP8 weights, so it has no BF16 twin; load it in bfloat16 or float16")
            for path, module in model.named_modules():
                if isinstance(module, torch._dynamo.OptimizedModule):
                    where = f"{name}.{path}" if path else name
                    raise PipelineError(
                        f"{where} was made by torch.compile(module), which would be measured instead; put back its "
                        "_orig_mod, or compile with module.compile()"
                    )
        self._parsed = parse_options(options)
        self.options = self._parsed.changed() if isinstance(options, Fp8Options) else dict(options)
        scheme = scheme_for(self._parsed)
        self.settings = {"method": scheme.method, **scheme.options, **self.options}
        if self._parsed.ignored_layers:
            raise OptionError(
                f"ignored_layers={list(self._parsed.ignored_layers)}: each variant has its own; see `use`"
            )
        if self._parsed.strict:
            raise OptionError("strict=True: a variant may keep all layers of a region, which is no error; leave it out")
        self.regions: list[Region] = []
        for name, model in self.denoisers.items():
            blocks = [] if whole else [Region(name, path, block) for path, block in repeated_blocks(model)]
            self.regions += blocks or [Region(name, "", model)]
        modules = [module for model in self.denoisers.values() for module in model.modules()]
        self._before = {module: module._compiled_call_impl for module in modules}
        self._calls: dict[tuple[Region, Patterns], Any] = {}
        self._backends: dict[tuple[str, ...], NotedBackend] = {}
        of_blocks = [self.denoisers[name] for name in {region.denoiser for region in self.regions if region.path}]
        self._hooks = mark_steps(of_blocks) if self._parsed.mode is not None or self._parsed.inductor else []

    @property
    def fp8_attention(self) -> bool:
        """Whether the options of the quantized variants ask for attention in FP8."""
        return self._parsed.fp8_attention

    @property
    def by_block(self) -> bool:
        """Whether regions are blocks."""
        return all(region.path for region in self.regions)

    def use(self, patterns_of: Callable[[Region], Patterns]) -> None:
        """Let every region run with its ``ignored_layers``, or as `BF16`. It is compiled when it first runs.

        Raises:
            OptionError: the patterns are one string.
        """
        for module in self._before:  # a model that is compiled as a whole would not call its blocks
            module._compiled_call_impl = None
        for region in self.regions:
            patterns = patterns_of(region)
            if isinstance(patterns, str):
                raise OptionError(f"ignored_layers: expected a tuple of patterns, got {patterns!r}")
            patterns = BF16 if patterns is BF16 else tuple(patterns)
            key = (region, patterns)
            if key not in self._calls:
                region.module.compile(fullgraph=True, dynamic=False, **self._arguments(patterns))
                self._calls[key] = region.module._compiled_call_impl
            region.module._compiled_call_impl = self._calls[key]

    def use_everywhere(self, patterns: Patterns) -> None:
        """`use`, with the same in every region."""
        self.use(lambda region: patterns)

    def _arguments(self, patterns: Patterns) -> dict[str, Any]:
        if patterns is not BF16:
            options = {**self.options, "ignored_layers": list(patterns)}
            return {"backend": self._backends.setdefault(patterns, NotedBackend()), "options": options}
        mode, inductor = self._parsed.mode, self._parsed.inductor
        # BF16 gets the mode and the settings, as FP8 does; torch.compile takes only one of them. A setting wins.
        of_mode = {} if mode is None else torch._inductor.list_mode_options(mode)
        settings = {**of_mode, **inductor}
        return {"backend": self._parsed.inner_backend, **({"options": settings} if settings else {})}

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], **call: Any) -> tuple[Sample, ...]:
        """`quality.generate`, by the variant in use."""
        with self._running():
            return generate(self.pipeline, prompts, seeds, **call)

    def step_seconds(self, prompt: str, seed: int, **call: Any) -> list[float]:
        """Seconds of each step but the first, whose start is unknown, of one picture by the variant in use."""
        with self._running(), StepClock(self.pipeline.device) as clock:
            generator = torch.Generator("cpu").manual_seed(seed)
            self.pipeline(prompt, generator=generator, callback_on_step_end=clock.step, output_type="latent", **call)
        return clock.seconds

    def graphs(self, patterns: Patterns) -> frozenset[str]:
        """The graphs that were compiled so far for regions with these ``ignored_layers``, as in `Report.graphs`."""
        known = None if patterns is BF16 else self._backends.get(patterns)
        return frozenset() if known is None else frozenset(known.graphs)

    def reports(self, patterns: Patterns) -> dict[str, Report]:
        """`report` of every denoiser, with what these ``ignored_layers`` did to it."""
        return {name: report(model, self.graphs(patterns)) for name, model in self.denoisers.items()}

    def close(self) -> None:
        """Let the pipeline run as it did before, and let go of what was compiled.

        What torch keeps stays until ``torch.compiler.reset()``: its graphs, and with them the FP8 constants.
        """
        for module, call in self._before.items():
            module._compiled_call_impl = call
        self._calls.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        # Every variant is another entry for the same code, and each is wanted.
        config: Any = torch._dynamo.config
        with config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=NothingConvertedWarning)  # a block that is kept as a whole
            # A pattern may be meant for one of several kinds of blocks; `reports` has those that match nowhere.
            warnings.filterwarnings("ignore", category=UnmatchedPatternWarning)
            yield
