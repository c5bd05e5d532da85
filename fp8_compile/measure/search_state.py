"""What a search has measured, and the file that it is kept in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..weights.fingerprint import fingerprint
from .bound import STATISTICS, SearchError
from .quality import METRICS
from .results import environment, to_jsonable, write_whole
from .search_layers import Layer, LayerNames
from .variants import Variants


@dataclass
class SearchState:
    """Measurements of one pipeline with the same settings.

    Attributes:
        file: that every measurement is written to.
        settings: what the measurements depend on; see `settings_of`.
        names: of the layers that can be in FP8.
        measurements: by the layers that were kept, the quality as `quality_to_dict` gives it.
    """

    file: Path
    settings: dict[str, Any]
    names: LayerNames
    measurements: dict[frozenset[Layer], dict[str, Any]] = field(default_factory=dict)

    def add(self, kept: frozenset[Layer], quality: dict[str, Any]) -> None:
        """Add a measurement, and write the file."""
        self.measurements[kept] = quality
        self.write()

    def write(self) -> None:
        """Write the file."""
        state = {
            "settings": self.settings,
            "layers": self.names.paths,
            "measurements": [
                {"kept": self.names.shortest(kept), "quality": quality} for kept, quality in self.measurements.items()
            ],
        }
        write_whole(self.file, json.dumps(state, indent=1, allow_nan=False) + "\n")


def read_state(file: Path, settings: dict[str, Any], blocks: Mapping[str, set[str]]) -> SearchState | None:
    """What an earlier search wrote to ``file``; None if there is no such file.

    Args:
        settings: of the search that goes on.
        blocks: the paths of the compiled blocks, by denoiser.

    Raises:
        SearchError: the file holds something else, or belongs to other settings.
    """
    if not file.exists():
        return None
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        there, layers, measurements = read["settings"], read["layers"], read["measurements"]
        differ = sorted(name for name in {*settings, *there} if settings.get(name) != there.get(name))
        if not differ:
            _check_layers(layers, blocks)
            names = LayerNames(layers)
            measured = {names.expand(entry["kept"]): _checked(entry["quality"], settings) for entry in measurements}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{error} is missing or unknown" if isinstance(error, KeyError) else error
        raise SearchError(f"{str(file)!r} is no state of a search: {problem}; remove it") from error
    if differ:
        changes = "; ".join(f"{name}: {there.get(name)!r}, now {settings.get(name)!r}" for name in differ)
        raise SearchError(
            f"{str(file)!r} belongs to a search with other settings ({changes}); ask for the same, or begin a new "
            "search elsewhere"
        )
    return SearchState(file, settings, names, measured)


def _check_layers(layers: Any, blocks: Mapping[str, set[str]]) -> None:
    if {denoiser: set(of) for denoiser, of in layers.items()} != blocks:
        raise ValueError(f"expected the layers of {', '.join(blocks)} by block, got {layers!r}")
    for of in layers.values():
        for block, paths in of.items():
            if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
                raise ValueError(f"layers of {block!r}: expected a list of paths, got {paths!r}")


def _checked(quality: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``quality``, which has a number for every metric; None, which is infinite, and "NaN" count as numbers."""
    for statistic in STATISTICS:
        for metric in METRICS:
            if (metric != "lpips" or settings["lpips"]) and quality[statistic][metric] is not None:
                float(quality[statistic][metric])
    return quality


def settings_of(
    variants: Variants, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any], lpips: bool
) -> dict[str, Any]:
    """All that measurements depend on, so that they are used again only where they would come out the same."""
    pipeline = variants.pipeline
    # The text encoders and the VAE make the pictures as well.
    components = {**getattr(pipeline, "components", {}), **variants.denoisers}
    scheduler = getattr(pipeline, "scheduler", None)
    here = environment(pipeline)
    return {
        "pipeline": type(pipeline).__name__,
        "weights": {name: _fingerprint(part) for name, part in components.items() if isinstance(part, nn.Module)},
        "scheduler": None
        if scheduler is None
        else [type(scheduler).__name__, to_jsonable(dict(getattr(scheduler, "config", {})))],
        "options": to_jsonable(variants.settings),
        "lpips": lpips,
        "prompts": list(prompts),
        "seeds": list(seeds),
        "call": to_jsonable(call),
        **{name: here[name] for name in ("device", "torch", "diffusers", "fp8-compile")},
    }


def _fingerprint(model: nn.Module) -> str:
    """A hash of all weights and their names: another checkpoint, or a fused LoRA, gives another one."""
    with torch.no_grad():
        parts = [
            f"{name} {int(fingerprint(part))}"
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            for part in _stored(tensor)
        ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _stored(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What ``tensor`` keeps in memory: itself, or the parts of an FP8 weight, of a text encoder for example."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _stored(getattr(tensor, name))]
