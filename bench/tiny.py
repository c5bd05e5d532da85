"""Small, real Qwen-Image and Z-Image pipelines that need no download.

They have the classes and the wiring of their models (text encoder, tokenizer, transformer, VAE, scheduler) at about 10
million parameters in total. ``embedded/`` carries trained weights of both (`fp8_compile.embedded`), which draw simple
scenes. `build_qwen_image` and `build_z_image` make random ones: a picture they draw is coloured noise that
depends on the prompt, the seed and the number of steps.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import QwenImagePipeline, ZImagePipeline

# So that every attention and MLP linear has at least 256 features on both sides: narrower ones are not worth FP8.
WIDTH = 256
HEADS = 4
BLOCKS = 2
LATENT_CHANNELS = 16
# The MLP of a Z-Image block is 8 / 3 as wide as the block, and FP8 takes multiples of 16.
Z_IMAGE_WIDTH = 384

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

# Qwen3's own, for messages without tools or thoughts.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Every word here becomes one token. The first four lines hold the words of the prompt template: QwenImagePipeline
# cuts off a fixed 34 tokens, which is the length of the template only where each of its words is one token.
CORPUS = (
    "system",
    "user assistant\n",
    "Describe the image by detailing the color, shape, size, texture, quantity, text,",
    "spatial relationships of the objects and background:",
    "a red circle on a white background",
    "a green square on a black background",
    "a blue triangle on a yellow background",
    "a small orange star above a large purple ring",
    "two pink dots below a thin brown line, three gray stripes beside a thick cyan cross",
    "one tiny magenta heart to the left of a huge golden diamond, to the right of a silver moon",
    "a photo of a cat and a dog in a park, a painting of a house near a lake under a cloudy sky",
    "an astronaut riding a horse at night, a bird with bright feathers in front of a tree behind the window",
    "a sign that says hello world, made from wood, glass, metal, stone and paper",
    "centered in the middle, at the top, at the bottom, in the corner, inside, outside, next to, between",
    "high quality, low quality, blurry, sharp, dark, light, soft, smooth, rough, bright, detailed, simple",
    "A red circle. A green square. The blue triangle. An orange star.",
    "0 1 2 3 4 5 6 7 8 9",
    "four small crosses and two medium circles, squares, triangles",
    # How a caption of `scenes` begins.
    *("a", "an", "one", "two", "three", "four"),
    "in the center of",
)


def _tokenizer() -> Any:
    """Train a byte-level BPE `Qwen2Tokenizer` on `CORPUS`: every byte is a token, so no text is unknown."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    # The backend of an empty Qwen2Tokenizer splits words exactly as the finished one will.
    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=2048, min_frequency=1, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    # Each line also with a space in front, because a word after a space is another token than one at the start.
    backend.train_from_iterator([line for text in CORPUS for line in (text, " " + text)], trainer=trainer)
    with tempfile.TemporaryDirectory() as folder:
        backend.model.save(folder)
        tokenizer = Qwen2Tokenizer.from_pretrained(folder, model_max_length=32768)
    special = (END_OF_TEXT, IM_START, IM_END, *VISION_TOKENS)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _text_encoder(tokenizer: Any) -> Any:
    """A `Qwen2_5_VLForConditionalGeneration`, 2 layers; its hidden states are (batch, tokens, WIDTH)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    end_of_text, im_end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, IM_END])
    vision_start, vision_end, image_pad, video_pad = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    text_config = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        # The sections add up to half a head.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [8, 12, 12]},
        "bos_token_id": end_of_text,
        "eos_token_id": im_end,
        "pad_token_id": end_of_text,
    }
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        # As small as it goes: this pipeline sends no picture to the text encoder.
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        image_token_id=image_pad,
        video_token_id=video_pad,
        vision_start_token_id=vision_start,
        vision_end_token_id=vision_end,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3(tokenizer: Any) -> Any:
    """A `Qwen3Model` of 3 layers; Z-Image reads what the last one but one makes, (batch, tokens, WIDTH)."""
    from transformers import Qwen3Config, Qwen3Model

    end_of_text, im_end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, IM_END])
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        head_dim=WIDTH // HEADS,
        bos_token_id=end_of_text,
        eos_token_id=im_end,
        pad_token_id=end_of_text,
    )
    return Qwen3Model(config)


def build_transformer() -> Any:
    """A `QwenImageTransformer2DModel` over packed 2x2 latent patches: (batch, patches, 64) in and out."""
    diffusers: Any = import_module("diffusers")
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=BLOCKS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(16, 24, 24),
    )


def build_z_image_transformer() -> Any:
    """A `ZImageTransformer2DModel` over 2x2 latent patches: lists of (16, 1, h, w) in and out."""
    diffusers: Any = import_module("diffusers")
    return diffusers.ZImageTransformer2DModel(
        dim=Z_IMAGE_WIDTH,
        n_layers=BLOCKS,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=WIDTH,
        axes_dims=(32, 48, 48),
        axes_lens=(1024, 512, 512),
    )


def _widen(transformer: Any, vae: Any) -> None:
    """Make random weights tell: a prompt, or an FP8 error, should change the picture by more than a grey level."""
    # With the usual initial weights the gates nearly close the blocks.
    for block in transformer.transformer_blocks:
        block.img_mod[1].weight.data *= 16
        block.txt_mod[1].weight.data *= 16
    transformer.norm_out.linear.weight.data *= 16
    transformer.proj_out.weight.data *= 2
    # Spreads the colours over most of 0..255; the usual initial weights give a nearly grey picture.
    vae.decoder.conv_out.weight.data *= 3


def build_vae() -> Any:
    """An `AutoencoderKLQwenImage`: (batch, 16, frames, h, w) latents, 8 times smaller than the picture on each side."""
    diffusers: Any = import_module("diffusers")
    return diffusers.AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_z_image_vae() -> Any:
    """An `AutoencoderKL`: (batch, 16, h, w) latents, 8 times smaller than the picture on each side."""
    diffusers: Any = import_module("diffusers")
    widths = (16, 32, 32, 64)
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_qwen_image(seed: int = 0) -> QwenImagePipeline:
    """Build the tiny pipeline with random weights on the CPU: BF16 parameters that depend only on `seed`, eval mode.

    The random state of the caller is left as it was.
    """
    diffusers: Any = import_module("diffusers")
    with _seeded(seed):
        tokenizer = _tokenizer()
        text_encoder, transformer, vae = _text_encoder(tokenizer), build_transformer(), build_vae()
        _widen(transformer, vae)
    pipeline: QwenImagePipeline = diffusers.QwenImagePipeline(
        scheduler=_scheduler(), vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )
    _to_bfloat16(pipeline)
    return pipeline


def build_z_image(seed: int = 0) -> ZImagePipeline:
    """Build the tiny Z-Image with random weights, in the same way as `build_qwen_image`."""
    diffusers: Any = import_module("diffusers")
    with _seeded(seed):
        tokenizer = _tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        text_encoder, transformer, vae = _qwen3(tokenizer), build_z_image_transformer(), build_z_image_vae()
    pipeline: ZImagePipeline = diffusers.ZImagePipeline(
        scheduler=_scheduler(), vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )
    _to_bfloat16(pipeline)
    return pipeline


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # torch.manual_seed would also reseed the caller's accelerators, which fork_rng(devices=[]) does not restore.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def _scheduler() -> Any:
    diffusers: Any = import_module("diffusers")
    return diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )


def _to_bfloat16(pipeline: Any) -> None:
    for model in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        model.eval()
        # Parameters only: the rotary frequencies of the text encoder are buffers, which stay FP32 in a loaded model.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
