"""Host time that the bound call adds to the compiled code of one Qwen-Image block (14 linears, all converted).

Method: the inner backend's compiled function only returns its last argument, so that nothing but host work is left.
``bound`` is the object that the backend returned, called with the very arguments that Dynamo passes to it; ``inner`` is
that function, called with the arguments that ``bound`` assembles for it. Each round times ``--calls`` calls of either,
one right after the other:

    added = median over rounds of (bound - inner) / calls

Rounds are short and many, so that on a shared machine some pass undisturbed. What those say is

    least = (least of bound - least of inner) / calls

Three cases: one block again and again; ``--blocks`` blocks of one graph in turn, as in a transformer; and one block
whose weights were made in inference mode, which have no version counters. For scale, the same block compiled by a
backend that does nothing (Dynamo's guards and calling code, and the module around them), and by ``fp8_diffusion`` over
that backend; with BF16 weights, and with weights converted at load time, whose schemes Dynamo's guards compare.

And the time that a block's first call takes to find out which layers its weights belong to. ``--blocks`` converted
blocks are in one module, so that there are no constants to make. Of all blocks but the first: the first call, less a
later one.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fp8_compile import quantize_

from .common import Spread, call_of, interleave, parser, qwen_image, ratio_of_medians, table, write

TARGET = 5e-6
BIND_TARGET = 1e-3
LINEARS = 14
Function = Callable[..., Any]
Arguments = tuple[Any, ...]

# Where `inner` and the bound object's caller note their arguments, while anyone wants to know them.
_inner_sink: list[Arguments] | None = None


def inner(*args: Any) -> Any:
    """A compiled block without its work; the graph of a Qwen-Image block has two outputs."""
    if _inner_sink is not None:
        _inner_sink.append(args)
    return args[-1], args[-1]


def do_nothing(gm: GraphModule, example_inputs: Sequence[Any]) -> Function:
    """A backend."""
    return inner


def fp8_over_nothing(gm: GraphModule, example_inputs: Sequence[Any]) -> Function:
    """A backend: ``fp8_diffusion`` with every linear converted, over `do_nothing`."""

    def compile_inner(rewritten: GraphModule, inputs: Sequence[Any]) -> Function:
        converted = sum(getattr(node.target, "__name__", "") == "scaled_linear" for node in rewritten.graph.nodes)
        if converted != LINEARS:
            raise RuntimeError(f"{converted} linears were converted, not {LINEARS}")
        return inner

    options = {"min_features": 64, "min_m": 1, "strict": True, "inner_backend": compile_inner}
    return torch._dynamo.lookup_backend("fp8_diffusion")(gm, example_inputs, options=options)


def capture(
    blocks: Sequence[nn.Module], args: Arguments, kwargs: dict[str, Any]
) -> tuple[Function, list[Any], list[Any]]:
    """Run ``blocks`` through one graph.

    Returns:
        The object that the backend returned; for each block the arguments it got from Dynamo; those it gave to `inner`.
    """
    global _inner_sink
    torch.compiler.reset()
    bound: list[Function] = []
    outer: list[Arguments] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Function:
        bound.append(fp8_over_nothing(gm, example_inputs))

        def call(*given: Any) -> Any:
            outer.append(given)
            return bound[0](*given)

        return call

    compiled = [torch.compile(block, backend=backend, fullgraph=True) for block in blocks]
    for _ in range(3):  # the first call makes the constants, the second settles them
        outer.clear()
        _inner_sink = []
        for block in compiled:
            block(*args, **kwargs)
    assembled, _inner_sink = _inner_sink, None
    if len(bound) != 1 or len(outer) != len(blocks) or len(assembled) != len(blocks):
        raise RuntimeError(f"{len(blocks)} blocks made {len(bound)} graphs, {len(outer)} calls")
    return bound[0], outer, assembled


def seconds_per_call(function: Function, arguments: Sequence[Arguments]) -> float:
    """The mean time of ``function(*args)`` over ``arguments``."""
    start = time.perf_counter()
    for args in arguments:
        function(*args)
    return (time.perf_counter() - start) / len(arguments)


def seconds_per_block(block: Function, args: Arguments, kwargs: dict[str, Any], calls: int) -> float:
    """The mean time of ``block(*args, **kwargs)``."""
    start = time.perf_counter()
    for _ in range(calls):
        block(*args, **kwargs)
    return (time.perf_counter() - start) / calls


def measure_bound(
    blocks: Sequence[nn.Module], args: Arguments, kwargs: dict[str, Any], calls: int, rounds: int
) -> dict[str, Any]:
    """One case: seconds per call of ``bound``, of ``inner``, and what the first adds to the second."""
    bound, outer, assembled = capture(blocks, args, kwargs)
    repeats = -(-calls // len(blocks))
    cases = {
        "bound": partial(seconds_per_call, bound, outer * repeats),
        "inner": partial(seconds_per_call, inner, assembled * repeats),
    }
    interleave(cases, 2)  # warm
    measured = interleave(cases, rounds)
    added = Spread.of([b - i for b, i in zip(measured["bound"], measured["inner"], strict=True)])
    least = min(measured["bound"]) - min(measured["inner"])
    return {
        "blocks": len(blocks),
        "arguments": len(outer[0]),
        "inner_arguments": len(assembled[0]),
        "bound_s": Spread.of(measured["bound"]),
        "inner_s": Spread.of(measured["inner"]),
        "added_s": added,
        "least_s": least,
        "least_per_linear_s": least / LINEARS,
        "met": {"median": added.median <= TARGET, "least": least <= TARGET},
        "rounds": measured,
    }


def measure_dynamo(
    block: nn.Module, in_fp8: nn.Module, args: Arguments, kwargs: dict[str, Any], calls: int, rounds: int
) -> dict[str, Any]:
    """Seconds per call of the compiled block: Dynamo alone, and with ``fp8_diffusion`` in between.

    Args:
        in_fp8: what is called with ``fp8_diffusion``: the same block, or one whose weights are quantized already.
    """
    torch.compiler.reset()
    compiled = {
        "dynamo": torch.compile(block, backend=do_nothing, fullgraph=True),
        "dynamo+bound": torch.compile(in_fp8, backend=fp8_over_nothing, fullgraph=True),
    }
    cases = {name: partial(seconds_per_block, f, args, kwargs, calls) for name, f in compiled.items()}
    interleave(cases, 2)
    measured = interleave(cases, rounds)
    added = [b - d for b, d in zip(measured["dynamo+bound"], measured["dynamo"], strict=True)]
    return {
        "dynamo_s": Spread.of(measured["dynamo"]),
        "dynamo_bound_s": Spread.of(measured["dynamo+bound"]),
        "added_s": Spread.of(added),
        "least_s": min(measured["dynamo+bound"]) - min(measured["dynamo"]),
        "ratio": ratio_of_medians(measured["dynamo+bound"], measured["dynamo"]),
        "rounds": measured,
    }


class _Timed(nn.Module):
    """Runs its blocks one after the other, and notes how long each took."""

    def __init__(self, blocks: Sequence[nn.Module], args: Arguments, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.call = args, kwargs

    def forward(self) -> list[float]:
        args, kwargs = self.call
        return [seconds_per_block(block, args, kwargs, 1) for block in self.blocks]


def measure_binding(blocks: Sequence[nn.Module], args: Arguments, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Seconds that the first call of a block takes longer than a later one, in a graph that others have run before."""
    torch.compiler.reset()
    model = _Timed(blocks, args, kwargs)
    quantize_(model, {"min_features": 64})
    for block in blocks:
        block.compile(backend=fp8_over_nothing, fullgraph=True)
    first, _, later = model(), model(), model()
    added = Spread.of([one - other for one, other in zip(first[1:], later[1:], strict=True)])
    return {"blocks": len(blocks), "added_s": added, "target_s": BIND_TARGET, "met": added.median <= BIND_TARGET}


