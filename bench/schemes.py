"""What each scheme costs in quality: pictures of the embedded trained pipelines, FP8 or int8 against BF16.

Method: the same captions and seeds are drawn in eager BF16 and with each scheme, transformers compiled block by block,
every wide linear converted (``ignored_layers`` is empty). PSNR of each picture to its BF16 twin, mean and worst; how
many pictures show all that the caption says (`fp8_compile.measure.quality.prompt_adherence`); the weights that a step
reads. Two more rows convert at load time and compile the whole transformer: all wide linears, and those of the blocks
alone, as compiling block by block does.
It says nothing about time, and these small models have no outliers in their activations: ``bench.outliers`` has some.

    python -m bench.schemes --output bench/results/schemes.json
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fp8_compile
from fp8_compile import Calibration
from fp8_compile.embedded import EMBEDDED_CALLS
from fp8_compile.measure.quality import Sample, generate, prompt_adherence, psnr
from fp8_compile.measure.scenes import scenes
from fp8_compile.pipelines.denoisers import repeated_blocks

from .common import parser, table, write
from .outliers import load

SCHEMES: dict[str, dict[str, Any]] = {
    "fp8, one scale per row": {},
    "fp8, one scale per tensor": {"granularity": "tensor"},
    "fp8, blocks of 128 x 128": {"weight_block_size": [128, 128]},
    "fp8, blocks of 1 x 128": {"weight_block_size": [1, 128]},
    "fp8 weights, per row": {"activation_scheme": "none"},
    "fp8 weights, per tensor": {"activation_scheme": "none", "granularity": "tensor"},
    "int8, one scale per row": {"method": "int8"},
}
STATIC = {
    f"fp8, static per {granularity}, {algorithm}": (
        algorithm,
        {"activation_scheme": "static", "granularity": granularity},
    )
    for granularity in ("row", "tensor")
    for algorithm in ("amax", "percentile", "mse")
}
AT_LOAD = {"fp8 at load, all layers": False, "fp8 at load, layers of the blocks": True}


def draw(name: str, captions: list[str], prepare: Callable[[nn.Module], None]) -> tuple[tuple[Sample, ...], nn.Module]:
    """The pictures of a pipeline whose transformer ``prepare`` was called with, and the transformer."""
    torch.compiler.reset()
    pipe = load(name)
    prepare(pipe.transformer)
    return generate(pipe, captions, [0, 1], **EMBEDDED_CALLS[name]), pipe.transformer


def calibrated(name: str, captions: list[str]) -> Calibration:
    """The ranges of a pipeline's transformer while it draws ``captions``, with seeds that are not measured."""
    pipe = load(name)
    with fp8_compile.calibrate(pipe.transformer, progress=False) as calibration:
        generate(pipe, captions, [2, 3], **EMBEDDED_CALLS[name])
    return calibration


def static(calibration: Calibration, algorithm: str, options: dict[str, Any]) -> Callable[[nn.Module], None]:
    return lambda model: compiled({**options, "activation_scales": calibration.scales(model, algorithm)})(model)


def compiled(options: dict[str, Any]) -> Callable[[Any], None]:
    return lambda model: model.compile_repeated_blocks(backend="fp8_diffusion", options=options)


def converted(blocks_only: bool, inner: str) -> Callable[[nn.Module], None]:
    def prepare(model: nn.Module) -> None:
        blocks = [path for path, _ in repeated_blocks(model)]
        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        outside = [path for path in linears if not any(path.startswith(f"{block}.") for block in blocks)]
        keep = [f"re:^{re.escape(path)}$" for path in outside] if blocks_only else []
        fp8_compile.quantize_(model, {"ignored_layers": keep})
        model.compile(backend="fp8_diffusion", options={"inner_backend": inner})  # uncompiled, activations would stay

    return prepare


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--pipeline", nargs="+", choices=sorted(EMBEDDED_CALLS), default=sorted(EMBEDDED_CALLS))
    made.add_argument(
        "--captions", type=int, default=6, help="how many, from all that the pipelines know; two seeds each"
    )
    made.add_argument("--inner", default="aot_eager", help="what compiles the rewritten graph")
    given = made.parse_args()
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
    known = sorted({scene.caption for scene in scenes()})
    step = len(known) // given.captions
    captions, others = known[::step][: given.captions], known[step // 2 :: step][: given.captions]
    found = []
    for name in given.pipeline:
        reference, _ = draw(name, captions, lambda model: None)
        ways = {key: compiled({**options, "inner_backend": given.inner}) for key, options in SCHEMES.items()}
        calibration = calibrated(name, others)
        ways |= {
            key: static(calibration, algorithm, {**options, "inner_backend": given.inner})
            for key, (algorithm, options) in STATIC.items()
        }
        ways |= {key: converted(blocks_only, given.inner) for key, blocks_only in AT_LOAD.items()}
        for scheme, prepare in ways.items():
            samples, model = draw(name, captions, prepare)
            totals = fp8_compile.report(model).totals
            values = [psnr(a.image, b.image) for a, b in zip(reference, samples, strict=True)]
            shown, of = prompt_adherence(samples)["all"]
            found.append(
                {
                    "pipeline": name,
                    "scheme": scheme,
                    "options": SCHEMES.get(scheme, STATIC.get(scheme, (None, None))[1]),
                    "psnr_db": values,
                    "mean_db": sum(values) / len(values),
                    "worst_db": min(values),
                    "as_captioned": [shown, of],
                    "bytes_before": totals["bytes_before"],
                    "bytes_after": totals["bytes_after"],
                }
            )
    rows = [
        [
            f"{row['pipeline']}: {row['scheme']}",
            f"{row['mean_db']:.1f} / {row['worst_db']:.1f}",
            "{} of {}".format(*row["as_captioned"]),
            f"{row['bytes_before'] / 1e6:.1f} -> {row['bytes_after'] / 1e6:.1f}",
        ]
        for row in found
    ]
    print(table(["", "PSNR, mean / worst, dB", "as captioned", "MB read per step"], rows))
    write(given.output, {"captions": captions, "calibrated_with": others, "results": found})


if __name__ == "__main__":
    main()
