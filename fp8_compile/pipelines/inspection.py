"""What would become of a pipeline's layers, found out without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..embedded import embedded_name
from ..errors import OptionError
from ..integrations.stored_weights import schemes_in
from ..options import RECOMMENDED
from ..quantize import quantize_, weights_in
from ..recipes import recipe_of, recommended
from ..report import LayerReport, report
from ..schemes import Scheme
from ..weights.quantized_weight import QuantizedWeight
from .denoisers import DENOISERS, PipelineError
from .session import DTYPES, pipeline_index


@dataclass(frozen=True)
class DenoiserPlan:
    """One module that runs at every step.

    Attributes:
        name, kind: in the pipeline, and its class.
        layers: a row per linear; see `LayerReport`.
        bytes_before, bytes_after: of all its parameters, unquantized and as they would be.
        largest: bytes of its largest unquantized weight, which loading with ``--load fp8`` has beside the others.
        recommended: patterns that a recipe or the model's blocks keep.
        source: whose recommendation that is.
        in_files: weights that its files hold quantized already; nothing more would be converted then.
    """

    name: str
    kind: str
    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int
    largest: int
    recommended: tuple[str, ...]
    source: str
    in_files: int

    @property
    def quantized(self) -> int:
        """How many layers become FP8."""
        return sum(row.decision == "quantized" for row in self.layers)


@dataclass(frozen=True)
class Inspection:
    """A pipeline.

    Attributes:
        pipeline: its class.
        denoisers: see `DenoiserPlan`.
        others: bytes of the weights of all other parts in files, by their names; empty where there are no files here.
    """

    pipeline: str
    denoisers: tuple[DenoiserPlan, ...]
    others: dict[str, int]

    def peaks(self) -> dict[str, int]:
        """Bytes of all weights on the device at the most, by the way of loading. Activations come on top."""
        others = sum(self.others.values())
        before = sum(plan.bytes_before for plan in self.denoisers)
        after = sum(plan.bytes_after for plan in self.denoisers)
        beside = sum(row.bytes_after for plan in self.denoisers for row in plan.layers if row.decision == "quantized")
        if all(plan.in_files for plan in self.denoisers):
            return {"files": others + after}
        largest = max(plan.largest for plan in self.denoisers)
        return {
            "unquantized": others + before,
            "compile": others + before + beside,
            "fp8": others + after + largest,
        }


def inspect_pipeline(model: str, options: Mapping[str, Any], dtype: str = "bfloat16") -> Inspection:
    """What ``model`` would be with ``options``. Its configuration is read, and no weights.

    Args:
        model: see `Session`.
        options: see `Fp8Options`. Without ``ignored_layers``, and ``layers``: what is recommended, but nothing of an
            embedded pipeline.
        dtype: a key of `DTYPES`.

    Raises:
        OptionError: an option is not valid.
        PipelineError: there is no pipeline, or none of its modules can be compiled.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r} is not valid; valid: {', '.join(DTYPES)}")
    index, source = pipeline_index(model)
    parts = {name: part for name, part in index.items() if isinstance(part, list | tuple) and part[0] is not None}
    names = [name for name in DENOISERS if name in parts]
    if not names:
        raise PipelineError(f"{index['_class_name']} has none of {', '.join(DENOISERS)}: nothing to compile")
    if not {"ignored_layers", "layers"} & options.keys() and embedded_name(model) is None:
        options = {**options, "ignored_layers": [RECOMMENDED]}
    plans = tuple(_plan(name, parts[name][1], source, options, DTYPES[dtype]) for name in names)
    others = {}
    if Path(source).is_dir():
        sizes = {name: _bytes_of_files(Path(source) / name) for name in parts if name not in names}
        others = {name: size for name, size in sizes.items() if size}
    return Inspection(str(index["_class_name"]), plans, others)


def _plan(name: str, kind: str, source: str, options: Mapping[str, Any], dtype: torch.dtype) -> DenoiserPlan:
    import diffusers

    found: Any = getattr(diffusers, kind, None)
    if found is None:
        raise PipelineError(f"the {name} is of a class {kind} that diffusers does not have")
    config = found.load_config(source, subfolder=name)
    held: Mapping[str, Scheme] = {}
    if config.pop("quantization_config", None) is not None and (Path(source) / name).is_dir():
        held = schemes_in(sorted((Path(source) / name).glob("*.safetensors")))
    with torch.device("meta"):
        module: nn.Module = found.from_config(config)
    stay = set(getattr(module, "_keep_in_fp32_modules", None) or ())  # as from_pretrained leaves them
    for path, part in module.named_modules():
        for leaf, parameter in part.named_parameters(recurse=False):
            if parameter.is_floating_point() and stay.isdisjoint([*path.split("."), leaf]):
                part._parameters[leaf] = nn.Parameter(parameter.to(dtype), requires_grad=False)
    before = sum(parameter.nbytes for parameter in module.parameters())
    largest = max((weight.nbytes for _, _, _, weight in weights_in(module)), default=0)
    if not held:
        quantize_(module, options)
    for weight, scheme in held.items():
        path, _, leaf = weight.rpartition(".")
        owner = module.get_submodule(path)
        owner._parameters[leaf] = QuantizedWeight.quantize(owner.get_parameter(leaf), scheme)  # type: ignore[assignment]
    recipe, keep = recipe_of(module), recommended(module)
    whose = "its recipe" if recipe is not None else "outside of its repeated blocks" if keep else "no recipe"
    return DenoiserPlan(
        name,
        kind,
        report(module).layers,
        before,
        sum(parameter.nbytes for parameter in module.parameters()),
        largest,
        keep,
        f"{whose}: {recipe.says}" if recipe is not None else whose,
        len(held),
    )


def _bytes_of_files(folder: Path) -> int:
    """Of the weights that diffusers reads where no variant is asked for."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.name.count(".") == 1)
