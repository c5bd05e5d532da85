"""One picture on several GPUs: diffusers' context parallelism, with the backend compiled on every rank.

    torchrun --nproc-per-node 2 -m bench.context_parallel --model Qwen/Qwen-Image --mode ulysses

Method: each rank loads the pipeline, quantizes it, and draws the picture alone; then the tokens of the denoiser are
shared by all ranks, and they draw it again together. Printed by the first rank: how near the two are, and the seconds
per step of both, the first step not counted.

The number of ranks must divide the tokens of the picture and those of the prompt. diffusers' ``ulysses_anything``, for
others, cannot be compiled with torch 2.13, by no backend. ``--mode ring`` needs an attention that returns its
log-sum-exp, such as ``--attention-backend flash``; torch's own on a CPU does not. FP8 attention refuses it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from .common import parser, write


def draw(session: Any, given: Any) -> tuple[Any, float | None]:
    """A picture, and the seconds per step."""
    from fp8_compile.pipelines.step_clock import StepClock

    call = session.arguments(prompt=given.prompt, num_inference_steps=given.steps, height=given.size, width=given.size)
    with StepClock(session.device) as clock:
        image = session.call(given.seed, callback_on_step_end=clock.step, **call).images[0]
    return image, clock.seconds_per_step


def share(session: Any, mode: str, ranks: int) -> None:
    """Let all ranks denoise one picture."""
    from diffusers import ContextParallelConfig

    for module in session.denoisers.values():
        config = ContextParallelConfig(ulysses_degree=ranks) if mode == "ulysses" else ContextParallelConfig(ranks)
        module.enable_parallelism(config=config)


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--model", default="embedded:qwen-image")
    p.add_argument("--mode", choices=("ulysses", "ring"), default="ulysses")
    p.add_argument("--attention-backend", help="a name for set_attention_backend of diffusers")
    p.add_argument("--attention", default="as-written", help="the option of the backend: fp8, fp8-emulated")
    p.add_argument("--prompt", default="a large red circle on a white background")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--size", type=int, default=64, help="width and height in pixels")
    p.add_argument("--inner-backend", default="inductor")
    p.add_argument("--device", default="cuda")
    given = p.parse_args(arguments)

    import torch
    import torch.distributed as dist

    from fp8_compile.measure.quality import psnr
    from fp8_compile.pipelines.session import Session

    dist.init_process_group("nccl" if given.device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = given.device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    options = {"strict": True, "inner_backend": given.inner_backend, "attention": given.attention}
    session = Session.load(given.model, device=device, at_load=options)
    session.pipe.set_progress_bar_config(disable=rank > 0)
    for module in session.denoisers.values() if given.attention_backend else ():
        module.set_attention_backend(given.attention_backend)
    session.compile(options)
    alone, seconds_alone = draw(session, given)
    torch.compiler.reset()
    share(session, given.mode, ranks)
    together, seconds = draw(session, given)
    same = [torch.zeros_like(pixels(together)) for _ in range(ranks)]
    dist.all_gather(same, pixels(together))
    reports = session.reports().items()
    results = {
        "ranks": ranks,
        "mode": given.mode,
        "db": psnr(alone, together),
        "ranks_agree": all(torch.equal(each, same[0]) for each in same),
        "quantized": {name: r.totals["quantized"] for name, r in reports},
        "attentions": {name: [row.kernel or row.reason for row in r.attentions] for name, r in reports},
        "seconds_per_step": {"1": seconds_alone, str(ranks): seconds},
    }
    if rank == 0:
        print(
            f"{given.mode}, {ranks} ranks against 1: {results['db']:.1f} dB; all ranks have "
            f"{'the same picture' if results['ranks_agree'] else 'DIFFERENT pictures'}; seconds per step: "
            f"{seconds_alone} alone, {seconds} together"
        )
        write(given.output, results)
    dist.destroy_process_group()
    return 0


def pixels(image: Any) -> Any:
    """Of a picture, as a tensor that collectives take."""
    import torch

    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.cuda() if torch.distributed.get_backend() == "nccl" else flat


if __name__ == "__main__":
    sys.exit(main())
