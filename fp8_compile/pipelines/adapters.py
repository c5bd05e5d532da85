"""LoRA adapters of a compiled pipeline, some of which a call can use: changing between them compiles nothing.

Compiled code runs through the adapters of PEFT that are active, so their number is fixed: all of a few slots, made for
the largest rank, into which the files of the wanted ones are read. A slot that is not wanted has weight 0. Nothing is
ever fused, so that the base weights stay as they are.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import Fp8Error
from .denoisers import DENOISERS, denoisers_of

Lora = tuple[tuple[str, float], ...]
"""Names and weights of the adapters of a call, in the order of their names; empty: none."""


class AdapterError(Fp8Error, ValueError):
    """A LoRA file that cannot be used."""


class Adapters:
    """Reads all files once, to know that they can be, and makes the slots. Before the pipeline is compiled.

    Args:
        pipe: a diffusers pipeline that takes LoRA.
        files: by the names that calls use; at least one. They are read again at each change.
        at_once: how many adapters a call may use. Each slot costs two small matmuls in each layer that it reaches, also
            where it is not wanted.

    Raises:
        AdapterError: names the file.
    """

    def __init__(self, pipe: Any, files: Mapping[str, Path], at_once: int = 1) -> None:
        if not hasattr(pipe, "load_lora_weights"):
            raise AdapterError(f"{type(pipe).__name__} takes no LoRA")
        from peft.utils.hotswap import prepare_model_for_compiled_hotswap

        self._pipe = pipe
        self._files = files
        shapes = {name: _layers_and_rank(pipe, name, file) for name, file in files.items()}
        # PEFT fits the others into the layers of the first.
        first, *others = sorted(files, key=lambda name: -shapes[name][0])
        slots = [f"slot_{i}" for i in range(min(at_once, len(files)))]
        with _blamed(first, files[first]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of the slots after the first
            for slot in slots:
                pipe.load_lora_weights(files[first].parent, weight_name=files[first].name, adapter_name=slot)
        pipe.set_adapters(slots)
        rank = max(rank for _, rank in shapes.values())
        denoisers: list[Any] = [
            denoiser for denoiser in denoisers_of(pipe).values() if hasattr(denoiser, "peft_config")
        ]
        for denoiser in denoisers:
            prepare_model_for_compiled_hotswap(denoiser, target_rank=rank, config=denoiser.peft_config)
        modules = [module for denoiser in denoisers for module in denoiser.modules()]
        self._slots = [_Slot(slot, first, modules) for slot in slots]
        for name in others:
            self._load(self._slots[0], name)
        self.use(())

    @property
    def names(self) -> tuple[str, ...]:
        """Those that `use` takes."""
        return tuple(self._files)

    @property
    def at_once(self) -> int:
        """How many `use` takes."""
        return len(self._slots)

    def use(self, lora: Lora) -> None:
        """Let the next calls use these adapters."""
        loaded = [slot.name for slot in self._slots]
        places = [loaded.index(name) if name in loaded else -1 for name, _ in lora]
        # Slots are added up in turn. In the order of the names, the same adapters give the same bits each time.
        if -1 in places or places != sorted(places):
            places = list(range(len(lora)))
        for slot in self._slots:
            slot.weigh(0.0)
        for place, (name, weight) in zip(places, lora, strict=True):
            slot = self._slots[place]
            if slot.name != name:
                self._load(slot, name)
            slot.weigh(weight)

    def _load(self, slot: _Slot, name: str) -> None:
        file = self._files[name]
        with _blamed(name, file):
            self._pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=slot.peft_name, hotswap=True)
        slot.filled(name)


class _Slot:
    """An adapter of PEFT, and whose weights are in it."""

    def __init__(self, peft_name: str, name: str, modules: list[Any]) -> None:
        self.peft_name = peft_name
        self._layers = [module for module in modules if peft_name in getattr(module, "scaling", ())]
        self.filled(name)

    def filled(self, name: str) -> None:
        """The file of the adapter ``name`` has been read into it."""
        self.name = name
        self._scalings = [float(self._scaling(layer)) for layer in self._layers]

    def weigh(self, weight: float) -> None:
        """Multiply what the file asks for in each layer."""
        for layer, scaling in zip(self._layers, self._scalings, strict=True):
            self._scaling(layer).fill_(scaling * weight)

    def _scaling(self, layer: Any) -> Tensor:
        """A tensor on the device, which compiled code reads."""
        scaling: Tensor = layer.scaling[self.peft_name]
        return scaling


def _layers_and_rank(pipe: Any, name: str, file: Path) -> tuple[int, int]:
    """How many layers a file has weights for, and the largest rank."""
    with _blamed(name, file):
        weights = pipe.lora_state_dict(file.parent, weight_name=file.name)
        ranks = [weight.shape[0] for key, weight in weights.items() if ".lora_A." in key]
        if not ranks:
            raise ValueError("it holds no LoRA weights")
        if others := {key.partition(".")[0] for key in weights} - set(DENOISERS):
            raise ValueError(
                f"it has weights for {', '.join(sorted(others))}, and only denoisers change their adapters"
            )
        return len(ranks), max(ranks)


@contextlib.contextmanager
def _blamed(name: str, file: Path) -> Iterator[None]:
    """Say of which file an error is: diffusers, PEFT and safetensors raise many kinds for a broken one."""
    try:
        yield
    except Exception as error:
        raise AdapterError(f"lora {name}={str(file)!r} cannot be used: {error}") from error
