"""Pictures of latents that are still being denoised, decoded by the pipeline's own last lines."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..errors import Fp8Error


class PreviewError(Fp8Error, RuntimeError):
    """A pipeline cannot decode latents between its steps."""


class Previews:
    """Decodes latents between the steps of a pipeline, whatever it does to them before its VAE.

    It calls a twin of the pipeline, with the same modules, that skips each of its steps. diffusers' pipelines do so
    when their property ``interrupt`` is true.

    Args:
        pipe: a diffusers pipeline. Its scheduler is copied, since a call resets it.
    """

    def __init__(self, pipe: Any) -> None:
        self._twin = copy.copy(pipe)
        name = type(pipe).__name__
        # The end of a call would offload the modules, and let a step cache forget its steps.
        parts = {"interrupt": property(lambda _: True), "maybe_free_model_hooks": lambda _: None}
        self._twin.__class__ = type(name, (type(pipe),), parts)
        self._twin.scheduler = copy.deepcopy(pipe.scheduler)

    def refusal(self) -> str | None:
        """Why latents of this pipeline cannot be decoded so; None if they can."""
        pipe = type(self._twin).__mro__[1]
        if not hasattr(pipe, "interrupt"):
            return f"{pipe.__name__} has no property interrupt"
        if getattr(self._twin.scheduler, "init_noise_sigma", 1.0) != 1.0:
            return f"{type(self._twin.scheduler).__name__} scales the latents that it is given"
        return None

    def decode(self, latents: Tensor, **arguments: Any) -> Tensor:
        """One picture, ``(1, 3, height, width)`` in [0, 1].

        Args:
            latents: of one picture, as ``callback_on_step_end`` gives them: ``(1, ...)``.
            **arguments: of the call that made them.

        Raises:
            PreviewError: the pipeline cannot.
        """
        # Two, because some schedulers divide by the number of steps minus one.
        arguments = {**arguments, "num_inference_steps": 2, "output_type": "pt"}
        try:
            decoded: Tensor = self._twin(latents=latents, **arguments).images
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # pipelines of all kinds, with latents that may be no argument of theirs
            raise PreviewError(f"{type(self._twin).__name__} decodes no latents between its steps: {error}") from error
        return decoded
