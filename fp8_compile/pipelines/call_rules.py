"""What the call of a pipeline takes, and what it would ignore."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..embedded import EMBEDDED_CALLS, embedded_name
from ..errors import Fp8Error


class CallError(Fp8Error, ValueError):
    """Arguments that a pipeline refuses, or would ignore.

    Attributes:
        argument: which one, where that is known.
    """

    def __init__(self, problem: str, argument: str | None = None) -> None:
        super().__init__(problem)
        self.argument = argument


@dataclass(frozen=True)
class CallRules:
    """The arguments of a pipeline. It holds no weights, so that it can be sent to a machine that has none.

    Attributes:
        model: see `Session`.
        pipeline: the name of its class.
        defaults: of the arguments of its call, ``inspect.Parameter.empty`` where there is none.
        unguided: the class of its transformer, where that takes no ``guidance_scale``.
    """

    model: str
    pipeline: str
    defaults: Mapping[str, Any]
    unguided: str | None

    @property
    def makes_videos(self) -> bool:
        """Whether the pipeline makes videos of so many frames as it is asked for."""
        return "num_frames" in self.defaults

    @property
    def rate(self) -> str | None:
        """The argument for the frames of a second, where the pipeline makes videos for a rate that it is told."""
        return next((name for name in ("frame_rate", "fps") if name in self.defaults), None)

    @property
    def usual_fps(self) -> int:
        """Frames of a second, where nothing is said: the pipeline's own, or those of Wan and others."""
        return 16 if self.rate is None else int(self.defaults[self.rate])

    def arguments(self, **given: Any) -> dict[str, Any]:
        """Arguments for `Session.call`: those of ``given`` that are not None, over the embedded pipelines' own.

        Raises:
            CallError: the pipeline takes no such argument, or would ignore it.
        """
        given = {name: value for name, value in given.items() if value is not None}
        for name in sorted(given.keys() - self.defaults.keys()):
            raise CallError(f"{self.pipeline} takes no {name}; it takes {', '.join(self.defaults)}", name)
        self._check_guidance(given)
        own = dict(EMBEDDED_CALLS.get(embedded_name(self.model) or "", {}))
        if "negative_prompt" in given:
            for scale in ("true_cfg_scale", "guidance_scale"):  # these switch guidance off, which would ignore it
                own.pop(scale, None)
        return {**own, **given}

    def _check_guidance(self, given: Mapping[str, Any]) -> None:
        """Refuse what pipelines ignore without an error."""
        true_cfg, guidance = given.get("true_cfg_scale"), given.get("guidance_scale")
        for name, value in (("true_cfg_scale", true_cfg), ("guidance_scale", guidance)):
            if value is not None and not math.isfinite(value):
                raise CallError(f"{name}={value}: expected a finite number", name)
        if "negative_prompt" in given:
            if true_cfg is not None and true_cfg <= 1:
                raise CallError(
                    f"true_cfg_scale={true_cfg:g} is no guidance, but negative_prompt needs some", "true_cfg_scale"
                )
            if guidance is not None and guidance <= 0:
                raise CallError(
                    f"guidance_scale={guidance:g} is no guidance, but negative_prompt needs some", "guidance_scale"
                )
        elif true_cfg is not None and true_cfg > 1:
            raise CallError(f"true_cfg_scale={true_cfg:g} needs a negative_prompt, if only ' '", "true_cfg_scale")
        if guidance is not None and guidance > 1 and self.unguided is not None:
            raise CallError(
                f"guidance_scale={guidance:g}: this {self.unguided} takes none (no guidance_embeds)",
                "guidance_scale",
            )
