"""What outlier channels do to pictures in FP8, by the granularity of the scales (per tensor, row, block), and in int8.

Each embedded pipeline gets the outliers of `bench.outlier_channels`, stronger and stronger. Its pictures in FP8,
compiled block by block, are compared with those that it draws in BF16 with the same outliers, from the same noise.

"block" is as in DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 3.3.2): a weight has a scale for each 128 x 128
values, an activation one for each 128 of a row. "group" has one for each 128 of a row in both.

    python -m bench.outliers --output bench/results/outliers.json
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fp8_compile.embedded import EMBEDDED_CALLS, default_pipeline_dir
from fp8_compile.measure.quality import compare, generate, prompt_adherence
from fp8_compile.measure.scenes import scenes

from . import common
from .outlier_channels import add_outliers

CHOICES: dict[str, dict[str, Any]] = {
    "tensor": {"granularity": "tensor"},
    "row": {"granularity": "row"},
    "block": {"weight_block_size": [128, 128]},
    "group": {"weight_block_size": [1, 128]},
    "int8": {"method": "int8"},
    "int8 rotated": {"method": "int8", "rotation": 256},
}


def load(name: str, factor: float | None = None, choice: str | None = None) -> Any:
    """The embedded pipeline, with outliers if there is a factor, compiled in FP8 if there is one of `CHOICES`."""
    from diffusers import DiffusionPipeline

    loader: Any = DiffusionPipeline
    pipe = loader.from_pretrained(str(default_pipeline_dir(name)), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    if factor is not None:
        add_outliers(pipe.transformer, factor)
    if choice is not None:
        options = {**CHOICES[choice], "inner_backend": "aot_eager", "strict": True}
        pipe.transformer.compile_repeated_blocks(backend="fp8_diffusion", fullgraph=True, options=options)
    return pipe


def measure(
    name: str, factor: float, prompts: Sequence[str], choices: Iterable[str] = tuple(CHOICES)
) -> dict[str, dict[str, Any]]:
    """By choice: PSNR in dB (mean and worst), relative L2 of the last latents, right pictures."""
    call = EMBEDDED_CALLS[name]
    reference = generate(load(name, factor), prompts, (0,), **call)
    measured = {"BF16": {"right": prompt_adherence(reference)["all"][0]}}
    for choice in choices:
        torch.compiler.reset()
        samples = generate(load(name, factor, choice), prompts, (0,), **call)
        found = compare(reference, samples)
        measured[choice] = {
            "psnr_mean": found.mean["psnr"],
            "psnr_worst": found.worst["psnr"],
            "relative_l2": found.mean["relative_l2"],
            "right": prompt_adherence(samples)["all"][0],
        }
    return measured


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pipeline", choices=list(EMBEDDED_CALLS), action="append", help="default: all; repeat it")
    parser.add_argument("--log2", type=int, action="append", help="of the factor; repeat it; default: 14, 16, 17, 18")
    parser.add_argument("--captions", type=int, default=3, help="held-out captions, one picture of each")
    parser.add_argument("--seed", type=int, default=0, help="chooses the captions")
    arguments = parser.parse_args()
    held_out = [scene.caption for scene in scenes() if scene.held_out]
    prompts = random.Random(arguments.seed).sample(held_out, arguments.captions)
    rows, results = [], []
    for name in arguments.pipeline or EMBEDDED_CALLS:
        for exponent in arguments.log2 or (14, 16, 17, 18):
            measured = measure(name, 2.0**exponent, prompts)
            results.append({"pipeline": name, "log2_factor": exponent, **measured})
            cells = [f"{m['psnr_mean']:.1f} dB, {m['right']}" for choice, m in measured.items() if choice != "BF16"]
            rows.append([f"{name}, 2^{exponent}", str(measured["BF16"]["right"]), *cells])
            print(common.table(["outliers", "right in BF16", *CHOICES], rows), flush=True)
    common.write(arguments.output, {"prompts": prompts, "measurements": results})


if __name__ == "__main__":
    main()