def run(blocks: int, calls: int, rounds: int) -> dict[str, Any]:
    """All cases."""

    def build() -> tuple[list[nn.Module], Arguments, dict[str, Any]]:
        model, inputs = qwen_image(blocks)
        found = list(model.transformer_blocks)  # type: ignore[arg-type]
        return found, *call_of(model, inputs, found[0])

    with torch.no_grad():
        found, args, kwargs = build()
        cases = {
            "one block": measure_bound(found[:1], args, kwargs, calls, rounds),
            f"{blocks} blocks in turn": measure_bound(found, args, kwargs, calls, rounds),
        }
        dynamo = {"through Dynamo": measure_dynamo(found[0], found[0], args, kwargs, calls // 4, rounds)}
        converted = copy.deepcopy(found[0])
        quantize_(converted, {"min_features": 64})
        dynamo["..., converted at load time"] = measure_dynamo(found[0], converted, args, kwargs, calls // 4, rounds)
        binding = measure_binding(*build())
    with torch.inference_mode():
        found, args, kwargs = build()
        cases["made in inference mode"] = measure_bound(found[:1], args, kwargs, calls, rounds)
    return {
        "target_s": TARGET,
        "linears": LINEARS,
        "calls": calls,
        "cases": cases,
        "dynamo": dynamo,
        "binding": binding,
    }


def show(results: dict[str, Any]) -> str:
    """The results as a table, in microseconds."""

    def us(spread: Spread) -> str:
        return spread.text(1e6)

    def verdicts(met: dict[str, bool]) -> list[str]:
        return ["yes" if met[by] else "NO" for by in ("median", "least")]

    rows = [
        [name, us(c["bound_s"]), us(c["inner_s"]), us(c["added_s"]), f"{c['least_s'] * 1e6:.2f}", *verdicts(c["met"])]
        for name, c in results["cases"].items()
    ]
    rows += [
        [name, us(d["dynamo_bound_s"]), us(d["dynamo_s"]), us(d["added_s"]), f"{d['least_s'] * 1e6:.2f}", "", ""]
        for name, d in results["dynamo"].items()
    ]
    header = [
        "us per call: median [quartiles]",
        "with fp8",
        "without",
        "added",
        "least",
        f"median <= {TARGET * 1e6:g}",
        "least",
    ]
    ratios = ", ".join(f"{name}: {d['ratio']:.3f}x" for name, d in results["dynamo"].items())
    binding = results["binding"]
    return (
        f"{table(header, rows)}\n{results['linears']} linears; Dynamo's own time per call, {ratios}\n"
        f"first call of a further block: {binding['added_s'].text(1e6)} us more than a later one "
        f"(target {binding['target_s'] * 1e6:g}: {'met' if binding['met'] else 'NOT met'})"
    )


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--blocks", type=int, default=60)
    p.add_argument("--calls", type=int, default=600, help="per round and side")
    p.add_argument("--rounds", type=int, default=200)
    given = p.parse_args()
    results = run(given.blocks, given.calls, given.rounds)
    print(show(results))
    write(given.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
