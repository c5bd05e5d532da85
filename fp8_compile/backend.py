"""The ``torch.compile`` backend: options, passes, the inner compiler, the bound callable."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from . import tracing
from .device import check_device, refusal
from .errors import (
    GradientError,
    NothingConvertedError,
    NothingConvertedWarning,
    OptionError,
    UnmatchedPatternWarning,
)
from .inductor.inner import compile_inner
from .options import Fp8Options
from .passes.graphs import example
from .passes.pipeline import rewrite
from .passes.plan import Plan, plan_linears
from .patterns import check_unmatched
from .runtime.binder import BoundGraph, GraphRecord, forget_all
from .schemes.fp8 import scheme_for
from .weights import lora
from .weights.quantized_weight import Fp8Weight, KeptWeight

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
    opts = Fp8Options.parse(options, mode)
    lora.watch_merges()
    # Without a device behind them, as with fake weights, there is nothing to ask.
    asked = any(isinstance(x, Tensor) and x.is_cuda and not isinstance(x, FakeTensor) for x in example_inputs)
    given = {node.name: value for node, value in zip(_placeholders(gm), example_inputs, strict=True)}
    kept_at_load = {name: value.reason for name, value in given.items() if isinstance(value, KeptWeight)}
    _check_granularity(given.values(), opts)
    plan = plan_linears(gm, opts, scheme_for(opts), refusal if asked else None, kept_at_load)
    tracing.trace_plan(plan, opts)
    _check_patterns(gm, plan)
    if opts.strict or not kept_at_load:  # else `quantize_` has said it, of the whole model
        _check_conversion(plan, opts)
    if plan.converted:
        _check_inputs(gm, plan, example_inputs)

    trace = partial(tracing.trace_graph, options=opts)
    rewritten, constants = rewrite(gm, plan, trace, opts.disabled_passes)
    inputs = [given.get(node.name, example(node)) for node in _placeholders(rewritten)]
    compiled = compile_inner(rewritten, inputs, opts)
    if not any(d.weight is not None and d.tracked for d in plan.decisions):
        return compiled  # nothing to bind, and nothing that a report could be asked for
    return BoundGraph(
        compiled,
        GraphRecord(plan, str(torch._guards.CompileContext.current_compile_id())),
        constants,
        arguments=list(given),
        kept_arguments=[node.name for node in _placeholders(rewritten) if node.name in given],
    )


def _placeholders(gm: GraphModule) -> list[torch.fx.Node]:
    return gm.graph.find_nodes(op="placeholder")


def _check_granularity(given: Iterable[Any], options: Fp8Options) -> None:
    """Refuse a granularity that weights in FP8 do not have; the default asks for none, since they bring their own."""
    if options.granularity == Fp8Options.granularity:
        return
    for value in given:
        if isinstance(value, Fp8Weight) and value.granularity != options.granularity:
            raise OptionError(
                f"granularity={options.granularity!r}: the weights were converted at load time with "
                f"granularity={value.granularity!r}; leave the option out, or load them anew with it"
            )


def _check_inputs(gm: GraphModule, plan: Plan, example_inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        raise GradientError(
            "gradients are enabled and an input or parameter of the graph requires them, but FP8 layers are for "
            "inference only: call the model under torch.no_grad() or torch.inference_mode()"
        )
    weights = {d.weight for d in plan.converted}
    for device in {example(node).device for node in _placeholders(gm) if node.name in weights}:
        check_device(device)


def _check_conversion(plan: Plan, options: Fp8Options) -> None:
    if not plan.decisions or plan.converted:
        return
    counted = "; ".join(f"{count} x {reason}" for reason, count in plan.reasons().most_common())
    message = f"none of the {len(plan.decisions)} linears of this graph became FP8: {counted}"
    if options.strict:
        raise NothingConvertedError(message)
    warnings.warn(message, NothingConvertedWarning, stacklevel=2)


# Patterns that matched in some graph, by the list that they belong to: a model may be compiled in several kinds of
# blocks, and a pattern is meant for all of them together.
_matched: dict[tuple[str, ...], set[str]] = {}


def _check_patterns(gm: GraphModule, plan: Plan) -> None:
    matched = _matched.setdefault(plan.ignored_layers, set())
    matched.update(set(plan.ignored_layers) - set(plan.unmatched_patterns))
    if not plan.decisions:
        return
    paths = [d.path for d in plan.decisions]
    reason = getattr(gm, "compile_subgraph_reason", None)
    partial = reason is not None and reason.graph_break
    for pattern in plan.unmatched_patterns:
        if pattern in matched or partial:
            logger.info(
                "ignored_layers: %r matched no linear of this graph; another one has it, or may have it", pattern
            )
            continue
        check_unmatched(pattern, paths)
        warnings.warn(
            f"ignored_layers: {pattern!r} matched none of the {len(paths)} linears of this graph; "
            "fp8_compile.report(model) shows what it matched in the whole model",
            UnmatchedPatternWarning,
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
