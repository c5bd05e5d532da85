"""What differs between the pipelines that `bench.train_tiny` trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import tiny


class QwenImage:
    """`QwenImagePipeline`, its VAE on single frames."""

    name = "qwen-image"
    no_caption = " "
    """Encoded in place of a caption, and the negative prompt for guidance; the model's own examples use it."""

    compile_vae = True
    """Whether that pays: many small elementwise kernels between convolutions of few channels."""
    matrices: ClassVar = {
        "text": r"layers.*(self_attn|mlp)\..*weight$",
        "vae": r"(conv1|conv2|conv_out|resample\.1|to_qkv|proj)\.weight$",
        "transformer": r"transformer_blocks.*(attn|_mlp)\..*weight$",
    }
    """Which parameters Muon trains, by stage."""

    build = staticmethod(tiny.build_qwen_image)
    build_transformer = staticmethod(tiny.build_transformer)
    build_vae = staticmethod(tiny.build_vae)

    def language(self, text_encoder: Any) -> nn.Module:
        """The part of the text encoder that reads captions."""
        module: nn.Module = text_encoder.model.language_model
        return module

    def read(self, pipeline: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Text embeddings (captions, tokens, width), and which of them are no padding, bool (captions, tokens)."""
        states, masks = pipeline.encode_prompt(captions)
        return states, torch.ones(states.shape[:2], dtype=torch.bool) if masks is None else masks.bool()

    def initialise_vae(self, vae: Any) -> None:
        """Start with a posterior narrow enough to learn from."""
        _initialise_convolutions(vae)
        vae.quant_conv.weight.data[tiny.LATENT_CHANNELS :] = 0
        vae.quant_conv.bias.data[tiny.LATENT_CHANNELS :] = -5

    @contextlib.contextmanager
    def vae_at_work(self) -> Iterator[None]:
        """Run causal 3D convolutions as the 2D ones that they are on a first frame: all but the last tap see zeros."""
        causal: Any = import_module("diffusers.models.autoencoders.autoencoder_kl_qwenimage").QwenImageCausalConv3d
        original = causal.forward

        def forward(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
            y = F.conv2d(x.squeeze(2), self.weight[:, :, -1], self.bias, padding=self._padding[0])
            return y.unsqueeze(2)

        causal.forward = forward
        try:
            yield
        finally:
            causal.forward = original

    def moments(self, vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents (batch, 16, 8, 8) of pictures in -1 to 1."""
        mean, logvar = vae.quant_conv(vae.encoder(x.unsqueeze(2))).squeeze(2).chunk(2, dim=1)
        return mean, logvar

    def decode(self, vae: Any, z: Tensor) -> Tensor:
        """Pictures (batch, 3, 64, 64) of latents that are not normalised."""
        picture: Tensor = vae.decoder(vae.post_quant_conv(z.unsqueeze(2))).squeeze(2)
        return picture

    def set_scale(self, vae: Any, latents: Tensor) -> None:
        """Write into the configuration how latents become unit normal."""
        vae.register_to_config(
            latents_mean=latents.mean(dim=(0, 2, 3)).tolist(), latents_std=latents.std(dim=(0, 2, 3)).tolist()
        )

    def normalise(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents as the transformer takes them."""
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        packed: Tensor = import_module("diffusers").QwenImagePipeline._pack_latents(
            (latents - mean) / std, *latents.shape
        )
        return packed

    def initialise(self, transformer: Any) -> None:
        """Start with open gates and nothing else modulated: plain pre-norm blocks, and zero for an output."""
        width = transformer.inner_dim
        for block in transformer.transformer_blocks:
            for modulation in (block.img_mod[1], block.txt_mod[1]):
                nn.init.zeros_(modulation.weight)
                nn.init.zeros_(modulation.bias)
                for gate in (2, 5):  # of shift, scale, gate; shift, scale, gate
                    modulation.bias.data[gate * width : (gate + 1) * width] = 1
        for linear in (transformer.norm_out.linear, transformer.proj_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def velocity(
        self, transformer: Any, noisy: Tensor, t: Tensor, states: Tensor, masks: Tensor, done: float
    ) -> Tensor:
        """What leads from the clean latents to the noise, predicted; ``done`` is how much of the training is over."""
        predicted: Tensor = transformer(
            hidden_states=noisy,
            encoder_hidden_states=states,
            encoder_hidden_states_mask=masks,
            timestep=t,
            img_shapes=[[(1, 4, 4)]] * len(noisy),
            return_dict=False,
        )[0]
        return predicted

    def guidance(self, scale: float) -> dict[str, Any]:
        """Arguments of the pipeline for classifier-free guidance; the pipeline takes a ``scale`` of 1 as none."""
        return {"negative_prompt": self.no_caption, "true_cfg_scale": scale} if scale > 1 else {}


def _initialise_convolutions(vae: nn.Module) -> None:
    """Start with signals that neither fade nor drown: from the usual weights, hundreds of steps teach nothing."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            # The usual deviation is 1 / sqrt(3 * inputs), and counts the taps in time that a single frame lacks.
            module.weight.data *= (3 * (module.kernel_size[0] if isinstance(module, nn.Conv3d) else 1)) ** 0.5
            if name.endswith(("conv2", "decoder.conv_out")):
                module.weight.data *= 0.2


class ZImage:
    """`ZImagePipeline`.

    Its transformer pads captions and pictures to 32 tokens each, of which captions and pictures of these scenes need
    about 16: most of the training pads them to 4 only, and the end of it as the model will be used.
    """

    name = "z-image"
    no_caption = ""
    padded = 0.85
    compile_vae = False

    matrices: ClassVar = {
        "text": r"layers.*(self_attn|mlp)\..*weight$",
        "vae": r"(conv|conv1|conv2|conv_out|conv_shortcut|to_[qkv]|to_out\.0)\.weight$",
        "transformer": r"(layers|refiner).*(attention|feed_forward)\..*weight$",
    }

    build = staticmethod(tiny.build_z_image)
    build_transformer = staticmethod(tiny.build_z_image_transformer)
    build_vae = staticmethod(tiny.build_z_image_vae)

    def language(self, text_encoder: Any) -> nn.Module:
        module: nn.Module = text_encoder
        return module

    def read(self, pipeline: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
        states, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False, max_sequence_length=32)
        masks = [torch.ones(len(s), dtype=torch.bool) for s in states]
        padded = torch.nn.utils.rnn.pad_sequence
        return padded(states, batch_first=True), padded(masks, batch_first=True)

    def initialise_vae(self, vae: Any) -> None:
        _initialise_convolutions(vae)
        nn.init.zeros_(vae.encoder.conv_out.weight[tiny.LATENT_CHANNELS :].data)
        vae.encoder.conv_out.bias.data[tiny.LATENT_CHANNELS :] = -5

    def vae_at_work(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def moments(self, vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = vae.encoder(x).chunk(2, dim=1)
        return mean, logvar

    def decode(self, vae: Any, z: Tensor) -> Tensor:
        picture: Tensor = vae.decoder(z)
        return picture

    def set_scale(self, vae: Any, latents: Tensor) -> None:
        vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())

    def normalise(self, vae: Any, latents: Tensor) -> Tensor:
        scaled: Tensor = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return scaled

    def initialise(self, transformer: Any) -> None:
        """Start with gates at one half, nothing else modulated, and zero for an output."""
        width = transformer.dim
        for block in [*transformer.noise_refiner, *transformer.layers]:
            modulation = block.adaLN_modulation[0]
            nn.init.zeros_(modulation.weight)
            nn.init.zeros_(modulation.bias)
            for gate in (1, 3):  # of scale, gate, scale, gate; tanh(0.55) is one half
                modulation.bias.data[gate * width : (gate + 1) * width] = 0.55
        for final in transformer.all_final_layer.values():
            nn.init.zeros_(final.linear.weight)
            nn.init.zeros_(final.linear.bias)

    def velocity(
        self, transformer: Any, noisy: Tensor, t: Tensor, states: Tensor, masks: Tensor, done: float
    ) -> Tensor:
        module: Any = import_module("diffusers.models.transformers.transformer_z_image")
        original = module.SEQ_MULTI_OF
        module.SEQ_MULTI_OF = 4 if done < self.padded else original
        try:
            out = transformer(
                list(noisy.unsqueeze(2)), 1 - t, [s[m] for s, m in zip(states, masks, strict=True)], return_dict=False
            )[0]
        finally:
            module.SEQ_MULTI_OF = original
        return -torch.stack(out).squeeze(2)

    def guidance(self, scale: float) -> dict[str, Any]:
        """As above; this pipeline adds its scale to 1, so that 0 is none."""
        return (
            {"negative_prompt": self.no_caption, "guidance_scale": scale - 1} if scale > 1 else {"guidance_scale": 0.0}
        )


RECIPES = {recipe.name: recipe for recipe in (QwenImage(), ZImage())}
