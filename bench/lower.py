"""What one real-size transformer block becomes on a GPU that need not be there.

Method: a block of diffusers, made of fake tensors, is compiled by ``torch.compile`` for a fake GPU (`bench.fake_gpu`)
up to the source of its kernels, and Inductor's schedule is read:

* launches: calls of Triton kernels in the generated source;
* bytes: Inductor's own count, ``GraphLowering.count_bytes``: what the nodes of the schedule read and write, kernels of
  libraries (matmuls, attention) included, each tensor once per kernel. It has two flaws, kept so that figures compare:
  eager views (``view_as_complex``) are in it though they move nothing ("views" says how much of it they are, and that
  depends on the version of torch), and a fused kernel that reads a slice counts for the whole tensor. A tensor that one
  kernel both stores and loads again is not in it; "round trips" shows those;
* eager: calls of aten that are neither matmul nor attention, because Inductor generates no code for them;
* 8-bit tensors: for each activation that FP8 or int8 matmuls read, how many tensors hold its quantized values, and its
  scales (of FP8; those of int8 are read by what follows the matmul, and not counted). Activations count as one if they
  are computed by the same operators from the same tensors;
* row loops: kernels that go over their rows in a loop, not as a whole: where a value is needed twice, as a quantized
  activation is for its amax and its cast, such a kernel loads and computes it twice;
* round trips: activations stored in BF16 (or wider) only to be read by their quantization to FP8, be it in the same
  kernel;
* copies: tensors whose kernel only moves values (a new layout, a concatenation of what is already in memory);
* roofline: the sum over all kernels of ``max(bytes / bandwidth, FLOPs / rate)`` under the ceilings of
  `bench.fake_gpu.Gpu`, one kernel after the other, caches unused, launches free. FLOPs are those of matmuls and
  attention. Of attention only the products are counted, by the dtype of its operands; kernels of attention stay further
  below the ceilings than matmuls do, since they compute exponentials between them.

The figures are a model of the code, not measurements; `max-autotune` is out of its reach, since it runs kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from .blocks import BLOCKS, make
from .common import parser, table, write
from .fake_gpu import GPUS, FakeGpuError, Gpu, fake_gpu, lower_to_code
from .models import quantize_with_torchao

BACKENDS = ("fp8_diffusion", "inductor", "torchao-row", "torchao-tensor")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
QUANTIZED = (*FP8, torch.int8)

_MATMULS = re.compile(
    r"\b(mm|addmm|bias_addmm|bmm|baddbmm|_scaled_mm|_scaled_mm_v2|_int_mm|_grouped_mm|_scaled_grouped_mm)\b"
)
# What a loop may consist of that computes no value: loads, stores, and the choice between them in a concatenation.
_COPYING = {
    "load",
    "store",
    "output",
    "get_index",
    "index_expr",
    "constant",
    "lt",
    "ge",
    "and_",
    "where",
    "masked",
}
_LOOP = re.compile(r"^@triton_heuristics\.reduction\(", re.MULTILINE)
_TRITON_CALL = re.compile(r"^\s*(triton_\w+)\.run\(", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """One node of Inductor's schedule that becomes work.

    Attributes:
        kind: "triton", "matmul", "attention", "eager" or "view" (an eager call that moves no data).
        name: the called function, or the operators of a Triton kernel.
        shape: ``[M, N, K]`` of a matmul.
        dtypes: of a matmul, operands and result.
    """

    kind: str
    name: str
    bytes: int
    flops: int = 0
    shape: tuple[int, ...] = ()
    dtypes: str = ""


@dataclass(frozen=True)
class Activation:
    """A quantized activation: its shape, and how many matmuls, 8-bit tensors and scale tensors it has."""

    shape: tuple[int, ...]
    matmuls: int
    tensors: int
    scales: int


@dataclass(frozen=True)
class RoundTrip:
    """A tensor that is stored only for its quantization to read it; ``inside`` one kernel or between two."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    inside: bool
    bytes: int


