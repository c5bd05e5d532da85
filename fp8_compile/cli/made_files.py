"""Files of pictures and videos, and what is written into them to make them again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from torch import Tensor

from ..version import __version__
from .common import use_settings
from .messages import VIDEO_SUFFIX, fail, require, tell

if TYPE_CHECKING:
    from ..pipelines.pixels import Sound

KEY = "fp8_diffusion"
"""Of the text in a PNG file."""

NOT_OF_A_PICTURE = frozenset(
    {"output", "again", "config", "quiet", "verbose", "as_json", "show_layers", "num_images", "seeds", "prompts_file"}
)
"""Options that say what to do with pictures, or name several of them."""


def versions() -> dict[str, str]:
    """Of all that the bits of a picture depend on."""
    found = {"fp8-compile": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def given_settings(context: typer.Context) -> dict[str, Any]:
    """The options of a command that were given, on its line or in a file, by their names."""
    found = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name not in NOT_OF_A_PICTURE and source is not None and source.name != "DEFAULT":
            found[name] = value
    return found


def plain(value: Any) -> Any:
    """``value`` as JSON has it."""
    if isinstance(value, Path):
        return str(value)
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def names_of(output: Path, count: int) -> list[Path]:
    """``output``, or as many files with numbers before its ending."""
    if count == 1:
        return [output]
    digits = len(str(count))
    return [output.with_stem(f"{output.stem}-{i + 1:0{digits}}") for i in range(count)]


def write_picture(pixels: Tensor, file: Path, about: Mapping[str, Any]) -> tuple[int, int]:
    """Write a picture, and into a PNG file how it was made.

    Args:
        pixels: ``(3, height, width)`` in [0, 1].

    Returns:
        Width and height.
    """
    from PIL.PngImagePlugin import PngInfo

    from ..pipelines.pixels import to_image

    image = to_image(pixels)
    if file.suffix.lower() == ".png":
        info = PngInfo()
        info.add_itxt(KEY, json.dumps(about, ensure_ascii=False, sort_keys=True))
        image.save(file, pnginfo=info)
    else:
        image.save(file)
    return image.size


def write_video(pixels: Tensor, file: Path, fps: int, sound: Sound | None) -> tuple[int, int]:
    """As `write_picture`, of ``(frames, 3, height, width)``."""
    from ..pipelines.pixels import to_bytes
    from ..serve.pictures import encoded_video

    require("imageio", "imageio_ffmpeg", extra="video")
    file.write_bytes(encoded_video(to_bytes(pixels), fps, sound))
    return pixels.shape[-1], pixels.shape[-2]


def read_again(context: typer.Context, path: Path | None) -> Path | None:
    """Let what a PNG file was made with stand for what the command line does not give."""
    if path is None or context.resilient_parsing:
        return path
    require("PIL", extra="quality")
    from PIL import Image

    if path.suffix.lower() == VIDEO_SUFFIX:
        fail(f"--from {path}: videos do not hold what they were made with")
    try:
        with Image.open(path) as image:
            image.load()  # the text may stand behind the pixels
            about = json.loads(getattr(image, "text", {}).get(KEY, "null"))
    except (OSError, ValueError) as error:
        fail(f"--from {path}: cannot be read as a picture: {error}")
    if about is None:
        fail(f"--from {path}: it does not say what it was made with; PNG files of this command do")
    here = versions()
    changed = [
        f"{name} {old} (here {here.get(name, 'none')})"
        for name, old in about["versions"].items()
        if old != here.get(name)
    ]
    if changed:
        tell(f"--from {path}: was made with {', '.join(changed)}; the picture may differ")
    use_settings(context, about["settings"], f"--from {path}")
    return path
