"""Which devices multiply quantized matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import UnsupportedDeviceError
from .numerics import on_real_tensors
from .schemes import ONES, Call, Scheme


def check_device(device: torch.device, scheme: Scheme) -> None:
    """Refuse a device that cannot run graphs with weights of ``scheme``; asked before anything is compiled for it.

    The check must come first: casting to FP8 on an older GPU crashes inside the compiler instead of raising.

    Raises:
        UnsupportedDeviceError: for a GPU below the scheme's compute capability, ROCm, and any other accelerator.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise UnsupportedDeviceError(f"device {device} is not supported; move the model to a CUDA GPU or the CPU")
    if torch.version.hip is not None:
        raise UnsupportedDeviceError(
            f"device {device} is an AMD GPU; ROCm is not supported, use an NVIDIA GPU or the CPU"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < scheme.min_capability:
        given, needed = (".".join(map(str, version)) for version in (capability, scheme.min_capability))
        raise UnsupportedDeviceError(
            f"device {device} ({torch.cuda.get_device_name(device)}) has compute capability {given}; method "
            f"{scheme.method!r} needs {needed} or higher. Leave the backend out there."
        )


_FEW_EXPERTS = 4

# A graph for any M may hit any kernel; one size per kernel family is asked.
_M_OF_ALL_SIZES = (16, 64, 256, 1024)


def refusal(
    scheme: Scheme,
    call: Call,
    device: torch.device,
    rows: int | torch.SymInt,
    features: tuple[int, int],
    dtype: torch.dtype,
    bias: bool,
    experts: int | None = None,
) -> str | None:
    """Why ``device`` cannot run ``call`` on a linear, or None; found out by running it once.

    On zeros, or, if the call has a reference, on random numbers: what differs from it is refused, and so is what cannot
    be compared now.

    Libraries refuse single shapes, or all, in ways that depend on their version: row-wise scales with K = 9216 and at
    most 256 rows on Hopper (https://github.com/pytorch/ao/issues/4582), all row-wise scales on consumer Blackwell
    (https://github.com/pytorch/pytorch/issues/192707).

    Args:
        scheme: whose constants ``call`` takes.
        rows: of the activation. If symbolic, some sizes are tried besides the one that was seen.
        features: input and output features.
        dtype: of the activation, the weight, the bias and the result.
        experts: how many matrices the weight is a stack of; a few of them are tried, since the kernel takes each alone.

    Raises:
        UnsupportedDeviceError: see `check_device`.
    """
    check_device(device, scheme)  # lest a device that can do nothing seem one that refuses each shape
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None if call.reference is None else "its kernel cannot be checked while a CUDA graph is recorded"
    if isinstance(rows, torch.SymInt):
        seen = rows.node.hint
        sizes = [*_M_OF_ALL_SIZES, *([] if seen is None else [int(seen)])]
    else:
        sizes = [rows]
    if experts is not None:
        tried = min(experts, _FEW_EXPERTS)
        sizes, experts = [-(-size * tried // experts) for size in sizes], tried
    reasons = (_refusal(scheme, call, device, size, features, dtype, bias, experts) for size in sizes)
    return next((reason for reason in reasons if reason is not None), None)


@functools.cache
def _refusal(
    scheme: Scheme,
    call: Call,
    device: torch.device,
    rows: int,
    features: tuple[int, int],
    dtype: torch.dtype,
    bias: bool,
    experts: int | None,
) -> str | None:
    k, n = features
    with on_real_tensors(), torch.no_grad():
        try:
            make: Callable[..., Tensor] = torch.zeros if call.reference is None else _Random(device)
            x, weight = (make(size, k, dtype=dtype, device=device) for size in (rows, n * (experts or 1)))
            if experts is None:
                made = scheme.quantize_weight(weight)
            else:
                made = scheme.quantize_stack(weight.view(experts, n, k), transposed=False)
            named = dict(zip(scheme.specs(n, k), made, strict=True))
            constants = call.operands_of(named)
            named[ONES] = torch.ones(rows, 1, device=device)
            quantized = x if call.quantize is None else call.quantize(x, *(named[name] for name in call.takes))
            added = make(n, dtype=dtype, device=device) if bias else None
            if experts is not None:  # an odd number of tokens more for each expert but the last
                ends = [min(rows, (i + 1) * (rows // experts) // 2 | 1) for i in range(experts - 1)]
                added = torch.tensor([*ends, rows], dtype=torch.int32, device=device)
            operands = quantized, *constants, added, dtype
            assert call.linear is not None
            out = call.linear(*operands)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            wrong: object = None if call.reference is None else _difference(out, call.reference(*operands))
        except torch.OutOfMemoryError as error:
            wrong = None if call.reference is None else error
        except (RuntimeError, ValueError) as error:
            # Of memory, like the above, not of the shape.
            wrong = None if "ALLOC_FAILED" in str(error) and call.reference is None else error
    return None if wrong is None else f"{device} refuses {rows} x {k} by {k} x {n}: {wrong}".splitlines()[0]


class _Random:
    """Makes random numbers whose size differs from row to row and from block to block, so that no two scales agree."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(0)  # lest the user's random numbers become others

    def __call__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=device, generator=self._generator)

        values = normal(*shape)
        if len(shape) == 2:
            rows, columns = shape
            blocks = normal(-(-rows // 128), -(-columns // 128)).repeat_interleave(128, 0)[:rows]
            sizes = (blocks + normal(*blocks.shape)) / 2
            values *= sizes.exp().repeat_interleave(128, 1)[:, :columns]
        return values.to(dtype)


# How far a result may be off: by a few roundings to bfloat16, and by so much of the root mean square of all, since
# Hopper's tensor cores keep 14 bits of a sum. One block of a hundred with its neighbour's scale is off by more.
_ROUNDINGS, _TOLERANCE = 2.0**-7, 0.02


def _difference(out: Tensor, expected: Tensor) -> str | None:
    """What is wrong with ``out``, or None."""
    out, expected = out.float(), expected.float()
    rms = expected.square().mean().sqrt()
    error = float((((out - expected).abs() - _ROUNDINGS * expected.abs()) / rms).amax())
    return None if error <= _TOLERANCE else f"a result is wrong by {error:.2g} of their root mean square"
