"""What was done to a model, told from the decisions that were carried out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .passes.plan import Decision
from .patterns import is_adapter, layer_path
from .quantize import unmatched_at_load
from .runtime.binder import GraphRecord, WeightState, state_of
from .schemes.fp8 import scheme_of
from .weights.quantized_weight import Fp8Weight, KeptWeight

NOT_COMPILED = "in no graph that the backend compiled"


@dataclass(frozen=True)
class LayerReport:
    """One linear.

    Attributes:
        path: as in ``model.named_modules()``; relative to the compiled region where the weight is no parameter.
        decision: "fp8" or "kept".
        reason: why it is kept, or in which graphs; may be empty for "fp8".
        scheme: names of the schemes that its weight was converted by, or empty.
        bytes_before: of its weight.
        bytes_after: of the FP8 constants that compiled code reads in its place, or of the weight if it is kept.
    """

    path: str
    in_features: int
    out_features: int
    decision: str
    reason: str
    scheme: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Report:
    """What `report` found; prints as a table.

    Attributes:
        layers: a row per linear of the model.
        unmatched_patterns: entries of ``ignored_layers`` that named no linear in any graph of the model.
        graphs: identifiers of the compilations that ran with the model's weights, in their order.
        extra_bytes: FP8 constants held beside the model's own weights.
    """

    layers: tuple[LayerReport, ...]
    unmatched_patterns: tuple[str, ...]
    graphs: tuple[str, ...]
    extra_bytes: int

    @property
    def totals(self) -> dict[str, int]:
        decisions = Counter(row.decision for row in self.layers)
        return {
            "fp8": decisions["fp8"],
            "kept": decisions["kept"],
            "bytes_before": sum(row.bytes_before for row in self.layers),
            "bytes_after": sum(row.bytes_after for row in self.layers),
            "extra_bytes": self.extra_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: ``layers``, ``totals``, ``unmatched_patterns``, ``graphs``."""
        return {
            "layers": [asdict(row) for row in self.layers],
            "totals": self.totals,
            "unmatched_patterns": list(self.unmatched_patterns),
            "graphs": list(self.graphs),
        }

    def __str__(self) -> str:
        header = ("layer", "x", "in", "out", "decision", "scheme", "MB before", "MB after", "reason")
        table = [header, *_grouped(self.layers)]
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        totals = self.totals
        lines.append(
            f"{totals['fp8']} in FP8, {totals['kept']} kept; weights {totals['bytes_before'] / 1e6:.1f} MB -> "
            f"{totals['bytes_after'] / 1e6:.1f} MB read per step, {totals['extra_bytes'] / 1e6:.1f} MB held beside the "
            f"model; {len(self.graphs)} graph(s) compiled"
        )
        lines.extend(f"ignored_layers: {pattern!r} matched nothing" for pattern in self.unmatched_patterns)
        return "\n".join(lines)


