"""Train the embedded pipelines: a small Qwen-Image and a small Z-Image that draw what captions say.

Everything is made here: the scenes and their captions (`fp8_compile.measure.scenes`), the tokenizer's vocabulary, the
weights.
Stages, each resumed from its last checkpoint (what differs between the two models is in `bench.training`):

* ``text``: the text encoder, to tell from what the pipeline reads of it each attribute of the scene that a caption
  describes (heads that are thrown away afterwards);
* ``vae``: the VAE on single pictures, L1 and a small KL term;
* ``transformer``: by flow matching on the VAE's latents, now and then without a caption, for classifier-free guidance;
* ``tune``: the same on pictures that a caption decides fully, as models are tuned on chosen pictures at the end.
  Which of four places two shapes take is decided place by place otherwise, and some pictures end with three. Z-Image,
  whose steps take three times as long, has this stage only;
* ``evaluate``: how often a picture shows what a caption says that no training step has seen;
* ``pack``: into ``embedded/``, the package that carries them, in BF16.

One caption in ten is held out, chosen by its text alone. Takes three quarters of an hour for each pipeline on two CPU
cores; the numbers depend only on ``--seed``, the number of threads and the versions of the libraries. All is float32
until the end, which a CPU without matrix instructions multiplies faster than BF16.

    python -m bench.train_tiny --folder RUN --output RESULTS.json text vae transformer tune evaluate pack
"""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8_compile.measure import scenes
from fp8_compile.measure.scene_detector import detect

from . import common, tiny
from .training import RECIPES

ADAMW_RATE = {"text": 1e-3, "vae": 1e-3, "transformer": 1e-3, "tune": 1e-3}
MUON_RATE = {"text": 0.01, "vae": 0.02, "transformer": 0.02, "tune": 0.02}
STEPS = {
    "qwen-image": {"text": 500, "vae": 2000, "transformer": 2000, "tune": 400},
    "z-image": {"text": 250, "vae": 2000, "transformer": 0, "tune": 1500},
}
BATCH = {
    "qwen-image": {"text": 64, "vae": 16, "transformer": 128, "tune": 128},
    "z-image": {"text": 64, "vae": 16, "transformer": 64, "tune": 64},
}
WARM_UP = 40
KL_WEIGHT = 1e-4
POOL = {"vae": 8192, "transformer": 16384}
SAVE_EVERY = 100
EMA = 0.99
WITHOUT_CAPTION = 0.1
EMBEDDED = Path(__file__).parent.parent / "embedded" / "fp8_compile_embedded"


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


def draw_pool(count: int, seed: int, loose: bool = False, fixed: bool = False) -> tuple[list[scenes.Scene], Tensor]:
    """``count`` training scenes and their pictures, uint8 (count, 3, 64, 64).

    Args:
        loose: as in `scenes.Scene.draw`.
        fixed: the same picture for each scene.
    """
    rng = random.Random(seed)
    chosen = [choose(rng) for _ in range(count)]
    pictures = torch.empty(count, 3, scenes.SIZE, scenes.SIZE, dtype=torch.uint8)
    for i, scene in enumerate(chosen):
        pictures[i] = torch.from_numpy(np.asarray(scene.draw(None if fixed else rng, loose)).copy()).permute(2, 0, 1)
    return chosen, pictures


def run_stage(
    stage: str,
    matrices: str,
    folder: Path,
    model: nn.Module,
    loss_of: Callable[[int, torch.Generator], Tensor],
    seed: int,
    steps: int,
    ema: bool = False,
) -> list[float]:
    """Train ``model`` to the end of its schedule, from the last checkpoint if there is one; Muon its ``matrices``.

    ``loss_of(step, generator)`` draws its batch from ``generator``, which depends on the seed and the step alone, so
    that a resumed run goes on as the interrupted one would have. Returns the loss of every step.
    """
    from tqdm import tqdm

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = Optimizer(stage, matrices, [(name, p) for name, p in model.named_parameters() if p.requires_grad])
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


