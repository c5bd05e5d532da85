"""``fp8-diffusion search``: a small set of layers to keep in BF16 that meets a bound on quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import KEEP
from .arguments import MeasureSettings, with_options
from .messages import check_folder, errors_as_messages, fail, tell

if TYPE_CHECKING:
    from ..measure.bound import Bound


@with_options
@errors_as_messages()
def search(
    settings: MeasureSettings,
    max_loss: Annotated[
        float | None, typer.Option(help="Bound for a metric that is 0 for equal pictures: relative_l2, lpips.")
    ] = None,
    min_quality: Annotated[
        float | None,
        typer.Option(help="Bound for a metric that grows with quality: psnr (in dB), ssim, cosine (1 for equal ones)."),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="relative_l2 and cosine of the last latents, psnr, ssim, lpips.")
    ] = "relative_l2",
    statistic: Annotated[str, typer.Option(help="The bound is for the worst picture, or for the mean.")] = "worst",
    by: Annotated[
        str,
        typer.Option(
            help="Keep layers, the same in all blocks; blocks; or blocks-then-layers: single layers of these."
        ),
    ] = "layers",
    output: Annotated[
        Path, typer.Option(help="Folder for search.json, its pictures and its page. A search that is there goes on.")
    ] = Path("search"),
    pictures: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures of each measurement on the page. Default: all that are measured."),
    ] = None,
) -> None:
    """Find a small set of layers to keep in BF16 that meets a bound on quality, by measuring pictures."""
    from ..measure import search_page
    from ..measure.search import BY, Search
    from ..measure.variants import Variants

    bound = _bound(metric, max_loss, min_quality, statistic)
    if by not in BY:
        fail(f"--by {by!r} is not valid; valid: {', '.join(BY)}")
    check_folder(output, "search")
    options = settings.options()
    session, call = settings.load()
    tell(f"asked for: {bound}")
    made = Search(
        Variants(session.pipe, options),
        bound,
        settings.prompts,
        settings.seeds,
        output / "search.json",
        progress=tell,
        **call,
    )
    # Those of another bound; this one may not be met.
    for name in ("search.html", "layers.json"):
        (output / name).unlink(missing_ok=True)
    result = made.run(by)
    # The list first: it is what was asked for, and the page may still fail.
    typer.echo(
        f"{len(result.kept)} of {len(made.layers)} layers to keep, after {result.measurements} measurements; "
        f"{bound.metric} {bound.of(result.quality):.4f}"
    )
    typer.echo(search_page.paste(result))
    typer.echo(search_page.how_to_use(result))
    (output / "search.html").write_text(search_page.html(made, result, pictures), encoding="utf-8")
    plan = {pattern: KEEP for patterns in result.patterns.values() for pattern in patterns}
    (output / "layers.json").write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    typer.echo(f"wrote {output / 'search'}.{{json,html}}, and {output / 'layers.json'} for --layers")


def _bound(metric: str, max_loss: float | None, min_quality: float | None, statistic: str) -> Bound:
    """The bound, given by the option that says in which direction the metric is better."""
    from ..measure.bound import Bound

    value = min_quality if max_loss is None else max_loss
    if value is None or (max_loss is not None and min_quality is not None):
        fail("give --max-loss (for relative_l2, lpips) or --min-quality (for psnr, ssim, cosine), one of the two")
    bound = Bound(metric, value, statistic)
    if bound.less_is_better and max_loss is None:
        fail(f"--min-quality {value:g}: {metric} is less for better pictures; use --max-loss")
    if not bound.less_is_better and min_quality is None:
        fail(f"--max-loss {value:g}: {metric} is greater for better pictures; use --min-quality")
    return bound
