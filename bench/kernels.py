"""What the generated kernels of a block do on a GPU that need not be there: registers, spills, instructions, time.

Method: `bench.lower` gives the source of a block's kernels. Each is compiled by Triton and its ptxas for the GPU's
architecture, in every configuration that Inductor would try, without a driver, and the machine code is read:

* registers and spilled bytes of a thread, as ptxas tells them; resident warps that follow from them;
* widths of the global loads and stores of a thread, and instructions that a thread executes for an element. In a loop
  they count as often as it runs; where ptxas has unrolled it, its trips are fewer by as much. Both sides of a branch
  count, and instructions that a predicate switches off;
* microseconds: the largest of the times that the memory and each unit of the multiprocessors need. Memory: Inductor's
  count of the kernel's bytes over the bandwidth of `bench.fake_gpu.Gpu`. Units: warp instructions over what a
  multiprocessor starts in a clock (the table "Throughput of Native Arithmetic Instructions" of the CUDA C++ Programming
  Guide; for 9.0: 128 float32 operations, 64 comparisons, selections, logic and conversions, 16 special functions; at
  most 4 warp instructions of all kinds) and the clock of `CLOCK`.

Of each kernel's configurations, the fastest by the model without spills stands for it, since Inductor times them and
takes the fastest; if all spill, the fastest.

Beside the generated kernels stand those of libraries, each at the larger of its bytes over the bandwidth and its FLOPs
over a rate: matmuls at the ceilings of `bench.fake_gpu.Gpu`, attention at `ATTENTION`, the eager rest at its bytes. A
block's time is the sum of all, one after the other, without gaps between launches.

This is a model of the code, not a measurement.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from .blocks import BLOCKS
from .common import parser, table, write
from .fake_gpu import GPUS, FakeGpuError, Gpu, fake_gpu, in_8_bits
from .lower import BACKENDS, Kernel, Lowered, lower, options

# Boost clocks of the data sheets' SXM cards, in Hz; those of the 4090 and 5090 are their reference boost.
CLOCK = {
    "h100": 1.755e9,
    "h200": 1.755e9,
    "b200": 1.85e9,
    "rtx4090": 2.52e9,
    "rtx5090": 2.407e9,
    "a100": 1.41e9,
    "rtx3090": 1.695e9,
}
ARCHITECTURE = {
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 9): "sm_89",
    (9, 0): "sm_90a",
    (10, 0): "sm_100a",
    (12, 0): "sm_120a",
}
# Bytes of shared memory in a multiprocessor: "Technical Specifications per Compute Capability" of the same guide.
SHARED = {
    (8, 0): 164 << 10,
    (8, 6): 100 << 10,
    (8, 9): 100 << 10,
    (9, 0): 228 << 10,
    (10, 0): 228 << 10,
    (12, 0): 100 << 10,
}
REGISTERS = 65536
# FlashAttention 2, which torch calls, reaches 35 % of an H100's dense peak (arXiv:2407.08608, abstract). Elsewhere the
# ceiling of BF16 matmuls stands for it.
ATTENTION = {"h100": 0.35 * 989e12, "h200": 0.35 * 989e12}

# Clocks for which a warp instruction occupies its unit in one of the four partitions of a multiprocessor: 32 lanes over
# a quarter of the guide's figure.
_UNITS: dict[str, tuple[int, frozenset[str]]] = {
    "float32": (1, frozenset({"FADD", "FMUL", "FFMA", "IMAD", "HFMA2", "HADD2", "HMUL2"})),
    "logic": (
        2,
        frozenset(
            [
                "FSETP",
                "FSEL",
                "SEL",
                "LOP3",
                "PRMT",
                "IADD3",
                "SHF",
                "ISETP",
                "FMNMX",
                "VIADD",
                "LEA",
                "PLOP3",
                "IMNMX",
                "VIMNMX",
                "VIADDMNMX",
                "P2R",
                "R2P",
                "MOV",
                "FSET",
                "FCHK",
                "BREV",
                "IABS",
                "SGXT",
                "VOTE",
            ]
        ),
    ),
    "conversion": (2, frozenset({"F2FP", "I2FP", "F2F", "I2F", "F2I"})),
    "special": (8, frozenset({"MUFU"})),
    "shared": (4, frozenset({"SHFL", "LDS", "STS", "LDSM", "STSM"})),
}

_KERNEL = re.compile(r"^(\w+) = async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.S | re.M)
_CALL = re.compile(r"^\s*(triton_\w+)\.run\((.*?), stream=", re.M)
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfus](\d+)\b")


@dataclass(frozen=True)
class Configuration:
    """One kernel, compiled in one of the ways that Inductor would try.

    Attributes:
        blocks: its block sizes, and how many warps run one.
        spilled: bytes that a thread stores for want of registers.
        shared: bytes of shared memory of a thread block.
        warps: resident in a multiprocessor.
        loads, stores: widths in bytes of a thread's global accesses, with how many there are in the code.
        instructions: that a thread executes for each element.
        units: microseconds that each unit takes, and "issue" for all instructions.
    """

    blocks: dict[str, int]
    registers: int
    spilled: int
    shared: int
    warps: int
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: float
    units: dict[str, float]


@dataclass(frozen=True)
class Generated:
    """One launch of a kernel.

    Attributes:
        elements: what it is launched over: all dimensions.
        bytes: that it moves, as Inductor counts.
        memory_us: these over the bandwidth; the floor of its time.
    """

    name: str
    operators: str
    elements: int
    bytes: int
    memory_us: float
    configurations: tuple[Configuration, ...]

    @property
    def best(self) -> Configuration:
        """The fastest configuration by the model, without spills if there is one."""
        whole = [c for c in self.configurations if c.spilled == 0] or list(self.configurations)
        return min(whole, key=lambda c: max(c.units.values()))

    @property
    def us(self) -> float:
        return max(self.memory_us, *self.best.units.values())

    @property
    def bound(self) -> str:
        """What the time is spent on: "memory", or a unit."""
        return max({"memory": self.memory_us, **self.best.units}.items(), key=lambda item: item[1])[0]


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        kernels: the generated ones, in their order.
        matmul_us, attention_us, rest_us: microseconds by the model of the kernels that libraries bring.
        in_8_bits: share of the matmuls' FLOPs that are of FP8 or int8 operands; what stays in BF16 is in the rest.
    """

    model: str
    backend: str
    device: str
    kernels: tuple[Generated, ...] = field(repr=False)
    matmul_us: float
    attention_us: float
    rest_us: float
    in_8_bits: float

    @property
    def generated_us(self) -> float:
        return sum(kernel.us for kernel in self.kernels)

    @property
    def memory_us(self) -> float:
        """Of the generated kernels: the least that their bytes take."""
        return sum(kernel.memory_us for kernel in self.kernels)

    @property
    def us(self) -> float:
        return self.generated_us + self.matmul_us + self.attention_us + self.rest_us