class Optimizer:
    """Muon for the matrices of a model (a convolution's kernel is one, outputs x the rest), AdamW for the rest.

    Muon (https://kellerjordan.github.io/posts/muon/) needs about half the steps of AdamW here, and its
    orthogonalization costs little beside a step.
    """

    def __init__(self, stage: str, matrices: str, named: list[tuple[str, nn.Parameter]]) -> None:
        matrix = re.compile(matrices)
        self._kernels = [p for name, p in named if matrix.search(name) and p.ndim >= 2]
        chosen = {id(p) for p in self._kernels}
        self._matrices = [nn.Parameter(p.detach().view(len(p), -1)) for p in self._kernels]  # the same memory
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


def train_text(recipe: Any, folder: Path, seed: int, steps: int) -> list[float]:
    """Train the text encoder, and write it in BF16 to ``folder/text_encoder``."""
    pipeline: Any = recipe.build(seed)
    torch.manual_seed(seed)
    encoder = pipeline.text_encoder.float().train().requires_grad_(False)
    language = recipe.language(encoder).requires_grad_(True)
    values = {name: sorted({getattr(s, name) for s in scenes.scenes()}, key=str) for name in scenes.ATTRIBUTES}
    heads = nn.ModuleDict({name: nn.Linear(tiny.WIDTH, len(choices)) for name, choices in values.items()})
    learned = [scene for scene in scenes.scenes() if not scene.held_out]

    def guess(chosen: list[scenes.Scene]) -> dict[str, tuple[Tensor, Tensor]]:
        """Per attribute the logits and the right choice."""
        states, masks = recipe.read(pipeline, [scene.caption for scene in chosen])
        last = states[torch.arange(len(chosen)), masks.sum(dim=1) - 1]
        right = {name: torch.tensor([every.index(getattr(s, name)) for s in chosen]) for name, every in values.items()}
        return {name: (head(last), right[name]) for name, head in heads.items()}

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(learned), (BATCH[recipe.name]["text"],), generator=generator).tolist()
        return torch.stack([F.cross_entropy(*pair) for pair in guess([learned[i] for i in picked]).values()]).sum()

    model = nn.ModuleDict({"language": language, "heads": heads})
    losses = run_stage("text", recipe.matrices["text"], folder, model, loss_of, seed, steps)
    with torch.no_grad():
        found = guess([scene for scene in scenes.scenes() if scene.held_out])
    for name, (logits, right) in found.items():
        print(f"text: {name} of held-out captions right {100 * (logits.argmax(1) == right).float().mean():.1f} %")
    encoder.bfloat16().save_pretrained(folder / "text_encoder")
    return losses