@dataclass(frozen=True)
class Lowered:
    """One block as it was lowered; bytes in all, seconds in all; ``attention_s`` are those of attention alone."""

    model: str
    tokens: int
    backend: str
    options: dict[str, Any]
    device: str
    launches: int
    bytes: int
    view_bytes: int
    kernels: tuple[Kernel, ...]
    attention_s: float
    activations: tuple[Activation, ...]
    fp8_tensors: int
    row_loops: int
    round_trips: tuple[RoundTrip, ...]
    copies: tuple[Kernel, ...]
    roofline_s: float
    memory_s: float
    code: str = field(repr=False, default="")

    def of_kind(self, kind: str) -> list[Kernel]:
        return [k for k in self.kernels if k.kind == kind]

    @property
    def matmuls(self) -> Counter[str]:
        """How many matmuls there are of each combination of dtypes."""
        return Counter(k.dtypes for k in self.of_kind("matmul"))

    @property
    def fallbacks(self) -> Counter[str]:
        return Counter(k.name for kind in ("eager", "view") for k in self.of_kind(kind))

    @property
    def round_trip_bytes(self) -> int:
        return sum(trip.bytes for trip in self.round_trips)


def lower(
    model: str,
    tokens: int,
    backend: str,
    options: dict[str, Any] | None = None,
    device: str = "h200",
    *,
    flash3: bool = False,
) -> Lowered:
    """Lower one block.

    Args:
        model: one of `bench.blocks.BLOCKS`.
        tokens: image tokens; the model's text tokens come on top.
        backend: one of `BACKENDS`.
        options: of ``torch.compile``, as its ``options``.
        device: one of `bench.fake_gpu.GPUS`.
        flash3: as if the package flash_attn_interface were installed.

    Raises:
        FakeGpuError: the installation lacks something, or is not one that this was tested with.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    gpu = GPUS[device]
    options = dict(options or {})
    found: dict[str, Any] = {}

    def inspect(graph: Any, code: str) -> None:
        found.update(_read(graph, code, gpu))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
        with fake_gpu(gpu, flash3=flash3), FakeTensorMode(), torch.no_grad():
            block, arguments = make(model, tokens)
            compiled = _compile(block, backend, options)
            lower_to_code(compiled, (), arguments, inspect)
    return Lowered(model, tokens, backend, options, device, **found)


def _compile(block: torch.nn.Module, backend: str, options: dict[str, Any]) -> Any:
    if backend == "fp8_diffusion":
        from fp8_compile.backend import fp8_diffusion

        return torch.compile(block, backend=fp8_diffusion, fullgraph=True, dynamic=False, options=options)
    if backend.startswith("torchao-"):
        try:
            quantize_with_torchao(block, backend.removeprefix("torchao-"))
        except ImportError as error:
            raise FakeGpuError(f"torchao is not installed (pip install torchao): {error}") from error
    return torch.compile(block, backend="inductor", fullgraph=True, dynamic=False, options=options)


def _read(graph: Any, code: str, gpu: Gpu) -> dict[str, Any]:
    """Everything of `Lowered` that the schedule tells; called while ``graph`` is Inductor's current one."""
    kernels = [k for node in graph.scheduler.nodes for k in _kernel(node)]
    activations, fp8_tensors = _activations(graph)
    return {
        "launches": len(_TRITON_CALL.findall(code)),
        "bytes": sum(node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes),
        "view_bytes": sum(k.bytes for k in kernels if k.kind == "view"),
        "kernels": tuple(kernels),
        "attention_s": sum(max(_memory_s(k, gpu), _compute_s(k, gpu)) for k in kernels if k.kind == "attention"),
        "activations": activations,
        "fp8_tensors": fp8_tensors,
        "row_loops": len(_LOOP.findall(code)),
        "round_trips": tuple(_round_trips(graph)),
        "copies": tuple(_copies(graph)),
        "roofline_s": sum(max(_memory_s(k, gpu), _compute_s(k, gpu)) for k in kernels),
        "memory_s": sum(_memory_s(k, gpu) for k in kernels),
        "code": code,
    }


def _memory_s(kernel: Kernel, gpu: Gpu) -> float:
    return 0.0 if kernel.kind == "view" else kernel.bytes / gpu.bandwidth


def _compute_s(kernel: Kernel, gpu: Gpu) -> float:
    return kernel.flops / gpu.flops(kernel.dtypes)


def _kernel(node: Any) -> Iterator[Kernel]:
    """What a node of the schedule becomes; nothing for an output of another node or a buffer without a kernel."""
    from torch._inductor import ir
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    moved = node.get_read_write_buffers_sizes()
    if isinstance(node, NopKernelSchedulerNode):
        return
    templates = [leaf.node for leaf in node.get_nodes() if isinstance(leaf.node, ir.TritonTemplateBuffer)]
    for template in templates:
        if any("flex_attention" in str(origin.target) for origin in _origins(template)):
            yield _attention(template, "flex_attention", moved)
            return
    if not isinstance(node, ExternKernelSchedulerNode):
        operators = dict.fromkeys(_operator(origin) for leaf in node.get_nodes() for origin in _origins(leaf.node))
        yield Kernel("triton", " ".join(operators), moved)
        return
    call = node.node
    if isinstance(call, ir.MultiOutput):
        return
    name = (getattr(call, "python_kernel_name", None) or str(getattr(call, "op_overload", call))).split(".", 1)[-1]
    name = name.removeprefix("ops.aten.").removesuffix(".default")
    if _MATMULS.search(name):
        yield _matmul(call, name, moved)
    elif "attention" in name or "flash" in name:
        yield _attention(call, name, moved)
    else:
        target = getattr(call, "op_overload", None)
        view = isinstance(target, torch._ops.OpOverload) and target.is_view
        yield Kernel("view" if view else "eager", name, moved)