def compile_block(lowered: Lowered) -> Block:
    """Compile all generated kernels of ``lowered``.

    Raises:
        FakeGpuError: the generated code is not as expected.
    """
    gpu = GPUS[lowered.device]
    calls = _CALL.findall(lowered.code)
    nodes = lowered.of_kind("triton")
    if len(calls) != len(nodes):
        raise FakeGpuError(f"{len(nodes)} nodes of the schedule became {len(calls)} launches; expected one each")
    sources = {name: source for name, _, source in _KERNEL.findall(lowered.code)}
    compiled: dict[tuple[str, tuple[int, ...]], tuple[Configuration, ...]] = {}
    kernels = []
    with fake_gpu(gpu), _no_driver(), tempfile.TemporaryDirectory() as folder:
        for (name, arguments), node in zip(calls, nodes, strict=True):
            sizes = tuple(int(part) for part in re.split(r",\s*(?![^()]*\))", arguments) if part.isdigit())
            key = name, sizes
            if key not in compiled:
                tuner = _load(name, sources[name], Path(folder))
                compiled[key] = tuple(
                    _compile(tuner, config, sizes, gpu, lowered.device, Path(folder)) for config in tuner.configs
                )
            memory_us = 1e6 * node.bytes / gpu.bandwidth
            kernels.append(Generated(name, node.name, math.prod(sizes), node.bytes, memory_us, compiled[key]))
    matmul, attention, rest = (
        sum(_library_us(k, lowered.device) for k in lowered.of_kind(kind)) for kind in ("matmul", "attention", "eager")
    )
    matmuls = lowered.of_kind("matmul")
    share = sum(k.flops for k in matmuls if in_8_bits(k.dtypes)) / sum(k.flops for k in matmuls)
    return Block(lowered.model, lowered.backend, lowered.device, tuple(kernels), matmul, attention, rest, share)


