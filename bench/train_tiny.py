"""Train the pipeline that the package carries: a small Qwen-Image that draws what simple captions say.

Everything is made here: the scenes and their captions (`fp8_compile.scenes`), the tokenizer's vocabulary, the weights.
Stages, each resumed from its last checkpoint:

* ``vae``: `AutoencoderKLQwenImage` on single frames, L1 and a small KL term;
* ``transformer``: `QwenImageTransformer2DModel` by flow matching on the VAE's latents. The text encoder keeps its
  random weights: its hidden states tell the words of a caption apart, and the transformer learns what they mean;
* ``decoder``: the VAE's decoder alone, a little longer;
* ``evaluate``: how often a picture shows what a caption says that no training step has seen.

One caption in ten is held out, chosen by its text alone. Takes a CPU and about an hour; the numbers depend only on
``--seed``, the number of threads and the versions of the libraries.

    python -m bench.train_tiny --output RESULTS.json --folder RUN vae transformer evaluate pack
"""

from __future__ import annotations

import contextlib
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import common
from fp8_compile import scenes, tiny

ADAMW_RATE = {"vae": 1e-3, "decoder": 5e-4, "transformer": 1e-3}
MUON_RATE = {"vae": 0.02, "decoder": 0.01, "transformer": 0.02}
MATRICES = {
    "vae": r"(conv1|conv2|conv_out|resample\.1|to_qkv|proj)\.weight$",
    "decoder": r"(conv1|conv2|conv_out|resample\.1|to_qkv|proj)\.weight$",
    "transformer": r"transformer_blocks.*(attn|_mlp)\..*weight$",
}
"""Which parameters Muon trains."""
STEPS = {"vae": 2000, "decoder": 600, "transformer": 1100}
BATCH = {"vae": 16, "decoder": 16, "transformer": 128}
WARM_UP = 40
KL_WEIGHT = 1e-4
POOL = {"vae": 8192, "decoder": 4096, "transformer": 16384}
SAVE_EVERY = 100
EMA = 0.99


def choose(rng: random.Random) -> scenes.Scene:
    """A scene whose caption is not held out; each attribute evenly, but medium and "anywhere" half of the time."""
    while True:
        color, background = rng.sample(list(scenes.COLORS), 2)
        count = rng.randint(1, len(scenes.COUNTS))
        size = rng.choice(["small", "medium", "medium", "large"])
        position = rng.choice(list(scenes.POSITIONS)) if count == 1 and rng.random() < 0.5 else None
        scene = scenes.Scene(count, rng.choice(scenes.SHAPES), color, background, size, position)
        if not scene.held_out:
            return scene


def draw_pool(count: int, seed: int) -> tuple[list[scenes.Scene], Tensor]:
    """``count`` training scenes and their pictures, uint8 (count, 3, 64, 64)."""
    rng = random.Random(seed)
    chosen = [choose(rng) for _ in range(count)]
    pictures = torch.empty(count, 3, scenes.SIZE, scenes.SIZE, dtype=torch.uint8)
    for i, scene in enumerate(chosen):
        pictures[i] = torch.from_numpy(np.asarray(scene.draw(rng)).copy()).permute(2, 0, 1)
    return chosen, pictures


