"""What was done to a model, from the decisions that were carried out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .options import RECOMMENDED, Fp8Options
from .passes.context import AttentionDecision, Decision, PassResult
from .patterns import join, layer_path, matching, parameter_layer
from .report_page import page
from .runtime.constants import GraphRecord, WeightState, state_of
from .schemes import Scheme
from .weights import eligible
from .weights.layers import Layer, Tree, all_parameters, stacks
from .weights.quantized_weight import QuantizedWeight
from .weights.records import record_of

NOT_COMPILED = "in no graph that the backend compiled"


@dataclass(frozen=True)
class LayerReport:
    """One linear, or one stack of the matrices of a mixture of experts.

    Attributes:
        path: as in ``model.named_modules()``; relative to the compiled region where the weight is no parameter.
        decision: "quantized" or "unquantized".
        reason: why it is unquantized, or in which graphs; may be empty for "fp8".
        scheme: how it runs in the graphs: names of the kernels' granularity, or empty; of a weight that has run in no
            graph yet, its method.
        rows: of its activation when its graphs were compiled. A graph of dynamic shapes serves others too, and runs the
            linear as was decided for these.
        bytes_before: of its weight.
        bytes_after: of the FP8 constants that compiled code reads in its place, or of the weight if it is unquantized.
        mixes_samples: what a graph makes of one sample depends on the others of its batch; see `Call`.
    """

    path: str
    in_features: int
    out_features: int
    decision: str
    reason: str
    scheme: str
    rows: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    mixes_samples: bool = False


@dataclass(frozen=True)
class AttentionReport:
    """One attention, where the option ``attention`` asked for FP8.

    Attributes:
        path: of its module, as in ``model.named_modules()``, and "sdpa"; what patterns match.
        decision: "fp8" or "as-written".
        kernel: what computes it; empty if it is as written.
        reason: why it is as written, in which graphs, or why no faster kernel computes it.
        tokens: of queries and of keys, when its graphs were compiled.
        heads: of queries and of keys.
        head_size: features of one head; 0 if unknown.
    """

    path: str
    decision: str
    kernel: str
    reason: str
    tokens: tuple[tuple[int, int], ...]
    heads: tuple[int, int]
    head_size: int


@dataclass(frozen=True)
class Report:
    """What `report` found; prints as a table.

    Attributes:
        layers: a row per linear of the model, and one per stack of experts.
        unmatched_patterns: entries of ``ignored_layers`` and ``layers`` that named no linear in any graph of the model.
        graphs: identifiers of the compilations that ran with the model's weights, in their order.
        passes: what each pass did to each of these graphs, by its identifier.
        extra_bytes: FP8 constants held beside the model's own weights.
        calibrated: where static input scales come from: algorithm, model, steps, sizes, date. Of weights from a file,
            nobody knows.
        on_cpu: in which dtype quantized values are multiplied, of weights on a CPU.
        attentions: a row per attention in the graphs, if ``attention`` asked for FP8.
        notes: what else compiling changed, outside of the model.
    """

    layers: tuple[LayerReport, ...]
    unmatched_patterns: tuple[str, ...]
    graphs: tuple[str, ...]
    passes: dict[str, tuple[PassResult, ...]]
    extra_bytes: int
    calibrated: tuple[str, ...] = ()
    on_cpu: tuple[str, ...] = ()
    attentions: tuple[AttentionReport, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def totals(self) -> dict[str, int]:
        decisions = Counter(row.decision for row in self.layers)
        return {
            "quantized": decisions["quantized"],
            "unquantized": decisions["unquantized"],
            "bytes_before": sum(row.bytes_before for row in self.layers),
            "bytes_after": sum(row.bytes_after for row in self.layers),
            "extra_bytes": self.extra_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: the attributes, and ``totals``."""
        return {
            "layers": self.rows(),
            "totals": self.totals,
            "unmatched_patterns": list(self.unmatched_patterns),
            "graphs": list(self.graphs),
            "passes": {graph: [asdict(result) for result in results] for graph, results in self.passes.items()},
            "calibrated": list(self.calibrated),
            "on_cpu": list(self.on_cpu),
            "attentions": [asdict(row) for row in self.attentions],
            "notes": list(self.notes),
        }

    def rows(self) -> list[dict[str, Any]]:
        """The layers as plain rows, for ``pandas.DataFrame(report(model).rows())``."""
        return [asdict(row) for row in self.layers]

    def html(self, path: str | os.PathLike[str]) -> None:
        """Write a page that needs no other file: the layers by bytes, coloured by decision, and a table.

        Raises:
            OSError: it cannot be written.
        """
        Path(path).write_text(page(self.rows(), self.totals), encoding="utf-8")

    def __str__(self) -> str:
        header = ("layer", "x", "in", "out", "decision", "scheme", "rows", "MB before", "MB after", "reason")
        lines = _table([header, *_grouped(self.layers)])
        totals = self.totals
        lines.append(
            f"{totals['quantized']} quantized, {totals['unquantized']} unquantized; weights "
            f"{totals['bytes_before'] / 1e6:.1f} MB -> {totals['bytes_after'] / 1e6:.1f} MB read per step, "
            f"{totals['extra_bytes'] / 1e6:.1f} MB beside the model; {len(self.graphs)} graph(s) compiled"
        )
        if self.attentions:
            columns = ("attention", "x", "tokens", "heads", "head size", "decision", "kernel", "reason")
            lines.extend(_table([columns, *_grouped_attentions(self.attentions)]))
        lines.extend(_of_passes(self.passes))
        lines.extend(f"static input scales: {text}" for text in self.calibrated)
        lines.extend(f"on the CPU, {text}" for text in self.on_cpu)
        lines.extend(self.notes)
        lines.extend(f"pattern {pattern!r} matched nothing" for pattern in self.unmatched_patterns)
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
        raise TypeError(f"expected a torch.nn.Module, for example pipeline.transformer, got {type(model).__name__}")
    rows: list[LayerReport] = []
    records: dict[GraphRecord, None] = {}
    extra = 0
    tree = Tree(model)
    seen: set[int] = set()
    of_experts: list[tuple[int, LayerReport]] = []
    schemes: dict[Scheme, None] = {}
    attentions: dict[str, dict[GraphRecord, AttentionDecision]] = {}
    for path, module, leaf, parameter in all_parameters(model):
        state = state_of(parameter)
        decisions: dict[GraphRecord, list[Decision]] = {}
        if state is not None:
            decisions = {r: ds for r, ds in state.decisions.items() if graphs is None or r.compile_id in graphs}
            records.update(dict.fromkeys(decisions))
            for record, of_graph in state.attentions.items():
                if record in decisions:
                    for made in of_graph:
                        attentions.setdefault(made.path, {})[record] = made
            if parameter.device.type == "cpu":
                quantized = (d.scheme for ds in decisions.values() for d in ds if d.decision == "quantized")
                schemes.update(dict.fromkeys(scheme for scheme in quantized if scheme is not None))
            if id(parameter) not in seen:
                extra += state.nbytes
            seen.add(id(parameter))
        if state is not None and decisions:
            rows.append(_row(layer_path(parameter_layer(path, leaf)), parameter, state, list(decisions.values())))
        elif isinstance(module, torch.nn.Linear) and leaf == "weight":
            rows.append(_uncompiled(path, parameter, tree.layer(module, leaf), module))
        elif leaf in dict(stacks(module)):
            of_experts.append((len(rows), _uncompiled(join(path, leaf), parameter, tree.layer(module, leaf), module)))
    ordered = sorted(records, key=lambda record: record.serial)
    asked = [found for module in model.modules() if (found := record_of(module))]
    least = min(
        [record.plan.min_features for record in ordered]
        + [found.options.get("min_features", Fp8Options.min_features) for found in asked],
        default=Fp8Options.min_features,
    )
    for i, row in reversed(of_experts):
        if row.reason != eligible.EXPERTS or min(row.in_features, row.out_features) >= least:
            rows.insert(i, row)
    for row in _without_parameter(ordered):
        _put(rows, row)
    limits = ", ".join(dict.fromkeys(record.last for record in ordered if record.last))
    rows = [replace(r, reason=f"{r.reason}; {limits}") if limits and r.reason == NOT_COMPILED else r for r in rows]
    calibrated = [found.calibrated for found in asked]
    at_load = [pattern for found in asked for pattern in found.unmatched]
    unmatched = tuple(dict.fromkeys([*at_load, *_unmatched(ordered, tree)]))
    return Report(
        tuple(rows),
        unmatched,
        tuple(record.compile_id for record in ordered),
        {record.compile_id: tuple(record.passes) for record in ordered},
        extra,
        tuple(dict.fromkeys(text for text in (*calibrated, *(r.plan.calibrated for r in ordered)) if text)),
        tuple(dict.fromkeys(scheme.on_cpu for scheme in schemes if scheme.on_cpu)),
        (
            *(_attention(path, list(of_graphs.values())) for path, of_graphs in attentions.items()),
            *(_attention(a.path, [a]) for r in ordered for a in r.plan.attentions if a.weight is None),
        ),
        tuple(dict.fromkeys(note for record in ordered for note in record.notes)),
    )


