"""The ``torch.compile`` backend: options, passes, the inner compiler, the bound callable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from . import tracing
from .checks import check_agreement, complain_of_nothing, parse_options, scheme_for, warn_of_unmatched
from .device import check_device, refusal
from .errors import GradientError
from .inductor.inner import compile_inner
from .options import Fp8Options
from .passes.context import Context, Plan
from .passes.graphs import example
from .passes.pipeline import rewrite
from .runtime.binder import BoundGraph
from .runtime.constants import GraphRecord, forget_all
from .weights import lora
from .weights.quantized_weight import KeptWeight, QuantizedWeight

logger = logging.getLogger(__name__)


def fp8_diffusion(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Fp8Options | Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile ``gm`` with its linear layers in FP8; registered with ``torch.compile`` as "fp8_diffusion".

    Args:
        gm: the graph that Dynamo captured. It is not modified.
        example_inputs: one per placeholder, parameters included.
        options: see `Fp8Options`.
        mode: as ``torch.compile``'s.

    Returns:
        A callable that takes what ``gm`` takes.

    Raises:
        Fp8Error: one of the errors of `fp8_compile.errors`; ``torch.compile`` raises it inside a
            ``BackendCompilerFailed``.
    """
    opts = parse_options(options, mode)
    lora.watch_merges()
    # Without a device behind them, as with fake weights, there is nothing to ask.
    asked = any(isinstance(x, Tensor) and x.is_cuda and not isinstance(x, FakeTensor) for x in example_inputs)
    given = {node.name: value for node, value in zip(_placeholders(gm), example_inputs, strict=True)}
    earlier = {name: value.reason for name, value in given.items() if isinstance(value, KeptWeight)}
    for scheme in dict.fromkeys(value.scheme for value in given.values() if isinstance(value, QuantizedWeight)):
        check_agreement(opts, scheme)
    context = Context(gm, opts, scheme_for(opts), refusal if asked else None, earlier)
    rewritten = rewrite(context, partial(tracing.trace_graph, options=opts))
    plan = context.plan
    tracing.trace_plan(plan, opts)
    _check_patterns(gm, plan)
    # Of a model that was quantized at load time, `quantize_` has said it, of the whole model.
    if plan.decisions and not plan.quantized and (opts.strict or not earlier):
        complain_of_nothing(plan.reasons(), "this graph", strict=opts.strict, stacklevel=2)
    if plan.quantized:
        _check_inputs(gm, plan, example_inputs)

    inputs = [given.get(node.name, example(node)) for node in _placeholders(rewritten)]
    compiled = compile_inner(rewritten, inputs, context)
    if not any(d.weight is not None and d.tracked for d in plan.decisions):
        return compiled  # nothing to bind, and nothing that a report could be asked for
    return BoundGraph(
        compiled,
        GraphRecord(plan, tuple(context.results), str(torch._guards.CompileContext.current_compile_id())),
        context.constants,
        arguments=list(given),
        kept_arguments=[node.name for node in _placeholders(rewritten) if node.name in given],
    )


def _placeholders(gm: GraphModule) -> list[torch.fx.Node]:
    return gm.graph.find_nodes(op="placeholder")


def _check_inputs(gm: GraphModule, plan: Plan, example_inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        raise GradientError(
            "gradients are enabled and an input or parameter of the graph requires them, but FP8 layers are for "
            "inference only: call the model under torch.no_grad() or torch.inference_mode()"
        )
    weights = {d.weight for d in plan.quantized}
    for device in {example(node).device for node in _placeholders(gm) if node.name in weights}:
        check_device(device)


# Patterns that matched in some graph, by the list that they belong to: a model may be compiled in several kinds of
# blocks, and a pattern is meant for all of them together.
_matched: dict[tuple[str, ...], set[str]] = {}


def _check_patterns(gm: GraphModule, plan: Plan) -> None:
    matched = _matched.setdefault(plan.ignored_layers, set())
    matched.update(set(plan.ignored_layers) - set(plan.unmatched_patterns))
    if not plan.decisions:
        return
    compile_reason = getattr(gm, "compile_subgraph_reason", None)
    partial_region = compile_reason is not None and compile_reason.graph_break
    elsewhere = [p for p in plan.unmatched_patterns if p in matched or partial_region]
    for pattern in elsewhere:
        logger.info("ignored_layers: %r matched no linear of this graph; another one has it, or may have it", pattern)
    warn_of_unmatched(
        [p for p in plan.unmatched_patterns if p not in elsewhere],
        [d.path for d in plan.decisions],
        "this graph; fp8_compile.report(model) shows what it matched in the whole model",
        whole_model=False,
        stacklevel=2,
    )


def _reset() -> None:
    _matched.clear()
    forget_all()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


# torch.compiler.reset() calls this attribute of a backend.
fp8_diffusion.reset = _reset  # type: ignore[attr-defined]