@contextlib.contextmanager
def single_frames() -> Iterator[None]:
    """Run causal 3D convolutions as the 2D ones that they are on a first frame: all but the last tap see zeros."""
    from diffusers.models.autoencoders import autoencoder_kl_qwenimage as module

    causal: Any = module.QwenImageCausalConv3d
    original = causal.forward

    def forward(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        y = F.conv2d(x.squeeze(2), self.weight[:, :, -1], self.bias, padding=self._padding[0])
        return y.unsqueeze(2)

    causal.forward = forward
    try:
        yield
    finally:
        causal.forward = original


def run_stage(
    stage: str,
    folder: Path,
    model: nn.Module,
    loss_of: Callable[[int, torch.Generator], Tensor],
    seed: int,
    steps: int,
    ema: bool = False,
) -> list[float]:
    """Train ``model`` to the end of its schedule, from the last checkpoint if there is one.

    ``loss_of(step, generator)`` draws its batch from ``generator``, which depends on the seed and the step alone, so
    that a resumed run goes on as the interrupted one would have. Returns the loss of every step.
    """
    from tqdm import tqdm

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = Optimizer(stage, [(name, p) for name, p in model.named_parameters() if p.requires_grad])
    average = [p.detach().clone() for p in parameters] if ema else []
    losses: list[float] = []
    checkpoint = folder / f"{stage}.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
        for mine, theirs in zip(average, state["average"], strict=True):
            mine.copy_(theirs)
    started, first = time.perf_counter(), len(losses)
    with tqdm(total=steps, initial=first, desc=stage, mininterval=5) as bar:
        for step in range(first, steps):
            loss = loss_of(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step(min(1, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
            losses.append(loss.item())
            if ema:
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(EMA, (step + 1) / (step + 10)))
            bar.update()
            bar.set_postfix_str(f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "average": average,
                        "losses": losses,
                    },
                    folder / "unfinished",
                )
                (folder / "unfinished").replace(checkpoint)
    for p, mean in zip(parameters, average, strict=False):
        p.data.copy_(mean)
    print(f"{stage}: {steps - first} steps in {time.perf_counter() - started:.0f} s")
    return losses


def initialise_vae(vae: Any) -> None:
    """Start with signals that neither fade nor drown: from the usual weights, hundreds of steps teach nothing."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            # The usual deviation is 1 / sqrt(3 * inputs), and counts the taps in time that a single frame does not use.
            module.weight.data *= math.sqrt(3 * (module.kernel_size[0] if isinstance(module, nn.Conv3d) else 1))
            if name.endswith(("conv2", "decoder.conv_out")):
                module.weight.data *= 0.2
    vae.quant_conv.weight.data[tiny.LATENT_CHANNELS :] = 0
    vae.quant_conv.bias.data[tiny.LATENT_CHANNELS :] = -5


class Optimizer:
    """Muon for the matrices of a model (a convolution's kernel is one, outputs x the rest), AdamW for the rest.

    Muon (https://kellerjordan.github.io/posts/muon/) needs about half the steps of AdamW here, and its
    orthogonalization costs little beside a step.
    """

    def __init__(self, stage: str, named: list[tuple[str, nn.Parameter]]) -> None:
        matrix = re.compile(MATRICES[stage])
        self._kernels = [p for name, p in named if matrix.search(name) and p.ndim >= 2]
        chosen = {id(p) for p in self._kernels}
        self._matrices = [nn.Parameter(p.detach().flatten(1)) for p in self._kernels]  # the same memory
        others = [p for _, p in named if id(p) not in chosen]
        adamw = torch.optim.AdamW(others, lr=1, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        muon = torch.optim.Muon(self._matrices, lr=1, weight_decay=0.01)
        self._rates = {"adamw": ADAMW_RATE[stage], "muon": MUON_RATE[stage]}
        self._optimizers: dict[str, torch.optim.Optimizer] = {"adamw": adamw, "muon": muon}

    def step(self, fraction: float) -> None:
        """One step at ``fraction`` of the full rates; the gradients are gone after it."""
        for matrix, kernel in zip(self._matrices, self._kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
            kernel.grad = None
        for name, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = fraction * self._rates[name]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])


def train_vae(folder: Path, seed: int, steps: int) -> list[float]:
    """Train the VAE, and write it with the mean and deviation of its latents to ``folder/vae``."""
    torch.manual_seed(seed)
    vae: Any = tiny.build_vae()
    initialise_vae(vae)
    _, pictures = draw_pool(POOL["vae"], seed)

    @torch.compile
    def objective(x: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        seen = vae.decoder(vae.post_quant_conv(mean + (0.5 * logvar).exp() * noise))
        return (seen - x).abs().mean() + KL_WEIGHT * kl

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures), (BATCH["vae"],), generator=generator)
        noise = torch.randn(BATCH["vae"], tiny.LATENT_CHANNELS, 1, 8, 8, generator=generator)
        return objective(pictures[chosen].unsqueeze(2) / 127.5 - 1, noise)

    with single_frames():
        losses = run_stage("vae", folder, vae, loss_of, seed, steps)
        latents = encode(vae, pictures[:2048], torch.Generator().manual_seed(seed))
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3)).tolist(), latents_std=latents.std(dim=(0, 2, 3)).tolist()
    )
    vae.save_pretrained(folder / "vae")
    return losses


def train_decoder(folder: Path, seed: int, steps: int) -> list[float]:
    """Sharpen the trained VAE's decoder alone: the latents, and with them a trained transformer, stay valid."""
    from diffusers import AutoencoderKLQwenImage

    vae: Any = AutoencoderKLQwenImage.from_pretrained(folder / "vae").train()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    _, pictures = draw_pool(POOL["decoder"], seed + 2)

    @torch.compile
    def objective(z: Tensor, x: Tensor) -> Tensor:
        return (vae.decoder(vae.post_quant_conv(z)) - x).abs().mean()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures), (BATCH["decoder"],), generator=generator)
        return objective(latents[chosen].unsqueeze(2), pictures[chosen].unsqueeze(2) / 127.5 - 1)

    with single_frames():
        latents = encode(vae, pictures, torch.Generator().manual_seed(seed))
        losses = run_stage("decoder", folder, vae, loss_of, seed, steps)
    vae.save_pretrained(folder / "vae")
    return losses


@torch.no_grad()
def encode(vae: Any, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Samples of the VAE's posterior, float32 (count, 16, 8, 8), under `single_frames`."""
    parts = []
    for x in pictures.split(64):
        mean, logvar = vae.quant_conv(vae.encoder(x.unsqueeze(2) / 127.5 - 1)).squeeze(2).chunk(2, dim=1)
        parts.append(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator))
    return torch.cat(parts)


def initialise(transformer: Any) -> None:
    """Start with open gates and nothing else modulated: the blocks are plain pre-norm blocks, the output is zero."""
    width = transformer.inner_dim
    for block in transformer.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            nn.init.zeros_(modulation.weight)
            nn.init.zeros_(modulation.bias)
            for gate in (2, 5):  # of shift, scale, gate; shift, scale, gate
                modulation.bias.data[gate * width : (gate + 1) * width] = 1
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.norm_out.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)


def pack(latents: Tensor) -> Tensor:
    """(batch, 16, 8, 8) to tokens (batch, 16, 64), as the pipeline packs them."""
    from diffusers import QwenImagePipeline

    packed: Tensor = QwenImagePipeline._pack_latents(latents, *latents.shape)
    return packed


@torch.no_grad()
def embed(pipeline: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Text embeddings, BF16 (captions, tokens, width), and which of them are no padding, bool (captions, tokens)."""
    parts = [pipeline.encode_prompt(captions[i : i + 128]) for i in range(0, len(captions), 128)]
    longest = max(part.shape[1] for part, _ in parts)
    embeddings, masks = [], []
    for part, mask in parts:
        mask = torch.ones(part.shape[:2]) if mask is None else mask
        embeddings.append(F.pad(part, (0, 0, 0, longest - part.shape[1])))
        masks.append(F.pad(mask.bool(), (0, longest - mask.shape[1])))
    return torch.cat(embeddings), torch.cat(masks)


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """Logit-normal, shifted as the sampler shifts its own, and stratified over the batch.

    One in five is uniform instead, for the ends of the schedule.
    """
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    uniform = torch.rand(count, generator=generator) < 0.2
    return torch.where(uniform, strata, torch.sigmoid(torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4)) + 0.5))


def train_transformer(folder: Path, seed: int, steps: int) -> list[float]:
    """Train the transformer on latents of the trained VAE."""
    from diffusers import AutoencoderKLQwenImage

    pipeline: Any = tiny.build_qwen_image(seed)
    vae: Any = AutoencoderKLQwenImage.from_pretrained(folder / "vae")
    torch.manual_seed(seed)
    chosen, pictures = draw_pool(POOL["transformer"], seed + 1)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    with single_frames():
        latents = pack((encode(vae, pictures, torch.Generator().manual_seed(seed)) - mean) / std)
    captions = sorted({scene.caption for scene in chosen})
    embeddings, masks = embed(pipeline, captions)
    number = {caption: i for i, caption in enumerate(captions)}
    texts = torch.tensor([number[scene.caption] for scene in chosen])
    print(f"transformer: {len(chosen)} scenes, {len(captions)} captions of {embeddings.shape[1]} tokens at most")

    transformer = tiny.build_transformer().train()
    initialise(transformer)
    transformer.compile_repeated_blocks(fullgraph=True)
    batch = BATCH["transformer"]

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(latents), (batch,), generator=generator)
        t = noise_levels(batch, generator)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator)
        clean, level = latents[picked], t.view(-1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = transformer(
                hidden_states=clean + level * (noise - clean),
                encoder_hidden_states=embeddings[texts[picked]].float(),
                encoder_hidden_states_mask=masks[texts[picked]],
                timestep=t.bfloat16().float(),  # as coarse as in a BF16 pipeline
                img_shapes=[[(1, 4, 4)]] * batch,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - clean)

    return run_stage("transformer", folder, transformer, loss_of, seed, steps, ema=True)


def assemble(folder: Path, seed: int) -> Any:
    """The trained pipeline in BF16, from the last checkpoints in ``folder``; the transformer's weights are averages."""
    from diffusers import AutoencoderKLQwenImage

    pipeline: Any = tiny.build_qwen_image(seed)
    transformer = tiny.build_transformer()
    average = torch.load(folder / "transformer.pt", weights_only=True)["average"]
    for parameter, mean in zip(transformer.parameters(), average, strict=True):
        parameter.data.copy_(mean)
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae")
    pipeline.register_modules(transformer=transformer.eval().bfloat16(), vae=vae.eval().bfloat16())
    return pipeline


def evaluate(pipeline: Any, folder: Path, seed: int, count: int, steps: int, batch: int = 64) -> dict[str, Any]:
    """Draw ``count`` held-out captions and see what the pictures show.

    The captions are shuffled by ``seed``, from which the initial noise comes too. Writes the first 64 pictures in one
    to ``folder/pictures.png``.
    """
    from PIL import Image

    captions = [scene for scene in scenes.scenes() if scene.held_out]
    random.Random(seed).shuffle(captions)
    chosen = captions[:count]
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for i in range(0, len(chosen), batch):
        prompts = [scene.caption for scene in chosen[i : i + batch]]
        pictures += pipeline(
            prompts, height=scenes.SIZE, width=scenes.SIZE, num_inference_steps=steps, generator=generator
        ).images
    right: dict[str, list[bool]] = {"all": []}
    for scene, picture in zip(chosen, pictures, strict=True):
        verdict = scenes.detect(picture).follows(scene)
        right["all"].append(all(verdict.values()))
        for name, good in verdict.items():
            right.setdefault(name, []).append(good)
    sheet = Image.new("RGB", (8 * scenes.SIZE, 8 * scenes.SIZE))
    for i, picture in enumerate(pictures[:64]):
        sheet.paste(picture, (scenes.SIZE * (i % 8), scenes.SIZE * (i // 8)))
    sheet.save(folder / "pictures.png")
    (folder / "pictures.txt").write_text("\n".join(scene.caption for scene in chosen[:64]) + "\n")
    rows = [
        [name, str(sum(good)), str(len(good)), f"{100 * sum(good) / len(good):.1f} %"] for name, good in right.items()
    ]
    print(common.table(["attribute", "right", "of", "rate"], rows))
    return {
        "seed": seed,
        "inference_steps": steps,
        "following": {name: {"right": sum(good), "of": len(good)} for name, good in right.items()},
    }


def plot(folder: Path) -> None:
    """Draw the loss of every stage that has a checkpoint to ``folder/losses.png``; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no loss plot: matplotlib is not installed")
        return
    found = [stage for stage in STEPS if (folder / f"{stage}.pt").is_file()]
    figure = Figure(figsize=(5 * len(found), 3.5), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        losses = np.array(torch.load(folder / f"{stage}.pt", weights_only=True)["losses"])
        window = max(1, len(losses) // 50)
        axes.plot(losses, linewidth=0.4, alpha=0.5)
        axes.plot(np.arange(window - 1, len(losses)), np.convolve(losses, np.ones(window) / window, mode="valid"))
        axes.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
    figure.savefig(folder / "losses.png", dpi=120)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("stages", nargs="+", choices=["vae", "transformer", "decoder", "evaluate", "pack"])
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and everything else that a run leaves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=STEPS["vae"])
    parser.add_argument("--transformer-steps", type=int, default=STEPS["transformer"])
    parser.add_argument("--decoder-steps", type=int, default=STEPS["decoder"])
    parser.add_argument("--captions", type=int, default=512, help="how many held-out captions the evaluation draws")
    parser.add_argument("--inference-steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder, seed = arguments.folder, arguments.seed
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"seed": seed}
    if "vae" in arguments.stages:
        train_vae(folder, seed, arguments.vae_steps)
    if "transformer" in arguments.stages:
        train_transformer(folder, seed, arguments.transformer_steps)
    if "decoder" in arguments.stages:
        train_decoder(folder, seed, arguments.decoder_steps)
    if "evaluate" in arguments.stages:
        pipeline = assemble(folder, seed)
        results |= evaluate(pipeline, folder, seed, arguments.captions, arguments.inference_steps)
    if "pack" in arguments.stages:
        assemble(folder, seed).save_pretrained(tiny.EMBEDDED, max_shard_size="9MB")
    plot(folder)
    common.write(arguments.output, results)


if __name__ == "__main__":
    main()
