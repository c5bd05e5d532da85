"""A CUDA device that answers every question of torch's compiler and runs nothing.

Within `fake_gpu`, Dynamo, AOTAutograd and Inductor compile fake tensors of a GPU that this machine need not have. What
they ask of a device, from its name to its number of multiprocessors, is answered from `GPUS`. Inductor stops at the
source of its kernels, which `lower_to_code` hands out; nothing is compiled or launched.

It works with a CUDA build of torch without a driver, and with the CPU build plus Triton's wheel. Every replacement of
an internal of torch is in this file, beside its reason, and holds for the versions in `TESTED` only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

TESTED = ("2.11", "2.13", "2.15")
"""Versions of torch whose internals are as this file expects."""

TRITON = {"2.11": "3.6.0", "2.13": "3.7.1", "2.15": "3.9.0"}
"""The version of Triton that each version of torch asks for (metadata of its CUDA wheel)."""

T = TypeVar("T")


class FakeGpuError(RuntimeError):
    """This installation cannot stand in for a GPU; the message says what is missing."""


@dataclass(frozen=True)
class Gpu:
    """What the compiler asks of a GPU, and the ceilings of its roofline.

    The ceilings are what well-shaped kernels reach, not the datasheet's peaks: for the H200, 790 of 989 TFLOP/s (80 %)
    and 4.3 of 4.8 TB/s (90 %). The same fractions of the dense peaks give the ceilings of FP8 and of the other GPUs.

    Attributes:
        capability: compute capability.
        processors: streaming multiprocessors.
        threads: resident threads per multiprocessor.
        shared: shared memory that one block may ask for, in bytes.
        l2: level-2 cache, in bytes.
        bf16_flops: BF16 ceiling with float32 accumulation, FLOP/s.
        fp8_flops: FP8 ceiling with float32 accumulation, FLOP/s.
        bandwidth: ceiling of device memory, bytes/s.
        source: where the peaks come from.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    threads: int
    shared: int
    l2: int
    memory: int
    bf16_flops: float
    fp8_flops: float
    bandwidth: float
    source: str

    def flops(self, dtypes: str) -> float:
        """The ceiling of a matmul whose first operand is of the dtype that ``dtypes`` begins with, FLOP/s.

        Int8 counts as FP8, as in the data sheets of H100, H200 and B200. GeForce cards, whose FP8 is halved by
        accumulation in float32, multiply int8 faster than this says.
        """
        return self.fp8_flops if in_8_bits(dtypes) else self.bf16_flops


def in_8_bits(dtypes: str) -> bool:
    """Whether a matmul of these dtypes, as in `Gpu.flops`, multiplies FP8 or int8."""
    return dtypes.startswith(("float8", "int8"))


