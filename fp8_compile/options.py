"""The options that do not depend on the method: what is accepted, and what each means.

This module knows neither methods nor passes: `checks.parse_options`, at the two entrances, takes a flat dict apart.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import math
import os
import struct
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from .errors import OptionError, PatternError
from .numerics import LARGEST_SCALE, SCALE_FLOOR
from .patterns import Pattern, matching

RECOMMENDED = "recommended"
"""In ``ignored_layers``: what the recipe of the model keeps (`fp8_compile.recipes`)."""

KEEP = "keep"
"""The entry of ``layers`` for a layer that shall stay as it is."""

DEFAULT_METHOD = "fp8"

UNCALIBRATED = ("error", "dynamic")
AS_WRITTEN = "as-written"
"""Of ``attention`` and ``cpu_attention``: attention stays what it is."""

CPU_ATTENTION = (AS_WRITTEN, "float32")
ATTENTION = (AS_WRITTEN, "fp8", "fp8-emulated")


class Scales(dict[str, float]):
    """Input scales by the paths of layers, and where they come from.

    Attributes:
        about: what was calibrated, for reports; empty if nobody said.
    """

    def __init__(self, scales: Mapping[str, float] = MappingProxyType({}), about: str = "") -> None:
        super().__init__(scales)
        self.about = about


@dataclass(frozen=True)
class Fp8Options:
    """Options of ``torch.compile(..., backend="fp8_diffusion", options=...)``.

    Users give a flat dict. Its keys are looked up among the attributes here, then among the options of the method
    (`fp8_compile.schemes`), then among Inductor's settings.

    Attributes:
        method: the kind of quantization; None if it was not given: weights that are quantized already have one of their
            own, and others get `fp8_compile.schemes.DEFAULT_METHOD`.
        method_options: the method's own options that were given.
        ignored_layers: module paths that stay as they are; see `fp8_compile.patterns` for what matches. `RECOMMENDED`,
            alone or as an entry, stands for those of the model's recipe.
        layers: what holds for single layers in the place of the options for all: by pattern, `KEEP`, or a dict of the
            method and its own options. The first that names a layer counts.
        activation_scales: of ``activation_scheme="static"``: what stands for a unit of each layer's activation, by the
            layer's path, as ``calibration.scales(model)`` gives it (`fp8_compile.calibrate`).
        uncalibrated: "error" refuses layers that are to be static and have no scale, "dynamic" leaves them dynamic.
        min_features: a linear with fewer input or output features stays as it is.
        cpu_attention: "float32" computes attention in float32 where it is in half precision on a CPU: faster on one
            that has no instructions for bfloat16. "as-written" leaves it alone.
        attention: "fp8" computes attention in FP8 where a kernel takes it; "fp8-emulated" computes what such a kernel
            would give, without being faster (`fp8_compile.attention`); "as-written" leaves it alone.
        strict: raise `NothingConvertedError` where a graph with linears would only warn that none was converted.
        inner_backend: what compiles the rewritten graph: the name of a registered backend, or a callable
            ``(graph_module, example_inputs) -> callable``.
        mode: as ``torch.compile``'s; for the inner backend "inductor" only.
        disabled_passes: names of passes that shall not run, to find out what they are good for; see
            `fp8_compile.passes.pipeline`. Quantization itself is not among them.
        dump_graphs: a directory that receives the graph before and after each pass, or None. The graph is also checked
            between passes then.
        inductor: Inductor settings for this compile only, by their name in ``torch._inductor.config``.

    Raises:
        OptionError: a value is not valid; the message says which ones are.
        PatternError: an entry of ``ignored_layers`` or ``layers`` is malformed.
    """

    method: str | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    ignored_layers: tuple[str, ...] = ()
    layers: Mapping[str, str | Mapping[str, Any]] = field(default_factory=dict)
    activation_scales: Mapping[str, float] = field(default_factory=Scales, repr=False)
    uncalibrated: str = "error"
    min_features: int = 256
    cpu_attention: str = AS_WRITTEN
    attention: str = AS_WRITTEN
    strict: bool = False
    inner_backend: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    disabled_passes: tuple[str, ...] = ()
    dump_graphs: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: Any = self.ignored_layers
        if given == RECOMMENDED:
            given = (RECOMMENDED,)
        if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
            raise PatternError(given, "expected a list of patterns, for example ['img_mlp'], or 'recommended'")
        object.__setattr__(self, "ignored_layers", tuple(given))
        for pattern in self.ignored_layers:
            Pattern(pattern)
        self._check_layers()
        if self.method is not None and not isinstance(self.method, str):
            raise OptionError(f"method={self.method!r}: expected a name")
        for name in ("method_options", "inductor"):
            if not isinstance(getattr(self, name), Mapping):
                raise OptionError(f"{name}={getattr(self, name)!r}: expected a dict")
        scales: Any = self.activation_scales
        if not isinstance(scales, Mapping):
            raise OptionError(
                f"activation_scales: expected a dict of scales by the path of the layer, as calibration.scales(model) "
                f"gives it, got {type(scales).__name__}"
            )
        checked = {path: check_scale(f"activation_scales: {path!r}", scale) for path, scale in scales.items()}
        object.__setattr__(self, "activation_scales", Scales(checked, getattr(scales, "about", "")))
        check_choice("uncalibrated", self.uncalibrated, UNCALIBRATED)
        check_count("min_features", self.min_features)
        check_choice("cpu_attention", self.cpu_attention, CPU_ATTENTION)
        check_choice("attention", self.attention, ATTENTION)
        if not isinstance(self.strict, bool):
            raise OptionError(f"strict={self.strict!r}: expected True or False")
        if isinstance(self.dump_graphs, os.PathLike):
            object.__setattr__(self, "dump_graphs", os.fspath(self.dump_graphs))
        if self.dump_graphs is not None and not (isinstance(self.dump_graphs, str) and self.dump_graphs):
            raise OptionError(f"dump_graphs={self.dump_graphs!r}: expected the path of a directory, or None")
        if self.dump_graphs is not None and os.path.isfile(self.dump_graphs):
            raise OptionError(f"dump_graphs={self.dump_graphs!r} is a file; expected the path of a directory")
        if isinstance(self.disabled_passes, (str, Mapping)) or not isinstance(self.disabled_passes, Iterable):
            raise OptionError(f"disabled_passes={self.disabled_passes!r}: expected a list of names")
        object.__setattr__(self, "disabled_passes", tuple(self.disabled_passes))
        self._check_inner()

    def _check_layers(self) -> None:
        given: Any = self.layers
        if not isinstance(given, Mapping):
            raise OptionError(f"layers={given!r}: expected a dict, for example {{'img_mod': 'keep'}}")
        for pattern, entry in given.items():
            Pattern(pattern, "layers")
            if pattern in self.ignored_layers:
                raise PatternError(pattern, "is in ignored_layers, too", "layers")
            if entry != KEEP and not (isinstance(entry, Mapping) and entry):
                raise OptionError(f"layers: {pattern!r}: expected {KEEP!r} or a dict of options, got {entry!r}")
        object.__setattr__(
            self, "layers", {p: entry if isinstance(entry, str) else dict(entry) for p, entry in given.items()}
        )

    @property
    def fp8_attention(self) -> bool:
        """Whether attention is asked for in FP8, by a kernel or emulated."""
        return self.attention != AS_WRITTEN

    @functools.cached_property
    def names_key(self) -> str:
        """What tells options apart that decide otherwise by the names of layers."""
        asked: tuple[Any, ...] = (self.ignored_layers,)
        if self.layers or self.uncalibrated == "dynamic":
            calibrated = sorted(self.activation_scales) if self.uncalibrated == "dynamic" else ()
            asked += repr(self.layers), self.method, repr(self.method_options), self.uncalibrated, calibrated
        if self.fp8_attention:
            asked += (self.attention, repr(self.layers))
        return hashlib.sha256(repr(asked).encode()).hexdigest()[:12]

    @property
    def patterns(self) -> dict[str, str]:
        """All entries that name layers, with the option of each."""
        return {**dict.fromkeys(self.ignored_layers, "ignored_layers"), **dict.fromkeys(self.layers, "layers")}

    def unmatched(self, names: Iterable[str]) -> dict[str, str]:
        """Those of `patterns` that match none of ``names``."""
        matched = matching(self.patterns, names)
        return {pattern: option for pattern, option in self.patterns.items() if pattern not in matched}

    @property
    def askable(self) -> tuple[str | None, ...]:
        """What `asked_of` takes: None, and the entries of ``layers`` that ask for something."""
        return (None, *(pattern for pattern, entry in self.layers.items() if entry != KEEP))

    @property
    def calibrated(self) -> str:
        """Where ``activation_scales`` come from; empty if nobody said, or there are none."""
        scales: Any = self.activation_scales
        return str(scales.about)

    def asked_of(self, pattern: str | None) -> tuple[str | None, Mapping[str, Any]]:
        """The method, if one was given, and the options of it that hold for layers named by ``pattern``.

        Args:
            pattern: one of `askable`; or of an entry that is `KEEP`, which asks for what holds for all.
        """
        entry = None if pattern is None else self.layers[pattern]
        if entry is None or isinstance(entry, str):
            return self.method, self.method_options
        method = entry.get("method", self.method)
        own = {name: value for name, value in entry.items() if name != "method"}
        same = (method or DEFAULT_METHOD) == (self.method or DEFAULT_METHOD)
        return method, {**self.method_options, **own} if same else own

    def _check_inner(self) -> None:
        if self.inner_backend != "inductor":
            for name in ("mode", "inductor"):
                if getattr(self, name):
                    raise OptionError(
                        f"{name}={getattr(self, name)!r} is a setting of Inductor, and inner_backend is "
                        f"{self.inner_backend!r}; leave one of the two out"
                    )
            if not callable(self.inner_backend):
                import torch

                known = torch.compiler.list_backends(exclude_tags=())
                check_choice("inner_backend", self.inner_backend, [name for name in known if name != "fp8_diffusion"])
            return
        if self.mode is not None:
            from torch._inductor import list_mode_options

            check_choice("mode", self.mode, list(list_mode_options()))
        if self.inductor:
            check_inductor(self.inductor)

    def changed(self) -> dict[str, Any]:
        """What is not the default, as the flat dict that means the same."""
        default = type(self)()
        common = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "method_options"}
        return {
            **{name: value for name, value in common.items() if value != getattr(default, name)},
            **self.method_options,
        }

    def of_weights(self) -> dict[str, Any]:
        """The same without what concerns compilation alone, and scales, which weights hold: plain data, for files."""
        given = self.changed()
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
            if (name in WEIGHT_OPTIONS or name in self.method_options) and name != "activation_scales"
        }


def expanded(patterns: tuple[str, ...], keep: tuple[str, ...]) -> tuple[str, ...]:
    """``patterns`` with ``keep`` in the place of `RECOMMENDED`."""
    if RECOMMENDED not in patterns:
        return patterns
    return tuple(dict.fromkeys(p for given in patterns for p in (keep if given == RECOMMENDED else (given,))))


WEIGHT_OPTIONS = ("method", "ignored_layers", "layers", "activation_scales", "uncalibrated", "min_features", "strict")
"""Options that concern weights, whatever the method; those of the method itself do, too."""

COMMON = tuple(f.name for f in fields(Fp8Options))
"""The names of the options that do not depend on the method."""


def check_choice(name: str, value: object, valid: Sequence[str]) -> None:
    """Refuse a value that is none of ``valid``."""
    if value not in valid:
        raise OptionError(f"{name}={value!r} is not valid{closest(value, valid)}; valid: {', '.join(valid)}")


def check_count(name: str, value: object) -> None:
    """Refuse what is no integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name}={value!r}: expected an integer of at least 1")


