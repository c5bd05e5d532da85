"""The methods of quantization: one file each, one line in the table below.

Other packages add a method by an entry point of the group ``fp8_compile.methods``, or by `register_method`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from ..errors import OptionError, UnknownMethodError
from ..options import closest
from .fp8 import Fp8
from .scheme import Call, Scheme, Spec, high_precision

__all__ = [
    "DEFAULT_METHOD",
    "Call",
    "Scheme",
    "Spec",
    "high_precision",
    "methods",
    "own_options",
    "owner_of",
    "register_method",
    "scheme_named",
]

_METHODS: dict[str, type[Scheme]] = {
    "fp8": Fp8,
}

DEFAULT_METHOD = "fp8"

ENTRY_POINTS = "fp8_compile.methods"
"""The group whose entry points are methods of other packages: the method's name, and where its class is."""


def register_method(scheme: type[Scheme]) -> None:
    """Make ``method=scheme.method`` available.

    Args:
        scheme: a subclass of `Scheme`, a frozen dataclass whose fields are the method's own options.

    Raises:
        OptionError: its name is taken.
    """
    known = methods()
    if known.setdefault(scheme.method, scheme) is not scheme:
        raise OptionError(f"method {scheme.method!r} is registered already; registered: {', '.join(sorted(known))}")
    _METHODS[scheme.method] = scheme


def methods() -> dict[str, type[Scheme]]:
    """The methods by name: those of this package, of entry points, and registered ones."""
    return {**_from_entry_points(), **_METHODS}


@functools.cache
def _from_entry_points() -> dict[str, type[Scheme]]:
    return {point.name: point.load() for point in entry_points(group=ENTRY_POINTS)}


def own_options(method: str) -> dict[str, Any]:
    """The names of the method's own options, with their defaults."""
    return {f.name: f.default for f in dataclasses.fields(methods()[method])}


def owner_of(option: str) -> str | None:
    """A method that has an option of this name, or None."""
    return next((method for method in methods() if option in own_options(method)), None)


def scheme_named(method: str, options: Mapping[str, Any]) -> Scheme:
    """The scheme that a weight, a file or the user names.

    Raises:
        UnknownMethodError: no method of that name is registered.
        OptionError: an option is unknown to the method, or not valid.
    """
    known = methods()
    if method not in known:
        raise UnknownMethodError(
            f"method={method!r} is not valid{closest(method, known)}; valid: {', '.join(sorted(known))}. A method of "
            "another package must be installed with it, or registered by importing the module that calls "
            "fp8_compile.register_method"
        )
    own = own_options(method)
    for name in options:
        if name not in own:
            owner = owner_of(name)
            whose = f" belongs to method {owner!r}, not to {method!r}" if owner else f" is no option of {method!r}"
            raise OptionError(f"{name}{whose}{closest(name, own)}; its options are {', '.join(own) or 'none'}")
    return known[method](**options)
