"""What outlier channels do to pictures in FP8, by the granularity of the scales (per tensor, row, block), and in int8.

Each embedded pipeline gets the outliers of `bench.outlier_channels`, stronger and stronger. Its pictures in FP8,
compiled block by block, are compared with those that it draws in BF16 with the same outliers, from the same noise.

Finer scales are emulated here, to be measured beside the others: the product is computed in float32 from the
dequantized operands. "block" is as in DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 3.3.2): a weight has a
scale for each 128 x 128 values, an activation one for each 128 of a row. "group" has one for each 128 of a row in both.

    python -m bench.outliers --output bench/results/outliers.json
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fp8_compile import Call, Scheme, Spec, numerics, register_method
from fp8_compile.embedded import EMBEDDED_CALLS, default_pipeline_dir
from fp8_compile.measure.quality import compare, generate, prompt_adherence
from fp8_compile.measure.scenes import scenes
from fp8_compile.schemes.fp8 import Fp8

from . import common
from .outlier_channels import add_outliers

BLOCK = 128
CHOICES: dict[str, dict[str, Any]] = {
    "tensor": {"granularity": "tensor"},
    "row": {"granularity": "row"},
    "block": {"method": "fp8-block-emulated"},
    "group": {"method": "fp8-group-emulated"},
    "int8": {"method": "int8"},
    "int8 rotated": {"method": "int8", "rotation": 256},
}


def quantize_blocks(weight: Tensor) -> numerics.Quantized:
    """``[N, K]`` to ``[N / 128, 128, K / 128, 128]`` float8_e4m3fn and ``[N / 128, 1, K / 128, 1]`` float32."""
    blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    return numerics.quantize_weight_with(blocks, blocks.abs().amax(dim=(1, 3), keepdim=True))


def quantize(x: Tensor) -> numerics.Quantized:
    """``[..., K]`` to ``[..., K / 128, 128]`` float8_e4m3fn and ``[..., K / 128, 1]`` float32."""
    groups = x.unflatten(-1, (-1, BLOCK))
    return numerics.quantize_weight_with(groups, groups.abs().amax(dim=-1, keepdim=True))


def quantize_groups(weight: Tensor) -> numerics.Quantized:
    """``[N, K]`` to ``[N, 1, K / 128, 128]`` float8_e4m3fn and ``[N, 1, K / 128, 1]`` float32."""
    return quantize(weight.unsqueeze(1))


def linear(
    x: numerics.Quantized, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x @ weight.T + bias`` of what the blocks stand for."""
    values = numerics.dequantize(*x, torch.float32).flatten(-2)
    return linear_of_small_m(values, weight, weight_scale, bias, dtype)


def linear_of_small_m(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As `linear`, of an activation that is not quantized."""
    matrix = numerics.dequantize(weight, weight_scale, torch.float32).flatten(2).flatten(0, 1)
    return torch.nn.functional.linear(x.float(), matrix, None if bias is None else bias.float()).to(dtype)


@dataclass(frozen=True)
class Blocks(Scheme):
    """Scales for each 128 x 128 values of a weight."""

    method: ClassVar[str] = "fp8-block-emulated"

    min_m: int = Fp8.min_m

    def specs(self, out_features: int, in_features: int) -> dict[str, Spec]:
        rows, columns = out_features // BLOCK, in_features // BLOCK
        return {
            "qdata": Spec((rows, BLOCK, columns, BLOCK), numerics.FP8_DTYPE),
            "scale": Spec((rows, 1, columns, 1), torch.float32),
        }

    def weight_shape(self, constants: Sequence[Tensor]) -> tuple[int, int]:
        rows, height, columns, width = constants[0].shape
        return rows * height, columns * width

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, ...]:
        return quantize_blocks(weight)

    def quantize_in_chunks(self, weight: Tensor, device: torch.device | None = None) -> tuple[Tensor, ...]:
        return self.quantize_weight(weight.to(device))

    def dequantize(self, constants: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return numerics.dequantize(constants[0], constants[1], dtype).flatten(2).flatten(0, 1)

    def for_call(self, m: float, device: torch.device) -> tuple[Call, ...]:
        if m < self.min_m:
            return (Call(f"{self.method}-weight-only", linear_of_small_m),)
        return (Call(self.method, linear, quantize),)

    def reason(self, out_features: int, in_features: int, dtype: torch.dtype) -> str | None:
        if in_features % BLOCK or out_features % BLOCK:
            return f"{in_features} x {out_features} is not made of blocks of {BLOCK} x {BLOCK}"
        return None


@dataclass(frozen=True)
class Groups(Blocks):
    """Scales for each 128 values of a row of a weight."""

    method: ClassVar[str] = "fp8-group-emulated"

    def specs(self, out_features: int, in_features: int) -> dict[str, Spec]:
        columns = in_features // BLOCK
        return {
            "qdata": Spec((out_features, 1, columns, BLOCK), numerics.FP8_DTYPE),
            "scale": Spec((out_features, 1, columns, 1), torch.float32),
        }

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, ...]:
        return quantize_groups(weight)


METHODS = (Blocks, Groups)
"""The emulated methods, which `main` registers."""


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
    for method in METHODS:
        register_method(method)
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