def _attention(call: Any, name: str, moved: int) -> Kernel:
    q, k, v = (_sizes(x) for x in call.inputs[:3])
    flops = 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    return Kernel("attention", name, moved, flops, dtypes=str(call.inputs[0].get_dtype()).removeprefix("torch."))


def _matmul(call: Any, name: str, moved: int) -> Kernel:
    operands = call.inputs[1:3] if name.startswith(("addmm", "bias_addmm", "baddbmm")) else call.inputs[:2]
    left, right = (_sizes(x) for x in operands)
    dtypes = [str(x.get_dtype()).removeprefix("torch.") for x in (operands[0], call)]
    shape = (*left[:-1], right[-1], left[-1])
    return Kernel("matmul", name, moved, 2 * prod(shape), shape, " -> ".join(dtypes))


def _sizes(value: Any) -> list[int]:
    from torch._inductor.virtualized import V

    sizevars = V.graph.sizevars
    hint = getattr(sizevars, "optimization_hint", None) or sizevars.size_hint
    return [int(hint(size)) for size in value.get_size()]


def _origins(buffer: Any) -> list[Node]:
    return sorted(getattr(buffer, "origins", ()), key=lambda node: node.name)


def _operator(node: Node) -> str:
    return str(getattr(node.target, "_opname", node.target))


def _activations(graph: Any) -> tuple[tuple[Activation, ...], int]:
    """The quantized activations, and how many 8-bit tensors all kernels write."""
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    keys: dict[Any, int] = {}
    known: dict[Node, int] = {}

    def identity(node: Node) -> int:
        """Equal for nodes that compute the same: there is no elimination of common subexpressions on these graphs."""
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [x for x in top.all_input_nodes if x not in known]
            if top in known or not missing:
                stack.pop()
                if top not in known:
                    arguments = torch.fx.map_arg((top.args, tuple(sorted(top.kwargs.items()))), lambda x: known[x])
                    key = (top.op, str(top.target), top.name if top.op == "placeholder" else str(arguments))
                    known[top] = keys.setdefault(key, len(keys))
            else:
                stack.extend(missing)
        return known[node]

    shapes: dict[int, tuple[int, ...]] = {}
    found: dict[int, tuple[list[Node], set[str], set[str]]] = {}
    for scheduled in graph.scheduler.nodes:
        call = scheduled.node if isinstance(scheduled, ExternKernelSchedulerNode) else None
        if call is None or not _is_quantized_matmul(str(getattr(call, "python_kernel_name", ""))):
            continue
        nodes = (call.get_origin_node(), *_origins(call))
        origin = next(n for n in nodes if n is not None and _is_quantized_matmul(n.name))
        made = origin.args[0]
        while isinstance(made, Node) and made.args and isinstance(made.args[0], Node) and _is_quantized(made.args[0]):
            made = made.args[0]
        key = identity(made)
        shapes[key] = tuple(int(size) for size in made.meta["val"].shape)
        matmuls, tensors, scales = found.setdefault(key, ([], set(), set()))
        matmuls.append(origin)
        tensors.add(call.inputs[0].get_name())
        scales.update(scale.get_name() for scale in call.inputs[2:3])
    written = sum(
        buffer.node.get_dtype() in QUANTIZED and buffer.get_name() not in graph.removed_buffers
        for leaf in _leaves(graph)
        for buffer in leaf.get_outputs()
        if _has_dtype(buffer.node)
    )
    rows = (Activation(shapes[k], len(m), len(t), len(s)) for k, (m, t, s) in found.items())
    return tuple(rows), written


