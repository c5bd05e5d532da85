"""How far the pictures of a quantized pipeline are from those of its unquantized twin.

Every number is measured end to end: the same prompts and the same initial noise through both pipelines, compiled as
they will be used. PSNR and SSIM are scikit-image's, LPIPS is the `lpips` package's. Adherence to the prompt is judged
by `scene_detector.detect`, so only for captions of `scenes`. Needs ``pip install 'fp8-compile[quality]'``, LPIPS
``'fp8-compile[quality,lpips]'``.

    bf16 = generate(pipe, prompts, seeds, height=64, width=64)
    pipe.transformer.compile_repeated_blocks(backend="fp8_diffusion", fullgraph=True)
    print(compare(bf16, generate(pipe, prompts, seeds, height=64, width=64)))
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import Fp8Error
from .scene_detector import detect
from .scenes import parse

if TYPE_CHECKING:
    from PIL.Image import Image

METRICS = {"psnr": max, "ssim": max, "relative_l2": min, "cosine": max, "lpips": min}
"""What `Comparison` holds of each picture, LPIPS only if asked for, and which of two values is the better one."""


_OWN_ARGUMENTS = (
    "prompt",
    "generator",
    "latents",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "num_images_per_prompt",
    "output_type",
    "return_dict",
)


class QualityError(Fp8Error, ValueError):
    """The pictures cannot be compared, or a metric is not installed."""


@dataclass(frozen=True)
class Sample:
    """One generated picture, with the latents that led to it.

    Attributes:
        latents: after every step, float32 (steps, ...) on the CPU.
    """

    prompt: str
    seed: int
    image: Image
    latents: Tensor


def generate(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], **arguments: Any) -> tuple[Sample, ...]:
    """Generate a picture for every prompt and every seed, one at a time.

    Args:
        pipeline: a diffusers pipeline that takes ``callback_on_step_end``.
        prompts: a picture of each for every seed.
        seeds: of the initial noise, which is made on the CPU and so is the same on every device.
        **arguments: for the pipeline's call, for example ``num_inference_steps``.

    Raises:
        QualityError: ``prompts`` is one string, or ``arguments`` holds one that is given here, such as ``generator``.
    """
    if isinstance(prompts, str):
        raise QualityError(f"expected a list of prompts, got {prompts!r}")
    for name in _OWN_ARGUMENTS:
        if name in arguments:
            raise QualityError(
                f"{name}={arguments[name]!r}: every picture is generated alone, from its prompt and seed; leave it out"
            )
    samples = []
    for prompt in prompts:
        for seed in seeds:
            steps: list[Tensor] = []

            def keep(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any], steps: list[Tensor] = steps) -> Any:
                steps.append(kwargs["latents"].detach().float().cpu().clone())
                return kwargs

            generator = torch.Generator("cpu").manual_seed(seed)
            image = pipeline(prompt, generator=generator, callback_on_step_end=keep, **arguments).images[0]
            samples.append(Sample(prompt, seed, image, torch.stack(steps)))
    return tuple(samples)


def psnr(reference: Image, image: Image) -> float:
    """Peak signal-to-noise ratio in dB over all channels; infinite for equal pictures."""
    import numpy as np

    metrics: Any = import_module("skimage.metrics")
    # Division by zero is the definition for equal pictures.
    with np.errstate(divide="ignore"):
        return float(metrics.peak_signal_noise_ratio(*_pixels(reference, image), data_range=255))


def ssim(reference: Image, image: Image) -> float:
    """Structural similarity, window 7, mean over the channels: 1 for equal pictures."""
    metrics: Any = import_module("skimage.metrics")
    return float(metrics.structural_similarity(*_pixels(reference, image), data_range=255, channel_axis=-1))


def lpips(reference: Image, image: Image) -> float:
    """Learned perceptual distance, version 0.1 with AlexNet (https://arxiv.org/abs/1801.03924): 0 for equal pictures.

    Raises:
        QualityError: the package, or the weights of AlexNet that torchvision keeps, are not there. Nothing is fetched.
    """
    model = require_lpips()
    both = [torch.from_numpy(p.copy()).permute(2, 0, 1)[None] / 127.5 - 1 for p in _pixels(reference, image)]
    with torch.no_grad():
        return float(model(*both))


@functools.cache
def require_lpips() -> Any:
    """The model that `lpips` measures with; call it before any picture is generated. Raises as `lpips` does."""
    try:
        package, models = import_module("lpips"), import_module("torchvision.models")
    except ModuleNotFoundError as error:
        raise QualityError(f"{error.name} is not installed; LPIPS needs: pip install 'fp8-compile[lpips]'") from error
    url = models.AlexNet_Weights.IMAGENET1K_V1.url
    weights = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not weights.exists():  # else torchvision would fetch them
        raise QualityError(
            f"LPIPS needs the weights of AlexNet in {str(weights)!r}; they are not there. Get them: {url}"
        )
    return package.LPIPS(net="alex", verbose=False)


def _pixels(reference: Image, image: Image) -> tuple[Any, Any]:
    import numpy as np

    if reference.size != image.size:
        raise QualityError(f"pictures of {reference.size} and {image.size} pixels cannot be compared")
    return np.asarray(reference.convert("RGB")), np.asarray(image.convert("RGB"))


def relative_l2(reference: Tensor, other: Tensor) -> float:
    """``|other - reference| / |reference|`` over all elements."""
    return float((other - reference).norm() / reference.norm())


def cosine(reference: Tensor, other: Tensor) -> float:
    """Cosine of the angle between two tensors taken as vectors."""
    return float(torch.nn.functional.cosine_similarity(reference.flatten(), other.flatten(), dim=0))


@dataclass(frozen=True)
class Row:
    """One picture against its reference.

    Attributes:
        relative_l2, cosine: of the latents after each step; the last are those that were decoded.
        lpips: None unless it was asked for.
    """

    prompt: str
    seed: int
    psnr: float
    ssim: float
    relative_l2: tuple[float, ...]
    cosine: tuple[float, ...]
    lpips: float | None = None

    def last(self, metric: str) -> float:
        """``metric`` of the finished picture."""
        value = getattr(self, metric)
        return float(value[-1] if isinstance(value, tuple) else value)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; prints as a table of the mean and the worst picture."""

    rows: tuple[Row, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of `METRICS` that were measured."""
        return tuple(metric for metric in METRICS if getattr(self.rows[0], metric) is not None)

    @property
    def mean(self) -> dict[str, float]:
        """Of each of `metrics` over the finished pictures."""
        return {metric: statistics.fmean(row.last(metric) for row in self.rows) for metric in self.metrics}

    @property
    def worst(self) -> dict[str, float]:
        """Of each of `metrics` over the finished pictures; not all of one picture. Nothing is worse than NaN."""
        worst = {}
        for metric in self.metrics:
            values = [row.last(metric) for row in self.rows]
            sign = 1 if METRICS[metric] is max else -1
            worst[metric] = min(values, key=lambda value, sign=sign: (not math.isnan(value), sign * value))  # type: ignore[misc]
        return worst

    def __str__(self) -> str:
        mean, worst = self.mean, self.worst
        lines = [f"{'':12}{'mean':>10}{'worst':>10}   ({len(self.rows)} pictures)"]
        lines += [f"{metric:12}{mean[metric]:10.4f}{worst[metric]:10.4f}" for metric in self.metrics]
        return "\n".join(lines)


def compare(reference: Sequence[Sample], samples: Sequence[Sample], perceptual: bool = False) -> Comparison:
    """Compare pictures of the same prompts and seeds, in the same order.

    Args:
        perceptual: by `lpips` too.

    Raises:
        QualityError: there are none, or they differ in prompts, seeds, sizes or numbers of steps; or see `lpips`.
    """
    if not reference or len(reference) != len(samples):
        raise QualityError(f"{len(reference)} pictures cannot be compared with {len(samples)}")
    rows = []
    for mine, theirs in zip(reference, samples, strict=True):
        if (mine.prompt, mine.seed) != (theirs.prompt, theirs.seed):
            raise QualityError(
                f"{mine.prompt!r}, seed {mine.seed}, cannot be compared with {theirs.prompt!r}, seed {theirs.seed}"
            )
        if mine.latents.shape != theirs.latents.shape:
            raise QualityError(
                f"{mine.prompt!r}: latents of shape {tuple(mine.latents.shape)} and {tuple(theirs.latents.shape)}"
            )
        steps = list(zip(mine.latents, theirs.latents, strict=True))
        rows.append(
            Row(
                mine.prompt,
                mine.seed,
                psnr(mine.image, theirs.image),
                ssim(mine.image, theirs.image),
                tuple(relative_l2(a, b) for a, b in steps),
                tuple(cosine(a, b) for a, b in steps),
                lpips(mine.image, theirs.image) if perceptual else None,
            )
        )
    return Comparison(tuple(rows))


def prompt_adherence(samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
    """How many pictures show what their prompts say: (right, of) per attribute of `scenes`, and for "all" of them.

    Raises:
        SceneError: a prompt is no caption of `scenes`.
    """
    counts: dict[str, tuple[int, int]] = {}
    wanted = [parse(sample.prompt) for sample in samples]
    for sample, scene in zip(samples, wanted, strict=True):
        verdict = detect(sample.image).follows(scene)
        for name, right in {"all": all(verdict.values()), **verdict}.items():
            before, of = counts.get(name, (0, 0))
            counts[name] = (before + right, of + 1)
    return counts