def train_vae(recipe: Any, folder: Path, seed: int, steps: int) -> list[float]:
    """Train the VAE, and write it with the scale of its latents to ``folder/vae``."""
    torch.manual_seed(seed)
    vae = recipe.build_vae()
    recipe.initialise_vae(vae)
    _, pictures = draw_pool(POOL["vae"], seed, loose=True)
    batch = BATCH[recipe.name]["vae"]

    def objective(x: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = recipe.moments(vae, x)
        logvar = logvar.clamp(-30, 20)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        seen = recipe.decode(vae, mean + (0.5 * logvar).exp() * noise)
        return (seen - x).abs().mean() + KL_WEIGHT * kl

    if recipe.compile_vae:
        objective = torch.compile(objective)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        noise = torch.randn(batch, tiny.LATENT_CHANNELS, 8, 8, generator=generator)
        return objective(pictures[chosen] / 127.5 - 1, noise)

    with recipe.vae_at_work():
        losses = run_stage("vae", recipe.matrices["vae"], folder, vae, loss_of, seed, steps)
        latents = encode(recipe, vae, pictures[:2048], torch.Generator().manual_seed(seed))
    recipe.set_scale(vae, latents)
    vae.save_pretrained(folder / "vae")
    return losses


@torch.no_grad()
def encode(recipe: Any, vae: Any, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Samples of the VAE's posterior, float32 (count, 16, 8, 8), under ``recipe.vae_at_work``."""
    parts = []
    for x in pictures.split(64):
        mean, logvar = recipe.moments(vae, x / 127.5 - 1)
        parts.append(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator))
    return torch.cat(parts)


@torch.no_grad()
def embed(recipe: Any, pipeline: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """What ``recipe.read`` gives, for many captions."""
    parts = [recipe.read(pipeline, captions[i : i + 128]) for i in range(0, len(captions), 128)]
    longest = max(part.shape[1] for part, _ in parts)
    embeddings = [F.pad(part, (0, 0, 0, longest - part.shape[1])) for part, _ in parts]
    masks = [F.pad(mask, (0, longest - mask.shape[1])) for _, mask in parts]
    return torch.cat(embeddings), torch.cat(masks)


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """Logit-normal, shifted as the sampler shifts its own, and stratified over the batch.

    One in five is uniform instead, for the ends of the schedule.
    """
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    uniform = torch.rand(count, generator=generator) < 0.2
    return torch.where(uniform, strata, torch.sigmoid(torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4)) + 0.5))


def trained(recipe: Any, folder: Path, seed: int) -> Any:
    """The random pipeline with the trained text encoder and VAE, in BF16 as they will be used."""
    pipeline: Any = recipe.build(seed)
    for name in ("text_encoder", "vae"):
        kind = type(getattr(pipeline, name))
        module = kind.from_pretrained(folder / name, torch_dtype=torch.bfloat16).eval()
        pipeline.register_modules(**{name: module})
    return pipeline


def train_transformer(recipe: Any, folder: Path, seed: int, steps: int, stage: str = "transformer") -> list[float]:
    """Train the transformer on latents of the trained VAE; ``tune`` goes on from the averages of ``transformer``."""
    pipeline = trained(recipe, folder, seed)
    vae = pipeline.vae.float()
    torch.manual_seed(seed)
    chosen, pictures = draw_pool(POOL["transformer"], seed + 1, fixed=stage == "tune")
    with recipe.vae_at_work():
        latents = recipe.normalise(vae, encode(recipe, vae, pictures, torch.Generator().manual_seed(seed)))
    captions = [recipe.no_caption, *sorted({scene.caption for scene in chosen})]
    embeddings, masks = embed(recipe, pipeline, captions)
    number = {caption: i for i, caption in enumerate(captions)}
    texts = torch.tensor([number[scene.caption] for scene in chosen])
    print(f"transformer: {len(chosen)} scenes, {len(captions)} captions of {embeddings.shape[1]} tokens at most")

    transformer = recipe.build_transformer().train()
    recipe.initialise(transformer)
    if stage == "tune" and (folder / "transformer.pt").is_file():
        _load_average(transformer, folder / "transformer.pt")
    batch = BATCH[recipe.name][stage]

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(latents), (batch,), generator=generator)
        t = noise_levels(batch, generator)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator)
        clean, level = latents[picked], t.view(-1, *[1] * (latents.ndim - 1))
        said = texts[picked] * (torch.rand(batch, generator=generator) >= WITHOUT_CAPTION)
        velocity = recipe.velocity(
            transformer,
            clean + level * (noise - clean),
            t.bfloat16().float(),  # as coarse as in a BF16 pipeline
            embeddings[said].float(),
            masks[said],
            step / steps,
        )
        return F.mse_loss(velocity, noise - clean)

    return run_stage(stage, recipe.matrices["transformer"], folder, transformer, loss_of, seed, steps, ema=True)


def _load_average(transformer: nn.Module, checkpoint: Path) -> None:
    average = torch.load(checkpoint, weights_only=True)["average"]
    for parameter, mean in zip(transformer.parameters(), average, strict=True):
        parameter.data.copy_(mean)


