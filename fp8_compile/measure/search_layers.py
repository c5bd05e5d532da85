"""The layers that a search can keep: their names, and patterns that name exactly them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..patterns import Pattern, layer_path


@dataclass(frozen=True)
class Layer:
    """A linear that can be in FP8, or an attention.

    Attributes:
        block: the path of the compiled block that it is in.
        path: in that block.
    """

    denoiser: str
    block: str
    path: str

    @property
    def full(self) -> str:
        """The path in the denoiser."""
        return f"{self.block}.{self.path}"


class LayerNames:
    """The layers that can be in FP8, and names for sets of them: kinds of layers, blocks, and single layers.

    A kind is the same path in all blocks. Names of blocks and of single layers begin with that of the denoiser where
    there are several.

    Args:
        paths: of the layers, by denoiser and block.
    """

    def __init__(self, paths: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        self.paths = paths
        self.layers = tuple(
            Layer(denoiser, block, path)
            for denoiser, blocks in paths.items()
            for block, inside in blocks.items()
            for path in inside
        )
        self._named: dict[str, frozenset[Layer]] = {}
        for layer in self.layers:
            for name in (self.kind(layer), self.block(layer), self.single(layer)):
                self._named[name] = self._named.get(name, frozenset()) | {layer}

    def kind(self, layer: Layer) -> str:
        """The name of the layers with this path in any block."""
        return layer.path

    def block(self, layer: Layer) -> str:
        """The name of the block that ``layer`` is in."""
        return f"{layer.denoiser}:{layer.block}" if len(self.paths) > 1 else layer.block

    def single(self, layer: Layer) -> str:
        """The name of ``layer`` alone."""
        return f"{layer.denoiser}:{layer.full}" if len(self.paths) > 1 else layer.full

    def expand(self, names: Iterable[str]) -> frozenset[Layer]:
        """The layers that have one of ``names``.

        Raises:
            KeyError: no layer has one of them.
        """
        return frozenset(layer for name in names for layer in self._named[name])

    def shortest(self, kept: frozenset[Layer]) -> list[str]:
        """Few names for exactly ``kept``: kinds of layers if they suffice, else blocks, else single layers."""
        kinds = [name for name in dict.fromkeys(map(self.kind, self.layers)) if self._named[name] <= kept]
        if self.expand(kinds) == kept:
            return kinds
        blocks = [name for name in dict.fromkeys(map(self.block, self.layers)) if self._named[name] <= kept]
        rest = kept - self.expand(blocks)
        return [*blocks, *(self.single(layer) for layer in self.layers if layer in rest)]


def names_in(module: nn.Module, others: Iterable[str]) -> list[str]:
    """The paths of the linears in ``module``, and ``others``, such as those of attentions."""
    linears = [layer_path(path) for path, child in module.named_modules() if isinstance(child, nn.Linear)]
    return list(dict.fromkeys([*linears, *others]))


def exact_pattern(path: str, names: Sequence[str], anywhere: bool = False) -> str:
    """A pattern for the layers at ``path`` or under it: the path itself, if it names no others of ``names``.

    ``anywhere``: layers whose paths end in ``path`` are meant as well.
    """

    def meant(name: str) -> bool:
        return f".{name}".endswith(f".{path}") if anywhere else f"{name}.".startswith(f"{path}.")

    if all(Pattern(path).matches(name) == meant(name) for name in names):
        return path
    return rf"re:(^|\.){re.escape(path)}$" if anywhere else rf"re:^{re.escape(path)}(\.|$)"


def widest_pattern(path: str, names: Sequence[str], measured: Collection[str], blocks: Sequence[str]) -> str:
    """A pattern for the layer at ``path`` and as many others as possible, but for none of the ``measured`` layers."""
    block = next((b for b in blocks if path.startswith(f"{b}.")), None)
    segments = path.split(".")
    if block is not None:  # in all blocks alike, if none of them is measured
        kind = path.removeprefix(f"{block}.")
        if not any(f".{other}".endswith(f".{kind}") for other in measured):
            return exact_pattern(kind, names, anywhere=True)
    for count in range(1, len(segments)):
        prefix = ".".join(segments[:count])
        if not any(other.startswith(f"{prefix}.") for other in measured):
            return exact_pattern(prefix, names)
    return exact_pattern(path, names)
