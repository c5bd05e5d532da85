"""What attention in FP8 costs in quality: pictures of the embedded trained pipelines, emulated, against BF16.

Method: the same captions and seeds are drawn in eager BF16 and in each way, transformers compiled block by block.
The emulation rounds what FlashAttention 3 rounds (`fp8_compile.attention.emulated`). Where linears are not in FP8,
patterns keep all of them. PSNR of each picture to its BF16 twin, mean and worst; how many show all that a caption says
(`fp8_compile.measure.quality.prompt_adherence`).

These pipelines have two blocks of heads of 64 and no outliers in their keys, so they say little of smoothing: the
first table rounds operands with outliers, too, against float64, and emulates flex_attention's template beside. Those
of the pipelines are all that one picture has; shown is the worst attention.

It says nothing about time.

    python -m bench.attention --output bench/results/attention.json
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fp8_compile
from fp8_compile.attention import emulated
from fp8_compile.attention.operands import Operands, quantize
from fp8_compile.embedded import EMBEDDED_CALLS
from fp8_compile.measure.quality import prompt_adherence, psnr
from fp8_compile.measure.scenes import scenes
from fp8_compile.numerics import rounded_to_e4m3

from .common import parser, sqnr, table, write
from .schemes import compiled, draw

LINEARS = r"re:(?<!\.sdpa)$"
FIRST, LAST = r"re:\.0\.[^.]+\.sdpa$", r"re:\.1\.[^.]+\.sdpa$"
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "linears": ({}, True),
    "attention": ({"attention": "fp8-emulated", "ignored_layers": [LINEARS]}, True),
    "attention, keys not smoothed": ({"attention": "fp8-emulated", "ignored_layers": [LINEARS]}, False),
    "attention but the first block's": ({"attention": "fp8-emulated", "ignored_layers": [LINEARS, FIRST]}, True),
    "attention but the last block's": ({"attention": "fp8-emulated", "ignored_layers": [LINEARS, LAST]}, True),
    "both": ({"attention": "fp8-emulated"}, True),
}


def smoothing(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Keys are smoothed, or not, in what is compiled within."""
    return mock.patch.object(emulated, "quantize", functools.partial(quantize, smooth=wanted))


def pictures(name: str, captions: list[str]) -> list[dict[str, Any]]:
    """A row per way."""
    reference, _ = draw(name, captions, lambda model: None)
    rows = []
    for way, (options, smooth) in WAYS.items():
        with smoothing(smooth):
            samples, model = draw(name, captions, compiled({**options, "inner_backend": "aot_eager"}))
        values = [psnr(a.image, b.image) for a, b in zip(reference, samples, strict=True)]
        rows.append(
            {
                "pipeline": name,
                "way": way,
                "psnr_db": values,
                "mean_db": sum(values) / len(values),
                "worst_db": min(values),
                "as_captioned": prompt_adherence(samples)["all"],
                "attentions_in_fp8": sum(row.decision == "fp8" for row in fp8_compile.report(model).attentions),
            }
        )
    return rows


def operands() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """One batch of 4 heads of 128, 1,024 tokens."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 1024, 128, generator=made).bfloat16() for _ in range(3))
    channels = torch.randn(1, 4, 1, 128, generator=made) * (torch.rand(1, 4, 1, 128, generator=made) < 0.1)
    return {
        "Gaussian": (q, k, v),
        "a tenth of the channels of K shifted by 20": (q, (k + 20 * channels).bfloat16(), v),
        "Q four times as large": (4 * q, k, v),
    }


class _Operands(TorchFunctionMode):
    """Notes what attention is computed of, while a model that `watch` was called with is running."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            assert given.get("attn_mask") is given.get("scale") is None
            self.seen.append((given["query"], given["key"], given["value"]))
        return func(*args, **(kwargs or {}))

    def watch(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(lambda *_: self.__enter__() and None)
        model.register_forward_hook(lambda *_: self.__exit__(None, None, None))


def operands_of(name: str, caption: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each attention of each step of one picture."""
    noted = _Operands()
    draw(name, [caption], noted.watch)
    return noted.seen


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention in float64."""
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def by_flex(o: Operands, scale: float) -> Tensor:
    """The arithmetic of Inductor's template of flex_attention: weights in units of 1, a result in E4M3."""
    factor = (o.query_scale * o.key_scale * scale)[..., None, None]
    scores = (o.query.float() @ o.key.float().mT) * factor
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    out = (rounded_to_e4m3(weights) @ o.value.float()) / weights.sum(dim=-1, keepdim=True)
    return (rounded_to_e4m3(out) * o.value_scale[..., None, None]).bfloat16()


def sqnrs(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """In dB, of each kernel's arithmetic, with and without smoothed keys."""
    scale, expected = 1 / math.sqrt(q.shape[-1]), exact(q, k, v)
    ways = {
        "flash3": emulated.attend(quantize(q, k, v), scale),
        "flash3, not smoothed": emulated.attend(quantize(q, k, v, smooth=False), scale),
        "flex": by_flex(quantize(q, k, v), scale),
    }
    return {way: sqnr(expected, out) for way, out in ways.items()}


def main() -> None:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--pipeline", nargs="+", choices=sorted(EMBEDDED_CALLS), default=sorted(EMBEDDED_CALLS))
    made.add_argument("--captions", type=int, default=6, help="how many; two seeds each")
    given = made.parse_args()
    warnings.filterwarnings("ignore", category=fp8_compile.NothingConvertedWarning)
    known = sorted({scene.caption for scene in scenes()})
    captions = known[:: len(known) // given.captions][: given.captions]
    made_of = {name: [each] for name, each in operands().items()}
    made_of |= {name: operands_of(name, captions[0]) for name in given.pipeline}
    losses = []
    for name, each in made_of.items():
        found = [sqnrs(*qkv) for qkv in each]
        losses.append({"operands": name, **{way: min(of[way] for of in found) for way in found[0]}})
    header = list(losses[0])
    print(table(header, [[str(row["operands"]), *(f"{row[way]:.1f}" for way in header[1:])] for row in losses]))
    drawn = [row for name in given.pipeline for row in pictures(name, captions)]
    rows = [
        [
            f"{row['pipeline']}: {row['way']}",
            f"{row['mean_db']:.1f} / {row['worst_db']:.1f}",
            "{} of {}".format(*row["as_captioned"]),
            str(row["attentions_in_fp8"]),
        ]
        for row in drawn
    ]
    print(table(["in FP8", "PSNR, mean / worst, dB", "as captioned", "attentions"], rows))
    write(given.output, {"captions": captions, "pictures": drawn, "operands": losses})


if __name__ == "__main__":
    main()
