"""The ``torch.compile`` backend: options, passes, the inner compiler, the bound callable."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from . import tracing
from .checks import (
    check_agreement,
    complain_of_nothing,
    parse_options,
    warn_of_no_recipe,
    warn_of_unmatched,
    warn_of_unused_scales,
)
from .device import check_device, refusal
from .errors import GradientError, OptionError, PatternError, RecompileLimitWarning
from .inductor import dynamo
from .inductor.failed import forgets_guards
from .inductor.inner import compile_inner
from .options import RECOMMENDED, Fp8Options
from .passes.context import Context, Plan
from .passes.graphs import example
from .passes.pipeline import rewrite
from .runtime.binder import BoundGraph
from .runtime.constants import LOCK, GraphRecord, forget_all
from .weights import eligible, lora, marks
from .weights.eligible import UNNAMED
from .weights.layers import Layer, Namer, Tree, is_matrix, tree_of
from .weights.quantized_weight import QuantizedWeight

logger = logging.getLogger(__name__)


@forgets_guards
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
    namer = Namer(dynamo.sources(gm), dynamo.bases(gm))
    matrices = {name: value for name, value in given.items() if isinstance(value, nn.Parameter) and is_matrix(value)}
    with LOCK:
        layers, roots = namer.find(matrices, anew=True)
    of_weights = {name: value.scheme for name, value in given.items() if isinstance(value, QuantizedWeight)}
    entries = {name: eligible.entry_of(layers.get(name, Layer()), opts) for name in of_weights}
    for scheme, entry in dict.fromkeys((scheme, entries[name]) for name, scheme in of_weights.items()):
        check_agreement(opts, scheme, entry)
    context = Context(gm, opts, refusal if asked else None, layers)
    rewritten = rewrite(context, partial(tracing.trace_graph, options=opts))
    plan = context.plan
    eligible.check_calibrated([d.path for d in plan.quantized if d.needs_scale])
    tracing.trace_plan(plan, opts)
    with LOCK:
        _complain(plan, layers.values(), roots, opts)
    if plan.quantized or context.attention_kernels:
        _check_inputs(gm, plan, example_inputs)
    notes = tuple(filter(None, [kernel.prepare() for kernel in context.attention_kernels] if asked else ()))

    inputs = [given.get(node.name, example(node)) for node in _placeholders(rewritten)]
    compiled = compile_inner(rewritten, inputs, context)
    if not any(d.weight is not None and (d.tracked or d.verdict is not None) for d in plan.decisions):
        return compiled  # nothing to bind, and nothing that a report could be asked for
    with LOCK:
        for root in roots:
            marks.mark(root, opts, anew=True)
        _guard(gm, plan, given, opts)
    compile_id = str(torch._guards.CompileContext.current_compile_id())
    return BoundGraph(
        compiled,
        gm,
        GraphRecord(plan, tuple(context.results), compile_id, _warn_of_the_last(dynamo.last_graph()), notes),
        context,
        arguments=list(given),
        kept_arguments=[node.name for node in _placeholders(rewritten) if node.name in given],
        namer=namer,
        check=partial(_check_unchanged, options, mode, opts),
    )


def _check_unchanged(given: Fp8Options | Mapping[str, Any] | None, mode: str | None, options: Fp8Options) -> None:
    """Refuse a dict that was written into since a graph was compiled by it: to Dynamo, it is the same dict.

    Raises:
        OptionError: it says something else now.
    """
    if isinstance(given, Mapping) and parse_options(given, mode) != options:
        raise OptionError(
            "the dict of options was changed after a graph was compiled with it, and torch takes it for the same: give "
            "each model a dict of its own"
        )


def _guard(gm: GraphModule, plan: Plan, given: Mapping[str, Any], options: Fp8Options) -> None:
    """Keep the graph from modules whose layers are marked otherwise."""
    nodes, verdicts = {node.name: node for node in _placeholders(gm)}, marks.verdicts(options)
    for d in plan.decisions:
        if d.weight is not None and d.verdict is not None:
            # It may bear the other mark: from another root that owns it, or if none does.
            holder, leaf = dynamo.holder(nodes[d.weight]) or (given[d.weight], "")
            marks.put(holder, options, leaf, d.verdict)
            for other in verdicts - {d.verdict}:
                dynamo.guard_absence(nodes[d.weight], partial(marks.name_of, options, verdict=other))
    for a in plan.attentions:
        if a.weight is not None and a.verdict is not None:
            holder, leaf = dynamo.holder(nodes[a.weight]) or (given[a.weight], "")
            marks.put(holder, options, marks.attention_leaf(leaf, a.above), a.verdict)
            other = marks.STAYS if a.verdict == marks.CONVERTS else marks.CONVERTS
            name = partial(_attention_mark, options, above=a.above, verdict=other)
            dynamo.guard_absence(nodes[a.weight], name)


def _attention_mark(options: Fp8Options, leaf: str, above: int, verdict: str) -> str:
    return marks.name_of(options, marks.attention_leaf(leaf, above), verdict)


def _placeholders(gm: GraphModule) -> list[torch.fx.Node]:
    return gm.graph.find_nodes(op="placeholder")


def _check_inputs(gm: GraphModule, plan: Plan, example_inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        raise GradientError(
            "gradients are enabled and an input or parameter of the graph requires them, but FP8 layers are for "
            "inference only: call the model under torch.no_grad() or torch.inference_mode()"
        )
    schemes = {d.weight: d.scheme for d in plan.quantized if d.scheme is not None}
    weights = [node for node in _placeholders(gm) if node.name in schemes]
    for device, scheme in {(example(node).device, schemes[node.name]) for node in weights}:
        check_device(device, scheme)


def _complain(plan: Plan, layers: Collection[Layer], roots: Sequence[nn.Module], options: Fp8Options) -> None:
    """Complain of patterns that match nothing, of layers without a name, of a graph in which nothing was converted.

    Args:
        roots: the outermost modules that are running.
    """
    if plan.attentions and all(a.kernel is None and a.pattern is None for a in plan.attentions):
        reasons = Counter(a.reason for a in plan.attentions)
        what = f"attentions of this graph (attention={options.attention!r})"
        # No error under strict: another graph may well have an attention without a mask.
        complain_of_nothing(reasons, what, strict=False, stacklevel=4)
    if not plan.decisions:
        return
    trees = [tree_of(root) for root in roots]
    if RECOMMENDED in options.ignored_layers and not any(tree.has_recipe for tree in trees):
        warn_of_no_recipe([type(root).__name__ for root in roots], stacklevel=4)
    names = [name for tree in trees for name in tree.names]
    others = [name for tree in trees for name in tree.others]
    if options.fp8_attention:
        others += [name for tree in trees for name in tree.attentions]
    of_graph = [name for d in plan.decisions for name in (d.path, d.within)]
    of_graph += [name for a in plan.attentions for name in (a.path, a.within)]
    unmatched = options.unmatched([*names, *others] or of_graph)
    warn_of_unmatched(
        {pattern: option for pattern, option in unmatched.items() if pattern in plan.unmatched_patterns},
        names or of_graph,
        "this model" if names else "this graph",
        count=sum(tree.count for tree in trees) if names else len(plan.decisions),
        stacklevel=4,
    )
    warn_of_unused_scales(options, [*names, *others], "this model", stacklevel=4)
    unnamed = [d.within or d.node for d in plan.decisions if d.reason.startswith(UNNAMED)]
    if unnamed and options.strict:
        pattern, option = next(iter(options.patterns.items()))
        raise PatternError(pattern, f"nothing names the layers of {', '.join(unnamed)}", option)
    if plan.quantized or (any(d.verdict == marks.STAYS for d in plan.decisions) and _others_convert(trees, options)):
        return
    # Of a model that was quantized at load time, `quantize_` has said it, of the whole model.
    if options.strict or not any(layer.recorded for layer in layers):
        complain_of_nothing(plan.reasons(), "linears of this graph", strict=options.strict, stacklevel=4)


def _others_convert(trees: Iterable[Tree], options: Fp8Options) -> bool:
    """Whether a graph that leaves everything as it is, as it was asked to, is but a part of what is running."""
    return any(
        eligible.kept_by_name(tree.layer(module, leaf), options) is None
        for tree in trees
        for module, leaf in tree.matrices()
        if isinstance(module, nn.Linear)
    )


def _warn_of_the_last(found: tuple[CodeType, int] | None) -> str:
    """Warn where Dynamo will compile no further graph; returns what a report says of layers that are in none."""
    if found is None:
        return ""
    code, limit = found
    where = f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"
    warnings.warn(
        f"Dynamo has compiled {limit} graphs of {where}, and will compile no more: layers that none of them fits run "
        "in high precision. Raise torch._dynamo.config.recompile_limit",
        RecompileLimitWarning,
        stacklevel=4,
    )
    return f"Dynamo's recompile_limit of {limit} was reached in {where}"


def _reset() -> None:
    forget_all()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


# torch.compiler.reset() calls this attribute of a backend.
fp8_diffusion.reset = _reset  # type: ignore[attr-defined]