def _uncompiled(path: str, weight: Tensor, layer: Layer, module: torch.nn.Module) -> LayerReport:
    """A linear, or a stack of the matrices of experts, that has run in no graph.

    Its weight may have been decided on when the model was loaded.
    """
    prequantized, linear = isinstance(weight, QuantizedWeight), isinstance(module, torch.nn.Linear)
    if is_lazy(weight) or (linear and weight.dim() != 2):
        size = 0 if is_lazy(weight) else weight.nbytes
        reason = "weight has no values yet" if is_lazy(weight) else "weight is packed by another library"
        return LayerReport(layer_path(path), 0, 0, "unquantized", reason, "", (), size, size)
    otherwise = None if linear or prequantized else eligible.multiplied_otherwise(module)
    reason = "low-rank adapter" if layer.adapter else layer.recorded or otherwise or NOT_COMPILED
    features = weight.shape[-2:]
    out_features, in_features = features if linear else features[::-1]
    return LayerReport(
        path=layer_path(path),
        in_features=in_features,
        out_features=out_features,
        decision="quantized" if prequantized else "unquantized",
        reason=reason,
        scheme=weight.scheme.label if isinstance(weight, QuantizedWeight) else "",
        rows=(),
        bytes_before=_original_bytes(weight),
        bytes_after=weight.nbytes,
    )


