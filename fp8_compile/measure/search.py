"""Find a small set of layers to keep in BF16 that meets a bound on quality, by measuring pictures.

    variants = Variants(pipe, {"granularity": "tensor"})
    search = Search(variants, Bound("relative_l2", 0.05), prompts, seeds, state=Path("search.json"), **call)
    print(search.run("blocks").patterns)

Every measurement generates all pictures by the compiled pipeline, and compares them with compiled BF16. It is written
to a file at once, so that an interrupted search goes on where it stopped.

One graph is compiled for each choice of layers within one kind of block, and blocks of that kind share it. So a search
among whole blocks compiles two graphs (all in FP8, nothing in FP8) however many blocks there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..checks import parse_options
from ..errors import NothingConvertedError
from ..patterns import Pattern, layer_path
from ..weights import eligible
from ..weights.eligible import Candidate
from ..weights.layers import Tree
from .bound import Bound, SearchError
from .quality import Sample, compare, require_lpips
from .results import check_writable, number_text, quality_to_dict
from .search_layers import Layer, LayerNames, exact_pattern, names_in, widest_pattern
from .search_pictures import SearchPictures
from .search_state import SearchState, read_state, settings_of
from .variants import BF16, Patterns, Region, Variants

__all__ = ["BY", "Bound", "Layer", "Result", "Search", "SearchError", "smallest"]

BY = ("layers", "blocks", "blocks-then-layers")


def smallest(units: Sequence[str], loss: Callable[[frozenset[str]], float], limit: float) -> frozenset[str]:
    """A small part of ``units`` to keep so that the loss is within the limit.

    1. Nothing kept: if that is good enough, nothing needs to be. All kept: if that is not, nothing helps.
    2. Each unit is measured as the only one that is not kept. The greater its loss, the earlier it is kept.
    3. Bisection finds how many units, in that order, have to be kept.
    4. Each of those is tried without, the one with the least loss first, until none can be left out.

    That takes about ``2 + n + log2(n)`` measurements and one for each unit that is kept; ``loss`` should remember the
    sets that it has measured. The result has been measured to be good enough, and not to be without any one of its
    members. It need not be the smallest of all: losses of units do not simply add up.

    Args:
        loss: of the model that keeps these units.
        limit: greatest loss that is good enough.

    Raises:
        SearchError: keeping everything is not good enough.
    """
    everything = frozenset(units)
    if loss(frozenset()) <= limit:
        return frozenset()
    if loss(everything) > limit:
        raise SearchError("even with everything kept that can be, the bound is not met; ask for less")
    alone = {unit: loss(everything - {unit}) for unit in units}
    ranked = sorted(units, key=alone.__getitem__, reverse=True)
    few, enough = 0, len(ranked)
    while enough - few > 1:
        middle = (few + enough) // 2
        if loss(frozenset(ranked[:middle])) <= limit:
            enough = middle
        else:
            few = middle
    kept = frozenset(ranked[:enough])
    while True:
        before = kept
        for unit in reversed(ranked):
            if unit in kept and loss(kept - {unit}) <= limit:
                kept -= {unit}
        if kept == before:
            return kept


@dataclass(frozen=True)
class Result:
    """What `Search.run` found.

    Attributes:
        by: what was searched among.
        patterns: ``ignored_layers`` for each denoiser. Except with ``by="layers"``, they are for the whole model and so
            include ``unmeasured``.
        kept: the layers that the search chose to keep.
        quality: with those kept, as `quality_to_dict` gives it.
        measurements: how many were made, those of earlier runs included.
        unmeasured: patterns for each denoiser. They name the layers that stayed in BF16 in every measurement, such as
            those outside the blocks, but become FP8 where the whole model is converted.
        options: of the measurements, those that are not the default.
    """

    by: str
    patterns: dict[str, tuple[str, ...]]
    kept: frozenset[Layer]
    quality: dict[str, Any]
    measurements: int
    unmeasured: dict[str, tuple[str, ...]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class Search:
    """Measurements of a pipeline with some layers kept in BF16, each made once.

    Args:
        variants: the pipeline, compiled block by block.
        bound: what is good enough. A state made for another bound is resumed, since every measurement holds all
            metrics, except LPIPS, which is measured only where the bound is for it.
        prompts: a picture of each for every seed.
        seeds: of the initial noise.
        state: a file that every measurement is written to, and read from if it is there. Its pictures go to a folder
            beside it; see `SearchPictures`.
        progress: is called with a line for every measurement.
        **call: for the pipeline's call.

    Raises:
        SearchError: the pipeline's model names no repeated blocks, there is no prompt or seed, or the state
            cannot be written or belongs to other settings, or its folder of pictures is another search's.
        NothingConvertedError: no layer of the model becomes FP8.
        QualityError: the bound is for LPIPS, which cannot be measured, or ``call`` holds what differs by picture.
    """

    def __init__(
        self,
        variants: Variants,
        bound: Bound,
        prompts: Sequence[str],
        seeds: Sequence[int],
        state: str | os.PathLike[str],
        progress: Callable[[str], None] = lambda line: None,
        **call: Any,
    ) -> None:
        if not variants.by_block:
            raise SearchError(
                f"{', '.join(type(m).__name__ for m in variants.denoisers.values())}: a search needs models that name "
                "their repeated blocks, and compiles those"
            )
        for name, values in (("prompts", prompts), ("seeds", seeds)):
            if not values:
                raise SearchError(f"{name}: expected at least one, got {values!r}")
        if isinstance(prompts, str):
            raise SearchError(f"expected a list of prompts, got {prompts!r}")
        file = Path(state)
        try:
            check_writable(file)
        except OSError as error:
            raise SearchError(f"state={str(file)!r} cannot be written: {error}") from error
        if bound.metric == "lpips":
            require_lpips()
        self.variants, self.bound, self.prompts, self.seeds = variants, bound, list(prompts), list(seeds)
        self._call, self._progress = call, progress
        self._reference: tuple[Sample, ...] | None = None
        self._in_fp8: tuple[Sample, ...] | None = None
        settings = settings_of(variants, prompts, seeds, call, lpips=bound.metric == "lpips")
        blocks: dict[str, set[str]] = {}
        for region in variants.regions:
            blocks.setdefault(region.denoiser, set()).add(region.path)
        self.pictures = SearchPictures(file)
        known = read_state(file, settings, blocks)
        if known is None:
            if self.pictures.folder.exists():
                raise SearchError(
                    f"{str(self.pictures.folder)!r} has pictures of a search whose state {str(file)!r} is not there; "
                    "remove them, or begin a new search elsewhere"
                )
            known = SearchState(file, settings, LayerNames(self._convertible()))
            known.write()  # from now on the pictures are this search's
        self.state, self.names = known, known.names

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Those that can be in FP8."""
        return self.names.layers

    def run(self, by: str = "layers") -> Result:
        """Search, measuring what is not known yet.

        Args:
            by: "layers" keeps or converts a layer in all blocks alike, so that the patterns serve compilation block by
                block. "blocks" keeps whole blocks. "blocks-then-layers" goes on to single layers of those.

        Raises:
            SearchError: ``by`` is not valid, or the bound cannot be met.
        """
        if by not in BY:
            raise SearchError(f"by={by!r} is not valid; valid: {', '.join(BY)}")
        limit = self.bound.loss(self.bound.value)

        def loss(units: frozenset[str]) -> float:
            return self.bound.loss(self.bound.of(self.measure(self.names.expand(units))))

        name = self.names.kind if by == "layers" else self.names.block
        kept = smallest(list(dict.fromkeys(map(name, self.layers))), loss, limit)
        if by == "blocks-then-layers" and kept:
            inside = self.names.expand(kept)
            kept = smallest([self.names.single(layer) for layer in self.layers if layer in inside], loss, limit)
        layers = self.names.expand(kept)
        patterns, unmeasured = self._patterns(kept, by), self._unmeasured()
        if by != "layers":
            patterns = {name: (*chosen, *unmeasured[name]) for name, chosen in patterns.items()}
        quality = self.measure(layers)
        options = parse_options(self.variants.options).changed()
        return Result(by, patterns, layers, quality, len(self.state.measurements), unmeasured, options)

    def measure(self, kept: frozenset[Layer]) -> dict[str, Any]:
        """The quality with ``kept`` in BF16, as `quality_to_dict` gives it; measured only if it is not known."""
        known = self.state.measurements
        if kept not in known:
            if self._reference is None:
                self._progress("compiling, generating pictures in BF16")
                self._reference = self._generate(lambda region: BF16)
                self.pictures.write(0, self._reference)
            samples = self._with_kept(kept)
            compared = compare(self._reference, samples, self.state.settings["lpips"])
            self.pictures.write(len(known) + 1, samples, self._reference)
            self.state.add(kept, quality_to_dict(compared))
            value = self.bound.of(known[kept])
            self._progress(
                f"{len(known)}: {len(kept)} of {len(self.layers)} layers kept, "
                f"{self.bound.metric} {number_text(value, 4)}: {'met' if self.bound.met(value) else 'not met'}"
            )
        return known[kept]

    def _with_kept(self, kept: frozenset[Layer]) -> tuple[Sample, ...]:
        if not kept and self._in_fp8 is not None:  # generated already, to see which layers become FP8
            return self._in_fp8
        inside: dict[tuple[str, str], list[str]] = {}
        for layer in kept:
            inside.setdefault((layer.denoiser, layer.block), []).append(layer.path)

        def patterns_of(region: Region) -> Patterns:
            paths = inside.get((region.denoiser, region.path), [])
            if paths and len(paths) == len(self.names.paths[region.denoiser][region.path]):
                return ("*",)
            names = names_in(region.module, self.names.paths[region.denoiser][region.path])
            return tuple(sorted(exact_pattern(path, names) for path in paths))

        return self._generate(patterns_of)

    def _generate(self, patterns_of: Callable[[Region], Patterns]) -> tuple[Sample, ...]:
        self.variants.use(patterns_of)
        return self.variants.generate(self.prompts, self.seeds, **self._call)

    def _convertible(self) -> dict[str, dict[str, list[str]]]:
        """The layers and attentions that become FP8 if none is kept, by denoiser and block."""
        self._progress("compiling, generating pictures in FP8")
        self._in_fp8 = self._generate(lambda region: ())
        reports = self.variants.reports(())
        found: dict[str, dict[str, list[str]]] = {}
        for region in self.variants.regions:
            prefix, made = f"{region.path}.", reports[region.denoiser]
            in_fp8 = [row.path for row in made.layers if row.decision == "quantized"]
            in_fp8 += [row.path for row in made.attentions if row.decision == "fp8"]
            paths = [path.removeprefix(prefix) for path in in_fp8 if path.startswith(prefix)]
            found.setdefault(region.denoiser, {})[region.path] = paths
        if not any(paths for blocks in found.values() for paths in blocks.values()):
            reasons = sorted({row.reason for report in reports.values() for row in report.layers})
            raise NothingConvertedError(f"no layer of the model was quantized: {'; '.join(reasons)}")
        return found

    def _patterns(self, kept: frozenset[str], by: str) -> dict[str, tuple[str, ...]]:
        found = {}
        for denoiser, model in self.variants.denoisers.items():
            layers = [layer for layer in self.layers if layer.denoiser == denoiser]
            names = names_in(model, [layer.full for layer in layers])
            chosen: dict[str, None] = {}
            for layer in layers:
                if by == "layers" and self.names.kind(layer) in kept:
                    chosen[exact_pattern(layer.path, names, anywhere=True)] = None
                elif self.names.block(layer) in kept:
                    chosen[exact_pattern(layer.block, names)] = None
                elif self.names.single(layer) in kept:
                    chosen[exact_pattern(layer.full, names)] = None
            found[denoiser] = tuple(chosen)
        return found

    def _unmeasured(self) -> dict[str, tuple[str, ...]]:
        """Patterns for the layers that could be in FP8 but were in none of the measurements."""
        options = parse_options(self.variants.options)
        found = {}
        for denoiser, model in self.variants.denoisers.items():
            tree = Tree(model)
            measured = {layer.full for layer in self.layers if layer.denoiser == denoiser}
            names = names_in(model, measured)
            blocks = [region.path for region in self.variants.regions if region.denoiser == denoiser]
            chosen: dict[str, None] = {}
            for name, module in model.named_modules():
                path = layer_path(name)
                if not isinstance(module, nn.Linear) or path in measured:
                    continue
                layer = tree.layer(module, "weight")
                candidate = Candidate(module.weight, layer, (module.in_features, module.out_features))
                if eligible.reason(candidate, options, eligible.scheme_of(layer, options)) is not None:
                    continue  # stays in BF16 in any case
                if not any(Pattern(pattern).matches(path) for pattern in chosen):
                    chosen[widest_pattern(path, names, measured, blocks)] = None
            found[denoiser] = tuple(chosen)
        return found
