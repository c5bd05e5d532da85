"""An ablation as a table in Markdown, and as a page with a plot and pictures."""

from __future__ import annotations

import math
from typing import Any

from ..options import AS_WRITTEN
from .ablation import Ablation, AblationError, AblationRow
from .html import HEAT, LOSSLESS_SIDE, Plot, Point, data_uri, encode, heatmap, render
from .results import number_text, quartiles

# Table heading and digits after the point, by metric.
_METRICS = {
    "psnr": ("PSNR, dB", 1),
    "ssim": ("SSIM", 3),
    "relative_l2": ("relative L2", 3),
    "cosine": ("cosine", 4),
    "lpips": ("LPIPS", 3),
}


def markdown(found: Ablation) -> str:
    """The table, with what it was measured on."""
    header, rows = _table(found)
    lines = [f"# Which layers to keep in BF16: {found.model}", "", *(f"{_text(line)}\n" for line in _about(found))]
    lines.append("| " + " | ".join(header) + " |")
    lines.append("|" + "|".join("---" if i in (1, 2) else "---:" for i in range(len(header))) + "|")
    lines += ["| " + " | ".join(_text(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"{line}\n" for line in _notes(found))])


def html(found: Ablation, pictures: int = 2) -> str:
    """One page with the table, a plot, and the first ``pictures`` pictures of every row; it needs no other file.

    Raises:
        AblationError: ``pictures`` is below 1.
    """
    if pictures < 1:
        raise AblationError(f"pictures: expected a number of at least 1, got {pictures!r}")
    header, rows = _table(found)
    references = [sample.image for sample in found.rows[0].samples[:pictures]]
    points = [
        Point(
            found.speedup(row),
            row.quality.mean["psnr"],
            str(number),
            f"{row.name}: keeps {', '.join(row.ignored_layers or ()) or 'nothing'}",
            name=f"{number} {row.name}",
            shows=number,
        )
        for number, row in enumerate(found.rows, start=1)
        if row.quality is not None and row.step_seconds and math.isfinite(row.quality.mean["psnr"])
    ]
    speedup = f"speedup over compiled BF16 ({found.environment['device']})"
    return render(
        "ablation.html.j2",
        model=found.model,
        about=_about(found),
        notes=_notes(found),
        header=header,
        rows=rows,
        plot=Plot.of(points, speedup, "mean PSNR, dB") if points else None,
        heat=HEAT,
        pictured=[number for number, row in enumerate(found.rows, start=1) if row.samples],
        left=1,
        right=next((number for number, row in enumerate(found.rows[1:], start=2) if row.samples), 1),
        hidden=len(found.rows[0].samples) - len(references),
        small=max(max(image.size) for image in references) <= LOSSLESS_SIDE,
        samples=[
            {
                "prompt": sample.prompt,
                "seed": sample.seed,
                "shown": [
                    _shown(number, row, i, sample.image)
                    for number, row in enumerate(found.rows, start=1)
                    if row.samples
                ],
            }
            for i, sample in enumerate(found.rows[0].samples[:pictures])
        ],
    )


def _shown(number: int, row: AblationRow, index: int, reference: Any) -> dict[str, Any]:
    """One picture of a row as the template shows it."""
    image, quality = row.samples[index].image, row.quality
    return {
        "number": number,
        "name": row.name,
        "image": data_uri(encode(image)),
        "heat": None if quality is None else data_uri(encode(heatmap(reference, image))),
        "quality": "" if quality is None else f"PSNR {number_text(quality.rows[index].psnr, 1)} dB",
    }


def _table(found: Ablation) -> tuple[list[str], list[list[str]]]:
    """The header and the rows, as text."""
    baseline = found.rows[0]
    adherence, peaks = baseline.prompt_adherence is not None, baseline.peak_bytes is not None
    attentions = _asks_for_attention(found)
    header = ["#", "configuration", "kept in BF16", "FP8 layers", *(["FP8 attentions"] if attentions else [])]
    header += ["weights, MB"]
    header += ["peak, MB"] if peaks else []
    header += ["ms per step [quartiles]", "speedup"]
    metrics = next((row.quality.metrics for row in found.rows if row.quality is not None), ())
    header += [f"{_METRICS[metric][0]}: mean / worst" for metric in metrics]
    header += ["follows the prompt"] if adherence else []
    rows = []
    for number, row in enumerate(found.rows, start=1):
        cells = [str(number), f"{row.name} (failed: {row.failure})" if row.failure else row.name]
        cells += ["everything" if row.ignored_layers is None else ", ".join(row.ignored_layers) or "nothing"]
        cells += [str(row.fp8_layers), *([str(row.fp8_attentions)] if attentions else [])]
        cells += [f"{row.weight_bytes / 1e6:.1f}"]
        if peaks:
            cells.append("-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}")
        if row.step_seconds:
            low, median, high = (1e3 * seconds for seconds in quartiles(row.step_seconds))
            cells += [f"{median:.1f} [{low:.1f}, {high:.1f}]", f"{found.speedup(row):.2f}"]
        else:
            cells += ["-", "-"]
        for metric in metrics:
            q, digits = row.quality, _METRICS[metric][1]
            values = [] if q is None else [number_text(of[metric], digits) for of in (q.mean, q.worst)]
            cells.append(" / ".join(values) or "-")
        if adherence:
            cells.append("-" if row.prompt_adherence is None else "{} of {}".format(*row.prompt_adherence["all"]))
        rows.append(cells)
    return header, rows


def _about(found: Ablation) -> list[str]:
    e, s = found.environment, found.settings
    call = ", ".join(f"{name} {value}" for name, value in s["call"].items())
    options = ", ".join(f"{name} {value}" for name, value in s["options"].items() if value is not None)
    return [
        f"Measured on {e['device']} ({e['threads']} CPU threads, load {e['load_average']}), torch {e['torch']}, "
        f"diffusers {e['diffusers']}, fp8-compile {e['fp8-compile']}, {e['date']}.",
        f"{len(s['prompts'])} prompts x {len(s['seeds'])} seeds; {call}; {options}.",
        *(["These are times of a CPU, which say nothing of a GPU."] if e["device"] == "cpu" else []),
    ]


IN_VAIN = "No attention was in FP8, though the options ask for it: no kernel took one."


def _asks_for_attention(found: Ablation) -> bool:
    return bool(found.settings["options"].get("attention", AS_WRITTEN) != AS_WRITTEN)


def _notes(found: Ablation) -> list[str]:
    in_vain = _asks_for_attention(found) and not any(row.fp8_attentions for row in found.rows)
    return [
        *([IN_VAIN] if in_vain else []),
        "Every row is compiled. Quality is against compiled BF16 with the same noise, mean and worst of all "
        "pictures; relative L2 and cosine are of the last latents.",
        f"Times: {len(found.rows[0].step_seconds)} denoising steps per row, of all rows in turn; the speedup is "
        "median over median. Weights: of all linear layers, as compiled code reads them.",
    ]


def _text(line: str) -> str:
    """``line`` for Markdown, which would take ``<`` for the beginning of a tag."""
    return line.replace("&", "&amp;").replace("<", "&lt;")