def _original_bytes(weight: Tensor) -> int:
    return weight.numel() * weight.dtype.itemsize


def _put(rows: list[LayerReport], row: LayerReport) -> None:
    """Say of a layer that seemed to be in no graph what a graph said of it by its path alone; else add it."""
    for i, other in enumerate(rows):
        if other.reason == NOT_COMPILED and (other.path == row.path or other.path.endswith(f".{row.path}")):
            rows[i] = replace(other, reason=row.reason)
            return
    rows.append(row)


def _row(path: str, weight: Tensor, state: WeightState, of_graphs: Sequence[Sequence[Decision]]) -> LayerReport:
    decisions = [_of_path(decisions, path) for decisions in of_graphs]
    quantized = [d for d in decisions if d.decision == "quantized"]
    unquantized = [d for d in decisions if d.decision == "unquantized"]
    first = (quantized or unquantized)[0]
    reasons = ", ".join(dict.fromkeys(d.reason for d in unquantized))
    if quantized and unquantized:
        reasons = f"unquantized in {len(unquantized)} of {len(decisions)} graphs: {reasons}"
    # A quantized layer has one if it is not multiplied in FP8 because the device has no kernel for that.
    reasons = ", ".join(dict.fromkeys(filter(None, [*(d.reason for d in quantized), reasons])))
    calls = [d.call for d in quantized if d.call is not None]
    return LayerReport(
        path=path,
        in_features=first.in_features,
        out_features=first.out_features,
        decision=first.decision,
        reason=reasons,
        scheme="+".join(dict.fromkeys(call.name for call in calls)),
        rows=tuple(sorted({d.rows for d in decisions if d.rows is not None})),
        bytes_before=_original_bytes(weight),
        bytes_after=state.nbytes if quantized and not isinstance(weight, QuantizedWeight) else weight.nbytes,
        mixes_samples=any(call.mixes_samples for call in calls),
    )


