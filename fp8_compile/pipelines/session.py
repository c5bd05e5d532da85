"""A diffusers pipeline on its device: loaded, compiled and called in one place, for whoever is asked for pictures.

session = Session.load("embedded:qwen-image")
session.compile({"ignored_layers": ["img_mlp"]})
image = session.call(seed=0, **session.arguments(prompt="a red circle", num_inference_steps=8)).images[0]
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import Calibration
from ..checks import parse_options
from ..embedded import default_pipeline_dir, embedded_name
from ..errors import Fp8Error, NothingConvertedError, OptionError
from ..options import KEEP, expanded
from ..quantize import quantize_
from ..recipes import recommended
from ..report import Report, report
from ..weights.quantized_weight import QuantizedWeight
from .adapters import Adapters
from .caches import check_cache, enable_cache, reset_caches
from .call_rules import CallError, CallRules
from .denoisers import PipelineError, denoisers_of, has_fp8_weights, mark_steps
from .offloading import check_offload, offload
from .text_encoders import EncoderRecord, quantize_text_encoders

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHORT = {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32"}


@dataclass(frozen=True, eq=False)
class Session:
    """A pipeline that is ready to be compiled, once, and called.

    Attributes:
        model: the directory or hub name that it was loaded from, or an embedded pipeline such as "embedded:qwen-image".
        denoisers: the modules of ``pipe`` that are compiled, by their names in it.
        adapters: of LoRA, some of which a call may use.
        cache: of steps, a key of `CACHES`.
        text_encoders: what became of them, if they were to be quantized.
        twin: the same pipeline with its weights as they are, to compare with; see `unquantized_twin`.
        offloaded: weights come to the device for their use.
    """

    model: str
    pipe: Any
    device: str
    denoisers: dict[str, nn.Module]
    adapters: Adapters | None = None
    cache: str | None = None
    text_encoders: tuple[EncoderRecord, ...] = ()
    twin: Session | None = None
    offloaded: bool = False

    @classmethod
    def load(
        cls,
        model: str,
        dtype: str = "bfloat16",
        device: str | None = None,
        quantized: bool = True,
        at_load: Mapping[str, Any] | None = None,
        cache: str | None = None,
        text_encoders: str | None = None,
        offloading: str | None = None,
    ) -> Session:
        """Load a pipeline onto its device.

        Args:
            model: see `Session`.
            dtype: a key of `DTYPES`.
            device: a torch device. Default: cuda if there is one, else cpu.
            quantized: its weights shall become FP8.
            at_load: options of `quantize_`: the denoisers are converted on their way to the device, which never holds
                their unquantized weights. Those that are quantized already stay so. None: nothing is converted.
            cache: give the denoisers this step cache, a key of `CACHES`.
            text_encoders: a method of quantization; see `quantize_text_encoders`.
            offloading: one of `OFFLOADING`: weights wait on the CPU, and come to the device for their use.

        Raises:
            OptionError: ``dtype`` or an option is not valid, or there is no embedded pipeline of that name, or it is
                not installed.
            PipelineError: the pipeline cannot be loaded, has nothing to compile, or cannot have the cache or the
                offloading, or no text encoder of it can be quantized.
        """
        if dtype not in DTYPES:
            raise OptionError(f"dtype={dtype!r} is not valid; valid: {', '.join(DTYPES)}")
        if dtype == "float32" and (quantized or text_encoders is not None):
            raise OptionError("dtype='float32': FP8 replaces bfloat16 and float16 weights; use one of those")
        if cache is not None:
            check_cache(cache)
        if text_encoders is not None:
            parse_options({"method": text_encoders})
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if offloading is not None:
            check_offload(offloading, device)
        home = device if offloading is None else "cpu"
        try:
            pipe = _pipeline(model, DTYPES[dtype])
            denoisers = denoisers_of(pipe)
            if cache is not None:
                enable_cache(cache, pipe, denoisers)
            records = () if text_encoders is None else quantize_text_encoders(pipe, text_encoders, home)
            for module in denoisers.values() if at_load is not None else ():
                if not has_fp8_weights(module):
                    quantize_(module, at_load, home)
            if offloading is None:
                pipe.to(device)
            else:
                offload(offloading, pipe, device)
        except Fp8Error:
            raise
        except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last two: there is no such device
            raise PipelineError(f"model={model!r} could not be loaded on device={device!r}: {error}") from error
        return cls(model, pipe, device, denoisers, cache=cache, text_encoders=records, offloaded=offloading is not None)

    def unquantized_twin(self) -> Session:
        """The same pipeline with its weights as they are, from the same place. What is not quantized is shared.

        Raises:
            PipelineError: the weights are quantized there already.
        """
        others = {record.name for record in self.text_encoders if record.weights}
        own = {*self.denoisers, *others, "scheduler"}  # the last: it counts the steps of a call
        shared = {name: part for name, part in self.pipe.components.items() if name not in own and part is not None}
        pipe = _pipeline(self.model, next(iter(self.denoisers.values())).dtype, **shared)  # type: ignore[arg-type]
        denoisers = denoisers_of(pipe)
        self._check_unquantized(denoisers)
        if self.cache is not None:
            enable_cache(self.cache, pipe, denoisers)
        pipe.to(self.device)
        return Session(self.model, pipe, self.device, denoisers, cache=self.cache)

    @property
    def weights(self) -> str:
        """What the weights of the denoisers are, in short: "FP8", "INT8", "BF16" and so on."""
        parameters = [parameter for module in self.denoisers.values() for parameter in module.parameters()]
        methods = {parameter.scheme.method for parameter in parameters if isinstance(parameter, QuantizedWeight)}
        dtype = parameters[0].dtype
        return " and ".join(sorted(methods)).upper() or SHORT.get(dtype, str(dtype).removeprefix("torch."))

    def compile(
        self,
        options: Mapping[str, Any],
        whole: bool = False,
        calibration: Calibration | None = None,
        dynamic: bool | None = None,
    ) -> None:
        """Compile the denoisers with the backend ``fp8_diffusion``.

        Args:
            options: see `Fp8Options`.
            whole: compile each denoiser as one graph. Default: its repeated blocks, where it names any.
            calibration: where each denoiser's ``activation_scales`` come from; alike ones by their names in ``pipe``.
            dynamic: as ``torch.compile``'s: True makes one graph for all sizes and texts.
        """
        parsed = parse_options(options)
        marked = parsed.mode is not None or bool(parsed.inductor)
        for name, module in self.denoisers.items():
            scales = {}
            if calibration is not None:
                known = name if name in calibration.models else None
                keep = [*expanded(parsed.ignored_layers, recommended(module))]
                keep += [pattern for pattern, entry in parsed.layers.items() if entry == KEEP]
                scales = {"activation_scales": calibration.scales(module, name=known, ignored_layers=keep)}
            arguments: dict[str, Any] = {"options": {**options, **scales}, "dynamic": dynamic}
            self._compile(module, whole, marked, backend="fp8_diffusion", **arguments)

    def compile_unquantized(
        self,
        inner_backend: str = "inductor",
        mode: str | None = None,
        whole: bool = False,
        dynamic: bool | None = None,
    ) -> None:
        """Compile the denoisers the same way with their weights as they are, to compare with.

        Raises:
            PipelineError: a denoiser has FP8 weights.
        """
        self._check_unquantized(self.denoisers)
        for module in self.denoisers.values():
            self._compile(module, whole, marked=mode is not None, backend=inner_backend, mode=mode, dynamic=dynamic)

    def _check_unquantized(self, denoisers: Mapping[str, nn.Module]) -> None:
        for name, module in denoisers.items():
            if has_fp8_weights(module):
                raise PipelineError(
                    f"the {name} of model={self.model!r} has FP8 weights, so it has no unquantized twin; load it in "
                    "bfloat16 or float16"
                )

    def _compile(self, module: nn.Module, whole: bool, marked: bool, **arguments: Any) -> None:
        """``marked``: there may be CUDA graphs, so `mark_steps`."""
        # Most caches decide in Python what to skip, and so do the hooks that bring weights.
        arguments["fullgraph"] = self.cache is None and not self.offloaded
        # Block by block where the model names its blocks: compiled once, run by all of them.
        if whole or not getattr(module, "_repeated_blocks", None):
            module.compile(**arguments)
            return
        if marked:
            mark_steps([module])
        compile_blocks: Any = module.compile_repeated_blocks
        compile_blocks(**arguments)

    @functools.cached_property
    def rules(self) -> CallRules:
        """What the pipeline's call takes."""
        parameters = inspect.signature(self.pipe.__call__).parameters
        transformer = getattr(self.pipe, "transformer", None)
        takes_none = getattr(getattr(transformer, "config", None), "guidance_embeds", None) is False
        return CallRules(
            self.model,
            type(self.pipe).__name__,
            {name: parameter.default for name, parameter in parameters.items()},
            type(transformer).__name__ if takes_none else None,
        )

    def arguments(self, **given: Any) -> dict[str, Any]:
        """Arguments for `call`; see `CallRules.arguments`.

        Raises:
            CallError: the pipeline takes no such argument, or would ignore it.
        """
        return self.rules.arguments(**given)

    @property
    def pixel_multiple(self) -> int:
        """Of which width and height must be multiples: a patch of the denoiser, in pixels."""
        if not self.rules.makes_videos:
            return 2 * int(getattr(self.pipe, "vae_scale_factor", 8))
        factor = self._of_vae("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")
        return (factor or 8) * self._patch

    @property
    def frame_multiple(self) -> int | None:
        """Frames that share a latent one: a video has a multiple of them and one more. None: it is not known."""
        return self._of_vae("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")

    def _of_vae(self, *names: str) -> int | None:
        """A factor, which each family of pipelines calls otherwise."""
        return next((int(getattr(self.pipe, name)) for name in names if hasattr(self.pipe, name)), None)

    @property
    def _patch(self) -> int:
        """Latent pixels on a side of a token."""
        config: Any = next(iter(self.denoisers.values())).config
        patch: Any = getattr(config, "patch_size", None) or getattr(config, "all_patch_size", 1)
        return int(patch if isinstance(patch, int) else patch[-1])

    def takes(self, argument: str) -> bool:
        """Whether the pipeline's call has an argument of this name."""
        return argument in self.rules.defaults

    def tokens(self, latents: Tensor) -> int:
        """How many tokens the denoiser sees of one picture or video.

        Args:
            latents: as ``callback_on_step_end`` gives them: packed, ``(batch, tokens, channels)``, or as the VAE takes
                them, ``(batch, channels, ..., height, width)``, which the denoiser cuts into patches.
        """
        if latents.dim() == 3:
            return latents.shape[1]
        return latents[0, 0].numel() // self._patch**2

    def call(self, seed: int | Sequence[int], **arguments: Any) -> Any:
        """What the pipeline returns for ``arguments``.

        Args:
            seed: of the initial noise, which is drawn on the CPU and so the same on every device. Several: one for each
                entry of ``prompt``, which is a list then.
            **arguments: see `arguments`. ``callback_on_step_end`` is left out where the pipeline takes none.

        Raises:
            CallError: the pipeline refuses the arguments.
        """
        if not self.takes("callback_on_step_end"):
            arguments.pop("callback_on_step_end", None)
        if self.cache is not None:
            reset_caches(self.denoisers)
        seeds = [seed] if isinstance(seed, int) else seed
        generators = [torch.Generator("cpu").manual_seed(each) for each in seeds]
        try:
            return self.pipe(generator=generators[0] if isinstance(seed, int) else generators, **arguments)
        except Fp8Error:
            raise
        except ValueError:
            self.check_call(**arguments)  # is it the arguments?
            raise

    def check_call(self, **arguments: Any) -> None:
        """Call the pipeline, but stop it where a denoiser would run first.

        Pipelines check their arguments in ``check_inputs``, in ``__call__`` and in the scheduler. What any of them
        refuses before the first step is the arguments; an error after that is not.

        Raises:
            CallError: the pipeline refuses the arguments.
        """
        with _stopped(self.denoisers):
            try:
                self.pipe(**arguments)
            except _Stop:
                pass
            except ValueError as error:
                raise CallError(str(error)) from error

    def check_fits(self, width: int, height: int) -> None:
        """Refuse a size of which not even the decoding fits the device, before anything is compiled for it.

        The last convolutions of the decoder read and write an activation of a known number of channels for each pixel.
        What else there is in memory is not counted, so a size that passes may still be too large.

        Args:
            width, height: in pixels.

        Raises:
            CallError: the two activations take more memory than the device has.
        """
        vae: Any = getattr(self.pipe, "vae", None)
        channels = None if vae is None else _last_channels(vae)
        if channels is None or getattr(vae, "use_tiling", False):
            return
        needed, there = 2 * channels * width * height * vae.dtype.itemsize, _memory(self.device)
        if needed > there:
            raise CallError(
                f"{width} x {height} pixels: decoding takes {needed / 1e9:.1f} GB at the least, and {self.device} has "
                f"{there / 1e9:.1f} GB"
            )

    def needs_a_picture(self, prompt: str, **arguments: Any) -> Exception | None:
        """What the pipeline raises for a text alone; None where it draws from that, or takes no picture."""
        if not self.takes("image"):
            return None
        try:
            self.check_call(prompt=prompt, **arguments)
        except Exception as error:  # each pipeline fails in its own way without a picture
            return error
        return None

    def reports(self) -> dict[str, Report]:
        """The `report` of every denoiser, after a call.

        Raises:
            NothingConvertedError: no layer was quantized.
        """
        found = {name: report(module) for name, module in self.denoisers.items()}
        if not any(r.totals["quantized"] for r in found.values()):
            reasons = sorted({row.reason for r in found.values() for row in r.layers})
            raise NothingConvertedError(f"no layer of the model was quantized: {'; '.join(reasons)}")
        return found