def assemble(recipe: Any, folder: Path, seed: int) -> Any:
    """The trained pipeline in BF16, from the last checkpoints in ``folder``; the transformer's weights are averages."""
    pipeline = trained(recipe, folder, seed)
    transformer = recipe.build_transformer()
    last = next(path for path in (folder / "tune.pt", folder / "transformer.pt") if path.is_file())
    _load_average(transformer, last)
    pipeline.register_modules(transformer=transformer.eval().bfloat16())
    return pipeline


def evaluate(
    pipeline: Any, folder: Path, seed: int, count: int, steps: int, guidance: dict[str, Any], batch: int = 64
) -> dict[str, Any]:
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
        arguments = dict(guidance)
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
        pictures += pipeline(
            prompts,
            height=scenes.SIZE,
            width=scenes.SIZE,
            num_inference_steps=steps,
            generator=generator,
            **arguments,
        ).images
    right: dict[str, list[bool]] = {"all": []}
    for scene, picture in zip(chosen, pictures, strict=True):
        verdict = detect(picture).follows(scene)
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
        "guidance": guidance,
        "following": {name: {"right": sum(good), "of": len(good)} for name, good in right.items()},
    }


def pack(pipeline: Any, target: Path) -> None:
    """Write ``pipeline`` to ``target``, without the place where its VAE was trained."""
    pipeline.save_pretrained(target, max_shard_size="9MB")
    config = target / "vae" / "config.json"
    told = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
    config.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")


def plot(folder: Path) -> None:
    """Draw the loss of every stage that has a checkpoint to ``folder/losses.png``; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no loss plot: matplotlib is not installed")
        return
    found = [stage for stage in BATCH["qwen-image"] if (folder / f"{stage}.pt").is_file()]
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
    parser.add_argument("stages", nargs="+", choices=["text", "vae", "transformer", "tune", "evaluate", "pack"])
    parser.add_argument("--pipeline", choices=list(RECIPES), default="qwen-image")
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and everything else that a run leaves")
    parser.add_argument("--seed", type=int, default=0)
    for stage in BATCH["qwen-image"]:
        parser.add_argument(f"--{stage}-steps", type=int, help="default: " + str({p: STEPS[p][stage] for p in STEPS}))
    parser.add_argument("--captions", type=int, default=512, help="how many held-out captions the evaluation draws")
    parser.add_argument("--inference-steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=1.0, help="scale of classifier-free guidance; 1 is none")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder, seed, recipe = arguments.folder, arguments.seed, RECIPES[arguments.pipeline]
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "pipeline": arguments.pipeline,
        "seed": seed,
        "threads": arguments.threads,
        "seconds": {},
    }
    training: dict[str, Callable[[Any, Path, int, int], list[float]]] = {
        "text": train_text,
        "vae": train_vae,
        "transformer": train_transformer,
        "tune": partial(train_transformer, stage="tune"),
    }
    for stage, train in training.items():
        steps = getattr(arguments, f"{stage}_steps") or STEPS[recipe.name][stage]
        if stage in arguments.stages and steps:
            started = time.perf_counter()
            train(recipe, folder, seed, steps)
            results["seconds"][stage] = round(time.perf_counter() - started)
    if "evaluate" in arguments.stages:
        guidance = recipe.guidance(arguments.guidance)
        pipeline = assemble(recipe, folder, seed)
        started = time.perf_counter()
        results |= evaluate(pipeline, folder, seed, arguments.captions, arguments.inference_steps, guidance)
        results["seconds"]["evaluate"] = round(time.perf_counter() - started)
    if "pack" in arguments.stages:
        pack(assemble(recipe, folder, seed), EMBEDDED / recipe.name)
    plot(folder)
    common.write(arguments.output, results)


if __name__ == "__main__":
    main()
