"""What each scheme costs in quality: pictures of the embedded trained pipelines, FP8 or int8 against BF16.

Method: the same captions and seeds are drawn in eager BF16 and with each scheme, transformers compiled block by block,
every wide linear converted (``ignored_layers`` is empty). PSNR of each picture to its BF16 twin, mean and worst; how
many pictures show all that the caption says (`fp8_compile.measure.quality.prompt_adherence`); the weights that a step
reads.
It says nothing about time, and these small models have no outliers in their activations: ``bench.outliers`` has some.

    python -m bench.schemes --output bench/results/schemes.json
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

import fp8_compile
from fp8_compile.embedded import EMBEDDED_CALLS, default_pipeline_dir
from fp8_compile.measure.quality import Sample, generate, prompt_adherence, psnr
from fp8_compile.measure.scenes import scenes

from .common import parser, table, write

SCHEMES: dict[str, dict[str, Any]] = {
    "fp8, one scale per row": {},
    "fp8, one scale per tensor": {"granularity": "tensor"},
    "fp8 weights, per row": {"activation_scheme": "none"},
    "fp8 weights, per tensor": {"activation_scheme": "none", "granularity": "tensor"},
    "int8, one scale per row": {"method": "int8"},
}


def draw(name: str, captions: list[str], options: dict[str, Any] | None) -> tuple[tuple[Sample, ...], int, int]:
    """The pictures, and the bytes of the weights before and after; eager BF16 without ``options``."""
    import diffusers

    torch._dynamo.reset()
    kind: Any = {"qwen-image": diffusers.QwenImagePipeline, "z-image": diffusers.ZImagePipeline}[name]
    pipe = kind.from_pretrained(default_pipeline_dir(name), torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    if options is not None:
        pipe.transformer.compile_repeated_blocks(backend="fp8_diffusion", options=options)
    samples = generate(pipe, captions, [0, 1], **EMBEDDED_CALLS[name])
    if options is None:
        return samples, 0, 0
    totals = fp8_compile.report(pipe.transformer).totals
    return samples, totals["bytes_before"], totals["bytes_after"]


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
    captions = known[:: len(known) // given.captions][: given.captions]
    found = []
    for name in given.pipeline:
        reference, _, _ = draw(name, captions, None)
        for scheme, options in SCHEMES.items():
            samples, before, after = draw(name, captions, {**options, "inner_backend": given.inner})
            values = [psnr(a.image, b.image) for a, b in zip(reference, samples, strict=True)]
            shown, of = prompt_adherence(samples)["all"]
            found.append(
                {
                    "pipeline": name,
                    "scheme": scheme,
                    "options": options,
                    "psnr_db": values,
                    "mean_db": sum(values) / len(values),
                    "worst_db": min(values),
                    "as_captioned": [shown, of],
                    "bytes_before": before,
                    "bytes_after": after,
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
    write(given.output, {"captions": captions, "results": found})


if __name__ == "__main__":
    main()
