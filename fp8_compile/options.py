"""The options of the backend: what is accepted, what each means, and what an invalid one is answered with."""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import OptionError, PatternError
from .patterns import Pattern
from .schemes import fp8

GRANULARITIES = ("row", "tensor")
FEW_ROWS = ("weight-only", "keep")


@dataclass(frozen=True)
class Fp8Options:
    """Options of ``torch.compile(..., backend="fp8_diffusion", options=...)``; a dict of the same names does as well.

    Attributes:
        method: the kind of quantization, one of `fp8_compile.schemes.methods`.
        ignored_layers: module paths that stay as they are; see `fp8_compile.patterns` for what matches.
        activation_scheme: "dynamic" computes each activation's scale from its values.
        weight_block_size: None; block-wise scales are not available yet.
        granularity: "row" gives each output channel of a weight and each token of an activation a scale of its own,
            "tensor" gives one to the whole.
        min_features: a linear with fewer input or output features stays as it is.
        min_rows: a linear whose input has fewer rows (tokens of the whole batch) is not multiplied in FP8.
        few_rows: what becomes of it: "weight-only" stores its weight in FP8, with scales of the same granularity, and
            multiplies in float32; "keep" leaves it as it is, which is for compilation only.
        strict: raise `NothingConvertedError` where a graph with linears would only warn that none was converted.
        inner_backend: what compiles the rewritten graph: the name of a registered backend, or a callable
            ``(graph_module, example_inputs) -> callable``.
        mode: as ``torch.compile``'s; for the inner backend "inductor" only.
        disabled_passes: names of passes that shall not run, to find out what they are good for; see
            `fp8_compile.passes.pipeline`. Quantization itself is not among them.
        dump_graphs: a directory that receives the graph before and after each pass, or None.
        inductor: Inductor settings for this compile only, by their name in ``torch._inductor.config``. In a dict of
            options they stand beside the others.

    Raises:
        OptionError: a value is not valid; the message says which ones are.
        PatternError: an entry of ``ignored_layers`` is malformed.
    """

    method: str = "fp8"
    ignored_layers: tuple[str, ...] = ()
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] | None = None
    granularity: str = "row"
    min_features: int = 256
    min_rows: int = 8
    few_rows: str = "weight-only"
    strict: bool = False
    inner_backend: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    disabled_passes: tuple[str, ...] = ()
    dump_graphs: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.ignored_layers, (str, Mapping)) or not isinstance(self.ignored_layers, Iterable):
            raise PatternError(self.ignored_layers, "a list of patterns belongs here, for example ['img_mlp']")
        object.__setattr__(self, "ignored_layers", tuple(self.ignored_layers))
        for pattern in self.ignored_layers:
            Pattern(pattern)

        _one_of("method", self.method, fp8.methods())
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("few_rows", self.few_rows, FEW_ROWS)
        if self.activation_scheme == "static":
            raise OptionError("activation_scheme='static' is not available yet; use 'dynamic'")
        _one_of("activation_scheme", self.activation_scheme, ("dynamic",))
        if self.weight_block_size is not None:
            raise OptionError(
                f"weight_block_size={self.weight_block_size!r}: block-wise scales are not available yet; use None"
            )
        for name in ("min_features", "min_rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{name}={value!r}: an integer of at least 1 belongs here")
        if not isinstance(self.strict, bool):
            raise OptionError(f"strict={self.strict!r}: True or False belongs here")
        if isinstance(self.dump_graphs, os.PathLike):
            object.__setattr__(self, "dump_graphs", os.fspath(self.dump_graphs))
        if self.dump_graphs is not None and not (isinstance(self.dump_graphs, str) and self.dump_graphs):
            raise OptionError(f"dump_graphs={self.dump_graphs!r}: the path of a directory or None belongs here")
        if self.dump_graphs is not None and os.path.isfile(self.dump_graphs):
            raise OptionError(f"dump_graphs={self.dump_graphs!r} is a file; the path of a directory belongs here")
        if isinstance(self.disabled_passes, (str, Mapping)) or not isinstance(self.disabled_passes, Iterable):
            raise OptionError(f"disabled_passes={self.disabled_passes!r}: a list of names belongs here")
        object.__setattr__(self, "disabled_passes", tuple(self.disabled_passes))
        if self.disabled_passes:
            from .passes.pipeline import HEURISTICS, POST_GRAD, PRE_GRAD

            for name in self.disabled_passes:
                _one_of("disabled_passes", name, [*PRE_GRAD, *POST_GRAD, *HEURISTICS])
        if not isinstance(self.inductor, Mapping):
            raise OptionError(f"inductor={self.inductor!r}: a dict of settings belongs here")
        self._check_inner()

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
                _one_of("inner_backend", self.inner_backend, [name for name in known if name != "fp8_diffusion"])
            return
        if self.mode is not None:
            from torch._inductor import list_mode_options

            _one_of("mode", self.mode, list(list_mode_options()))
        if self.inductor:
            _check_inductor(self.inductor)

    def changed(self) -> dict[str, Any]:
        """The options that are not the default, by their names."""
        default = type(self)()
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(default, name)}

    @classmethod
    def parse(cls, options: Fp8Options | Mapping[str, Any] | None, mode: str | None = None) -> Fp8Options:
        """Options from what ``torch.compile`` hands to a backend.

        Args:
            options: an instance (returned as it is), a dict, or None for the defaults. Keys that are no attribute of
                this class must be settings of Inductor.
            mode: ``torch.compile``'s own ``mode``, which it passes separately.
        """
        if isinstance(options, cls):
            given = {f.name: getattr(options, f.name) for f in fields(cls)}
        elif isinstance(options, Mapping):
            own = {f.name for f in fields(cls)}
            given = {key: value for key, value in options.items() if key in own}
            extra = {key: value for key, value in options.items() if key not in own}
            if extra:
                inner = given.get("inductor", {})
                if not isinstance(inner, Mapping):
                    raise OptionError(f"inductor={inner!r}: a dict of settings belongs here")
                given["inductor"] = {**inner, **extra}
                # Before __post_init__, because an unknown key must be called unknown whatever the inner backend is.
                _check_inductor(given["inductor"])
        elif options is None:
            given = {}
        else:
            raise OptionError(f"options={options!r}: a dict or Fp8Options belongs here")
        if mode is not None:
            if given.get("mode") not in (None, mode):
                raise OptionError(f"mode is given twice: {mode!r} and, in the options, {given['mode']!r}")
            given["mode"] = mode
        return cls(**given)


def _one_of(name: str, value: object, valid: typing.Sequence[str]) -> None:
    if value not in valid:
        raise OptionError(f"{name}={value!r} is not valid{_closest(value, valid)}; valid: {', '.join(valid)}")


def _closest(value: object, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(value), list(valid), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _check_inductor(settings: Mapping[str, Any]) -> None:
    """Refuse what is no setting of Inductor, or not of the setting's type (the checks of torch.compile itself)."""
    from torch._inductor import config as inductor_config

    config: Any = inductor_config
    known = config.get_config_copy()
    own = [f.name for f in fields(Fp8Options)]
    for key, value in settings.items():
        if key not in known:
            raise OptionError(
                f"unknown option {key!r}{_closest(key, [*own, *known])}; the options are {', '.join(own)}, "
                "and every setting of torch._inductor.config"
            )
        expected = config.get_type(key)
        if typing.get_origin(expected) is None and isinstance(expected, type) and not isinstance(value, expected):
            raise OptionError(f"{key}={value!r}: this setting of Inductor takes {expected.__name__}")
