"""Pipelines that are quick to compile, and small ones of real classes."""

from __future__ import annotations

import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

WIDTH = 64
OPTIONS = {"inner_backend": "aot_eager", "min_features": WIDTH}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_v = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(x, x.shape[-1:])
        return x + 2 * self.mlp(8 * self.to_q(normed).tanh() * self.to_v(normed))


class Transformer(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.proj_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.proj_out(x)
        return out


class Pipeline:
    """Draws 32 x 32 pixels that depend on everything that a diffusers pipeline's do."""

    def __init__(self, blocks: int = 3) -> None:
        torch.manual_seed(0)
        self.transformer = Transformer(blocks).bfloat16().eval()
        self.device = torch.device("cpu")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        generator: torch.Generator,
        callback_on_step_end: Callable[..., Any],
        num_inference_steps: int = 3,
        output_type: str = "pil",
    ) -> Any:
        x = torch.randn(1, 16, WIDTH, generator=generator) + zlib.crc32(prompt.encode()) % 7 / 10
        x = x.bfloat16()
        for step in range(num_inference_steps):
            x = x - 0.3 * self.transformer(x)
            callback_on_step_end(self, step, step, {"latents": x})
        pixels = ((x.float().flatten() + 2) * 64).clamp(0, 255).byte().view(32, 32)
        return SimpleNamespace(images=[Image.fromarray(pixels.numpy()).convert("RGB")])


def with_outlier(pipeline: Pipeline, block: int, layer: str = "to_q", factor: float = 2.0**17) -> Pipeline:
    """Make one row of a weight huge, so that one scale per tensor leaves nothing of its other rows."""
    linear = pipeline.transformer.blocks[block].get_submodule(layer)
    with torch.no_grad():
        linear.weight[0] *= factor
    return pipeline


def qwen_image_with_outliers(blocks: int, hard: int, factor: float) -> Any:
    """A random `QwenImagePipeline` in which block ``hard`` has outlier channels."""
    import diffusers

    from bench.outlier_channels import add_outliers
    from bench.tiny import build_qwen_image

    pipe: Any = build_qwen_image()
    torch.manual_seed(0)
    config = {**pipe.transformer.config, "num_layers": blocks}
    model: Any = diffusers.QwenImageTransformer2DModel.from_config(config).eval()
    for block in model.transformer_blocks:  # with the usual initial weights the gates nearly close the blocks
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            modulation.weight.data *= 16
    model.norm_out.linear.weight.data *= 16
    add_outliers(model, factor, blocks=[hard])
    pipe.transformer = model.bfloat16()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_wan(begins_with_a_picture: bool = False) -> Any:
    """A random `WanPipeline`, or `WanImageToVideoPipeline`: 64 x 64 pixels and 5 frames take a tenth of a second."""
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    from bench.tiny import _tokenizer
    from tests.support.zoo import MODELS

    transformer: Any = MODELS["Wan"].build()
    if begins_with_a_picture:  # whose latents, and a mask, come with the noise
        given = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
        transformer = type(transformer)(**{**given, "in_channels": 36}).eval()
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    width = transformer.config.text_dim
    config = UMT5Config(vocab_size=4096, d_model=width, d_ff=2 * width, d_kv=8, num_layers=2, num_heads=4)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    kind: Any = diffusers.WanImageToVideoPipeline if begins_with_a_picture else diffusers.WanPipeline
    pipe: Any = kind(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config).bfloat16().eval(),
        transformer=transformer.bfloat16(),
        vae=vae.bfloat16().eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_ltx() -> Any:
    """A random `LTXPipeline`, as quick as `build_wan`."""
    import diffusers
    from transformers import T5Config, T5EncoderModel

    from bench.tiny import _tokenizer
    from tests.support.zoo import MODELS

    transformer: Any = MODELS["LTXVideo"].build()
    torch.manual_seed(0)
    width = transformer.config.caption_channels
    config = T5Config(vocab_size=4096, d_model=width, d_ff=2 * width, d_kv=8, num_layers=2, num_heads=4)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=transformer.config.in_channels,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    pipe: Any = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.bfloat16().eval(),
        text_encoder=T5EncoderModel(config).bfloat16().eval(),
        tokenizer=_tokenizer(),
        transformer=transformer.bfloat16(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_ltx2() -> Any:
    """A random `LTX2Pipeline`, whose videos have sound: 16,000 samples a second, two channels."""
    import diffusers
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    from bench.tiny import _tokenizer

    width, heads = 64, {"num_attention_heads": 2, "attention_head_dim": 32}

    def of_both(settings: dict[str, Any], video: str, audio: str) -> dict[str, Any]:
        return {f"{kind}{name}": value for kind in (video, audio) for name, value in settings.items()}

    torch.manual_seed(0)
    text = {"vocab_size": 4096, "hidden_size": width, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    encoder: Any = Gemma3Config(
        text_config={**text, "num_attention_heads": 2, "num_key_value_heads": 1},
        vision_config={**vision, "num_attention_heads": 2},
        mm_tokens_per_image=4,
    )
    connector = {f"connector_{name}": value for name, value in {**heads, "num_layers": 1}.items()}
    parts = {
        "text_encoder": Gemma3ForConditionalGeneration(encoder),
        "transformer": diffusers.LTX2VideoTransformer3DModel(
            **of_both({"in_channels": 4, "out_channels": 4, "cross_attention_dim": width, **heads}, "", "audio_"),
            num_layers=2,
            caption_channels=width,
            rope_double_precision=False,
        ),
        "connectors": LTX2TextConnectors(
            **of_both({**connector, "connector_num_learnable_registers": None}, "video_", "audio_"),
            caption_channels=width,
            text_proj_in_factor=3,
            rope_double_precision=False,
        ),
        "vae": diffusers.AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            layers_per_block=(1,),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=1,
        ),
        "audio_vae": diffusers.AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8, resolution=32
        ),
        "vocoder": LTX2Vocoder(
            in_channels=16,
            hidden_channels=32,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ),
    }
    pipe: Any = diffusers.LTX2Pipeline(
        **{name: part.bfloat16().eval() for name, part in parts.items()},
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        tokenizer=_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sound_in(video: Path) -> NDArray[np.int16]:
    """The sound of an MP4 file, ``(samples, 2)``, at 16,000 samples a second."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(video), "-f", "s16le", "-ac", "2"]
    done = subprocess.run([*command, "-ar", "16000", "-"], check=True, capture_output=True)
    return np.frombuffer(done.stdout, np.int16).reshape(-1, 2)
