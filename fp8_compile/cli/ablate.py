"""``fp8-diffusion ablate``: what each choice of layers that stay in BF16 costs and gains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import MeasureSettings, Whole, with_options
from .messages import check_folder, errors_as_messages, fail, tell


@with_options
@errors_as_messages()
def ablate(
    settings: MeasureSettings,
    groups: Annotated[
        Path | None,
        typer.Option(
            help="JSON or TOML file: names, and lists of layers that stay in BF16. Default: 13 choices for Qwen-Image; "
            "for other models, each part of a block in turn."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for ablation.md, .json and .html.")] = Path("ablation"),
    rounds: Annotated[int, typer.Option(min=1, help="Pictures that are timed for each choice, in turn.")] = 3,
    pictures: Annotated[
        int | None, typer.Option(min=1, help="Pictures of each choice on the page. Default: all that are measured.")
    ] = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="Measure LPIPS too; its weights must be there.")] = False,
    whole: Whole = False,
) -> None:
    """Compare choices of layers that stay in BF16: time, memory, and quality against compiled BF16."""
    from ..measure import ablation_page
    from ..measure.ablate import ONE_STEP
    from ..measure.ablate import ablate as measure
    from ..measure.groups import groups_for, read_groups
    from ..measure.variants import Variants

    check_folder(output, "ablation")
    if settings.steps == 1:
        fail(f"--steps 1: {ONE_STEP}")
    options = settings.options()
    chosen = None if groups is None else read_groups(groups)
    session, call = settings.load()
    variants = Variants(session.pipe, options, whole)
    found = measure(
        variants,
        chosen or groups_for(next(iter(session.denoisers.values())), variants.fp8_attention),
        settings.prompts,
        settings.seeds,
        rounds,
        lpips,
        progress=tell,
        written=output / "ablation.json",
        **call,
    )
    # The table first: it is what was asked for, and the page may still fail.
    table = ablation_page.markdown(found)
    typer.echo(table)
    (output / "ablation.md").write_text(table, encoding="utf-8")
    (output / "ablation.html").write_text(
        ablation_page.html(found, pictures or len(found.rows[0].samples)), encoding="utf-8"
    )
    typer.echo(f"wrote {output / 'ablation'}.{{md,json,html}}")
