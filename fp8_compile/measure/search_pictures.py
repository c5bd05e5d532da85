"""The pictures that a search has measured, in files beside its state, so that one that goes on has those of before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .html import encode, heatmap
from .quality import Sample
from .results import write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 512
"""Pixels on the longer side: a search measures dozens of sets, and its page holds the pictures of all."""


class SearchPictures:
    """Files by the number of a measurement, from 1, and that of a sample, from 0. The pictures in BF16 have number 0.

    Args:
        state: the file of the search.
    """

    def __init__(self, state: Path) -> None:
        self.folder = state.with_name(f"{state.stem}-pictures")

    def write(self, number: int, samples: Sequence[Sample], references: Sequence[Sample] = ()) -> None:
        """Write the pictures of a measurement, over what may be there, and their heatmaps if there are references."""
        for index, sample in enumerate(samples):
            self._write(self.file(number, index), sample.image)
            if references:
                self._write(self.file(number, index, "-heat"), heatmap(references[index].image, sample.image))

    def complete(self, number: int, samples: int) -> bool:
        """Whether all pictures of a measurement of so many samples are there, and the heatmaps."""
        kinds = ("", "-heat") if number else ("",)
        return all(self.file(number, index, kind).exists() for index in range(samples) for kind in kinds)

    def size(self) -> int:
        """Pixels on the longer side of the first picture in BF16."""
        from PIL import Image

        with Image.open(self.file(0, 0)) as opened:
            return max(opened.size)

    def _write(self, file: Path, image: Image) -> None:
        smaller = image.copy()
        smaller.thumbnail((LONGEST, LONGEST))
        write_whole(file, encode(smaller))

    def file(self, number: int, index: int, kind: str = "") -> Path:
        """Where a picture is, or with "-heat" its heatmap."""
        return self.folder / f"{number}-{index}{kind}.webp"
