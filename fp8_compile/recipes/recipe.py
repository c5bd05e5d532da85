"""What a recipe says of a model family."""

from __future__ import annotations

from dataclasses import dataclass, field

Groups = dict[str, tuple[str, ...]]
"""``ignored_layers`` by the name of the choice. Patterns are those of `fp8_compile.patterns`."""


@dataclass(frozen=True)
class Recipe:
    """What to keep in BF16 in one class of transformers.

    Attributes:
        models: that have this transformer, as people call them.
        transformer: the class, in diffusers.
        pipeline: a class of diffusers' that runs it.
        steps: how many denoising steps that takes where nothing is said.
        keep: the ``ignored_layers`` that others recommend to start with.
        says: what others say, with ``[name]`` for a source of `SOURCES`.
        date: when that was looked up, year and month.
        groups: what an ablation compares; empty: one choice per part of the blocks.
    """

    models: str
    transformer: str
    pipeline: str
    steps: int
    keep: tuple[str, ...]
    says: str
    date: str
    groups: Groups = field(default_factory=dict)


@dataclass(frozen=True)
class EncoderRecipe:
    """What to keep in one class of text encoders, if it is converted.

    Attributes:
        models: as people call them.
        encoder: the class, in transformers.
        keep, says, date: as in `Recipe`.
    """

    models: str
    encoder: str
    keep: tuple[str, ...]
    says: str
    date: str


SOURCES = {
    "vllm-omni": "vLLM-Omni, [FP8 guide](https://docs.vllm.ai/projects/vllm-omni/en/latest/user_guide/quantization/"
    "fp8/): scales computed while the model runs.",
    "sglang": "SGLang, [diffusion quantization](https://github.com/sgl-project/sglang/blob/main/docs/diffusion/"
    "quantization.md): for Z-Image-Turbo likewise; for the others calibrated ModelOpt checkpoints.",
    "1764": "vLLM-Omni, [pull request 1764](https://github.com/vllm-project/vllm-omni/pull/1764).",
    "3929": "vLLM-Omni, [pull request 3929](https://github.com/vllm-project/vllm-omni/pull/3929).",
    "modelopt": "NVIDIA Model Optimizer, [diffusers example](https://github.com/NVIDIA/Model-Optimizer/blob/main/examples/"
    "diffusers/quantization/utils.py): calibrated scales, and for FP4 as well.",
    "2920": "vLLM-Omni, [pull request 2920](https://github.com/vllm-project/vllm-omni/pull/2920), not merged. With "
    "calibrated scales all attention and MLP layers are in FP8: "
    "[pull request 3305](https://github.com/vllm-project/vllm-omni/pull/3305).",
    "3998": "vLLM-Omni, [pull request 3998](https://github.com/vllm-project/vllm-omni/pull/3998), not merged.",
    "7823": "vLLM-Omni, [pull request 7823](https://github.com/vllm-project/vllm-omni/pull/7823), not merged.",
    "7824": "vLLM-Omni, [pull request 7824](https://github.com/vllm-project/vllm-omni/pull/7824), not merged: "
    "transformers casts the activation to the dtype of `wo`'s weight, which would be FP8 there. Here a weight in FP8 "
    "still says BF16.",
    "1338": "vLLM-Omni, [pull request 1338](https://github.com/vllm-project/vllm-omni/pull/1338), not merged.",
    "tencent": "Tencent, [HunyuanVideo](https://github.com/Tencent-Hunyuan/HunyuanVideo/blob/main/hyvideo/modules/"
    "fp8_optimization.py): one scale per weight, multiplied in BF16.",
}
"""Who recommends what, and where; by a short name."""