def _attention(path: str, decisions: Sequence[AttentionDecision]) -> AttentionReport:
    computed = [d for d in decisions if d.kernel is not None]
    others = [d for d in decisions if d.kernel is None]
    reasons = ", ".join(dict.fromkeys(d.reason for d in others))
    if computed and others:
        reasons = f"as written in {len(others)} of {len(decisions)} graphs: {reasons}"
    first = (computed or others)[0]
    return AttentionReport(
        path=path,
        decision="fp8" if computed else "as-written",
        kernel="+".join(dict.fromkeys(d.kernel for d in computed if d.kernel is not None)),
        reason=", ".join(dict.fromkeys(filter(None, [*(d.reason for d in computed), reasons]))),
        tokens=tuple(sorted({(d.queries or 0, d.keys or 0) for d in decisions})),
        heads=(first.heads or 0, first.key_heads or 0),
        head_size=first.head_size or 0,
    )


def _of_path(decisions: Sequence[Decision], path: str) -> Decision:
    """Of the layers that share a weight in one graph, the one at ``path``."""
    ours = f".{path}"
    same = (d for d in decisions if ours.endswith(f".{d.path}") or f".{d.path}".endswith(ours))
    return next(same, decisions[0])


def _without_parameter(records: Sequence[GraphRecord]) -> Iterator[LayerReport]:
    seen = {}
    for record in records:
        for d in record.plan.decisions:
            if d.weight is None:
                seen[d.path, d.reason] = LayerReport(
                    d.path, d.in_features, d.out_features, d.decision, d.reason, "", (), 0, 0
                )
    return iter(seen.values())


def _unmatched(records: Sequence[GraphRecord], tree: Tree) -> tuple[str, ...]:
    given = dict.fromkeys(p for record in records for p in record.plan.patterns)
    matched = {d.pattern for record in records for d in record.plan.decisions} | matching(given, tree.names)
    matched |= {a.pattern for record in records for a in record.plan.attentions}
    if tree.has_recipe:
        matched.add(RECOMMENDED)
    return tuple(pattern for pattern in given if pattern not in matched)


def _of_passes(passes: Mapping[str, Sequence[PassResult]]) -> Iterator[str]:
    """A line per pass: how many places it changed in all graphs, and how long it took."""
    results: dict[str, list[PassResult]] = {}
    for of_graph in passes.values():
        for result in of_graph:
            results.setdefault(result.name, []).append(result)
    for name, those in results.items():
        ran = [r for r in those if r.matches is not None]
        notes = Counter(r.note for r in those if r.matches is None)
        parts = (
            [f"{sum(r.matches or 0 for r in ran)} matches in {sum(r.milliseconds for r in ran):.1f} ms"] if ran else []
        )
        yield f"{name}: {'; '.join([*parts, *(f'{note} ({count} graphs)' for note, count in notes.items())])}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _any_block(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", path, count=1)


def _grouped_attentions(rows: Sequence[AttentionReport]) -> Iterator[tuple[str, ...]]:
    """Table cells, as `_grouped`."""
    groups: dict[AttentionReport, list[AttentionReport]] = {}
    for row in rows:
        groups.setdefault(replace(row, path=_any_block(row.path)), []).append(row)
    for row, group in groups.items():
        yield (
            row.path if len(group) > 1 else group[0].path,
            str(len(group)),
            ", ".join(str(q) if q == k else f"{q} of {k}" for q, k in row.tokens),
            str(row.heads[0]) if row.heads[0] == row.heads[1] else f"{row.heads[0]} of {row.heads[1]}",
            str(row.head_size),
            row.decision,
            row.kernel,
            row.reason,
        )


def _grouped(rows: Sequence[LayerReport]) -> Iterator[tuple[str, ...]]:
    """Table cells, with layers that differ in a block's index only as one line."""
    groups: dict[tuple[Any, ...], list[LayerReport]] = {}
    for row in rows:
        key = (_any_block(row.path), *list(asdict(row).values())[1:])
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
            ", ".join(map(str, row.rows)),
            f"{sum(r.bytes_before for r in group) / 1e6:.2f}",
            f"{sum(r.bytes_after for r in group) / 1e6:.2f}",
            row.reason,
        )