def check_scale(name: str, value: object) -> float:
    """``value`` as a float32 number; refuses what is no positive finite one."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        number: float = struct.unpack("f", struct.pack("f", value))[0] if ok else math.nan
    except OverflowError:
        number = math.inf
    if not SCALE_FLOOR <= number <= LARGEST_SCALE:
        raise OptionError(
            f"{name}={value!r}: expected a positive finite number, between {SCALE_FLOOR:.3g} and {LARGEST_SCALE:.3g}"
        )
    return number


def closest(value: object, valid: Iterable[str]) -> str:
    """What a message says of the one of ``valid`` that was meant, perhaps."""
    near = difflib.get_close_matches(str(value), list(valid), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def inductor_settings() -> Mapping[str, Any]:
    """All settings of ``torch._inductor.config``."""
    from torch._inductor import config as inductor_config

    config: Any = inductor_config
    settings: Mapping[str, Any] = config.get_config_copy()
    return settings


def check_inductor(settings: Mapping[str, Any], others: Sequence[str] = COMMON) -> None:
    """Refuse what is no setting of Inductor, or not of the setting's type (the checks of torch.compile itself).

    Args:
        others: the names that are no settings of Inductor and valid where the settings stand.
    """
    from torch._inductor import config as inductor_config

    config: Any = inductor_config
    known = inductor_settings()
    for key, value in settings.items():
        if key not in known:
            raise OptionError(
                f"unknown option {key!r}{closest(key, [*others, *known])}; the options are {', '.join(others)}, "
                "and every setting of torch._inductor.config"
            )
        expected = config.get_type(key)
        if typing.get_origin(expected) is None and isinstance(expected, type) and not isinstance(value, expected):
            raise OptionError(f"{key}={value!r}: this setting of Inductor takes {expected.__name__}")
