"""What compiling leaves behind for whoever debugs it: log lines, tlparse artifacts, files.

``TORCH_LOGS="+fp8_compile"`` prints each decision; ``TORCH_TRACE`` stores the plan and the graph before and after each
pass for tlparse; the option ``dump_graphs`` writes the same to files.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch._logging._internal import trace_structured
from torch.fx import GraphModule

from .options import Fp8Options
from .passes.context import Decision, Plan

logger = logging.getLogger(__name__)


def trace_plan(plan: Plan, options: Fp8Options) -> None:
    """Record every decision of ``plan``."""
    for d in plan.decisions:
        logger.debug(
            "%s [%d -> %d]: %s%s", d.path, d.in_features, d.out_features, d.decision, d.reason and f", {d.reason}"
        )
    for a in plan.attentions:
        logger.debug("%s: %s%s", a.path, a.kernel or "as written", a.reason and f", {a.reason}")
    _store(
        "plan",
        "json",
        lambda: json.dumps([*map(_row, plan.decisions), *map(asdict, plan.attentions)], indent=1),
        options,
    )


def _row(decision: Decision) -> dict[str, Any]:
    row = {field.name: getattr(decision, field.name) for field in dataclasses.fields(decision)}
    return {
        **row,
        "scheme": decision.scheme and {"method": decision.scheme.method, **decision.scheme.options},
        "call": decision.call and decision.call.name,
    }


def trace_graph(stage: str, make: Callable[[], GraphModule], options: Fp8Options) -> None:
    """Record the graph at one stage of the rewrite."""
    _store(stage, "string", lambda: make().print_readable(print_output=False), options)


def _store(name: str, encoding: str, payload: Callable[[], str], options: Fp8Options) -> None:
    trace_structured("artifact", metadata_fn=lambda: {"name": f"fp8_{name}", "encoding": encoding}, payload_fn=payload)
    if options.dump_graphs is not None:
        compile_id = str(torch._guards.CompileContext.current_compile_id()).replace("/", "_")
        folder = Path(options.dump_graphs) / f"graph_{compile_id}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.{'json' if encoding == 'json' else 'py'}").write_text(payload())
