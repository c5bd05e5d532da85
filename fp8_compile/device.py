"""Which devices multiply FP8 matrices."""

from __future__ import annotations

import torch

from .errors import UnsupportedDeviceError

# Ada Lovelace, the first with FP8 tensor cores: https://developer.nvidia.com/cuda-gpus
MIN_CAPABILITY = (8, 9)


def check_device(device: torch.device) -> None:
    """Refuse a device that cannot run the rewritten graph; asked before anything is compiled for it.

    The check must come first: casting to FP8 on such a GPU crashes inside the compiler instead of raising.

    Raises:
        UnsupportedDeviceError: for a GPU below compute capability 8.9, ROCm, and any other kind of accelerator.
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
    if capability < MIN_CAPABILITY:
        raise UnsupportedDeviceError(
            f"device {device} ({torch.cuda.get_device_name(device)}) has compute capability "
            f"{capability[0]}.{capability[1]} and no FP8 tensor cores; 8.9 or higher is needed "
            '(Ada, Hopper, Blackwell). Compile with backend="inductor" there.'
        )