GPUS = {
    "h100": Gpu(
        name="NVIDIA H100",
        capability=(9, 0),
        processors=132,
        threads=2048,
        shared=232448,
        l2=50 << 20,
        memory=80 * 10**9,
        bf16_flops=790e12,
        fp8_flops=1580e12,
        bandwidth=3.0e12,
        source="https://www.nvidia.com/en-us/data-center/h100/: 1979 TFLOP/s BF16 and 3958 FP8, both sparse (dense is "
        "half), 3.35 TB/s, of the SXM card",
    ),
    "h200": Gpu(
        name="NVIDIA H200",
        capability=(9, 0),
        processors=132,
        threads=2048,
        shared=232448,
        l2=60 << 20,
        memory=141 * 10**9,
        bf16_flops=790e12,
        fp8_flops=1580e12,
        bandwidth=4.3e12,
        source="https://www.nvidia.com/en-us/data-center/h200/: 1979 TFLOP/s BF16 and 3958 FP8, both sparse (dense is "
        "half), 4.8 TB/s. DeepGEMM reports up to 1550 TFLOP/s of FP8 on the same chip: "
        "https://github.com/deepseek-ai/DeepGEMM",
    ),
    "b200": Gpu(
        name="NVIDIA B200",
        capability=(10, 0),
        processors=148,
        threads=2048,
        shared=232448,
        l2=126 << 20,
        memory=180 * 10**9,
        bf16_flops=1800e12,
        fp8_flops=3600e12,
        bandwidth=7.2e12,
        source="https://www.nvidia.com/en-us/data-center/dgx-b200/: 72 PFLOP/s of sparse FP8 and 64 TB/s for eight "
        "GPUs, BF16 at half the rate of FP8",
    ),
    "a100": Gpu(
        name="NVIDIA A100",
        capability=(8, 0),
        processors=108,
        threads=2048,
        shared=166912,
        l2=40 << 20,
        memory=80 * 10**9,
        bf16_flops=250e12,
        fp8_flops=499e12,
        bandwidth=1.83e12,
        source="https://www.nvidia.com/en-us/data-center/a100/: 312 TFLOP/s BF16, dense, 624 TOP/s int8 (no FP8), "
        "2,039 GB/s, of the 80 GB SXM card",
    ),
    "rtx3090": Gpu(
        name="NVIDIA GeForce RTX 3090",
        capability=(8, 6),
        processors=82,
        threads=1536,
        shared=101376,
        l2=6 << 20,
        memory=24 * 10**9,
        bf16_flops=57e12,
        fp8_flops=227e12,
        bandwidth=0.842e12,
        source="https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf, "
        "appendix A: 71 TFLOP/s BF16 with float32 accumulation, 284 TOP/s int8, both dense (no FP8), 936 GB/s",
    ),
    "rtx4090": Gpu(
        name="NVIDIA GeForce RTX 4090",
        capability=(8, 9),
        processors=128,
        threads=1536,
        shared=101376,
        l2=72 << 20,
        memory=24 * 10**9,
        bf16_flops=132e12,
        fp8_flops=264e12,
        bandwidth=0.907e12,
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf, appendix A: "
        "165.2 TFLOP/s BF16 and 330.3 FP8, both dense with float32 accumulation, 1008 GB/s",
    ),
    "rtx5090": Gpu(
        name="NVIDIA GeForce RTX 5090",
        capability=(12, 0),
        processors=170,
        threads=1536,
        shared=101376,
        l2=96 << 20,
        memory=32 * 10**9,
        bf16_flops=168e12,
        fp8_flops=335e12,
        bandwidth=1.61e12,
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
        ", appendix: 209.5 TFLOP/s BF16 and 419 FP8, both dense with float32 accumulation, 1792 GB/s",
    ),
}


def check_installation() -> None:
    """Refuse an installation for which the replacements below are not known to hold.

    Raises:
        FakeGpuError: the version of torch is not in `TESTED`, or Triton is missing.
    """
    release = ".".join(torch.__version__.split(".")[:2])
    if release not in TESTED:
        raise FakeGpuError(
            f"torch {torch.__version__}: bench/fake_gpu.py replaces internals of torch and was tested with "
            f"{', '.join(TESTED)} only. Add the version to TESTED there and run tests/bench/test_lower.py."
        )
    if importlib.util.find_spec("triton") is None:
        raise FakeGpuError(
            f"Triton is not installed, and Inductor writes no GPU code without it; with torch {release}: "
            f"pip install triton=={TRITON[release]}"
        )


