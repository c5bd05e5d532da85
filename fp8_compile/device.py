"""Which devices multiply quantized matrices."""

from __future__ import annotations

import functools

import torch

from .errors import UnsupportedDeviceError
from .schemes import Call, Scheme


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
            f'{scheme.method!r} needs {needed} or higher. Compile with backend="inductor" there.'
        )


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
) -> str | None:
    """Why ``device`` cannot run ``call`` on a linear, or None; found out by running it once on zeros.

    Libraries refuse single shapes, or all, in ways that depend on their version: row-wise scales with K = 9216 and at
    most 256 rows on Hopper (https://github.com/pytorch/ao/issues/4582), all row-wise scales on consumer Blackwell
    (https://github.com/pytorch/pytorch/issues/192707).

    Args:
        scheme: whose constants ``call`` takes.
        rows: of the activation. If symbolic, some sizes are tried besides the one that was seen.
        features: input and output features.
        dtype: of the activation, the weight, the bias and the result.

    Raises:
        UnsupportedDeviceError: see `check_device`.
    """
    check_device(device, scheme)  # lest a device that can do nothing seem one that refuses each shape
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    if isinstance(rows, torch.SymInt):
        seen = rows.node.hint
        sizes = [*_M_OF_ALL_SIZES, *([] if seen is None else [int(seen)])]
    else:
        sizes = [rows]
    reasons = (_refusal(scheme, call, device, size, features, dtype, bias) for size in sizes)
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
) -> str | None:
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.utils._python_dispatch import _disable_current_modes

    k, n = features
    with unset_fake_temporarily(), _disable_current_modes(), torch.no_grad():
        try:
            x, weight = (torch.zeros(size, k, dtype=dtype, device=device) for size in (rows, n))
            quantized = x if call.quantize is None else call.quantize(x)
            added = torch.zeros(n, dtype=dtype, device=device) if bias else None
            assert call.linear is not None
            call.linear(quantized, *scheme.quantize_weight(weight), added, dtype)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            return None
        except (RuntimeError, ValueError) as error:
            if "ALLOC_FAILED" in str(error):
                return None  # of memory, like the above, not of the shape
            return f"{device} refuses {rows} x {k} by {k} x {n}: {error}".splitlines()[0]
    return None