def attention_instructions(lowered: Lowered) -> tuple[str, ...]:
    """The instructions by which the kernel of ``flex_attention`` in ``lowered`` multiplies, as in PTX.

    Raises:
        FakeGpuError: there is no such kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sources = {name: source for name, _, source in _KERNEL.findall(lowered.code) if "flex_attention" in name}
    if not sources:
        raise FakeGpuError(f"{lowered.model}: no kernel of flex_attention was generated")
    gpu, found = GPUS[lowered.device], set()
    major, minor = gpu.capability
    with fake_gpu(gpu), _no_driver(), tempfile.TemporaryDirectory() as folder:
        for name, source in sources.items():
            tuner = _load(name, source, Path(folder))
            for config in tuner.configs:
                meta = tuner._create_compile_meta(config)
                given = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
                options = tuner._create_compile_options(config, meta)
                binary = triton.compile(given, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)
                found |= set(re.findall(r"\bw?g?mma\.\S*sync\.aligned\.\S+e4m3\S*", binary.asm["ptx"]))
    return tuple(sorted(found))


def _library_us(kernel: Kernel, device: str) -> float:
    gpu = GPUS[device]
    rate = gpu.flops(kernel.dtypes)
    if kernel.kind == "attention":
        rate = ATTENTION.get(device, rate)
    return 1e6 * max(kernel.bytes / gpu.bandwidth, kernel.flops / rate)


@contextlib.contextmanager
def _no_driver() -> Iterator[None]:
    import torch._inductor.runtime.triton_helpers as helpers

    with mock.patch.object(helpers, "set_driver_to_gpu", return_value=None):
        yield


def _load(name: str, source: str, folder: Path) -> Any:
    """The autotuner of a kernel, from its source."""
    path = folder / f"{name[:100]}.py"
    path.write_text(source.replace("\\'\\'\\'", "'''").replace("\\\\", "\\"))
    spec = importlib.util.spec_from_file_location(f"_kernel_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Triton reads the source of its functions by their module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return getattr(module, name)


def _compile(tuner: Any, config: Any, sizes: tuple[int, ...], gpu: Gpu, device: str, folder: Path) -> Configuration:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    meta = tuner._create_compile_meta(config)
    options = tuner._create_compile_options(config, meta)
    source = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    major, minor = gpu.capability
    binary = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)
    ptx = binary.asm["ptx"]
    registers, spilled, shared, code = _assemble(ptx, gpu, folder)
    shared = max(shared, binary.metadata.shared)
    loads, stores = _accesses(ptx)
    blocks = {**config.kwargs, "warps": config.num_warps}
    rows, row = sizes[0], sizes[1] if len(sizes) > 1 else 1
    trips = -(-row // config.kwargs["R0_BLOCK"]) if "R0_BLOCK" in config.kwargs else 1
    grid = -(-rows // config.kwargs.get("XBLOCK", 1))
    weighted = _executed(code, trips, ptx)
    warps = grid * config.num_warps
    partitions = 4 * gpu.processors * CLOCK[device]
    total = sum(weighted.values())
    units = {"issue": total}
    for unit, (clocks, names) in _UNITS.items():
        units[unit] = clocks * sum(count for name, count in weighted.items() if name in names)
    return Configuration(
        blocks=blocks,
        registers=registers,
        spilled=spilled,
        shared=shared,
        warps=_resident(registers, config.num_warps, shared, gpu),
        loads=dict(loads),
        stores=dict(stores),
        instructions=total * warps * 32 / math.prod(sizes),
        units={unit: 1e6 * clocks * warps / partitions for unit, clocks in units.items()},
    )


def _assemble(ptx: str, gpu: Gpu, folder: Path) -> tuple[int, int, int, str]:
    """Registers, spilled bytes and shared memory as ptxas tells them, and the machine code as text."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = tools / ("ptxas" if gpu.capability[0] < 10 else "ptxas-blackwell")
    (folder / "kernel.ptx").write_text(ptx)
    cubin = folder / "kernel.cubin"
    arguments = ["-v", f"--gpu-name={ARCHITECTURE[gpu.capability]}", str(folder / "kernel.ptx"), "-o", str(cubin)]
    done = subprocess.run([ptxas, *arguments], capture_output=True, text=True, check=True)
    output = done.stdout + done.stderr
    used = re.search(r"Used (\d+) registers", output)
    if used is None:
        raise FakeGpuError(f"ptxas does not tell the registers: {output}")
    spilled, shared = re.search(r"(\d+) bytes spill stores", output), re.search(r"(\d+) bytes smem", output)
    code = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    return int(used[1]), int(spilled[1]) if spilled else 0, int(shared[1]) if shared else 0, code


