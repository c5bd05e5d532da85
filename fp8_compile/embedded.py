"""Small trained Qwen-Image and Z-Image pipelines, which need no download; how they are made is in ``bench/``.

Their files are a package of their own, ``fp8-compile-embedded``: they are forty times as large as this one.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import NotInstalledError, OptionError

PREFIX = "embedded:"
"""Before the name of an embedded pipeline, where a directory or a hub name could stand as well."""

EMBEDDED_CALLS: dict[str, dict[str, Any]] = {
    "qwen-image": {"height": 64, "width": 64, "num_inference_steps": 8, "true_cfg_scale": 1.0},
    "z-image": {"height": 64, "width": 64, "num_inference_steps": 8, "guidance_scale": 0.0},
}
"""By name of an embedded pipeline, the arguments that it was evaluated with."""


def default_pipeline_dir(pipeline: str = "qwen-image") -> Path:
    """The directory of an embedded pipeline, in the layout of `save_pretrained`.

    It has the classes and the sizes of ``bench.tiny``'s random pipelines, and was trained by
    ``bench/train_tiny.py`` to draw the captions of `fp8_compile.measure.scenes` at 64 x 64 pixels.

    Args:
        pipeline: a key of `EMBEDDED_CALLS`.

    Raises:
        OptionError: there is no embedded pipeline of that name.
        NotInstalledError: the package with the embedded pipelines is not installed.
    """
    if pipeline not in EMBEDDED_CALLS:
        raise OptionError(f"no embedded pipeline is called {pipeline!r}; there are {', '.join(EMBEDDED_CALLS)}")
    try:
        package = import_module("fp8_compile_embedded")
    except ModuleNotFoundError as error:
        raise NotInstalledError(
            f"{PREFIX}{pipeline} is in the package fp8-compile-embedded, which is not installed: "
            "pip install fp8-compile-embedded, or in a checkout: pip install -e ./embedded"
        ) from error
    return Path(package.__path__[0]) / pipeline


def embedded_name(model: str) -> str | None:
    """The name of the embedded pipeline that ``model`` asks for, such as "embedded:z-image"; None if it asks for none.

    Nothing is said of whether there is one of that name; see `default_pipeline_dir`.
    """
    return model.removeprefix(PREFIX) if model.startswith(PREFIX) else None