@contextlib.contextmanager
def fake_gpu(gpu: Gpu, *, flash3: bool = False) -> Iterator[None]:
    """Compile for ``gpu`` within this context. Best in a process of its own: torch caches what a device answers.

    Args:
        flash3: as if FlashAttention 3 were installed. Its kernels are called by an operator of torch's own.

    Raises:
        FakeGpuError: see `check_installation`.
    """
    check_installation()
    with contextlib.ExitStack() as stack:
        for replacement in (
            _patterns(),
            _sums(),
            *_device_queries(gpu),
            *_initialization(),
            *_settings(),
            _flash_attention(),
        ):
            stack.enter_context(replacement)
        if flash3:
            from fp8_compile.attention import flash3 as asked

            stack.enter_context(_replaced(asked, "PACKAGE", "torch"))  # some package that is there
        if not torch.backends.cuda.is_built():
            stack.enter_context(_unguarded_methods())
        stack.enter_context(_triton_driver(gpu))
        _forget()
        try:
            yield
        finally:
            _forget()
            torch._dynamo.reset()


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` within this context; a plain function, since Dynamo traces some of them."""
    before = getattr(owner, name)
    own = vars(owner).get(name)  # as it is stored: staticmethod and all
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before if own is None else own)


def _patterns() -> Any:
    """Inductor's patterns, traced now, for the CPU: for a device that seems to be there it would use real tensors.

    Only those of attention depend on the device, and `_flash_attention` leaves them nothing to match.
    """
    from torch._inductor.fx_passes import joint_graph, post_grad

    joint_graph.lazy_init(torch.device("cpu"))
    post_grad.lazy_init()
    return _replaced(joint_graph, "lazy_init", lambda *args, **kwargs: None)


def _sums() -> Any:
    """Inductor's patterns without that for sums of constants.

    It forgets their dtype, so that stock cannot compile experts (https://github.com/pytorch/pytorch/issues/189518).
    """
    from torch._inductor.fx_passes.post_grad import pass_patterns

    found = pass_patterns[1]
    others = {key: entries for key, entries in found.patterns.items() if key[1] is not torch.ops.aten.cumsum.default}
    return _replaced(found, "patterns", defaultdict(list, others))


def _device_queries(gpu: Gpu) -> Iterator[Any]:
    properties = SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.memory,
        multi_processor_count=gpu.processors,
        max_threads_per_multi_processor=gpu.threads,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=gpu.shared,
        shared_memory_per_multiprocessor=gpu.shared + 1024,
        L2_cache_size=gpu.l2,
        warp_size=32,
        gcnArchName="",
    )
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: gpu.name,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
    }
    # A build without CUDA has no version of it, and torchao refuses such a one.
    yield _replaced(torch.version, "cuda", torch.version.cuda or "12.8")
    from torch._dynamo.device_interface import CudaInterface

    for name, answer in answers.items():
        yield _replaced(torch.cuda, name, answer)
        # The interface took these functions over when it was defined.
        if name in vars(CudaInterface):
            yield _replaced(CudaInterface, name, staticmethod(answer))
    # It would import Triton's compiled driver; that Triton is there was checked.
    yield _replaced(CudaInterface, "raise_if_triton_unavailable", staticmethod(lambda device=None: None))
    # The properties are kept per process, filled by a query of the driver or by an earlier fake GPU.
    yield _replaced(CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: properties))
    yield _replaced(CudaInterface.Worker, "current_device", staticmethod(lambda: 0))


def _initialization() -> Iterator[Any]:
    """What would start CUDA: all that a compiler does with a device besides asking."""
    import torch._subclasses.fake_tensor as fake_tensor

    # Allocates one real element, so that autograd's threads find a context.
    yield _replaced(fake_tensor, "init_gpu_context", lambda device: None)
    # Dynamo and AOTAutograd save and restore the state of the generator around tracing.
    yield _replaced(torch.cuda, "get_rng_state", lambda device="cuda": torch.zeros(16, dtype=torch.uint8))
    yield _replaced(torch.cuda, "set_rng_state", lambda state, device="cuda": None)
    # Inductor makes the device current while it generates code.
    for name in ("_exchange_device", "_maybe_exchange_device"):
        yield _replaced(torch.cuda, name, lambda device: 0)
    # Dynamo asks for the current stream, to follow the use of streams; the blocks use none.
    yield _replaced(torch.accelerator, "is_available", lambda: False)
    yield _replaced(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield _replaced(torch.cuda, "synchronize", lambda device=None: None)


def _settings() -> Iterator[Any]:
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    yield inductor_config.patch(
        {
            "joint_graph_constant_folding": False,  # computes constants on the device
            "fx_graph_cache": False,  # a hit would skip the lowering
            "compile_threads": 1,  # no pool of workers, since nothing is compiled
        }
    )
    yield functorch_config.patch({"enable_autograd_cache": False})


@contextlib.contextmanager
def _unguarded_methods() -> Iterator[None]:
    """The methods of tensors whose C++ sets the current device, which a build without CUDA cannot do.

    They call the same operators through the dispatcher. Indexing is rebuilt from slices, integers, None and Ellipsis,
    or from tensors alone, which are all that the blocks use.
    """
    tensor: Any = torch.Tensor
    aten = torch.ops.aten
    # What Tensor inherits from C; setting them on the class reaches fake and functional tensors alike.
    inherited = {name: getattr(tensor, name) for name in ("__getitem__", "__setitem__", "copy_", "contiguous")}

    def getitem(self: Tensor, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if all(isinstance(part, Tensor) for part in parts):
            return aten.index.Tensor(self, list(parts))
        indexed = sum(part is not None and part is not Ellipsis for part in parts)
        out, dim = self, 0
        for part in parts:
            if part is None:
                out = out.unsqueeze(dim)
                dim += 1
            elif part is Ellipsis:
                dim += self.dim() - indexed
            elif isinstance(part, slice):
                if part != slice(None):
                    step = 1 if part.step is None else part.step
                    out = aten.slice.Tensor(out, dim, part.start, part.stop, step)
                dim += 1
            elif isinstance(part, (int, torch.SymInt)):
                out = out.select(dim, part)
            else:
                raise FakeGpuError(f"a fake CUDA tensor of torch's CPU build cannot be indexed with {part!r}")
        return aten.alias.default(out) if out is self else out

    def setitem(self: Tensor, index: Any, value: Any) -> None:
        target = getitem(self, index)
        target.copy_(value) if isinstance(value, Tensor) else target.fill_(value)

    def copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
        return aten.copy_.default(self, source, non_blocking)

    def contiguous(self: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
        return aten.contiguous.default(self, memory_format=memory_format)

    def for_cuda(name: str, unguarded: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (unguarded if self.device.type == "cuda" else inherited[name])(self, *args, **kwargs)

        return method

    for name, unguarded in zip(inherited, (getitem, setitem, copy, contiguous), strict=True):
        setattr(tensor, name, for_cuda(name, unguarded))
    try:
        yield
    finally:
        for name in inherited:
            delattr(tensor, name)


@contextlib.contextmanager
def _triton_driver(gpu: Gpu) -> Iterator[None]:
    """Triton's active driver, asked by Inductor for its target and its shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    major, minor = gpu.capability
    target = GPUTarget("cuda", major * 10 + minor, 32)
    fake = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": gpu.shared}),
    )
    before = driver._active
    driver.set_active(fake)
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def _flash_attention() -> Iterator[None]:
    """diffusers' native attention as the flash kernel.

    ``scaled_dot_product_attention`` asks the driver which kernel fits, and without one takes the unfused kernel; on an
    Ampere or newer GPU it takes this one.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if attn_mask is not None:
            raise FakeGpuError("flash attention takes no mask")
        q, k, v = (x.permute(0, 2, 1, 3) for x in (query, key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v)[0].permute(0, 2, 1, 3)

    with mock.patch.dict(_AttentionBackendRegistry._backends, {AttentionBackendName.NATIVE: attention}):
        supported = {AttentionBackendName.NATIVE: {"query", "key", "value", "attn_mask"}}
        with mock.patch.dict(_AttentionBackendRegistry._supported_arg_names, supported):
            yield


def _forget() -> None:
    """Drop what torch remembers of the device that is there, or of a fake one before."""
    import torch._inductor.runtime.hints as hints
    import torch._inductor.utils as inductor_utils
    import torch.utils._triton as triton_utils

    remembered = [hints.DeviceProperties.create, *vars(triton_utils).values(), *vars(inductor_utils).values()]
    for function in remembered:
        if hasattr(function, "cache_clear"):
            function.cache_clear()


class _Stop(BaseException):
    """Leaves the compilers once the code is there; no handler of theirs takes a BaseException for an error."""


def lower_to_code(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], inspect: Callable[[Any, str], T]
) -> T:
    """What ``inspect`` says of the one graph that Inductor generates for ``function(*args, **kwargs)``.

    Args:
        function: compiled by ``torch.compile`` with ``fullgraph``; within `fake_gpu`, on fake CUDA tensors.
        inspect: ``(GraphLowering, source)``, called while the graph is Inductor's current one.
    """
    from torch._inductor.graph import GraphLowering

    answers: list[T] = []
    codegen = GraphLowering.codegen

    @functools.wraps(codegen)
    def stop(self: GraphLowering) -> Any:
        wrapper, _ = codegen(self)
        answers.append(inspect(self, wrapper.value))
        raise _Stop

    with _replaced(GraphLowering, "codegen", stop), contextlib.suppress(_Stop):
        function(*args, **kwargs)
    if not answers:
        raise FakeGpuError("Inductor generated no code: nothing in the graph needs a kernel")
    return answers[0]