def _accesses(ptx: str) -> tuple[Counter[int], Counter[int]]:
    """Widths of the global loads and stores."""
    widths: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    for kind, vector, bits in _PTX_ACCESS.findall(ptx):
        widths[kind][int(bits) // 8 * int(vector or 1)] += 1
    return widths["ld"], widths["st"]


def _executed(code: str, trips: int, ptx: str) -> dict[str, float]:
    """How often a thread executes each instruction.

    Args:
        code: of nvdisasm.
        trips: of each loop over a row, as Triton wrote it.
        ptx: what it was assembled from, before loops were unrolled.
    """
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append((found[1], found[2]))
    while instructions and instructions[-1][0] in ("NOP", "BRA"):  # behind the end
        instructions.pop()
    times = [1.0] * len(instructions)
    loops = [
        (labels[target[1]], i)
        for i, (name, operands) in enumerate(instructions)
        if name.startswith("BRA")
        and (target := re.search(r"(\.L_x_\d+)", operands))
        and labels.get(target[1], len(instructions)) <= i
    ]
    if trips > 1:
        written = _loads_in_loops(ptx)
        inside = {
            loop: sum(instructions[i][0].startswith("LDG") for i in range(loop[0], loop[1] + 1)) for loop in loops
        }
        # ptxas makes of one loop a long one, unrolled, and a short one for what is left; the long one does the work.
        for (first, last), loads in sorted(inside.items(), key=lambda item: -item[1])[: len(written)]:
            unrolled = max(1.0, loads / max(1, min(written, key=lambda count: loads % max(1, count))))
            for i in range(first, last + 1):
                times[i] = max(1.0, trips / unrolled)
    executed: defaultdict[str, float] = defaultdict(float)
    for (name, _), count in zip(instructions, times, strict=True):
        executed[name.split(".")[0]] += count
    return executed


def _loads_in_loops(ptx: str) -> list[int]:
    """Of each loop of ``ptx``, how many global loads are in it."""
    lines = ptx.splitlines()
    labels = {line.strip().split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L__BB")}
    found = []
    for i, line in enumerate(lines):
        target = re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)", line)
        if target and labels.get(target[1], len(lines)) <= i:
            body = "\n".join(lines[labels[target[1]] : i])
            found.append(sum(kind == "ld" for kind, _, _ in _PTX_ACCESS.findall(body)))
    return found


def _resident(registers: int, warps: int, shared: int, gpu: Gpu) -> int:
    """Warps of so many registers a thread, in blocks of ``warps``, that a multiprocessor holds at a time."""
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // of_warp // warps
    by_threads = gpu.threads // (32 * warps)
    by_shared = SHARED[gpu.capability] // (shared + 1024)
    return warps * max(0, min(by_registers, by_threads, by_shared, 32))


def show(block: Block) -> str:
    """A row for each launch, and the sum."""

    def widths(counts: dict[int, int]) -> str:
        return " ".join(f"{width}x{count}" for width, count in sorted(counts.items(), reverse=True))

    rows = []
    for kernel in block.kernels:
        best = kernel.best
        spills = [c.spilled for c in kernel.configurations]
        rows.append(
            [
                kernel.operators[-60:],
                " ".join(map(str, best.blocks.values())),
                f"{best.registers}",
                f"{best.spilled}" if min(spills) == max(spills) else f"{best.spilled} ({min(spills)}-{max(spills)})",
                f"{best.warps}",
                f"{best.shared}",
                widths(best.loads),
                widths(best.stores),
                f"{best.instructions:.1f}",
                kernel.bound,
                f"{kernel.us:.1f}",
                f"{kernel.memory_us:.1f}",
            ]
        )
    header = ["", "blocks, warps", "registers", "spilled", "warps", "shared", "loads", "stores", "instr/el", "bound"]
    title = f"{block.model}, {block.backend}, {block.device}"
    return (
        f"{title}\n{table([*header, 'us', 'floor'], rows)}\n"
        f"{title}: generated {block.generated_us:.1f} us by the model, floor {block.memory_us:.1f} us, "
        f"{len(block.kernels)} launches; matmuls {block.matmul_us:.1f}, attention {block.attention_us:.1f}, "
        f"rest {block.rest_us:.1f}; together {block.us:.1f}"
    )


def sums(blocks: Sequence[Block]) -> str:
    """A row for each block, with its speed against that of the first backend on the same model and device."""
    rows = []
    for block in blocks:
        first = next(b for b in blocks if (b.model, b.device) == (block.model, block.device))
        parts = (block.matmul_us, block.attention_us, block.generated_us, block.rest_us, block.us)
        figures = [f"{block.in_8_bits:.0%}", *(f"{us:,.0f}" for us in parts), f"{first.us / block.us:.2f}x"]
        rows.append([f"{block.model}, {block.backend}, {block.device}", *figures])
    header = ["us by the model", "in 8 bits", "matmuls", "attention", "generated", "rest", "all", "speed"]
    return table(header, rows)


def main() -> None:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--model", nargs="+", choices=sorted(BLOCKS), default=["qwen-image"])
    made.add_argument("--tokens", type=int, default=4096, help="image tokens; the model's text tokens come on top")
    made.add_argument("--backend", nargs="+", choices=BACKENDS, default=["fp8_diffusion"])
    made.add_argument("--options", type=options, default={}, help="JSON, torch.compile's options for fp8_diffusion")
    made.add_argument("--device", nargs="+", choices=sorted(GPUS), default=["h200"])
    args = made.parse_args()
    blocks = []
    for device, model, backend in itertools.product(args.device, args.model, args.backend):
        given = args.options if backend == "fp8_diffusion" else {}
        try:
            blocks.append(compile_block(lower(model, args.tokens, backend, given, device)))
        except FakeGpuError as error:
            sys.exit(f"bench.kernels: {error}")
        print(show(blocks[-1]), end="\n\n", flush=True)
    print(sums(blocks))
    write(
        args.output,
        {
            "results": [
                asdict(block)
                | {"us": block.us, "generated_us": block.generated_us, "memory_us": block.memory_us}
                | {"kernels": [asdict(k) | {"us": k.us, "bound": k.bound} for k in block.kernels]}
                for block in blocks
            ]
        },
    )


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