def _is_quantized(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in QUANTIZED


def _is_quantized_matmul(name: str) -> bool:
    return any(kernel in name for kernel in ("_scaled_mm", "_scaled_grouped_mm", "_int_mm"))


def _has_dtype(buffer: Any) -> bool:
    from torch._inductor import ir

    return buffer is not None and not isinstance(buffer.layout, (ir.MultiOutputLayout, ir.NoneLayout))


def _leaves(graph: Any) -> list[Any]:
    return [leaf for node in graph.scheduler.nodes for leaf in node.get_nodes()]


def _generated(leaf: Any) -> bool:
    """Whether Inductor generates the loop of ``leaf``."""
    from torch._inductor import ir

    return isinstance(leaf.node, ir.ComputedBuffer)


def _round_trips(graph: Any) -> Iterator[RoundTrip]:
    scheduler = graph.scheduler
    owner = {leaf.get_name(): node for node in scheduler.nodes for leaf in node.get_nodes()}
    wanted = _feeding_quantization(graph)
    for leaf in _leaves(graph):
        if not _generated(leaf) or leaf.is_reduction():
            continue
        for buffer in leaf.get_outputs():
            node, name = buffer.node, buffer.get_name()
            shape = tuple(_sizes(node))
            users = [user.node for user in buffer.users if not user.is_weak]
            if name in graph.removed_buffers or not node.get_dtype().is_floating_point or node.get_dtype() in FP8:
                continue
            if not users or any(user.get_name() not in wanted for user in users):
                continue
            # Amax and cast must both be among the readers, or the tensor is no more than a scale.
            if not any(user.is_reduction() for user in users) or prod(shape) < 2 * shape[-1]:
                continue
            here = owner[leaf.get_name()]
            readers = {id(owner[user.get_name()]) for user in users if owner[user.get_name()] is not here}
            size = prod(shape) * node.get_dtype().itemsize
            # Within its own kernel it is loaded again wherever another loop needs it, once at least.
            reads = len(readers) or 1
            dtype = str(node.get_dtype()).removeprefix("torch.")
            yield RoundTrip(name, shape, dtype, not readers, size * (1 + reads))


def _feeding_quantization(graph: Any) -> set[str]:
    """Names of the nodes that write FP8, or a reduction over which FP8 is written (an amax and what follows it)."""
    leaves = {leaf.get_name(): leaf for leaf in _leaves(graph) if _generated(leaf)}
    names = {name for name, leaf in leaves.items() if leaf.node.get_dtype() in FP8}
    small: dict[str, bool] = {}

    def only_for_scales(leaf: Any) -> bool:
        name = leaf.get_name()
        if name not in small:
            small[name] = False
            users = [user.node.get_name() for buffer in leaf.get_outputs() for user in buffer.users]
            reduced = leaf.is_reduction() or prod(_sizes(leaf.node)) <= max(_sizes(leaf.node), default=1) * 32
            small[name] = reduced and all(
                user in names
                or "_scaled_mm" in str(getattr(_node(graph, user), "python_kernel_name", ""))
                or (user in leaves and only_for_scales(leaves[user]))
                for user in users
            )
        return small[name]

    return names | {name for name, leaf in leaves.items() if only_for_scales(leaf)}


def _node(graph: Any, name: str) -> Any:
    scheduled = graph.scheduler.name_to_node.get(name)
    return None if scheduled is None else scheduled.node


def _copies(graph: Any) -> Iterator[Kernel]:
    for leaf in _leaves(graph):
        body = getattr(leaf, "_body", None)
        if body is None or not _generated(leaf) or leaf.get_outputs()[0].get_name() in graph.removed_buffers:
            continue
        if set(body.op_counts) <= _COPYING:
            dtype = leaf.node.get_dtype()
            size = prod(_sizes(leaf.node)) * dtype.itemsize
            operators = " ".join(dict.fromkeys(_operator(origin) for origin in _origins(leaf.node)))
            yield Kernel("copy", f"{str(dtype).removeprefix('torch.')} {operators}", size)


def summary(result: Lowered) -> dict[str, str]:
    """The figures of one block by the name of their row."""
    gpu = GPUS[result.device]
    matmuls = ", ".join(f"{count} {dtypes}" for dtypes, count in sorted(result.matmuls.items()))
    fallbacks = ", ".join(f"{count} {name}" for name, count in sorted(result.fallbacks.items()))
    per_activation = [a.tensors for a in result.activations]
    scales = [a.scales for a in result.activations]
    inside = sum(t.inside for t in result.round_trips)
    return {
        "Triton launches": str(result.launches),
        "bytes (MB, Inductor's count)": f"{result.bytes / 1e6:,.0f}",
        "  of which views (MB)": f"{result.view_bytes / 1e6:,.0f}",
        "matmuls": matmuls,
        "attention": ", ".join(f"{k.name} {k.dtypes}" for k in result.of_kind("attention")),
        "eager calls": fallbacks or "none",
        "quantized activations": str(len(result.activations)),
        "8-bit tensors per activation, at most": str(max(per_activation, default=0)),
        "8-bit tensors written": str(result.fp8_tensors),
        "scale tensors per activation, at most": str(max(scales, default=0)),
        "row loops": str(result.row_loops),
        "round trips before quantization": f"{len(result.round_trips)} ({inside} inside a kernel)",
        "  their bytes (MB)": f"{result.round_trip_bytes / 1e6:,.0f}",
        "copies": f"{len(result.copies)}, {sum(k.bytes for k in result.copies) / 1e6:,.0f} MB written",
        "matmul and attention (TFLOP)": f"{sum(k.flops for k in result.kernels) / 1e12:.3f}",
        "memory alone (us)": f"{result.memory_s * 1e6:,.0f}",
        f"roofline (us, {gpu.name})": f"{result.roofline_s * 1e6:,.0f}",
        "  of which attention (us)": f"{result.attention_s * 1e6:,.0f}",
    }


def show(results: Sequence[Lowered]) -> str:
    """The results side by side, one table for each model."""
    parts = []
    for model in dict.fromkeys(r.model for r in results):
        columns = [(r.backend + " *" * bool(r.options), summary(r)) for r in results if r.model == model]
        names = list(dict.fromkeys(name for _, column in columns for name in column))
        tokens = f"{results[0].tokens} + {BLOCKS[model].text} tokens"
        rows = [[name, *(column.get(name, "") for _, column in columns)] for name in names]
        parts.append(table([f"{model}, {tokens}", *(backend for backend, _ in columns)], rows))
    return "\n\n".join(parts)


def show_kernels(result: Lowered) -> str:
    """Every kernel of one result, in order, with its bytes."""
    rows = [
        [f"{k.kind} {k.name[:70]}", "x".join(map(str, k.shape)), k.dtypes, f"{k.bytes / 1e6:.1f}"]
        for k in result.kernels
    ]
    return table([f"{result.model} {result.backend}", "M x N x K", "dtypes", "MB"], rows)


def _ceilings(gpu: Gpu) -> str:
    return (
        f"ceilings of {gpu.name}: {gpu.bf16_flops / 1e12:.0f} TFLOP/s BF16, {gpu.fp8_flops / 1e12:.0f} FP8, "
        f"{gpu.bandwidth / 1e12:.2f} TB/s\n  {gpu.source}"
    )


def options(text: str) -> dict[str, Any]:
    """The value of ``--options``."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(given, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return given


def main() -> None:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--model", nargs="+", choices=sorted(BLOCKS), default=["qwen-image"])
    made.add_argument("--tokens", type=int, default=4096, help="image tokens; the model's text tokens come on top")
    made.add_argument("--backend", choices=BACKENDS, default="fp8_diffusion")
    made.add_argument("--diff", choices=BACKENDS, nargs="+", default=[], help="other backends, shown beside the first")
    made.add_argument("--options", type=options, default={}, help="JSON, torch.compile's options for --backend")
    made.add_argument("--device", choices=sorted(GPUS), default="h200")
    made.add_argument("--flash3", action="store_true", help="as if the package flash_attn_interface were installed")
    made.add_argument("--kernels", action="store_true", help="list every kernel as well")
    made.add_argument("--code", type=Path, help="where the generated code of --backend goes")
    args = made.parse_args()
    if args.code is not None and len(args.model) > 1:
        made.error("--code takes the code of one model")

    cases = [(args.backend, args.options), *((other, {}) for other in args.diff)]
    try:
        results = [
            lower(m, args.tokens, b, options, args.device, flash3=args.flash3)
            for m in args.model
            for b, options in cases
        ]
    except FakeGpuError as error:
        sys.exit(f"bench.lower: {error}")
    print(show(results))
    if args.kernels:
        print("", *map(show_kernels, results), sep="\n\n")
    if args.options:
        print(f"* with {json.dumps(args.options)}")
    print(_ceilings(GPUS[args.device]))
    if args.code is not None:
        args.code.write_text(results[0].code)
    write(args.output, {"results": [_plain(r) for r in results]})


def _plain(result: Lowered) -> dict[str, Any]:
    return {key: value for key, value in asdict(result).items() if key != "code"} | {
        "matmuls": result.matmuls,
        "fallbacks": result.fallbacks,
        "round_trip_bytes": result.round_trip_bytes,
    }


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