def _last_channels(vae: Any) -> int | None:
    """Channels of the decoder's last stage, which has the size of the picture; None of kinds where that is unknown."""
    if hasattr(vae.config, "base_dim"):  # Qwen-Image's and Wan's, but where they decode into patches
        return None if getattr(vae.config, "patch_size", None) else int(vae.config.base_dim)
    return int(vae.config.block_out_channels[0]) if type(vae).__name__ == "AutoencoderKL" else None


def _memory(device: str) -> int:
    """Bytes of a device, in use or not."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def pipeline_index(model: str) -> tuple[Mapping[str, Any], str]:
    """The parts of the pipeline that `Session.load` would make, by library and class; and where diffusers finds them.

    Raises:
        OptionError: there is no embedded pipeline of that name, or it is not installed.
        PipelineError: there is no pipeline.
    """
    import diffusers

    source = _source(model)
    loader: Any = diffusers.DiffusionPipeline
    try:
        index: Mapping[str, Any] = loader.load_config(source)
    except (OSError, ValueError) as error:
        raise PipelineError(f"model={model!r} could not be loaded: {error}") from error
    return index, source


def pipeline_class(model: str) -> type | None:
    """The class that `Session.load` will make; None: the model brings one of its own.

    Raises:
        OptionError: there is no embedded pipeline of that name, or it is not installed.
        PipelineError: there is no pipeline.
    """
    import diffusers

    name = pipeline_index(model)[0]["_class_name"]
    return getattr(diffusers, name, None) if isinstance(name, str) else None


def _source(model: str) -> str:
    """What diffusers loads. As text: not every release takes a Path."""
    embedded = embedded_name(model)
    return model if embedded is None else str(default_pipeline_dir(embedded))


def _pipeline(model: str, dtype: torch.dtype, **components: Any) -> Any:
    """The pipeline of `Session.model`, in the memory of the CPU, with ``components`` instead of its own."""
    import diffusers

    loader: Any = diffusers.DiffusionPipeline
    return loader.from_pretrained(_source(model), dtype=dtype, **components)


class _Stop(Exception):
    """A denoiser was called."""


@contextlib.contextmanager
def _stopped(denoisers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let every denoiser raise `_Stop` instead of running, compiled or not."""

    def stop(*_: Any, **__: Any) -> None:
        raise _Stop

    before = {module: module._compiled_call_impl for module in denoisers.values()}
    for module in before:
        module._compiled_call_impl = stop
    try:
        yield
    finally:
        for module, call in before.items():
            module._compiled_call_impl = call
