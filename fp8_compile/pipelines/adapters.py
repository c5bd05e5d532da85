"""LoRA adapters of a compiled pipeline, one of which a call can use: changing between them compiles nothing.

They share one adapter of PEFT, made for the largest rank, into which the file of the wanted one is read. It is never
fused, so that the base weights stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import Fp8Error
from .denoisers import denoisers_of

SLOT = "served"
"""What PEFT calls the shared adapter."""


class AdapterError(Fp8Error, ValueError):
    """A LoRA file that cannot be used."""


class Adapters:
    """Reads all files once, to know that they can be, and makes the shared adapter. Before the pipeline is compiled.

    Args:
        pipe: a diffusers pipeline that takes LoRA.
        files: by the names that calls use; at least one. They are read again at each change.

    Raises:
        AdapterError: names the file.
    """

    def __init__(self, pipe: Any, files: Mapping[str, Path]) -> None:
        if not hasattr(pipe, "load_lora_weights"):
            raise AdapterError(f"{type(pipe).__name__} takes no LoRA")
        self._pipe = pipe
        self._files = files
        shapes = {name: _layers_and_rank(pipe, name, file) for name, file in files.items()}
        # PEFT fits the others into the layers of the first.
        first, *others = sorted(files, key=lambda name: -shapes[name][0])
        pipe.enable_lora_hotswap(target_rank=max(rank for _, rank in shapes.values()))
        with _blamed(first, files[first]):
            pipe.load_lora_weights(files[first].parent, weight_name=files[first].name, adapter_name=SLOT)
        modules = [module for denoiser in denoisers_of(pipe).values() for module in denoiser.modules()]
        self._layers: list[Any] = [module for module in modules if SLOT in getattr(module, "scaling", ())]
        self._loaded = first
        self._scalings = self._read_scalings()
        for name in others:
            self._load(name)
        self.use(None)

    @property
    def names(self) -> tuple[str, ...]:
        """Those that `use` takes."""
        return tuple(self._files)

    def use(self, lora: tuple[str, float] | None) -> None:
        """Let the next calls use an adapter, by name and weight; None: none."""
        if lora is not None and lora[0] != self._loaded:
            self._load(lora[0])
        for layer, scaling in zip(self._layers, self._scalings, strict=True):
            layer.scaling[SLOT].fill_(0.0 if lora is None else scaling * lora[1])

    def _load(self, name: str) -> None:
        file = self._files[name]
        with _blamed(name, file):
            self._pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=SLOT, hotswap=True)
        self._loaded = name
        self._scalings = self._read_scalings()

    def _read_scalings(self) -> list[float]:
        """What the file asks for in each layer; on the device they are tensors, which compiled code reads."""
        return [float(layer.scaling[SLOT]) for layer in self._layers]


def _layers_and_rank(pipe: Any, name: str, file: Path) -> tuple[int, int]:
    """How many layers a file has weights for, and the largest rank."""
    with _blamed(name, file):
        weights = pipe.lora_state_dict(file.parent, weight_name=file.name)
        ranks = [weight.shape[0] for key, weight in weights.items() if ".lora_A." in key]
        if not ranks:
            raise ValueError("it holds no LoRA weights")
        return len(ranks), max(ranks)


@contextlib.contextmanager
def _blamed(name: str, file: Path) -> Iterator[None]:
    """Say of which file an error is: diffusers, PEFT and safetensors raise many kinds for a broken one."""
    try:
        yield
    except Exception as error:
        raise AdapterError(f"lora {name}={str(file)!r} cannot be used: {error}") from error