def report(model: torch.nn.Module, graphs: Collection[str] | None = None) -> Report:
    """What the backend did to ``model``, after it has run.

    Args:
        model: the module itself, or what ``torch.compile`` returned for it.
        graphs: tell of these compilations only (see `Report.graphs`), where a model was compiled in several ways. None:
            of all.

    Raises:
        TypeError: ``model`` is no module (a pipeline's transformer is one, the pipeline is not).
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"a torch.nn.Module belongs here, for example pipeline.transformer, not {type(model).__name__}")
    rows: list[LayerReport] = []
    records: dict[GraphRecord, None] = {}
    extra = 0
    linear_weights = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        state = state_of(parameter)
        decisions: dict[GraphRecord, list[Decision]] = {}
        if state is not None:
            told = state.decisions
            decisions = {r: told[r] for r in told if graphs is None or r.compile_id in graphs}
            records.update(dict.fromkeys(decisions))
            if id(parameter) not in seen:
                extra += state.nbytes
            seen.add(id(parameter))
        if state is not None and decisions:
            path = layer_path(owner if leaf == "weight" else name)
            rows.append(_row(path, parameter, state, list(decisions.values())))
        elif owner in linear_weights and leaf == "weight":
            rows.append(_uncompiled(owner, parameter))
    ordered = sorted(records, key=lambda record: record.serial)
    for row in _without_parameter(ordered):
        _put(rows, row)
    unmatched = tuple(dict.fromkeys([*unmatched_at_load(model), *_unmatched(ordered)]))
    return Report(tuple(rows), unmatched, tuple(record.compile_id for record in ordered), extra)


def _uncompiled(path: str, weight: Tensor) -> LayerReport:
    """A linear that no graph has told of; whose weight may have been quantized, or kept, when the model was loaded."""
    held = isinstance(weight, Fp8Weight)
    reason = "low-rank adapter" if is_adapter(path) else _kept_at_load(weight) or NOT_COMPILED
    out_features, in_features = weight.shape
    return LayerReport(
        path=layer_path(path),
        in_features=in_features,
        out_features=out_features,
        decision="fp8" if held else "kept",
        reason=reason,
        scheme=scheme_of(weight.granularity).name if isinstance(weight, Fp8Weight) else "",
        bytes_before=_original_bytes(weight),
        bytes_after=weight.nbytes,
    )


def _kept_at_load(weight: Tensor) -> str:
    return weight.reason if isinstance(weight, KeptWeight) else ""


def _original_bytes(weight: Tensor) -> int:
    return weight.numel() * weight.dtype.itemsize


def _put(rows: list[LayerReport], row: LayerReport) -> None:
    """Say of a layer that seemed to be in no graph what a graph said of it by its path alone; else add it."""
    for i, other in enumerate(rows):
        if other.reason == NOT_COMPILED and (other.path == row.path or other.path.endswith(f".{row.path}")):
            rows[i] = replace(other, reason=row.reason)
            return
    rows.append(row)


def _row(path: str, weight: Tensor, state: WeightState, told: Sequence[Sequence[Decision]]) -> LayerReport:
    decisions = [_of_path(decisions, path) for decisions in told]
    converted = [d for d in decisions if d.decision == "fp8"]
    kept = [d for d in decisions if d.decision == "kept"]
    first = (converted or kept)[0]
    # A graph tells the reason that held for the first module that ran with it; the weight tells its own.
    reasons = _kept_at_load(weight) or ", ".join(dict.fromkeys(d.reason for d in kept))
    if converted and kept:
        reasons = f"kept in {len(kept)} of {len(decisions)} graphs: {reasons}"
    schemes = [d.scheme.name for d in converted if d.scheme is not None]
    return LayerReport(
        path=path,
        in_features=first.in_features,
        out_features=first.out_features,
        decision=first.decision,
        reason=reasons,
        scheme="+".join(dict.fromkeys(schemes)),
        bytes_before=_original_bytes(weight),
        bytes_after=state.nbytes if converted and not isinstance(weight, Fp8Weight) else weight.nbytes,
    )


def _of_path(decisions: Sequence[Decision], path: str) -> Decision:
    """Of the layers that share a weight in one graph, the one at ``path``."""
    same = (d for d in decisions if path == d.path or path.endswith("." + d.path))
    return next(same, decisions[0])


def _without_parameter(records: Sequence[GraphRecord]) -> Iterator[LayerReport]:
    seen = {}
    for record in records:
        for d in record.plan.decisions:
            if d.weight is None:
                seen[d.path, d.reason] = LayerReport(
                    d.path, d.in_features, d.out_features, d.decision, d.reason, "", 0, 0
                )
    return iter(seen.values())


def _unmatched(records: Sequence[GraphRecord]) -> tuple[str, ...]:
    given = dict.fromkeys(p for record in records for p in record.plan.ignored_layers)
    matched = {d.pattern for record in records for d in record.plan.decisions}
    return tuple(pattern for pattern in given if pattern not in matched)


def _grouped(rows: Sequence[LayerReport]) -> Iterator[tuple[str, ...]]:
    """Table cells, with layers that differ in a block's index only as one line."""
    groups: dict[tuple[Any, ...], list[LayerReport]] = {}
    for row in rows:
        key = (re.sub(r"(^|\.)\d+(?=\.)", r"\1*", row.path, count=1), *list(asdict(row).values())[1:])
        groups.setdefault(key, []).append(row)
    for (path, *_), group in groups.items():
        row = group[0]
        yield (
            path if len(group) > 1 else row.path,
            str(len(group)),
            str(row.in_features),
            str(row.out_features),
            row.decision,
            row.scheme,
            f"{sum(r.bytes_before for r in group) / 1e6:.2f}",
            f"{sum(r.bytes_after for r in group) / 1e6:.2f}",
            row.reason,
        )
